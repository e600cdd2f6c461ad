"""Progress of a probe, kept in a file, so that a resumed probe ends with the same numbers."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from etils import epath

from singer_jax.io.files import download, replacing
from singer_jax.io.limits import read_arrays
from singer_jax.platform import parallel
from singer_jax.runs.metrics import LOG


@dataclasses.dataclass(frozen=True)
class Progress:
    """Progress of a probe.

    Attributes:
      nearest: metrics of kNN, once they are known.
      held_out: score of each rate on held-out images; empty during their comparison.
      step: number of steps done in the current phase: comparison of rates, or final training.
      heads: heads after these steps; None before the first.
      by_epoch: metrics on the test split after each epoch of the final training.
    """

    nearest: dict[str, float] = dataclasses.field(default_factory=dict)
    held_out: tuple[float, ...] = ()
    step: int = 0
    heads: dict[str, np.ndarray] | None = None
    by_epoch: tuple[dict[str, float], ...] = ()


class ProgressStore:
    """Progress in memory, which never requests a stop.

    Attributes:
      progress: progress from which the probe resumes.
    """

    def __init__(self, progress: Progress = Progress()) -> None:
        self.progress = progress

    def update(self, **changes: Any) -> None:
        """Keeps the fields that have changed."""
        if changes.get("heads") is not None:
            arrays = {name: np.asarray(value) for name, value in changes["heads"].items()}
            changes["heads"] = arrays
        self.progress = dataclasses.replace(self.progress, **changes)

    def stopping(self) -> bool:
        """Returns True if the probe must stop now; the answer is the same in every process."""
        return False

    def describe(self) -> str:
        """Returns a description of the kept progress, for the message of a stop."""
        return "stopped"


class FileProgressStore(ProgressStore):
    """Progress in a file, which only process 0 writes and reads.

    Args:
      file: path of the `.npz` file; a file with another key, or an unreadable one, is ignored.
      key: digest of the model, the settings and the data.
      asked: function that returns True if a stop was requested; the answer is the same in every
        process.
    """

    def __init__(self, file: epath.Path, key: str, asked: Callable[[], bool]) -> None:
        self.file, self.key, self.asked = file, key, asked
        found = self._read() if jax.process_index() == 0 else None
        super().__init__(parallel.of_first_process(found) or Progress())
        if self.progress.step:
            LOG.info("continuing %s", self._where())

    def update(self, **changes: Any) -> None:
        super().update(**changes)
        if jax.process_index() > 0:
            return
        described = dataclasses.asdict(dataclasses.replace(self.progress, heads=None))
        text = json.dumps({"key": self.key, "progress": described})
        with replacing(self.file) as file:
            np.savez(file, described=np.array(text), **(self.progress.heads or {}))

    def stopping(self) -> bool:
        return self.asked()

    def describe(self) -> str:
        return f"stopped {self._where()}, saved in {self.file}"

    def remove(self) -> None:
        """Removes the progress of a finished probe."""
        if jax.process_index() == 0:
            self.file.unlink(missing_ok=True)

    def _where(self) -> str:
        return f"after step {self.progress.step} of the probe"

    def _read(self) -> Progress | None:
        try:
            arrays = read_arrays(download(self.file))
            text = json.loads(str(arrays.pop("described")))
        except FileNotFoundError:
            return None
        except (OSError, KeyError, ValueError) as error:
            LOG.warning("%s is corrupt (%s); its probe starts again", self.file, error)
            return None
        if text["key"] != self.key:
            return None
        found = text["progress"] | {"heads": arrays or None}
        return Progress(**{key: tuple(v) if isinstance(v, list) else v for key, v in found.items()})
