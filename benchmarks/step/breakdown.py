"""The parts of this project's step."""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.step.jax_step import prepared, random_images


def breakdown(arguments: argparse.Namespace) -> tuple[list[dict[str, str]], str]:
    """Returns the table of the parts (FLOPs, memory traffic, seconds), and the device.

    The compiler may move work of one part into a loop or fusion of another. Input is measured by
    `benchmarks.input`.
    """
    import jax

    from singer_jax.platform import hlo, parallel
    from singer_jax.training.flops import parts_flops
    from singer_jax.training.program import compile_step
    from singer_jax.training.step import PARTS

    parallel.start()
    if arguments.precision == "float32":
        jax.config.update("jax_default_matmul_precision", "highest")
    with tempfile.TemporaryDirectory() as folder:
        from benchmarks.make_inputs import write_weights

        weights = Path(folder) / "teacher.safetensors"
        write_weights(arguments.teacher, weights)
        runs = prepared(arguments, str(weights), None)
        teacher = runs.load_teacher()
    states, mesh = runs.init_states(teacher), runs.any.mesh
    images = random_images(arguments.batch, runs.image_size)
    examples = {"image": images, "label": np.zeros(arguments.batch, np.int32)}
    batch = parallel.put_batch(examples, parallel.batch_sharding(mesh))
    program = compile_step(runs.students, mesh, states, teacher, batch)
    step = program.step
    reads = runs.students.teacher_reads
    moved = hlo.moved(program.compiled.as_text(), (max(reads) + 1) / len(reads), PARTS)
    flops = parts_flops(runs.students, runs.states, runs.teacher, arguments.batch)
    teach = jax.jit(runs.students.teach).lower(teacher, batch).compile()

    times: dict[str, list[float]] = {"teacher": [], "all": []}
    for _ in range(arguments.warmup + arguments.rounds):
        start = time.perf_counter()
        jax.block_until_ready(teach(teacher, batch))
        between = time.perf_counter()
        states, _ = jax.block_until_ready(step(states, teacher, batch, np.bool_(False)))
        times["teacher"].append(between - start)
        times["all"].append(time.perf_counter() - between)
    seconds = {name: statistics.median(t[arguments.warmup :]) for name, t in times.items()}
    total = sum(flops.values())
    found = [
        {
            "part": part or "in none of them",
            "TFLOP": f"{flops.get(part, 0) / 1e12:.3f}",
            "of the operations": f"{flops.get(part, 0) / total:.1%}",
            "traffic GB": f"{moved.by_part.get(part, 0) / 1e9:.2f}",
            "s": f"{seconds[part]:.4g}, alone" if part in seconds else "",
        }
        for part in (*PARTS, "")
    ]
    found.append(
        {
            "part": "whole step",
            "TFLOP": f"{total / 1e12:.3f}",
            "of the operations": "",
            "traffic GB": f"{moved.traffic / 1e9:.2f}",
            "s": f"{seconds['all']:.4g}",
        }
    )
    return found, mesh.devices.flat[0].device_kind
