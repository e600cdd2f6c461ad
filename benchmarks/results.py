"""Appends a benchmark's table to RESULTS.md, with the date, the machine and the versions."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path

RESULTS = Path(__file__).parent / "RESULTS.md"


def machine(device: str = "") -> str:
    """Processor, cores and accelerator in a few words."""
    model = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.split(":", 1)[1].strip()
            break
    cores = len(os.sched_getaffinity(0))
    return f"{model}, {cores} cores" + (f", {device}" if device and device != "cpu" else "")


def versions(packages: Sequence[str]) -> str:
    """`python 3.11.7, jax 0.10.2, ...`."""
    found = [f"python {platform.python_version()}"]
    found += [f"{package} {importlib.metadata.version(package)}" for package in packages]
    return ", ".join(found)


def report(
    title: str,
    command: str,
    rows: Sequence[Mapping[str, object]],
    device: str,
    packages: Sequence[str],
    keep: bool = True,
) -> None:
    """Prints a table and, unless told not to keep it, appends it to RESULTS.md."""
    columns = list(rows[0])
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(str(row[column]) for column in columns) + " |" for row in rows]
    table = "\n".join(lines)
    print(table)
    if not keep:
        return
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    with RESULTS.open("a") as file:
        file.write(
            f"\n### {title}\n\n`{command}`  \n{today}; {machine(device)}; {versions(packages)}\n\n"
            f"{table}\n"
        )
