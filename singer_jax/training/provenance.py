"""The provenance of a run's models: the weights that they start from, and that of an export."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

import jax

from singer_jax.models.provenance import Provenance, origin, provenance
from singer_jax.training.settings import DistillSettings
from singer_jax.training.setup import RunSetup


def run_provenance(settings: DistillSettings, run: RunSetup) -> dict[str, Provenance]:
    """Returns the provenance of the teacher and of each student; empty except in process 0.

    Args:
      settings: The settings of the run.
      run: The students and their teacher.
    """
    found: dict[str, Provenance] = {}
    if jax.process_index() > 0:
        return found
    if run.teacher_model:
        spec, file = run.teacher_model.network.spec, run.teacher_model.weights
        found["teacher"] = provenance(spec, settings.teacher.weights, file)
    for name, own in settings.each().items():
        prepared = run.each[name]
        spec = prepared.distillation.student.spec
        found[name or "student"] = provenance(spec, own.student.weights, prepared.weights)
    return found


def export_origin(
    settings: DistillSettings, weights: Mapping[str, Provenance], name: str, step: int
) -> dict[str, Any]:
    """Returns the origin that is written into an export of a student.

    Args:
      settings: The settings of the run for this student.
      weights: The provenance of the run's teacher and students.
      name: The student's name; empty where it is the only one.
      step: The step of the checkpoint.
    """
    data = settings.data
    # An export names the folder of the images only, because its path is private.
    source = PurePath(data.path if data.source == "folder" else data.source).name
    images = {"source": source, "batch_size": settings.batch_size}
    return origin(weights, name, settings.method_name, step, images)
