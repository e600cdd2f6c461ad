"""The step in which a loss or gradient first was no finite number: what replays it.

The state before that step is no longer there when its metrics are read, because states are donated;
keeping it would cost memory and time in every step. A run is a function of state and step, so what
is written is small: the step, its images and the settings. The state comes from the last good
checkpoint, or of a student that was stopped among several, which keeps it, from any later one.
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
    """A step that went wrong.

    Attributes:
      step: its number, from 1.
      student: which of several; empty for the only one.
      found: what was found, in words.
      records: indices of the images of its global batch, in order of the data.
      images: what they are called.
      config: of the run.
    """

    step: int
    student: str
    found: str
    records: list[int]
    images: list[str]
    config: dict[str, Any]

    @property
    def settings(self) -> DistillSettings:
        """Of the run."""
        return of_saved(self.config)


def capture(
    workdir: epath.Path,
    settings: DistillSettings,
    source: Source,
    step: int,
    student: str,
    found: str,
) -> str:
    """Writes `nan/STUDENT.json` (`nan/student.json`), in the first process.

    Returns:
      the command that replays the step, or why there is none.
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
    """What `capture` wrote of a student.

    Raises:
      InputError: nothing that can be read.
    """
    file = captured_step_file(run, student)
    try:
        return Captured(**json.loads(file.read_text()))
    except FileNotFoundError:
        raise InputError(f"run: {file} is not there; no such step was recorded") from None
    except (ValueError, TypeError) as error:
        raise InputError(f"run: {file} is damaged: {error}") from error
