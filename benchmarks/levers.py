"""The compiled SiNGER step for a GPU that is not attached, one change after the other.

  pip install ".[plan-gpu]"
  python -m benchmarks.levers --append

Each row adds a change to the row before it. Kernels, launches and bytes are read from the program;
times are the model of `singer_jax.platform.kernels`, not measurements. `--append` writes the rows
to benchmarks/results.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping
from typing import Any
from unittest import mock

import jax

from benchmarks.results import report
from benchmarks.step import jax_step
from singer_jax.platform import backends, chips, parallel
from singer_jax.settings.settings import from_flat
from singer_jax.training.roofline import Cost, cost
from singer_jax.training.settings import DistillSettings
from singer_jax.training.setup import setup_students

TRITON = ("xla_gpu_enable_triton_gemm", False)
MERGER = ("xla_gpu_dot_merger_threshold_mb", 0)

# Name of the row, choices of the backend, settings of the run; each row keeps those before it.
LEVERS: tuple[tuple[str, Mapping[str, Any], Mapping[str, Any]], ...] = (
    (
        "before: Triton's products, a branch for diagnostics",
        {
            "flat_linear": False,
            "row_major": False,
            "slice_frozen": False,
            "fused_gelu": False,
            "separate_diagnostics": False,
            "compiler_options": (),
        },
        {},
    ),
    ("products by cuBLASLt", {"compiler_options": (TRITON,)}, {}),
    ("row-major student", {"flat_linear": True, "row_major": True}, {}),
    ("diagnostics in a program of their own", {"separate_diagnostics": True}, {}),
    (
        "query, key and value of the teacher apart",
        {"slice_frozen": True, "compiler_options": (TRITON, MERGER)},
        {},
    ),
    (
        "teacher.approximate_gelu=True",
        {"fused_gelu": True},
        {"teacher.approximate_gelu": True},
    ),
    ("teacher.precision=fp8", {}, {"teacher.precision": "fp8"}),
)


def changes(arguments: argparse.Namespace) -> dict[str, Any]:
    """Returns the settings of the step that `benchmarks.step` measures."""
    depth = {"depth": arguments.depth} if arguments.depth else {}
    return {
        **jax_step.changes(arguments, "", None),
        "teacher.overrides": depth,
        "student.overrides": depth,
    }


def compiled(arguments: argparse.Namespace, choices: backends.Choices, given: Any) -> Cost:
    """Compiles the step with choices of the backend and settings."""
    with mock.patch.dict(backends._CHOICES, {"gpu": choices}):
        devices = chips.described(arguments.topology)
        mesh = parallel.make_mesh(described=devices)
        settings = from_flat(DistillSettings(), changes(arguments) | given)
        with parallel.computing(arguments.precision):
            runs = setup_students(settings, 1000 * arguments.batch, 0, mesh, weights_needed=False)
            return cost(runs, arguments.batch)


def row(name: str, found: Cost) -> dict[str, Any]:
    """Returns the numbers of a compiled step."""
    kernels, launches = found.kernels, found.launches
    return {
        "lever": name,
        "kernels": kernels.count,
        "GB": round(kernels.traffic / 1e9, 2),
        "graphs": launches.graphs,
        "launches outside": launches.others,
        "host waits": kernels.waits,
        "arrays": kernels.arrays,
        "modelled ms, device": round(1e3 * kernels.device_seconds, 2),
        "with the host": round(1e3 * kernels.seconds, 2),
        "peak GiB": round(found.peak / 2**30, 2),
    }


def main() -> None:
    """Compiles the chosen rows, and prints or writes each of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--teacher", default="vit_large_patch16_224")
    parser.add_argument("--student", default="vit_tiny_patch16_224")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--precision", default="bfloat16")
    parser.add_argument("--topology", default="h200:1")
    parser.add_argument("--depth", type=int, default=0, help="of both models; 0: the whole depth")
    parser.add_argument("--rows", type=int, nargs="+", default=range(len(LEVERS)))
    parser.add_argument("--append", action="store_true", help="append to benchmarks/results")
    arguments = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)
    choices, given, rows = backends.choices("gpu"), {}, []
    for number, (name, own, settings) in enumerate(LEVERS):
        choices, given = dataclasses.replace(choices, **own), given | settings
        if number not in arguments.rows:
            continue
        rows.append(row(name, compiled(arguments, choices, given)))
        print(rows[-1], flush=True)
    title = (
        f"{arguments.teacher} -> {arguments.student}, {arguments.batch} images, "
        f"{arguments.precision}, {arguments.topology}"
    )
    report(title, "python -m benchmarks.levers", rows, "", ["jax"], keep=arguments.append)


if __name__ == "__main__":
    main()
