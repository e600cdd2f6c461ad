"""Losses between predictions and targets in float32; `LOSSES` holds those of tokens by name."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from singer_jax.methods.norms import unit


def mean_squared_error(
    prediction: Float[Array, "*axes"], target: Float[Array, "*axes"]
) -> Float[Array, ""]:
    """Returns the squared difference in float32, averaged over all elements."""
    return jnp.mean(jnp.square(prediction.astype(jnp.float32) - target.astype(jnp.float32)))


def cosine_distance(
    prediction: Float[Array, "*axes dim"], target: Float[Array, "*axes dim"]
) -> Float[Array, ""]:
    """Returns 1 - cos of prediction and target, averaged over tokens."""
    return 1.0 - jnp.mean(jnp.sum(unit(prediction) * unit(target), axis=-1))


def smooth_l1(prediction: Float[Array, "*axes"], target: Float[Array, "*axes"]) -> Float[Array, ""]:
    """Returns the mean over all elements of d^2 / 2 for differences |d| < 1, else |d| - 1/2."""
    distance = jnp.abs(prediction.astype(jnp.float32) - target.astype(jnp.float32))
    within = jnp.minimum(distance, 1.0)
    return jnp.mean(within * (distance - within / 2))


def cosine_smooth_l1(
    prediction: Float[Array, "*axes dim"], target: Float[Array, "*axes dim"]
) -> Float[Array, ""]:
    """Returns the mean of `cosine_distance` and `smooth_l1`.

    This is the loss of UNIC ("Universal Classification Models via Multi-teacher Distillation",
    ECCV 2024).
    """
    return (cosine_distance(prediction, target) + smooth_l1(prediction, target)) / 2


def divergence(
    prediction: Float[Array, "*axes classes"], target: Float[Array, "*axes classes"]
) -> Float[Array, ""]:
    """Returns the mean KL(target || prediction) of log-probabilities."""
    return jnp.mean(jnp.sum(jnp.exp(target) * (target - prediction), axis=-1))


LOSSES: dict[str, Callable[[Array, Array], Array]] = {
    "mse": mean_squared_error,
    "cosine": cosine_distance,
    "smooth_l1": smooth_l1,
    "cosine_smooth_l1": cosine_smooth_l1,
}


def cross_entropy(
    logits: Float[Array, "batch classes"], labels: Int[Array, " batch"]
) -> Float[Array, ""]:
    """Returns the mean cross-entropy with integer labels in float32."""
    log_probabilities = jax.nn.log_softmax(logits.astype(jnp.float32))
    return -jnp.mean(jnp.take_along_axis(log_probabilities, labels[:, None], axis=1))
