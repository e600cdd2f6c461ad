"""The learning-rate schedule that training and probes share."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import optax


def cosine_schedule(
    learning_rate: float, steps: int, warmup: int, min_lr_ratio: float
) -> optax.Schedule:
    """Returns a linear warm-up to `learning_rate`, then half a cosine to `min_lr_ratio` times it.

    With w = warmup and T = steps - w, the learning rate is lr (s + 1) / w for s < w, else
    f + (lr - f) (1 + cos(pi (s - w) / T)) / 2 with f = min_lr_ratio lr. A run that is shorter than
    its warm-up ends during the warm-up.
    """
    final, decay_steps = min_lr_ratio * learning_rate, max(steps - warmup, 1)

    def schedule(step: Any) -> Any:
        # (1 + cos x) / 2 = sin^2((pi - x) / 2), which has no cancellation near the end in float32.
        remaining = jnp.maximum(steps - step, 0) / decay_steps
        decayed = final + (learning_rate - final) * jnp.square(jnp.sin(jnp.pi / 2 * remaining))
        return jnp.where(step < warmup, learning_rate * (step + 1) / max(warmup, 1), decayed)

    return schedule
