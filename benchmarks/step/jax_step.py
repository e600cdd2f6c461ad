"""This project's training step, and the inputs that the peers share."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.step.memory import resident_peak

RANK, QUANTILE, OUTLIER_WEIGHT = 64, 0.97, 0.01
LEARNING_RATE, WEIGHT_DECAY = 1e-3, 1e-4


def changes(arguments: argparse.Namespace, weights: str, quantised: str | None) -> dict[str, Any]:
    """Returns the settings of this project's step, by dotted key."""
    return {
        "teacher.model": arguments.teacher,
        "teacher.weights": weights,
        "teacher.precision": quantised,
        "student.model": arguments.student,
        "precision": arguments.precision,
        "batch_size": arguments.batch,
        "steps": 1000,
        "data.normalisation": "imagenet",
        "method.rank": RANK,
        "method.outlier_quantile": QUANTILE,
        "method.nullspace.init": "official",
        "method.match.norm_clip_quantile": 1.0,  # the peers do not clip
        "optimizer.learning_rate": LEARNING_RATE,
        "optimizer.weight_decay": WEIGHT_DECAY,
        "schedule.name": "multistep",
        "schedule.milestones": (),
        "schedule.warmup_epochs": 0,
    }


def prepared(arguments: argparse.Namespace, weights: str, quantised: str | None) -> Any:
    """Returns the run (`training.setup.RunSetup`) of this project's step."""
    from singer_jax.settings.settings import from_flat
    from singer_jax.training.settings import DistillSettings
    from singer_jax.training.setup import setup_students

    settings = from_flat(DistillSettings(), changes(arguments, weights, quantised))
    return setup_students(settings, 1000 * arguments.batch, 0)


def random_images(batch: int, size: int) -> np.ndarray:
    """Returns random images, [batch, size, size, 3] uint8."""
    return np.random.default_rng(0).integers(0, 256, (batch, size, size, 3), np.uint8)


def matmul_rate(precision: str) -> float:
    """Returns the FLOP/s of a product of random square matrices."""
    import jax
    import jax.numpy as jnp

    size = 2048 if jax.default_backend() == "cpu" else 8192
    a, b = jax.random.normal(jax.random.key(0), (2, size, size), jnp.dtype(precision))
    product = jax.jit(jnp.matmul)
    product(a, b).block_until_ready()
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        last = [product(a, b) for _ in range(10)][-1]
        last.block_until_ready()
        seconds.append((time.perf_counter() - start) / 10)
    return 2 * size**3 / statistics.median(seconds)


def jax_step(
    arguments: argparse.Namespace, shared: Path, quantised: str | None = None
) -> tuple[Callable[[], float], Callable[[], int], dict]:
    """Returns the step of this project, its peak memory and facts about it.

    It writes the student and the parts of the method, from which the peers start.
    """
    import jax
    from safetensors.numpy import save_file

    from singer_jax.models.params import join
    from singer_jax.models.weights import to_timm
    from singer_jax.platform import allocator, parallel
    from singer_jax.training.flops import step_flops
    from singer_jax.training.program import compile_step

    allocator.keep_freed_memory()  # as the command does
    parallel.start()
    if arguments.precision == "float32":
        jax.config.update("jax_default_matmul_precision", "highest")
    runs = prepared(arguments, str(shared / "teacher.safetensors"), quantised)
    run = runs.any
    teacher = runs.load_teacher()
    states = runs.init_states(teacher)
    state = states[""]

    save_file(
        to_timm(join(state.params["student"], state.constants["student"])),
        shared / "student.safetensors",
    )
    method = run.method_of(state)
    parts = {}
    for layer, own in zip(method.teacher_layers, method.student_layers, strict=True):
        refiner, adapter = method.refiner[str(layer)], method.adapter[str(own)]
        parts |= {
            f"{layer}.{own}.down": refiner.down[...],
            f"{layer}.{own}.up": refiner.up[...],
            f"{layer}.{own}.projection": refiner.projection[...],
            f"{layer}.{own}.kernel": adapter.kernel[...],
            f"{layer}.{own}.bias": adapter.bias[...],
        }
    save_file(
        {name: np.asarray(value) for name, value in parts.items()}, shared / "parts.safetensors"
    )

    images = random_images(arguments.batch, runs.image_size)
    np.save(shared / "images.npy", images)
    batch = parallel.put_batch(
        {"image": images, "label": np.zeros(arguments.batch, np.int32)},
        parallel.batch_sharding(run.mesh),
    )
    unlogged = np.bool_(False)  # as 49 of 50 steps
    program = compile_step(runs.students, run.mesh, states, teacher, batch)

    def step() -> float:
        nonlocal states
        states, metrics = program.step(states, teacher, batch, unlogged)
        jax.block_until_ready(states)
        return float(metrics[""]["loss"])

    def peak() -> int:
        on_device = jax.default_backend() != "cpu"
        return program.peak if on_device else resident_peak()

    flops = step_flops(runs.students, runs.states, runs.teacher, arguments.batch)
    facts = {"flops": flops, "device": jax.devices()[0].device_kind}
    return step, peak, facts | {"rate": matmul_rate(arguments.precision)}
