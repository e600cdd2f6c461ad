"""The training step as a program: its shardings, its memory, and how several students share it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from singer_jax.models.params import Params
from singer_jax.platform import backends, parallel
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


# Of a device's memory; the rest is for batches on their way and for evaluation.
_MOST = 0.9


class Program(NamedTuple):
    """A compiled step, the bytes that it takes on a device, and why this one, for the user."""

    step: Callable
    peak: int
    told: str


def compile_step(
    students: Students,
    mesh: Mesh,
    states: Mapping[str, TrainState],
    teacher: Params | None,
    batch: Any,
    execution: str | None = None,
) -> Program:
    """`jit_step`, compiled for these arguments; of several students as memory admits.

    Args:
      students: of the step.
      mesh: of the devices.
      states, teacher, batch: as the step takes them.
      execution: `parallel` or `sequential`; None: together, where a device has that much memory and
        its backend does not prefer the other.
    """

    def compiled(execution: str, why: str = "") -> Program:
        which = dataclasses.replace(students, sequential=execution == "sequential")
        step = jit_step(which, mesh, states, teacher)
        step = step.lower(states, teacher, batch, np.bool_(True)).compile()
        peak, words = peak_memory(step), execution.replace("_", " ")
        return Program(step, peak, f"{len(students.each)} students {words}, {_gib(peak)}{why}")

    if len(students.each) == 1:
        return compiled("parallel")._replace(told="")
    if execution or backends.choices(parallel.platform(mesh)).sequential:
        return compiled(execution or "sequential")
    memory = parallel.device_memory(mesh)
    try:
        together = compiled("parallel", f" of a device's {_gib(memory)}")
    except jax.errors.JaxRuntimeError as error:  # a compiler that knows its device's memory
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return compiled("sequential", "; together they do not fit")
    if parallel.of_first_process(together.peak <= _MOST * memory):
        return together
    needed = _gib(together.peak)
    del together
    return compiled("sequential", f"; together they would take {needed} of {_gib(memory)}")


def peak_memory(compiled: Any) -> int:
    """Bytes that a compiled program takes on a device, its arguments included.

    0 on a backend that does not say.
    """
    found = compiled.memory_analysis()
    if found is None:
        return 0
    held = found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
    return held + found.temp_size_in_bytes


def _gib(size: int) -> str:
    return f"{size / 2**30:.3g} GiB"
