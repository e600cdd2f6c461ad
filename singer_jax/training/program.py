"""The training step as a program: its shardings, its memory, and how several students share it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from singer_jax import parallel
from singer_jax.models.params import Params
from singer_jax.training.step import Distillation, Students, TrainState


def jit_step(
    distillation: Distillation | Students, mesh: Mesh, state: Any, teacher: Params | None
) -> Callable:
    """`distillation.step` under `jax.jit` with the shardings of `state` and `teacher` as they are.

    The state, or those of several students, are donated; metrics come back replicated. All four
    arguments are given by position.
    """
    shardings = jax.tree.map(lambda x: x.sharding, (state, teacher))
    return jax.jit(
        distillation.step,
        in_shardings=(*shardings, parallel.batch_sharding(mesh), parallel.replicated(mesh)),
        out_shardings=(shardings[0], parallel.replicated(mesh)),
        donate_argnums=0,
        compiler_options=parallel.compiler_options(mesh),
    )


class Program(NamedTuple):
    """A compiled step, and what a user should know of how it was chosen."""

    step: Callable
    told: str = ""


def compile_step(
    students: Students,
    mesh: Mesh,
    states: Mapping[str, TrainState],
    teacher: Params | None,
    batch: Any,
    schedule: str | None = None,
) -> Program:
    """`jit_step`, compiled for these arguments; of several students as memory admits.

    Args:
      students: of the step.
      mesh: of the devices.
      states, teacher, batch: as the step takes them.
      schedule: `together` or `one_by_one`; None: together, if all devices have that much memory.
    """

    def compile(one_by_one: bool) -> tuple[Callable, int]:
        which = dataclasses.replace(students, one_by_one=one_by_one)
        step = jit_step(which, mesh, states, teacher)
        step = step.lower(states, teacher, batch, np.bool_(True)).compile()
        return step, peak_memory(step)

    def program(which: str, step: Callable, peak: int, why: str = "") -> Program:
        count = len(students.each)
        told = (
            f"{count} students {which.replace('_', ' ')}, {_gib(peak)} of {_gib(memory)} a device"
        )
        return Program(step, told + why if count > 1 else "")

    memory = parallel.device_memory(mesh)
    if schedule or len(students.each) == 1:
        chosen = schedule or "together"
        return program(chosen, *compile(chosen == "one_by_one"))
    try:
        step, peak = compile(False)
    except jax.errors.JaxRuntimeError as error:  # a compiler that knows its device refuses
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return program("one_by_one", *compile(True), "; together they do not fit")
    if peak <= memory:
        return program("together", step, peak)
    del step
    return program("one_by_one", *compile(True), f"; together they would take {_gib(peak)}")


def peak_memory(compiled: Any) -> int:
    """Bytes that a compiled program takes on a device, its arguments included."""
    found = compiled.memory_analysis()
    held = found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
    return held + found.temp_size_in_bytes


def _gib(size: int) -> str:
    return f"{size / 2**30:.3g} GiB"
