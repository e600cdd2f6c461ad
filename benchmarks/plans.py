"""What distillations would take on TPU slices: one row for each, by the job `plan`.

  pip install ".[plan]"
  python -m benchmarks.plans --topologies v5e:2x2 v5e:16x16 --images 128
  python -m benchmarks.plans --configs singer_vitl_vitt --topologies v5p:4x4x4 --batch 4096
  python -m benchmarks.plans --configs singer_vitl_vitt --change "mesh.fsdp=8" --topologies v5e:4x4

`--configs` are shipped ones (default: every distillation of one student), `--images` those a chip,
`--batch` the global ones instead. Rows are printed as they come; the table is appended at the end.

The last columns are of more chips with the same program on each, as it is with data parallelism:
the rate a chip of 256 against that of these, and a step of 512 and of 4,096 images on as many chips
as give each so many images.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import shlex
import sys
from pathlib import Path

import jax

from benchmarks.results import report
from singer_jax.errors import InputError
from singer_jax.jobs.plan import PlanSettings, planned
from singer_jax.platform import chips
from singer_jax.training.roofline import Cost

CONFIGS = Path(__file__).parents[1] / "configs"


def row(config: str, change: str, topology: str, batch: int) -> dict[str, str]:
    """Of the table."""
    devices = chips.described(topology)
    settings = PlanSettings(plan=config, overrides=change, topology=topology, batch_size=str(batch))
    shown = {
        "configuration": config,
        "chips": topology,
        "images": f"{batch // len(devices)} a chip",
    }
    try:
        found = planned(settings, devices)
    except InputError as error:
        return shown | {"GiB": str(error)}
    seconds = found.seconds
    return (
        shown
        | {
            "GiB": f"{found.peak / 2**30:.1f} of {found.chip.memory / 2**30:.0f}",
            "TFLOP": f"{found.flops / 1e12:.2f}",
            "traffic GB": f"{found.traffic / 1e9:.1f}",
            "collectives": ", ".join(
                f"{count:.0f} {kind} {size / 1e6:.0f} MB"
                for kind, (count, size) in found.collectives.items()
            ),
            "ms a step": f"{1e3 * found.step_seconds:.1f}",
            "of them collectives": f"{1e3 * seconds['collectives']:.2f}",
            "bound by": found.binds,
            "images/s a chip": f"{found.images_per_second / found.count:.0f}",
            "MFU": f"{found.mfu:.0%}",
            "compiler's CPU s": f"{found.compile_cpu_seconds:.0f}",
        }
        | (_on_more(found) if found.kind.startswith("TPU") else {})
    )


def _on_more(found: Cost) -> dict[str, str]:
    """Of a TPU, whose chips are all joined alike; GPUs are joined so within a node alone."""
    return {
        "rate at 256 chips": f"{found.step_seconds / _on(found, 256).step_seconds:.1%}",
        "512 images": _of_batch(found, 512),
        "4,096 images": _of_batch(found, 4096),
    }


def _on(found: Cost, count: int) -> Cost:
    """The same program on each of another number of chips."""
    return dataclasses.replace(found, count=count, images=found.images // found.count * count)


def _of_batch(found: Cost, images: int) -> str:
    count = images // (found.images // found.count)
    return f"{count} chips, {1e3 * _on(found, count).step_seconds:.1f} ms"


def main() -> None:
    """Plans what the arguments ask for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    shipped = [file.stem for file in sorted(CONFIGS.glob("*_*_*.py"))]
    parser.add_argument("--configs", nargs="+", default=shipped)
    parser.add_argument("--topologies", nargs="+", default=["v5e:2x2"])
    parser.add_argument("--change", default="")
    parser.add_argument("--images", type=int, nargs="+", default=[128], help="a chip")
    parser.add_argument("--batch", type=int, default=0, help="of all chips, instead")
    arguments = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)
    rows = []
    for topology in arguments.topologies:
        count = len(chips.described(topology))
        batches = [arguments.batch] if arguments.batch else [count * n for n in arguments.images]
        for config, batch in itertools.product(arguments.configs, batches):
            rows.append(row(config, arguments.change, topology, batch))
            print(rows[-1], flush=True)
    report(
        "Planned (compiled, not run)",
        f"python -m benchmarks.plans {shlex.join(sys.argv[1:])}",
        [{**dict.fromkeys(max(rows, key=len), ""), **found} for found in rows],
        "",
        ("jax", "libtpu"),
    )


if __name__ == "__main__":
    main()
