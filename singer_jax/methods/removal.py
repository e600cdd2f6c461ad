"""Measures of the removal of outliers: what is left of them, and what it changes.

Lengths are root mean squares over the outlier patches of a batch, in the mean of its images' median
patch norms ("medians"). What lies beside an image's mean patch is `nullspace.deviations`.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
from jax.lax import Precision
from jaxtyping import Array, Bool, Float

from singer_jax.methods import nullspace
from singer_jax.methods.base import ModelFeatures
from singer_jax.methods.norms import clip_threshold, image_medians, token_norms

LARGEST_CHANGE = 0.1
"""Relative change of what the next block adds above which a run warns."""
CLIP_QUANTILE = 0.9
"""Value of `match.norm_clip_quantile` with which the removal is compared."""


def length(
    rows: Float[Array, "batch patches dim"],
    outliers: Bool[Array, "batch patches"],
    medians: Float[Array, "batch 1"],
) -> Float[Array, ""]:
    """Returns the root mean square norm of the outliers' rows in medians, 0 without outliers."""
    squares = jnp.where(outliers, jnp.sum(jnp.square(rows), axis=-1), 0)
    return jnp.sqrt(jnp.sum(squares) / jnp.maximum(jnp.sum(outliers), 1)) / jnp.mean(medians)


def clipped_length(patches: Float[Array, "batch patches dim"]) -> Float[Array, ""]:
    """Returns the norm to which clipping at `CLIP_QUANTILE` shortens outliers, in medians."""
    threshold = clip_threshold(token_norms(patches), CLIP_QUANTILE)
    return jnp.mean(threshold) / jnp.mean(image_medians(patches))


def without_outliers(
    features: Float[Array, "batch tokens dim"],
    projection: Float[Array, "dim dim"],
    outliers: Bool[Array, "batch patches"],
) -> Float[Array, "batch tokens dim"]:
    """Returns features whose outliers have, inside the subspace, their image's mean patch."""
    prefix = features.shape[1] - outliers.shape[1]
    deviations = nullspace.deviations(features[:, prefix:], outliers)
    removed = jnp.matmul(deviations, projection, precision=Precision.HIGHEST)
    return features.astype(jnp.float32) - jnp.pad(removed, ((0, 0), (prefix, 0), (0, 0)))


def next_block_changes(
    teacher: ModelFeatures,
    layer: int,
    replacements: Sequence[Float[Array, "batch tokens dim"]],
    ordinary: Bool[Array, "batch patches"],
) -> Float[Array, " replacements"]:
    """Returns how much replaced features change what the next block B adds to ordinary patches.

    For features F and their replacement F~ it is ||(B(F~) - F~) - (B(F) - F)|| / ||B(F) - F||, the
    norms taken over all ordinary patches of the batch.

    Args:
      teacher: The teacher and its features.
      layer: A block other than the last; F are its features.
      replacements: Features in float32 that replace F.
      ordinary: Mask of the patches.
    """
    prefix = teacher.model.arch.num_prefix_tokens
    own = teacher.features[layer].astype(jnp.float32)

    def added(features: Array) -> Array:
        # The block reads its input in the dtype of the features, which rounds it.
        features = features.astype(teacher.features[layer].dtype)
        after = teacher.next_block(layer, features).astype(jnp.float32)
        after -= features.astype(jnp.float32)
        return jnp.where(ordinary[..., None], after[:, prefix:], 0)

    # Not a scan, so that no sum over the batch lies inside a loop. `norms._largest` says why.
    reference = added(own)
    changes = jnp.stack([jnp.linalg.norm(added(features) - reference) for features in replacements])
    return changes / jnp.maximum(jnp.linalg.norm(reference), jnp.finfo(jnp.float32).tiny)
