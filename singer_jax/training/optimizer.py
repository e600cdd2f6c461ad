"""Optimisers and learning-rate schedules as the official code runs them."""

from __future__ import annotations

import dataclasses

import optax

from singer_jax.runs.schedules import cosine_schedule
from singer_jax.settings.ranges import (
    COUNT,
    DECAY,
    FROM_ZERO,
    NOT_NEGATIVE,
    POSITIVE,
    SHARE,
    Each,
    OneOf,
)
from singer_jax.settings.settings import Settings, setting


@dataclasses.dataclass(frozen=True)
class OptimizerSettings(Settings):
    """How parameters are updated."""

    name: str = setting("adamw", OneOf(("adamw", "sgd")), "which optimiser")
    learning_rate: float = setting(1e-3, NOT_NEGATIVE, "the peak of the schedule")
    b1: float = setting(0.9, DECAY, "decay of AdamW's first moment")
    b2: float = setting(0.999, DECAY, "decay of AdamW's second moment")
    eps: float = setting(1e-8, NOT_NEGATIVE, "added to the root of AdamW's second moment")
    weight_decay: float = setting(1e-4, NOT_NEGATIVE, "of every parameter")
    momentum: float = setting(0.9, DECAY, "of SGD")
    max_grad_norm: float = setting(0.0, NOT_NEGATIVE, "largest norm of all gradients; 0: any")


@dataclasses.dataclass(frozen=True)
class ScheduleSettings(Settings):
    """The learning rate by step."""

    name: str = setting("cosine", OneOf(("cosine", "multistep")), "its shape")
    warmup_epochs: int = setting(5, FROM_ZERO, "linear warm-up of `cosine`", "epochs")
    min_lr_ratio: float = setting(1e-4, SHARE, "last over largest learning rate of `cosine`")
    milestones: tuple[int, ...] = setting(
        (30, 60, 90), Each(COUNT), "when `multistep` lowers the learning rate", "epochs"
    )
    gamma: float = setting(0.1, POSITIVE, "what `multistep` multiplies it with")


def make_schedule(
    settings: ScheduleSettings, learning_rate: float, steps: int, steps_per_epoch: int
) -> optax.Schedule:
    """The learning rate as a function of the step.

    Args:
      settings: of the schedule.
      learning_rate: the peak.
      steps: of the whole run.
      steps_per_epoch: ceil(examples / batch).
    """
    if settings.name == "cosine":
        warmup = settings.warmup_epochs * steps_per_epoch
        return cosine_schedule(learning_rate, steps, warmup, settings.min_lr_ratio)
    boundaries = {epoch * steps_per_epoch: settings.gamma for epoch in settings.milestones}
    return optax.piecewise_constant_schedule(learning_rate, boundaries)


def make_optimizer(
    settings: OptimizerSettings, schedule: optax.Schedule
) -> optax.GradientTransformation:
    """AdamW, or SGD with weight decay added to the gradient, equal to PyTorch's.

    Args:
      settings: of the optimiser; the learning rate is `schedule`'s.
      schedule: learning rate by step.
    """
    if settings.name == "adamw":
        update = optax.adamw(
            schedule, settings.b1, settings.b2, settings.eps, weight_decay=settings.weight_decay
        )
    else:
        update = optax.chain(
            optax.add_decayed_weights(settings.weight_decay),
            optax.sgd(schedule, settings.momentum or None),
        )
    if settings.max_grad_norm:
        return optax.chain(optax.clip_by_global_norm(settings.max_grad_norm), update)
    return update
