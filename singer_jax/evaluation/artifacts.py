"""Measures of a synthetic artifact: its size, and how much of it a method removes."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float

from singer_jax.evaluation.patches import PatchTokens


def outlier_length(medians: Float[np.ndarray, " layers"], ratio: float) -> float:
    """Returns the length of a vector that makes a patch's norm about `ratio` times the median.

    The vector is taken to be orthogonal to a token of median norm. The result is the mean over
    layers.

    Args:
      medians: median patch norm at each distilled layer.
      ratio: target ratio, above 1.
    """
    return float(np.mean(medians) * np.sqrt(ratio**2 - 1))


def removed_share(
    before: PatchTokens,
    after: PatchTokens,
    vector: Float[np.ndarray, " dim"],
    marked: Bool[np.ndarray, "images patches"],
) -> float:
    """Returns the share of the synthetic outlier's energy that is removed from the marked patches.

    The share is 1 - mean |v + d|^2 / |v|^2, where v is the vector and d the change of a patch. Any
    other change of the patch lowers it. It is 0 if nothing changed, and negative if the change
    added energy.
    """
    left = (after - before)[marked] + vector
    return float(1 - np.mean(np.sum(np.square(left), axis=-1)) / np.sum(np.square(vector)))


def energy_within(
    vector: Float[np.ndarray, " dim"], projection: Float[np.ndarray, "dim dim"]
) -> float:
    """Returns the share of the vector's energy in a subspace, given the subspace's projector."""
    return float(np.sum(np.square(vector @ projection)) / np.sum(np.square(vector)))


def relative_change(before: np.ndarray, after: np.ndarray) -> float:
    """Returns ||after - before|| / ||before|| over all elements."""
    return float(np.linalg.norm(after - before) / np.linalg.norm(before))
