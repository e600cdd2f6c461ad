"""Optimisers and learning-rate schedules as the official code runs them."""

from __future__ import annotations

from typing import Any

import optax

from singer_jax.schedules import cosine_schedule


def make_schedule(
    config: Any, learning_rate: float, steps: int, steps_per_epoch: int
) -> optax.Schedule:
    """The learning rate as a function of the step.

    Args:
      config: the `schedule` part: `name` (`cosine`, `multistep`), `warmup_epochs`, `final_ratio`,
        `milestones` (epochs), `gamma`.
      learning_rate: the peak.
      steps: of the whole run.
      steps_per_epoch: ceil(examples / batch).
    """
    if config.name == "cosine":
        warmup = config.warmup_epochs * steps_per_epoch
        return cosine_schedule(learning_rate, steps, warmup, config.final_ratio)
    boundaries = {epoch * steps_per_epoch: config.gamma for epoch in config.milestones}
    return optax.piecewise_constant_schedule(learning_rate, boundaries)


def make_optimizer(config: Any, schedule: optax.Schedule) -> optax.GradientTransformation:
    """AdamW, or SGD with weight decay added to the gradient, equal to PyTorch's.

    Args:
      config: the `optimizer` part: `name`, `b1`, `b2`, `eps`, `weight_decay` (on every parameter),
        `momentum`, `clip_norm` (0: no clipping).
      schedule: learning rate by step.
    """
    if config.name == "adamw":
        update = optax.adamw(
            schedule, config.b1, config.b2, config.eps, weight_decay=config.weight_decay
        )
    else:
        update = optax.chain(
            optax.add_decayed_weights(config.weight_decay),
            optax.sgd(schedule, config.momentum or None),
        )
    if config.clip_norm:
        return optax.chain(optax.clip_by_global_norm(config.clip_norm), update)
    return update
