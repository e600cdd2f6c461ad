"""The parts of this project's step on the CPU, from a profile."""

from __future__ import annotations

import argparse
import collections
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from benchmarks.step.jax_step import matmul_rate, prepared, random_images

STEPS = 3  # profiled steps
DONE = "end: "  # begins the name of the event at which XLA's CPU runtime completes an instruction


def breakdown(arguments: argparse.Namespace) -> tuple[list[dict[str, str]], str]:
    """Returns the table of the parts, and the device.

    The compiler may move work of one part into a fusion of another. Input is measured by
    `benchmarks.input`.
    """
    import jax

    from singer_jax.platform import allocator, hlo, parallel
    from singer_jax.training.flops import parts_flops
    from singer_jax.training.program import compile_step
    from singer_jax.training.step import PARTS

    allocator.keep_freed_memory()
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
    step = compile_step(runs.students, mesh, states, teacher, batch)

    def timed() -> float:
        nonlocal states
        start = time.perf_counter()
        states, _ = jax.block_until_ready(step.step(states, teacher, batch, np.bool_(False)))
        return time.perf_counter() - start

    taken = [timed() for _ in range(arguments.warmup + arguments.rounds)][arguments.warmup :]
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(STEPS):
                timed()
        (file,) = Path(folder).rglob("*.xplane.pb")
        seconds = shares(events(jax.profiler.ProfileData.from_file(str(file))))

    program = hlo.Program(step.compiled.as_text(), 1, PARTS)
    products, others = collections.Counter(), collections.Counter()
    for instructions in program.computations.values():
        for one in instructions:
            bodies = [program.computations[name] for name in one.called.get("calls", ())]
            multiplies = one.opcode == "dot" or any(x.opcode == "dot" for b in bodies for x in b)
            kind = products if multiplies else others
            kind[program.part(one)] += seconds[one.name] / STEPS
    flops = parts_flops(runs.students, runs.states, runs.teacher, arguments.batch)
    rate = matmul_rate(arguments.precision)

    def row(part: str, flops: float, products: float, others: float) -> dict[str, str]:
        return {
            "part": part,
            "GFLOP": f"{flops / 1e9:.1f}",
            "s, products": f"{products:.3f}",
            "their share of matmul rate": f"{flops / products / rate:.0%}" if flops else "",
            "s, the rest": f"{others:.3f}",
            "s, all": f"{products + others:.3f}",
        }

    found = [
        row(part or "in none of them", flops.get(part, 0), products[part], others[part])
        for part in (*PARTS, "")
        if products[part] or others[part]
    ]
    found.append(row("all", sum(flops.values()), products.total(), others.total()))
    whole = f"{statistics.median(taken):.3f}"
    found.append({"part": "other steps, without a profile", "s, all": whole})
    return found, mesh.devices.flat[0].device_kind


def events(profile: object) -> Iterator[tuple[float, str]]:
    """Yields the time in seconds and the name of each event."""
    for plane in profile.planes:
        for line in plane.lines:
            for event in line.events:
                yield event.start_ns / 1e9, event.name


def shares(events: Iterator[tuple[float, str]]) -> collections.Counter[str]:
    """Returns the seconds of each instruction.

    XLA runs independent instructions at the same time; their time is divided evenly among them.
    """
    ordered = sorted(events, key=lambda event: (event[0], event[1].startswith(DONE)))
    done = {name.removeprefix(DONE) for _, name in ordered if name.startswith(DONE)}
    found, running, last = collections.Counter(), collections.Counter(), 0.0
    for now, name in ordered:
        instruction = name.removeprefix(DONE)
        if instruction not in done:
            continue
        for other, count in running.items():
            found[other] += count * (now - last) / running.total()
        last = now
        running[instruction] += -1 if name.startswith(DONE) else 1
        if not running[instruction]:
            del running[instruction]
    return found
