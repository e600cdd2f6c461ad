"""The recorder that follows a training loop: metrics, progress, stalls, non-finite losses.

Metrics stay on the device until later steps have been dispatched, so that the device never waits
while they are read.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import datetime
import math
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import numpy as np

from singer_jax.errors import RunError, StudentsStopped
from singer_jax.platform import chips, signals
from singer_jax.runs.metrics import LOG, MetricsWriter, StepMetrics, metric_name

_SHOWN = 0.05  # fraction of time spent waiting for images above which the progress states it
_PATIENCE = 60  # seconds without a batch after which the watchdog logs a line


def peak_flops(devices: Sequence[jax.Device]) -> float | None:
    """Returns the total bfloat16 FLOP/s of devices of one kind; None for an unlisted kind."""
    chip = chips.chip(devices[0].device_kind)
    return chip.bf16 * len(devices) if chip else None


def in_words(stopped: Mapping[str, str]) -> str:
    """Returns a text that names each stopped student and its error."""
    return "; ".join(f"{name}: {error}" for name, error in stopped.items())


@contextlib.contextmanager
def stall_watchdog() -> Iterator[None]:
    """Logs a warning if the wait for a batch in its block takes longer than a minute.

    A loader worker or a network disk that hangs raises no error.
    """
    line = "no images for %d s: a loader worker hangs, or the disk that holds the images"
    warning = threading.Timer(_PATIENCE, LOG.warning, (line, _PATIENCE))
    warning.daemon = True
    warning.start()
    try:
        yield
    finally:
        warning.cancel()


class _Lines:
    """Logs the progress in lines, where the output is a file or a pipe and not a terminal.

    It has the methods of `tqdm` that `Recorder` calls.

    Args:
      start: The number of steps that are done.
      steps: The number of steps at the end of the run.
    """

    EVERY = 30  # seconds between lines

    def __init__(self, start: int, steps: int) -> None:
        self.start, self.step, self.steps, self.text = start, start, steps, ""
        self.began = self.logged = time.perf_counter()

    def update(self) -> None:
        """Counts a step."""
        self.step += 1
        now = time.perf_counter()
        if now - self.logged < self.EVERY or self.step == self.steps:
            return
        self.logged = now
        left = (now - self.began) / (self.step - self.start) * (self.steps - self.step)
        line = f"step {self.step} of {self.steps}, {datetime.timedelta(seconds=round(left))} left"
        LOG.info(", ".join(filter(None, (line, self.text))))

    def set_postfix_str(self, text: str) -> None:
        """Sets the text that the lines show after the step and the time left."""
        self.text = text

    def close(self) -> None:
        """Does nothing."""


def _progress(start: int, steps: int, active: bool) -> Any:
    """Returns a bar in a terminal or a notebook, else an object that logs lines.

    Where `active` is false the bar shows nothing.
    """
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


@dataclasses.dataclass(frozen=True)
class RecordedSteps:
    """The steps that a recorder follows.

    Attributes:
      start: The number of steps that are done.
      steps: The number of steps at the end of the run.
      every: The number of steps between rows.
      batch_size: The global batch size.
      flops: The FLOPs of one step on all devices.
      devices: The devices of the step. If their kind is not listed, `train/mfu` is left out.
    """

    start: int
    steps: int
    every: int
    batch_size: int
    flops: int
    devices: Sequence[jax.Device]


class Recorder:
    """Follows a training loop: writes metrics, shows the progress, stops at non-finite numbers.

    Of a step without a row it reads only whether the numbers are finite.

    Args:
      writer: Takes the rows.
      followed: The steps.
      stopped: The errors of students that stopped before, by name. The recorder adds the students
        that it stops.
      capture: Stores what is needed to replay a step with non-finite numbers. It takes the step,
        the name of the student and the error, and returns the command that replays the step.
    """

    LAG = 2  # steps that are dispatched and not read yet

    def __init__(
        self,
        writer: MetricsWriter,
        followed: RecordedSteps,
        stopped: dict[str, str] | None = None,
        capture: Callable[[int, str, str], str] | None = None,
    ) -> None:
        self.writer, self.followed = writer, followed
        self.start, self.steps = followed.start, followed.steps
        peak = peak_flops(followed.devices)
        self.flops_share = followed.flops / peak if peak else None
        self.pending: collections.deque[tuple[int, StepMetrics, Mapping[str, Any]]]
        self.pending = collections.deque()
        self.stopped = {} if stopped is None else stopped
        self.capture = capture
        self.bar = _progress(followed.start, followed.steps, writer.active)
        self.row_step, self.row_time, self.waited = followed.start + 1, time.perf_counter(), 0.0
        # Seconds since the last row: of evaluations and saves together, and of saves alone.
        self.excluded = self.saving_seconds = 0.0

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
        """Writes a row with the metrics that `measure` returns and its time.

        The time does not count as time of training.
        """
        start = time.perf_counter()
        metrics = measure()
        seconds = time.perf_counter() - start
        self.excluded += seconds
        self.writer.write(step, {**metrics, "train/evaluation_seconds": seconds})

    @contextlib.contextmanager
    def saving(self) -> Iterator[None]:
        """Measures how long the training loop waits for a save, which may write on afterwards.

        The time does not count as time of training. The next row with a throughput states it as
        `train/save_seconds`; no row follows the save after the last step.
        """
        start = time.perf_counter()
        try:
            yield
        finally:
            seconds = time.perf_counter() - start
            self.excluded += seconds
            self.saving_seconds += seconds

    def logs(self, step: int) -> bool:
        """Returns True for a step that gets a row: the first, every n-th and the last.

        Args:
          step: The number of the step, counted from 1.
        """
        return step in (self.start + 1, self.steps) or step % self.followed.every == 0

    def add(
        self,
        step: int,
        metrics: StepMetrics,
        common: Mapping[str, jax.Array | float] = MappingProxyType({}),
    ) -> None:
        """Takes the metrics of a dispatched step, and reads those of an earlier step.

        Args:
          step: The number of the step, counted from 1.
          metrics: The metrics by student. The name of an only student is empty.
          common: The metrics that all students share.

        Raises:
          RunError: The loss or the gradient of the only student is not finite.
          StudentsStopped: All students are stopped.
        """
        read = (metrics, common) if self.logs(step) else metrics.finite
        for value in jax.tree.leaves(read):
            if isinstance(value, jax.Array):
                value.copy_to_host_async()
        self.pending.append((step, metrics, common))
        while len(self.pending) > self.LAG:
            self._read()

    def flush(self) -> None:
        """Reads and stores the metrics of all dispatched steps; raises as `add`."""
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
            seconds = now - self.row_time - self.excluded
            steps_per_second = (step - self.row_step) / seconds
            waiting = min(1.0, self.waited / seconds)
            if self.saving_seconds:
                metrics["train/save_seconds"] = self.saving_seconds
            self._begin_row(step, now)
            metrics["train/images_per_second"] = steps_per_second * self.followed.batch_size
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
            # The time of the first step is mostly that of loading and compiling.
            self._begin_row(step, time.perf_counter())
            self.writer.write(step, metrics)

    def _begin_row(self, step: int, now: float) -> None:
        self.row_step, self.row_time, self.waited = step, now, 0.0
        self.excluded = self.saving_seconds = 0.0

    def _stop(self, step: int, student: str, metrics: Mapping[str, float]) -> None:
        """Stops a student, and names its first number that is not finite.

        One of several students keeps the state that it had before the step.

        Raises:
          RunError: It is the only student.
        """
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
