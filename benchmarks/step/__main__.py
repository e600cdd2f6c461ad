"""Runs the benchmark; see `benchmarks/step/__init__.py`."""

from __future__ import annotations

import sys

from benchmarks.results import report
from benchmarks.step.arguments import parser
from benchmarks.step.breakdown import breakdown
from benchmarks.step.peers import TORCH, measure, rows, worker


def main() -> None:
    """Measures the peers, or the parts of this project's step."""
    arguments = parser().parse_args()
    if arguments.peer:
        worker(arguments)
        return

    command = f"python -m benchmarks.step {' '.join(sys.argv[1:])}"
    what = f"{arguments.teacher} -> {arguments.student}, batch {arguments.batch}"
    if arguments.breakdown:
        table, device = breakdown(arguments)
        title = f"SiNGER step by its parts, {what}, {arguments.precision}"
        report(title, command, table, device, ("jax", "flax"))
        return
    measured = measure(arguments)
    table, device = rows(arguments, measured), measured["jax"].facts["device"]
    libraries = ("jax", "flax", *(("torch", "timm") if set(measured) & set(TORCH) else ()))
    report(f"SiNGER step, {what}, {arguments.precision}", command, table, device, libraries)


if __name__ == "__main__":
    main()
