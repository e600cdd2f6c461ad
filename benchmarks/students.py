"""Compares a step of several students of one teacher with the steps of one student each.

  pip install ".[dev]"
  python -m benchmarks.students --counted
  python -m benchmarks.students --compiled --topology v5e:2x2
  python -m benchmarks.students --timed

`--counted` counts the operations of a step of six students of a ViT-L (ViT-S and ViT-Ti with three
methods) by part, and of six steps of one student each. `--compiled` compiles both for a TPU that is
not attached, with 128 images per chip, and reports the memory of parallel and sequential execution
and of each student alone. `--timed` times the step of 1, 2, 4 and 6 ViT-Ti of a ViT-S on this
machine, and the steps of one student each, in turn in one process, with the default execution.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from benchmarks.make_inputs import write_blank_weights, write_weights
from benchmarks.results import report
from benchmarks.topology import tpu_mesh
from singer_jax.config import default, settings_of
from singer_jax.models.summary import features_flops
from singer_jax.platform import parallel
from singer_jax.training.flops import step_flops
from singer_jax.training.program import compile_step
from singer_jax.training.setup import RunSetup, setup_students

METHODS = ("fitnet", "vitkd", "singer")


def six_of_vit_large(images: int, methods: Sequence[str] = METHODS) -> ConfigDict:
    """Returns the settings of ViT-S and ViT-Ti with each of the methods."""
    config = default()
    config.teacher.model, config.batch_size = "vit_large_patch16_224", images
    for size in ("small", "tiny"):
        for method in methods:
            model = f"vit_{size}_patch16_224"
            config.students[f"{size}_{method}"] = {"model": model, "method": {"name": method}}
    return config


def prepare(config: ConfigDict, mesh: jax.sharding.Mesh | None = None) -> RunSetup:
    """Returns the setup with a teacher whose weights are zeros."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "teacher.safetensors"
        config.teacher.weights = str(write_blank_weights(file, config.teacher.model))
        return setup_students(settings_of(config), 1_281_167, 1000, mesh)


def counted(methods: Sequence[str]) -> list[dict[str, str]]:
    """Returns the operations per image of each part of a step."""
    run = prepare(six_of_vit_large(1, methods), parallel.make_mesh(1))
    together = step_flops(run.students, run.states, run.teacher, 1)
    alone = {
        name: step_flops(one.students, one.states, one.teacher, 1)
        for name, one in ((name, RunSetup({"": own})) for name, own in run.each.items())
    }
    spec, blocks = run.teacher_model.network.spec, max(run.students.teacher_reads) + 1
    teacher = features_flops(spec.arch, blocks)
    rows = [{"part": "teacher", "GFLOP an image": f"{teacher / 1e9:.1f}"}]
    rows += [
        {"part": name, "GFLOP an image": f"{(total - teacher) / 1e9:.1f}"}
        for name, total in alone.items()
    ]
    separate = sum(alone.values())
    rows += [
        {"part": "all together", "GFLOP an image": f"{together / 1e9:.1f}"},
        {"part": "all as separate runs", "GFLOP an image": f"{separate / 1e9:.1f}"},
        {"part": "together / separate", "GFLOP an image": f"{together / separate:.3f}"},
    ]
    return rows


def described_batch(run: RunSetup, images: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns an abstract batch for a mesh, which may be of described chips."""
    split = parallel.batch_sharding(run.any.mesh)
    shape = (images, run.image_size, run.image_size, 3)
    return {
        "image": jax.ShapeDtypeStruct(shape, jnp.uint8, sharding=split),
        "label": jax.ShapeDtypeStruct(shape[:1], jnp.int32, sharding=split),
    }


def compiled(topology: str, images: int, only: str) -> Iterator[dict[str, str]]:
    """Yields the memory per chip of each program."""
    mesh = tpu_mesh(topology)
    config = six_of_vit_large(images * mesh.size)
    run = prepare(config, mesh)
    batch = described_batch(run, config.batch_size)
    programs = {"six, sequential": (run, "sequential"), "six, parallel": (run, "parallel")}
    programs |= {name: (RunSetup({"": own}), "parallel") for name, own in run.each.items()}
    for name, (which, schedule) in programs.items():
        if only and only not in name:
            continue
        cpu = time.process_time()
        program = compile_step(which.students, mesh, which.states, which.teacher, batch, schedule)
        temporary = program.compiled.memory_analysis().temp_size_in_bytes
        yield {
            "step of": name,
            "GiB a chip": f"{program.peak / 2**30:.2f}",
            "of them temporary": f"{temporary / 2**30:.2f}",
            "compiler's CPU s": f"{time.process_time() - cpu:.0f}",
        }


def timed(images: int, repeats: int, counts: tuple[int, ...]) -> list[dict[str, str]]:
    """Returns medians over steps that take turns; all are compiled before the first one."""
    config = default()
    config.teacher.model, config.student.model = "vit_small_patch16_224", "vit_tiny_patch16_224"
    config.precision, config.batch_size, config.mesh.data = "float32", images, 1
    for number in range(max(counts)):
        method = METHODS[number % len(METHODS)]
        config.students[f"{number}_{method}"] = {"method": {"name": method}, "seed": number}
    with tempfile.TemporaryDirectory() as folder:
        config.teacher.weights = str(Path(folder) / "teacher.safetensors")
        write_weights(config.teacher.model, Path(config.teacher.weights))
        run = setup_students(settings_of(config), 1000, 0)
        teacher = run.load_teacher()
    rng = np.random.default_rng(0)
    shape = (images, run.image_size, run.image_size, 3)
    batch = parallel.put_batch(
        {
            "image": rng.integers(0, 256, shape, dtype=np.uint8),
            "label": np.zeros(images, np.int32),
        },
        parallel.batch_sharding(run.any.mesh),
    )
    names = list(run.each)
    groups = {(name,): RunSetup({"": run.each[name]}) for name in names}
    groups |= {
        tuple(names[:count]): RunSetup({name: run.each[name] for name in names[:count]})
        for count in counts
        if count > 1
    }
    programs: dict[tuple[str, ...], Any] = {}
    for group, which in groups.items():
        states = which.init_states(teacher)
        program = compile_step(which.students, run.any.mesh, states, teacher, batch)
        programs[group] = [program.step, states]
    took: dict[tuple[str, ...], list[float]] = {group: [] for group in groups}
    for _ in range(repeats + 1):
        for group, program in programs.items():
            start = time.perf_counter()
            program[1], _ = program[0](program[1], teacher, batch, np.bool_(False))
            jax.block_until_ready(program[1])
            took[group].append(time.perf_counter() - start)
    median = {group: statistics.median(seconds[1:]) for group, seconds in took.items()}
    rows = []
    for count in counts:
        group = tuple(names[:count])
        separate = sum(median[(name,)] for name in group)
        together = median[group]
        own = RunSetup({name: run.each[name] for name in group})
        flops = step_flops(own.students, own.states, own.teacher, images)
        apart = sum(
            step_flops(one.students, one.states, one.teacher, images)
            for one in (groups[(name,)] for name in group)
        )
        rows.append(
            {
                "students": ", ".join(name.split("_")[1] for name in group),
                "together ms": f"{1e3 * together:.0f}",
                "separate ms": f"{1e3 * separate:.0f}",
                "ratio": f"{together / separate:.2f}",
                "of operations": f"{flops / apart:.2f}",
            }
        )
    return rows


def main() -> None:
    """Measures what the arguments select and reports one table for each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--counted", action="store_true")
    parser.add_argument("--methods", nargs="+", default=METHODS, help="methods of --counted")
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--timed", action="store_true")
    parser.add_argument("--topology", default="v5e:2x2")
    parser.add_argument("--images", type=int, default=128, help="images per chip of --compiled")
    parser.add_argument("--only", default="", help="only programs whose name contains this")
    parser.add_argument("--batch", type=int, default=16, help="batch size of --timed")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 2, 4, 6])
    arguments = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    command = f"python -m benchmarks.students {' '.join(sys.argv[1:])}"
    if arguments.counted:
        report("Students of ViT-L, counted", command, counted(arguments.methods), "", ("jax",))
    if arguments.compiled:
        rows = []
        for row in compiled(arguments.topology, arguments.images, arguments.only):
            print(row, flush=True)
            rows.append(row)
        title = f"Six students of ViT-L compiled for {arguments.topology}, bfloat16"
        report(title, command, rows, "", ("jax", "libtpu"))
    if arguments.timed:
        rows = timed(arguments.batch, arguments.repeats, tuple(arguments.counts))
        title = f"Students together, ViT-S to ViT-Ti, batch {arguments.batch}, float32"
        report(title, command, rows, "", ("jax",))


if __name__ == "__main__":
    main()
