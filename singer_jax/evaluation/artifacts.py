"""What became of a planted artifact: its size, how much of it is removed, and who saw that."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float

from singer_jax.evaluation.patches import PatchTokens


def planted_length(medians: Float[np.ndarray, " layers"], ratio: float) -> float:
    """Of a vector that makes the norm of a patch `ratio` times the median, about.

    A vector at right angles to a token of median length adds its square; the mean over the layers.

    Args:
      medians: of the patch norms at each distilled layer.
      ratio: above 1.
    """
    return float(np.mean(medians) * np.sqrt(ratio**2 - 1))


def removed_share(
    before: PatchTokens,
    after: PatchTokens,
    planted: Float[np.ndarray, " dim"],
    marked: Bool[np.ndarray, "images patches"],
) -> float:
    """The share of the planted vector's energy that is gone from the marked patches.

    1 - mean |v + d|^2 / |v|^2 with v the vector and d the change of a patch: all else that the
    change does to it counts against it. 0: it is as it was; below 0: it is worse.
    """
    left = (after - before)[marked] + planted
    return float(1 - np.mean(np.sum(np.square(left), axis=-1)) / np.sum(np.square(planted)))


def energy_within(
    planted: Float[np.ndarray, " dim"], projection: Float[np.ndarray, "dim dim"]
) -> float:
    """The share of the vector's energy in a subspace, from its projector."""
    return float(np.sum(np.square(planted @ projection)) / np.sum(np.square(planted)))


def relative_change(before: np.ndarray, after: np.ndarray) -> float:
    """||after - before|| / ||before||, of all elements together."""
    return float(np.linalg.norm(after - before) / np.linalg.norm(before))
