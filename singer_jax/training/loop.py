"""The training loop: steps, their metrics, what is saved between them, and when to stop."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from singer_jax.errors import Stopped
from singer_jax.models.params import Params
from singer_jax.platform import hosts, signals
from singer_jax.runs.metrics import StepMetrics
from singer_jax.runs.recorder import Recorder
from singer_jax.settings.ranges import COUNT, FROM_ZERO
from singer_jax.settings.settings import Settings, setting
from singer_jax.training.step import TrainState

States = Mapping[str, TrainState]


@dataclasses.dataclass(frozen=True)
class CheckpointSettings(Settings):
    """When a run is saved."""

    every_steps: int = setting(1000, COUNT, "between two checkpoints", "steps")
    keep: int = setting(2, COUNT, "how many of them are kept, the latest")


@dataclasses.dataclass(frozen=True)
class EvalsSettings(Settings):
    """Evaluation while training: kNN and the held-out losses, on the test split."""

    every_steps: int = setting(0, FROM_ZERO, "between two evaluations; 0: never", "steps")
    images: int = setting(
        1000,
        COUNT,
        "number of test images; kNN compares with as many training images, or with 10 a class (up "
        "to 20,000) where that is more",
    )


@dataclasses.dataclass(frozen=True)
class LoopHooks:
    """What happens between steps.

    Attributes:
      save: keeps the states after so many steps; may still write when it returns.
      save_every: steps.
      kept_in: where `save` keeps it, for messages.
      saved: returns when everything is written.
      evaluate: measures the states with the teacher's parameters; None: never.
      evaluate_every: steps.
      first: sees the states and metrics of the first step.
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
    """Steps from `recorder.start` to `recorder.steps`.

    Args:
      step_fn: of `Students`, as `jit_step` makes it, compiled.
      states: of the students by name, before the first of these steps; donated.
      teacher: its parameters.
      batches: on the devices, as many as there are steps, with the count of unreadable images.
      between: what happens between steps.
      recorder: of the metrics.

    Raises:
      Stopped: on request, saved.
      RunError: a loss or gradient of every student that is not finite; what `batches` raises.
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
                recorder.flush()  # raises, so that no state is saved after a loss that is no number
                with recorder.saving():
                    between.save(states, step)
            if stop:
                raise Stopped(
                    f"stopped after step {step} of {recorder.steps}, saved in {between.kept_in}"
                )
            if not last:
                with recorder.waiting():
                    batch, unreadable = next(batches)
    return states
