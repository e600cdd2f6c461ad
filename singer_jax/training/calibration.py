"""What methods must know of a run's first batches before they are made."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from singer_jax.methods import ModelFeatures
from singer_jax.models.params import Params
from singer_jax.platform import parallel
from singer_jax.training.setup import Setups
from singer_jax.training.step import micro_batches

BATCHES = 8
"""How many of the run's first batches are looked at."""


def measure(run: Setups, teacher: Params, batches: Iterable[Any]) -> dict[str, Any]:
    """By student what its method needs, summed over batches; replicated on all devices.

    Args:
      run: of the students.
      teacher: its parameters.
      batches: on the devices, as the step takes them.
    """
    add, everywhere = jit_add(run), parallel.replicated(run.any.mesh)
    empty = {name: own.measured for name, own in run.each.items() if own.measured}
    totals = jax.jit(
        lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), empty), out_shardings=everywhere
    )()
    for batch in batches:
        totals = add(totals, teacher, batch)
    return totals


def jit_add(run: Setups) -> Callable[[dict[str, Any], Params, Any], dict[str, Any]]:
    """The program that adds a batch: of totals (donated), the teacher's parameters and the batch.

    It goes through the batch in as many parts as the step does, so that it takes no more memory.
    """
    network, students = run.teacher_model.network, run.students

    def add(totals: dict[str, Any], teacher: Params, batch: Any) -> dict[str, Any]:
        def add_part(totals: dict[str, Any], part: Any) -> tuple[dict[str, Any], None]:
            seen = ModelFeatures.of_streams(network.merge(teacher), students.teach(teacher, part))
            found = {name: run.each[name].measure(seen) for name in totals}
            return jax.tree.map(jnp.add, totals, found), None

        parts = micro_batches(batch, run.any.distillation.grad_accum_steps)
        return jax.lax.scan(add_part, totals, parts)[0]

    return jax.jit(add, out_shardings=parallel.replicated(run.any.mesh), donate_argnums=0)
