"""Reads the settings of a run, and the states of its students from checkpoints."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping
from typing import Any

from etils import epath

from singer_jax.errors import InputError
from singer_jax.io.limits import read_object
from singer_jax.runs import verify
from singer_jax.runs.checkpoints import Checkpoints
from singer_jax.runs.metrics import LOG
from singer_jax.runs.workdir import checkpoints_folder, config_file
from singer_jax.training.settings import DistillSettings, of_saved
from singer_jax.training.step import TrainState


def saved_tree(states: Mapping[str, Any]) -> Any:
    """Returns the tree that a checkpoint holds: the state alone of a single, unnamed student."""
    return states[""] if "" in states else dict(states)


def restore_states(
    checkpoints: Checkpoints, step: int, states: Mapping[str, TrainState]
) -> dict[str, TrainState]:
    """Restores the states of students from the checkpoint of a step.

    Args:
      checkpoints: The checkpoints of the run.
      step: The step of the checkpoint.
      states: The abstract states with shardings by the student's name; of several students any
        number.

    Raises:
      As `Checkpoints.restore`.
    """
    found = checkpoints.restore(step, saved_tree(states))
    return {"": found} if "" in states else found


def read_config(run: epath.Path) -> DistillSettings:
    """Reads the settings of a run, with all its students.

    Args:
      run: The work directory.

    Raises:
      InputError: The folder is not a run, or its settings cannot be read.
    """
    file = config_file(run)
    if not file.is_file():
        raise InputError(f"run: {run} is not the work directory of a run: no {file.name}")
    try:
        saved = read_object(file)
    except InputError as error:
        raise InputError(f"run: {error}; start the run again, which writes it") from error
    return of_saved(saved)


def read_settings(run: epath.Path, step: int | None = None) -> DistillSettings:
    """Reads the settings of a run, without the students that stopped with an error.

    Args:
      run: The work directory.
      step: The step of the checkpoint that says which students stopped; None: as
        `Checkpoints.step_to_read`.

    Raises:
      InputError: The folder is not a run, or its settings cannot be read.
      RunError: No checkpoint of several students is without corruption.
    """
    settings = read_config(run)
    students = settings.students
    if not students.named or not verify.finished(checkpoints_folder(run)):
        return settings
    with contextlib.closing(Checkpoints(run, read_only=True)) as checkpoints:
        stopped = checkpoints.meta(checkpoints.step_to_read(step)).get("stopped", {})
    for name, error in stopped.items():
        LOG.warning("%s: student %s is left out: %s", run, name, error)
    named = {name: one for name, one in students.named.items() if name not in stopped}
    return dataclasses.replace(settings, students=dataclasses.replace(students, named=named))
