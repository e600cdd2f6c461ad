"""Metrics of a run: their names, and the files and services that they are written to.

Rows of metrics are appended to `metrics.jsonl`, to TensorBoard event files and, on request, to
Weights & Biases. Only the first process writes. `singer_jax.runs.recorder` decides when.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import logging
import socket
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import Array, Bool, Float

from singer_jax.io.files import Mirror, write_text, writing
from singer_jax.runs.workdir import METRICS_FILE, metrics_file, tensorboard_folder, wandb_id_file
from singer_jax.settings.ranges import COUNT, Flag
from singer_jax.settings.renamed import current_metric
from singer_jax.settings.settings import Settings, setting

LOG = logging.getLogger("singer_jax")


@dataclasses.dataclass(frozen=True)
class LogSettings(Settings):
    """Settings of the metrics that a run writes."""

    every_steps: int = setting(50, COUNT, "Number of steps between rows of metrics.")
    wandb: bool = setting(False, Flag(), "Send the metrics to Weights & Biases as well.")


def metric_name(group: str, student: str, name: str) -> str:
    """Returns `group/name`, or `group/student/name` where a run has several students."""
    return "/".join(filter(None, (group, student, name)))


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["numbers", "finite"], meta_fields=["names"]
)
@dataclasses.dataclass(frozen=True, eq=False)
class StepMetrics(Mapping[str, Mapping[str, Any]]):
    """Metrics of one step by student and name, packed into two arrays.

    Each array that a compiled program returns costs time on the host. A hundred separate scalars
    can take longer than the step of a small model.

    Attributes:
      numbers: All metrics, one student after the other.
      finite: For each student, true if its loss and its gradient are finite.
      names: The name of each student with the names of its metrics.
    """

    numbers: Float[Array, " metrics"]
    finite: Bool[Array, " students"]
    names: tuple[tuple[str, tuple[str, ...]], ...]

    @classmethod
    def pack(cls, metrics: Mapping[str, Mapping[str, Any]]) -> StepMetrics:
        """Packs the scalars of each student, which include `loss` and `grad_norm`."""
        names = tuple((student, tuple(sorted(own))) for student, own in metrics.items())
        values = [metrics[student][name] for student, own in names for name in own]
        finite = [
            jnp.isfinite(own["loss"]) & jnp.isfinite(own["grad_norm"]) for own in metrics.values()
        ]
        return cls(
            jnp.stack([jnp.asarray(value, jnp.float32) for value in values]),
            jnp.stack(finite),
            names,
        )

    def __getitem__(self, student: str) -> dict[str, Any]:
        traced = isinstance(self.numbers, jax.core.Tracer)
        values = self.numbers if traced else np.asarray(self.numbers)
        start = 0
        for name, own in self.names:
            if name == student:
                return {key: values[start + index] for index, key in enumerate(own)}
            start += len(own)
        raise KeyError(student)

    def __iter__(self) -> Iterator[str]:
        return (student for student, _ in self.names)

    def __len__(self) -> int:
        return len(self.names)


class MetricsWriter:
    """Writes rows of named numbers to `metrics.jsonl`, TensorBoard and, on request, W&B.

    Args:
      folder: The work directory.
      step: The step that the run continues from. Later rows are dropped, because the run writes
        them again.
      wandb: The configuration of the run to send to Weights & Biases; None: nothing is sent.
    """

    PUSH_EVERY = 60  # seconds between copies to a URL; each copy writes whole files

    def __init__(
        self, folder: epath.Path, step: int = 0, wandb: dict[str, Any] | None = None
    ) -> None:
        self.active = jax.process_index() == 0
        if not self.active:
            return
        self.mirror = Mirror(folder, continued=[METRICS_FILE])
        self.pushed = time.monotonic()
        path = metrics_file(self.mirror.local)
        _drop_rows_after(path, step)
        self.file = path.open("a")
        self.tensorboard = _EventFile(tensorboard_folder(self.mirror.local), step + 1)
        self.wandb = None
        if wandb is not None:
            import wandb as package

            own = {"id": _wandb_id(folder), "resume": "allow"}
            self.wandb = package.init(dir=str(self.mirror.local), config=wandb, **own)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Writes one row, which a local file holds at once and a URL within a minute."""
        if not self.active:
            return
        row = {"step": step, "time": time.time()} | metrics
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()
        self.tensorboard.write(step, metrics)
        if self.wandb:
            self.wandb.log(metrics, step=step)
        if time.monotonic() - self.pushed > self.PUSH_EVERY:
            self.flush()

    def flush(self) -> None:
        """Stores all rows in the work directory.

        Raises:
          RunError: The work directory cannot be written.
        """
        if self.active:
            self.tensorboard.flush()
            self.mirror.push()
            self.pushed = time.monotonic()

    def close(self) -> None:
        """Flushes and closes everything; raises as `flush`."""
        if not self.active:
            return
        with contextlib.ExitStack() as stack:  # each is closed even if an earlier one fails
            if self.wandb:
                stack.callback(self.wandb.finish)
            stack.callback(self.mirror.close)
            stack.callback(self.tensorboard.close)
            stack.callback(self.file.close)


class _EventFile:
    """A file of events for TensorBoard that is written by the calling thread.

    The thread of tensorboardX's `SummaryWriter` ends if the disk is full, and then the training
    waits forever to add an event.

    Args:
      folder: folder of the event files; it is made.
      step: first step of this file, from which TensorBoard drops the steps of earlier files.
    """

    def __init__(self, folder: Path, step: int) -> None:
        from tensorboardX.record_writer import RecordWriter

        folder.mkdir(exist_ok=True)
        name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}"
        self.records = RecordWriter(str(folder / name))
        self._add(file_version="brain.Event:2")
        self._add(step=step, session_log={"status": "START"})
        self.flush()

    def _add(self, **event: Any) -> None:
        from tensorboardX.proto.event_pb2 import Event

        self.records.write(Event(wall_time=time.time(), **event).SerializeToString())

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Appends the scalars of a step, which `flush` stores."""
        values = [{"tag": name, "simple_value": value} for name, value in metrics.items()]
        self._add(step=step, summary={"value": values})

    def flush(self) -> None:
        """Stores everything on disk."""
        self.records.flush()

    def close(self) -> None:
        """Stores everything and closes the file."""
        self.records.close()


def _wandb_id(folder: epath.Path) -> str:
    """Returns the run's id at Weights & Biases, where a run that continues stays one run."""
    file = wandb_id_file(folder)
    if not file.exists():
        with writing(folder):
            write_text(file, uuid.uuid4().hex[:8] + "\n")
    return file.read_text().strip()


def read_rows(file: epath.Path) -> tuple[list[dict[str, Any]], list[str]]:
    """Reads a `metrics.jsonl` that a killed process may have left, or that a run is writing.

    Returns:
      The rows, and the lines that are not rows, such as a last line that is incomplete.
    """
    rows, damaged = [], []
    for line in file.read_bytes().decode(errors="replace").splitlines():
        try:
            row = json.loads(line)
        except (RecursionError, ValueError):
            row = None
        whole = isinstance(row, dict) and isinstance(row.get("step"), int)
        if whole:
            row = {current_metric(name): value for name, value in row.items()}
        (rows if whole else damaged).append(row if whole else line)
    return rows, damaged


def _drop_rows_after(path: Path, step: int) -> None:
    """Removes the rows after `step`, and the lines that are not rows, from a file."""
    if not path.exists():
        return
    rows, damaged = read_rows(epath.Path(path))
    if damaged:
        LOG.warning("%s: %d lines are not rows and are left out", path, len(damaged))
    kept = "".join(json.dumps(row) + "\n" for row in rows if row["step"] <= step)
    write_text(epath.Path(path), kept)
