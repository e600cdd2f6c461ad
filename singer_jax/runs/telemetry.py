"""What a run says of itself: progress, metrics.jsonl, TensorBoard, Weights & Biases.

Only the first process writes. Metrics stay on the device until the steps after them have been
dispatched, so that reading them never makes it wait.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import datetime
import functools
import json
import logging
import math
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import Array, Bool, Float

from singer_jax.errors import RunError, StudentsStopped
from singer_jax.io.files import Mirror, write_text, writing
from singer_jax.platform import chips, signals
from singer_jax.settings.ranges import COUNT, Flag
from singer_jax.settings.renamed import current_metric
from singer_jax.settings.settings import Settings, setting

LOG = logging.getLogger("singer_jax")

_SHOWN = 0.05  # the share of waiting above which the progress bar says it
_PATIENCE = 60  # seconds without a batch after which a line says it


@dataclasses.dataclass(frozen=True)
class LogSettings(Settings):
    """What a run says of itself, and when."""

    every_steps: int = setting(50, COUNT, "between two rows of metrics", "steps")
    wandb: bool = setting(False, Flag(), "also send them to Weights & Biases")


def metric_name(group: str, student: str, name: str) -> str:
    """`group/name`, of one of several students `group/student/name`."""
    return "/".join(filter(None, (group, student, name)))


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["numbers", "finite"], meta_fields=["names"]
)
@dataclasses.dataclass(frozen=True, eq=False)
class StepMetrics(Mapping[str, Mapping[str, Any]]):
    """Metrics of one step by student and name, packed into two arrays.

    Each array that a program returns costs time on the host; that of a hundred scalars can be
    longer than the step of a small model.

    Attributes:
      numbers: all metrics, one student after the other.
      finite: for each student, true if its loss and its gradient are finite.
      names: each student's name with the names of its metrics.
    """

    numbers: Float[Array, " metrics"]
    finite: Bool[Array, " students"]
    names: tuple[tuple[str, tuple[str, ...]], ...]

    @classmethod
    def pack(cls, metrics: Mapping[str, Mapping[str, Any]]) -> StepMetrics:
        """Packs scalars; each student has `loss` and `grad_norm` among them."""
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


def peak_flops(devices: Sequence[jax.Device]) -> float | None:
    """bfloat16 FLOP/s of equal devices together; None for a kind that is not listed."""
    chip = chips.chip(devices[0].device_kind)
    return chip.bf16 * len(devices) if chip else None


class MetricsWriter:
    """Rows of named numbers into `metrics.jsonl`, TensorBoard and, if asked for, W&B.

    Args:
      folder: the work directory.
      step: rows after this step are dropped: a resumed run writes them again.
      wandb: the run's configuration where Weights & Biases is wanted, else None.
    """

    PUSH_EVERY = 60  # seconds; behind a URL, where each time writes the whole file

    def __init__(
        self, folder: epath.Path, step: int = 0, wandb: dict[str, Any] | None = None
    ) -> None:
        self.active = jax.process_index() == 0
        if not self.active:
            return
        from tensorboardX import SummaryWriter

        self.mirror = Mirror(folder, continued=["metrics.jsonl"])
        self.pushed = time.monotonic()
        path = self.mirror.local / "metrics.jsonl"
        _cut_back(path, step)
        self.file = path.open("a")
        events = str(self.mirror.local / "tensorboard")
        self.tensorboard = SummaryWriter(events, purge_step=step + 1)
        self.wandb = None
        if wandb is not None:
            import wandb as package

            own = {"id": _wandb_id(folder), "resume": "allow"}
            self.wandb = package.init(dir=str(self.mirror.local), config=wandb, **own)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """One row; the file holds it when this returns, behind a URL within a minute."""
        if not self.active:
            return
        row = {"step": step, "time": time.time()} | metrics
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()
        for name, value in metrics.items():
            self.tensorboard.add_scalar(name, value, step)
        if self.wandb:
            self.wandb.log(metrics, step=step)
        if time.monotonic() - self.pushed > self.PUSH_EVERY:
            self.flush()

    def flush(self) -> None:
        """The work directory holds all rows when this returns.

        Raises:
          RunError: it cannot be written.
        """
        if self.active:
            self.tensorboard.flush()
            self.mirror.push()
            self.pushed = time.monotonic()

    def close(self) -> None:
        """Flushes and closes everything; raises as `flush`."""
        if self.active:
            self.file.close()
            self.tensorboard.close()
            self.mirror.close()
            if self.wandb:
                self.wandb.finish()


def _wandb_id(folder: epath.Path) -> str:
    """Returns the run's id at Weights & Biases, where a run that continues stays one run."""
    file = folder / "wandb_id"
    if not file.exists():
        with writing(folder):
            write_text(file, uuid.uuid4().hex[:8] + "\n")
    return file.read_text().strip()


def read_rows(file: epath.Path) -> tuple[list[dict[str, Any]], list[str]]:
    """The rows of a `metrics.jsonl`, and the lines that are none.

    A kill leaves a last line half written, and a reader may meet one that is being written.
    """
    rows, damaged = [], []
    for line in file.read_bytes().decode(errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        whole = isinstance(row, dict) and isinstance(row.get("step"), int)
        if whole:
            row = {current_metric(name): value for name, value in row.items()}
        (rows if whole else damaged).append(row if whole else line)
    return rows, damaged


def _cut_back(path: Path, step: int) -> None:
    """Drops rows after `step`, and lines that are none."""
    if not path.exists():
        return
    rows, damaged = read_rows(epath.Path(path))
    if damaged:
        LOG.warning("%s: %d lines are no rows and are left out", path, len(damaged))
    kept = "".join(json.dumps(row) + "\n" for row in rows if row["step"] <= step)
    write_text(epath.Path(path), kept)


def in_words(stopped: Mapping[str, str]) -> str:
    """Each stopped student and how it went wrong."""
    return "; ".join(f"{name}: {how}" for name, how in stopped.items())


@contextlib.contextmanager
def stall_watchdog() -> Iterator[None]:
    """Around a wait for a batch: a worker or a network disk that hangs raises nothing."""
    line = "no images for %d s: a loader's worker hangs, or the disk that they are on"
    told = threading.Timer(_PATIENCE, LOG.warning, (line, _PATIENCE))
    told.daemon = True
    told.start()
    try:
        yield
    finally:
        told.cancel()


class _Lines:
    """Progress as a line of the log now and then, where nobody watches a bar.

    Its methods are those of `tqdm` that `Recorder` calls.

    Args:
      start, steps: where the run stands, and its end.
    """

    EVERY = 30  # seconds

    def __init__(self, start: int, steps: int) -> None:
        self.start, self.step, self.steps, self.text = start, start, steps, ""
        self.began = self.said = time.perf_counter()

    def update(self) -> None:
        """Counts a step."""
        self.step += 1
        now = time.perf_counter()
        if now - self.said < self.EVERY or self.step == self.steps:
            return
        self.said = now
        left = (now - self.began) / (self.step - self.start) * (self.steps - self.step)
        words = f"step {self.step} of {self.steps}, {datetime.timedelta(seconds=round(left))} left"
        LOG.info(", ".join(filter(None, (words, self.text))))

    def set_postfix_str(self, text: str) -> None:
        """Sets what the lines say beside the step."""
        self.text = text

    def close(self) -> None:
        """Does nothing."""


def _progress(start: int, steps: int, active: bool) -> Any:
    """A bar in a terminal or a notebook, else lines in the log; silent where not active."""
    from tqdm.auto import tqdm

    notebook = "ipykernel" in sys.modules
    if active and not sys.stderr.isatty() and not notebook:
        return _Lines(start, steps)
    bar = tqdm(
        total=steps,
        initial=start,
        unit="step",
        disable=not active,
        dynamic_ncols=True,
        mininterval=0.5,
    )
    if not bar.disable:
        signals.bar_is_shown.set()
    return bar


class Recorder:
    """Follows a training loop: writes its metrics late, shows progress, stops it at a NaN.

    Between rows it reads nothing of a step but whether its numbers are finite.

    Args:
      writer: for the rows.
      start, steps: where the run stands, and its end.
      every: steps between rows.
      batch_size: global.
      flops: of one step on all devices.
      devices: on which the step runs; of an unlisted kind they leave `train/mfu` out.
      stopped: students that went wrong before, and how; those that go wrong are added.
      capture: keeps what replays the step in which a student went wrong, from the step, the
        student's name and what was found; returns the command.
    """

    LAG = 2  # steps in flight

    def __init__(
        self,
        writer: MetricsWriter,
        *,
        start: int,
        steps: int,
        every: int,
        batch_size: int,
        flops: int,
        devices: Sequence[jax.Device],
        stopped: dict[str, str] | None = None,
        capture: Callable[[int, str, str], str] | None = None,
    ) -> None:
        self.writer, self.every, self.batch_size = writer, every, batch_size
        peak = peak_flops(devices)
        self.flops_share = flops / peak if peak else None
        self.start, self.steps = start, steps
        self.pending: collections.deque[tuple[int, StepMetrics, Mapping[str, Any]]]
        self.pending = collections.deque()
        self.stopped = {} if stopped is None else stopped
        self.capture = capture
        self.bar = _progress(start, steps, writer.active)
        self.row_step, self.row_time, self.waited = start + 1, time.perf_counter(), 0.0
        self.aside = self.saved_in = 0.0  # seconds since the last row

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Measures the wait for the next batch, for `train/data_wait_fraction`."""
        start = time.perf_counter()
        try:
            with stall_watchdog():
                yield
        finally:
            self.waited += time.perf_counter() - start

    def evaluate(self, step: int, measure: Callable[[], Mapping[str, float]]) -> None:
        """Writes a row of what `measure` gives and of its time, which is not that of training."""
        start = time.perf_counter()
        metrics = measure()
        seconds = time.perf_counter() - start
        self.aside += seconds
        self.writer.write(step, {**metrics, "train/evaluation_seconds": seconds})

    @contextlib.contextmanager
    def saving(self) -> Iterator[None]:
        """Around a save: its time is not that of training, and stands in the next row."""
        start = time.perf_counter()
        try:
            yield
        finally:
            seconds = time.perf_counter() - start
            self.aside += seconds
            self.saved_in += seconds

    def logs(self, step: int) -> bool:
        """Whether a step (counted from 1) gets a row: the first, every n-th, the last."""
        return step in (self.start + 1, self.steps) or step % self.every == 0

    def add(
        self,
        step: int,
        metrics: StepMetrics,
        common: Mapping[str, jax.Array | float] = MappingProxyType({}),
    ) -> None:
        """Takes the metrics of a dispatched step (counted from 1), reads those of an earlier one.

        Args:
          step: its number.
          metrics: of the students; the name of a single one is empty.
          common: of all.

        Raises:
          RunError: the loss or the gradient of the only student is not finite, or all are stopped.
        """
        read = (metrics, common) if self.logs(step) else metrics.finite
        for value in jax.tree.leaves(read):
            if isinstance(value, jax.Array):
                value.copy_to_host_async()
        self.pending.append((step, metrics, common))
        while len(self.pending) > self.LAG:
            self._read()

    def flush(self) -> None:
        """Reads and stores what is pending; raises as `add`."""
        while self.pending:
            self._read()
        self.writer.flush()

    def _read(self) -> None:
        step, students, common = self.pending.popleft()
        for student, finite in zip(students, np.asarray(students.finite), strict=True):
            if not finite and student not in self.stopped:
                self._stop(step, student, students[student])
        training = [student for student in students if student not in self.stopped]
        if not training:
            message = f"all students are stopped: {in_words(self.stopped)}"
            raise StudentsStopped(message, self.stopped)
        self.bar.update()
        if not self.logs(step):
            return
        metrics = {f"train/{name}": float(value) for name, value in common.items()}
        losses = {}
        for student in training:
            own = {name: float(value) for name, value in students[student].items()}
            losses[student] = own["loss"]
            metrics |= {metric_name("train", student, name): own[name] for name in own}
        if step > self.row_step:
            now = time.perf_counter()
            seconds = now - self.row_time - self.aside
            steps_per_second = (step - self.row_step) / seconds
            waiting = min(1.0, self.waited / seconds)
            if self.saved_in:
                metrics["train/save_seconds"] = self.saved_in
            self._begin_row(step, now)
            metrics["train/images_per_second"] = steps_per_second * self.batch_size
            metrics["train/data_wait_fraction"] = waiting
            if self.flops_share:
                metrics["train/mfu"] = steps_per_second * self.flops_share
            self.bar.set_postfix_str(
                f"loss {', '.join(f'{name} {value:.4g}'.strip() for name, value in losses.items())}"
                f", {metrics['train/images_per_second']:.0f} images/s"
                + (f", {waiting:.0%} waiting for images" if waiting > _SHOWN else "")
            )
            self.writer.write(step, metrics)
        else:
            # The first step of this start: its time is mostly that of the start itself.
            self._begin_row(step, time.perf_counter())
            self.writer.write(step, metrics)

    def _begin_row(self, step: int, now: float) -> None:
        self.row_step, self.row_time, self.waited = step, now, 0.0
        self.aside = self.saved_in = 0.0

    def _stop(self, step: int, student: str, metrics: Mapping[str, float]) -> None:
        """Names the first number that is not finite; several students kept their states then."""
        first = next(
            name
            for name in (*filter(lambda name: name.startswith("loss_"), metrics), *metrics)
            if not math.isfinite(metrics[name])
        )
        found = f"{metric_name('train', student, first)} is {metrics[first]} at step {step}"
        again = f"; replay it: {self.capture(step, student, found)}" if self.capture else ""
        if not student:
            raise RunError(f"{found}; the last good checkpoint is kept{again}")
        self.stopped[student] = f"{found}, stopped after step {step - 1}"
        LOG.error("student %s: %s%s", student, self.stopped[student], again)

    def close(self) -> None:
        """Ends the progress bar."""
        self.bar.close()
        signals.bar_is_shown.clear()
