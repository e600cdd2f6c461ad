"""A model under evaluation, and the files of its finished tasks and results."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from singer_jax.errors import InputError
from singer_jax.evaluation import table1
from singer_jax.evaluation.backbone import Backbone
from singer_jax.evaluation.results import VERSION, provenance
from singer_jax.io.files import replacing, write_text
from singer_jax.io.limits import read_object
from singer_jax.platform import parallel
from singer_jax.runs.checkpoints import fingerprint
from singer_jax.runs.metrics import LOG
from singer_jax.runs.workdir import head_file, results_file, task_file


@dataclasses.dataclass(eq=False)
class EvaluatedModel:
    """Model under evaluation with its finished tasks.

    Attributes:
      name: name of one of several students, or `teacher`; else empty.
      folder: folder of its results.
      backbone: the model.
      run: settings of the run that made it, as nested dicts; None if there is none.
      step: step of the run's checkpoint; None if it is not a student of a run.
      settings: settings on which the results depend, as nested dicts.
      skipped: reasons why other tasks are not evaluated, by name.
      finished: records of the finished tasks, by name: identity, key, data and metrics.
      digest: `checkpoints.fingerprint` of the parameters.
      identity: digests of the model and of the settings, by which finished results are reused.
    """

    name: str
    folder: epath.Path
    backbone: Backbone
    run: Mapping[str, Any] | None
    step: int | None
    settings: Mapping[str, Any]
    skipped: dict[str, str]
    finished: dict[str, dict[str, Any]] = dataclasses.field(init=False, default_factory=dict)
    digest: str = dataclasses.field(init=False)
    identity: dict[str, str] = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        measured = json.dumps({**self.settings, "version": VERSION}, sort_keys=True)
        self.digest = fingerprint(self.backbone.params)
        self.identity = {
            "model": self.backbone.digest(),
            "settings": hashlib.sha256(measured.encode()).hexdigest(),
        }

    def read_finished(self, tasks: Sequence[str]) -> None:
        """Reads the tasks that were finished with the same model and settings."""
        found = {task: known for task in tasks if (known := self._read(task))}
        self.finished.update(parallel.of_first_process(found))

    def _read(self, task: str) -> dict[str, Any] | None:
        """Returns the record of a task; None if it differs or the task's head is missing."""
        try:
            content = read_object(task_file(self.folder, task))
        except (FileNotFoundError, InputError):
            return None
        known = table1.TASKS.get(task)
        headless = known is not None and known.kind == "transfer"
        if not headless and not head_file(self.folder, task).is_file():
            return None
        return content if all(content.get(k) == v for k, v in self.identity.items()) else None

    def key_of(self, task: str) -> str | None:
        """Returns the key of a finished task; None if the task is not finished."""
        return self.finished.get(task, {}).get("key")

    def progress_key(self, task_key: str) -> str:
        """Returns the digest by which the progress of a probe is reused."""
        return hashlib.sha256(json.dumps([self.identity, task_key]).encode()).hexdigest()

    def write_head(self, task: str, head: Mapping[str, np.ndarray]) -> None:
        """Writes the head that was trained for a task."""
        if jax.process_index() == 0:
            with replacing(head_file(self.folder, task)) as file:
                np.savez(file, **head)

    def finish(self, task: str, key: str, data: str, metrics: Mapping[str, Any]) -> None:
        """Writes the metrics of a task, and the updated results.

        Args:
          task: name of the task.
          key: digest of the task and its data.
          data: digest of the data.
          metrics: metrics of the task.
        """
        record = {**self.identity, "key": key, "data": data, "metrics": metrics}
        self.finished[task] = record
        _write(task_file(self.folder, task), record)
        self.report(task)

    def report(self, task: str) -> None:
        """Logs the metrics of a finished task, and writes the results."""
        numbers = self.finished[task]["metrics"].items()
        line = ", ".join(f"{key} {value:.4g}" for key, value in numbers if isinstance(value, float))
        LOG.info("%s: %s", f"{self.name}: {task}" if self.name else task, line)
        self.write_results()

    def write_results(self) -> dict[str, Any]:
        """Writes the results.json of the finished tasks; returns the rows of the table."""
        results = {name: found["metrics"] for name, found in self.finished.items()}
        measured = f"{self.name}, measured here" if self.name else "measured here"
        rows: dict[str, Any] = {measured: table1.row(results)}
        model, run = self.backbone.network.spec.name, self.run
        content = {
            "model": model,
            "run": {k: run[k] for k in ("seed", "method", "teacher", "student")} if run else None,
            "protocol": self.settings["probe"]["protocol"],
            **provenance(
                self.settings,
                {name: found["data"] for name, found in self.finished.items()},
                self.step,
                self.digest,
            ),
            "tasks": results,
            "skipped": {
                name: reason for name, reason in self.skipped.items() if name not in results
            },
            "table1": rows[measured],
        }
        paper = table1.published(run, model)
        if paper:
            rows[f"published: {paper[0]}"] = paper[1]
            content["published"] = {"of": paper[0], "row": paper[1]}
        _write(results_file(self.folder), content)
        return rows


def _write(file: epath.Path, content: Any) -> None:
    if jax.process_index() == 0:
        write_text(file, json.dumps(content, indent=2) + "\n")
