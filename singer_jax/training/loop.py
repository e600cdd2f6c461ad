"""The training loop: steps, metrics, checkpoints, evaluations and stops."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from singer_jax.errors import Stopped
from singer_jax.models.params import Params
from singer_jax.platform import hosts, signals
from singer_jax.runs.metrics import StepMetrics
from singer_jax.runs.recorder import Recorder
from singer_jax.settings.ranges import COUNT, FROM_ZERO
from singer_jax.settings.settings import Settings, setting

if TYPE_CHECKING:
    from singer_jax.training.step import TrainState

States = Mapping[str, "TrainState"]


@dataclasses.dataclass(frozen=True)
class CheckpointSettings(Settings):
    """Settings of the checkpoints."""

    every_steps: int = setting(1000, COUNT, "Number of steps between checkpoints.")
    keep: int = setting(2, COUNT, "Number of checkpoints to keep; older ones are deleted.")


@dataclasses.dataclass(frozen=True)
class EvalsSettings(Settings):
    """Settings of the evaluation during training: kNN and validation losses on the test split."""

    every_steps: int = setting(0, FROM_ZERO, "Number of steps between evaluations. 0: never.")
    images: int = setting(
        1000,
        COUNT,
        "Number of test images. kNN compares them with as many training images, or with 10 images "
        "per class (at most 20,000) if that is more.",
    )


@dataclasses.dataclass(frozen=True)
class LoopHooks:
    """Functions that the loop calls between steps.

    Attributes:
      save: Saves the states after the given number of steps; writing may continue after it returns.
      save_every: Number of steps between two calls of `save`.
      kept_in: Place in which `save` stores the states, for messages.
      saved: Waits until everything is written.
      evaluate: Evaluates the states with the teacher's parameters; None for no evaluation.
      evaluate_every: Number of steps between two calls of `evaluate`.
      first: Called with the states and metrics of the first step.
    """

    save: Callable[[States, int], None]
    save_every: int
    kept_in: str
    saved: Callable[[], None]
    evaluate: Callable[[States, Params | None], dict[str, float]] | None
    evaluate_every: int
    first: Callable[[States, StepMetrics], None]


def train(
    step_fn: Callable[..., tuple[States, StepMetrics]],
    states: States,
    teacher: Params | None,
    batches: Iterator[Any],
    between: LoopHooks,
    recorder: Recorder,
) -> States:
    """Trains from step `recorder.start` to step `recorder.steps`.

    Args:
      step_fn: The compiled step of `Students`, as `jit_step` makes it.
      states: States of the students by name before the first step; donated.
      teacher: Parameters of the teacher.
      batches: Batches on the devices, one for each step, with the count of unreadable images.
      between: Functions that are called between steps.
      recorder: Recorder of the metrics.

    Returns:
      The states after the last step.

    Raises:
      Stopped: A stop was requested; the states are saved.
      RunError: The loss or gradient of every student is not finite, or `batches` raises it.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(signals.deferred())
        stack.callback(between.saved)
        stack.enter_context(hosts.leaving_within(30))
        batch, unreadable = next(batches)
        for step in range(recorder.start + 1, recorder.steps + 1):
            states, metrics = step_fn(states, teacher, batch, np.bool_(recorder.logs(step)))
            if step == recorder.start + 1:
                between.first(states, metrics)
            recorder.add(step, metrics, {"unreadable_images": unreadable})
            last = step == recorder.steps
            stop = hosts.stop_after(step) and not last
            if between.evaluate and (last or step % between.evaluate_every == 0):
                recorder.flush()
                recorder.evaluate(step, functools.partial(between.evaluate, states, teacher))
            if last or stop or step % between.save_every == 0:
                recorder.flush()  # raises, so that no state is saved after a non-finite loss
                with recorder.saving():
                    between.save(states, step)
            if stop:
                raise Stopped(
                    f"stopped after step {step} of {recorder.steps}, saved in {between.kept_in}; "
                    "run the same command to continue"
                )
            if not last:
                with recorder.waiting():
                    batch, unreadable = next(batches)
    return states
