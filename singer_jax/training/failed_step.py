"""A record of the first step with a non-finite loss or gradient, from which it is replayed.

When the metrics of a step are read, the state before it no longer exists, because states are
donated; keeping it would cost memory and time in every step. A run is a deterministic function of
state and step, so the record is small: the step, its images and the settings. The state is read
from the last good checkpoint. A student that was stopped among several keeps its state, so for it
any later checkpoint will do.
"""

from __future__ import annotations

import json
import shlex
from typing import Any, NamedTuple

import jax
from etils import epath

from singer_jax.data.loader import batch_records
from singer_jax.data.sources import Source
from singer_jax.errors import InputError
from singer_jax.io.files import failures, write_text
from singer_jax.runs.workdir import captured_step_file
from singer_jax.settings.settings import to_dict
from singer_jax.training.settings import DistillSettings, of_saved


class Captured(NamedTuple):
    """A recorded step with a non-finite loss or gradient.

    Attributes:
      step: Number of the step, counted from 1.
      student: Name of the student; empty if the run has only one.
      found: Description of the non-finite value.
      records: Indices of the images of the global batch, in the order of the data.
      images: Names of these images.
      config: Configuration of the run.
    """

    step: int
    student: str
    found: str
    records: list[int]
    images: list[str]
    config: dict[str, Any]

    @property
    def settings(self) -> DistillSettings:
        """Settings of the run."""
        return of_saved(self.config)


def capture(
    workdir: epath.Path,
    settings: DistillSettings,
    source: Source,
    step: int,
    student: str,
    found: str,
) -> str:
    """Writes `nan/STUDENT.json` (`nan/student.json` for the only student) in the first process.

    Returns:
      The command that replays the step, or the reason why it could not be recorded.
    """
    if jax.process_index() == 0:
        records = batch_records(source, settings.seed, settings.batch_size, step - 1)
        images = [source.describe(record) for record in records]
        captured = Captured(step, student, found, records, images, to_dict(settings))
        content = json.dumps(captured._asdict(), indent=2)
        try:
            write_text(captured_step_file(workdir, student), content + "\n")
        except failures(workdir) as error:
            return f"not recorded ({error})"
    which = f" --config.student={student}" if student else ""
    run = shlex.quote(str(workdir))
    return f"python -m singer_jax.main --config=replay --config.run={run}{which}"


def read(run: epath.Path, student: str) -> Captured:
    """Reads the step that `capture` recorded for a student.

    Raises:
      InputError: No step is recorded, or the file cannot be read.
    """
    file = captured_step_file(run, student)
    try:
        return Captured(**json.loads(file.read_text()))
    except FileNotFoundError:
        raise InputError(
            f"run: {file} does not exist; the run recorded no step with a non-finite loss"
        ) from None
    except (ValueError, TypeError) as error:
        raise InputError(f"run: {file} is damaged, the step cannot be replayed: {error}") from error
