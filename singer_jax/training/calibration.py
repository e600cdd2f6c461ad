"""Measurements of the teacher on a run's first batches, which methods need before they are made."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from singer_jax.data.sources import Source
from singer_jax.methods import ModelFeatures
from singer_jax.models.params import Params
from singer_jax.platform import parallel
from singer_jax.runs.metrics import LOG
from singer_jax.training.batches import device_batches
from singer_jax.training.settings import DistillSettings
from singer_jax.training.setup import RunSetup
from singer_jax.training.step import micro_batches

BATCHES = 8
"""Number of the run's first batches that are measured."""


def measure_first_batches(
    settings: DistillSettings, run: RunSetup, source: Source, teacher: Params | None
) -> dict[str, Any]:
    """Measures the teacher on the first batches, which are read apart from the training.

    Args:
      settings: Settings of the run.
      run: Setup of the students.
      source: The training images.
      teacher: Parameters of the teacher.

    Returns:
      The measurements as `measure` returns them; empty if no method needs any.
    """
    if not any(own.measured for own in run.each.values()):
        return {}
    LOG.info("looking at the teacher's outliers in the first %d batches", BATCHES)
    with contextlib.closing(device_batches(settings, run, source, 0)) as batches:
        return measure(run, teacher, (batch for batch, _ in itertools.islice(batches, BATCHES)))


def measure(run: RunSetup, teacher: Params, batches: Iterable[Any]) -> dict[str, Any]:
    """Measures the teacher for the method of each student that needs it.

    Args:
      run: Setup of the students.
      teacher: Parameters of the teacher.
      batches: Batches on the devices, as the step takes them.

    Returns:
      The measurements by student, summed over the batches and replicated on all devices.
    """
    add, everywhere = jit_add(run), parallel.replicated(run.any.mesh)
    empty = {name: own.measured for name, own in run.each.items() if own.measured}
    totals = jax.jit(
        lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), empty), out_shardings=everywhere
    )()
    for batch in batches:
        totals = add(totals, teacher, batch)
    return totals


def jit_add(run: RunSetup) -> Callable[[dict[str, Any], Params, Any], dict[str, Any]]:
    """Returns the jitted function that adds the measurements of a batch to the totals.

    Its arguments are the totals (donated), the teacher's parameters and the batch. It splits the
    batch into as many micro-batches as the step does, so that it needs no more memory.
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
