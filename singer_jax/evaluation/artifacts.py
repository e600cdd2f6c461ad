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

    1 - mean (a + d)^2 / a^2 with a the vector's length and d what the change adds along it. 0: it
    is as it was; below 0: it is larger, also where it was turned round and more.
    """
    length = np.linalg.norm(planted)
    along = (after - before)[marked] @ (planted / length)
    return float(1 - np.mean(np.square(length + along)) / length**2)


def energy_within(
    planted: Float[np.ndarray, " dim"], projection: Float[np.ndarray, "dim dim"]
) -> float:
    """The share of the vector's energy in a subspace, from its projector."""
    return float(np.sum(np.square(planted @ projection)) / np.sum(np.square(planted)))


def relative_change(before: np.ndarray, after: np.ndarray) -> float:
    """||after - before|| / ||before||, of all elements together."""
    return float(np.linalg.norm(after - before) / np.linalg.norm(before))
