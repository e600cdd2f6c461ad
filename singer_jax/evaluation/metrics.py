"""Counts and scores, on the device, with padding left out."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def correct_in_top(
    logits: Float[Array, "batch classes"], labels: Int[Array, " batch"], k: int
) -> Bool[Array, " batch"]:
    """Whether fewer than `k` classes score higher than the label's (ties count for the label)."""
    score = jnp.take_along_axis(logits, labels[:, None], axis=1)
    return jnp.sum(logits > score, axis=1) < k
