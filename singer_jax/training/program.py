"""The compiled training step: its shardings, its memory, and the execution of several students."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array

from singer_jax.models.params import Params
from singer_jax.platform import backends, parallel
from singer_jax.training.step import Distillation, Students, TrainState


def jit_step(
    distillation: Distillation | Students, mesh: Mesh, state: Any, teacher: Params | None
) -> Callable:
    """Returns `distillation.step` under `jax.jit` with the shardings of `state` and `teacher`.

    The state, or those of several students, are donated; metrics are returned replicated. All four
    arguments are positional. The last one may be None, for a program without diagnostics.
    """
    shardings = jax.tree.map(lambda x: x.sharding, (state, teacher))
    return jax.jit(
        distillation.step,
        in_shardings=(*shardings, parallel.batch_sharding(mesh), parallel.replicated(mesh)),
        out_shardings=(shardings[0], parallel.replicated(mesh)),
        donate_argnums=0,
        compiler_options=parallel.compiler_options(mesh),
    )


# Largest share of a device's memory; the rest is for prefetched batches and for evaluation.
_MOST = 0.9


class Program(NamedTuple):
    """A compiled step.

    Attributes:
      step: The step, a function with the arguments of `Students.step`.
      compiled: The compiled program of a step without diagnostics, or with a branch for them.
      peak: Peak memory on a device in bytes.
      description: Description of the execution of several students for logs; empty for one student.
    """

    step: Callable
    compiled: jax.stages.Compiled
    peak: int
    description: str


def compile_step(
    students: Students,
    mesh: Mesh,
    states: Mapping[str, TrainState],
    teacher: Params | None,
    batch: Any,
    execution: str | None = None,
) -> Program:
    """Compiles `jit_step` for these arguments and chooses the execution of several students.

    Args:
      students: The students of the step.
      mesh: Mesh of the devices.
      states, teacher, batch: Arguments of the step.
      execution: `parallel` or `sequential`. None selects `parallel` if a device has enough memory
        and its backend does not prefer `sequential`.
    """

    def compiled(execution: str, why: str = "") -> Program:
        which = dataclasses.replace(students, sequential=execution == "sequential")
        separate = backends.choices(parallel.platform(mesh)).separate_diagnostics
        step = jit_step(which, mesh, states, teacher)
        step = step.lower(states, teacher, batch, unlogged(mesh)).compile()
        peak = peak_memory(step)
        line = f"{len(students.each)} students, {execution}, peak memory {_gib(peak)}{why}"
        run = _with_diagnostics(step, which, mesh) if separate else step
        return Program(run, step, peak, line)

    if len(students.each) == 1:
        return compiled("parallel")._replace(description="")
    if execution or backends.choices(parallel.platform(mesh)).sequential:
        return compiled(execution or "sequential")
    memory = parallel.device_memory(mesh)
    try:
        together = compiled("parallel", f" of {_gib(memory)} per device")
    except jax.errors.JaxRuntimeError as error:  # a compiler that knows its device's memory
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return compiled("sequential", "; parallel execution does not fit into memory")
    if parallel.of_first_process(together.peak <= _MOST * memory):
        return together
    needed = _gib(together.peak)
    del together
    return compiled(
        "sequential", f"; parallel execution needs {needed} of {_gib(memory)} per device"
    )


def unlogged(mesh: Mesh) -> np.bool_ | None:
    """Returns the argument `logged` of `jit_step` for steps without diagnostics."""
    return None if backends.choices(parallel.platform(mesh)).separate_diagnostics else np.False_


def _with_diagnostics(step: jax.stages.Compiled, students: Students, mesh: Mesh) -> Callable:
    """Returns a step that computes the diagnostics of logged steps in a program of their own.

    That program is compiled for the first logged step. It changes nothing in the step's program, so
    that a run does not depend on which of its steps are logged.
    """

    _, metrics = jax.tree.unflatten(step.out_tree, [None] * step.out_tree.num_leaves)
    places = [(student, name) for student, own in metrics.names for name in own]

    @functools.partial(
        jax.jit,
        out_shardings=parallel.replicated(mesh),
        compiler_options=parallel.compiler_options(mesh),
    )
    def diagnose(states: Any, teacher: Params | None, batch: Any) -> Array:
        found = students.diagnose(states, teacher, batch)
        values = [found[student].get(name, 0.0) for student, name in places]
        return jnp.stack([jnp.asarray(value, jnp.float32) for value in values])

    def run(states: Any, teacher: Params | None, batch: Any, logged: Any) -> tuple[Any, Any]:
        if not logged:
            return step(states, teacher, batch, None)
        found = diagnose(states, teacher, batch)  # before `step`, which donates the states
        states, metrics = step(states, teacher, batch, None)
        return states, dataclasses.replace(metrics, numbers=metrics.numbers + found)

    return run


def peak_memory(compiled: Any) -> int:
    """Returns the peak memory in bytes of a compiled program on a device, arguments included.

    It is 0 if the backend does not report it.
    """
    found = compiled.memory_analysis()
    if found is None:
        return 0
    held = found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
    return held + found.temp_size_in_bytes


def _gib(size: int) -> str:
    return f"{size / 2**30:.3g} GiB"
