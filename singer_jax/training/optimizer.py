"""Optimisers and learning-rate schedules, equal to those of the official code."""

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
    """Settings of the optimiser."""

    name: str = setting("adamw", OneOf(("adamw", "sgd")), "Name of the optimiser.")
    learning_rate: float = setting(1e-3, NOT_NEGATIVE, "Peak learning rate of the schedule.")
    b1: float = setting(0.9, DECAY, "Decay rate of AdamW's first moment.")
    b2: float = setting(0.999, DECAY, "Decay rate of AdamW's second moment.")
    eps: float = setting(
        1e-8, NOT_NEGATIVE, "Constant added to the square root of AdamW's second moment."
    )
    weight_decay: float = setting(1e-4, NOT_NEGATIVE, "Weight decay of every trained parameter.")
    momentum: float = setting(0.9, DECAY, "Momentum of SGD.")
    max_grad_norm: float = setting(
        0.0, NOT_NEGATIVE, "Global norm to which gradients are clipped. 0: no clipping."
    )


@dataclasses.dataclass(frozen=True)
class ScheduleSettings(Settings):
    """Settings of the learning-rate schedule."""

    name: str = setting("cosine", OneOf(("cosine", "multistep")), "Shape of the schedule.")
    warmup_epochs: int = setting(5, FROM_ZERO, "Number of epochs of linear warm-up of `cosine`.")
    min_lr_ratio: float = setting(
        1e-4, SHARE, "Ratio of the last to the peak learning rate of `cosine`."
    )
    milestones: tuple[int, ...] = setting(
        (30, 60, 90), Each(COUNT), "Epochs after which `multistep` multiplies the rate by `gamma`."
    )
    gamma: float = setting(
        0.1, POSITIVE, "Factor by which `multistep` multiplies the learning rate at a milestone."
    )


def make_schedule(
    settings: ScheduleSettings, learning_rate: float, steps: int, steps_per_epoch: int
) -> optax.Schedule:
    """Returns the learning rate as a function of the step.

    Args:
      settings: Settings of the schedule.
      learning_rate: Peak learning rate.
      steps: Number of steps of the whole run.
      steps_per_epoch: Number of steps per epoch, ceil(examples / batch).
    """
    if settings.name == "cosine":
        warmup = settings.warmup_epochs * steps_per_epoch
        return cosine_schedule(learning_rate, steps, warmup, settings.min_lr_ratio)
    boundaries = {epoch * steps_per_epoch: settings.gamma for epoch in settings.milestones}
    return optax.piecewise_constant_schedule(learning_rate, boundaries)


def make_optimizer(
    settings: OptimizerSettings, schedule: optax.Schedule
) -> optax.GradientTransformation:
    """Makes AdamW, or SGD with weight decay added to the gradient, equal to PyTorch's.

    Args:
      settings: Settings of the optimiser; the learning rate comes from `schedule`.
      schedule: Learning rate by step.
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
