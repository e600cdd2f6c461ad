"""Synthetic outliers of known norm, position and direction: a vector added to a few patches.

They are for studies of the effect of distillation and artifact removal on outlier tokens. A teacher
that is trained with them (`Architecture.synthetic_outlier`) adapts to them, as large transformers
adapt to their own outliers.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from singer_jax.models.architecture import Architecture


class SyntheticOutlier(nnx.Module):
    """Holds the outlier vector, which no optimiser changes.

    Args:
      arch: architecture, which has the width and the vector's length.
      dtype: dtype of the vector.
      rngs: random streams; `params` gives the direction.

    Attributes:
      vector: [dim].
    """

    def __init__(self, arch: Architecture, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        drawn = jax.random.normal(rngs.params(), (arch.embed_dim,))
        length = arch.synthetic_outlier_length / jnp.linalg.norm(drawn)
        self.vector = nnx.Param((length * drawn).astype(dtype))


def marked_patches(
    images: Float[Array, "batch height width 3"], arch: Architecture
) -> Bool[Array, "batch patches"]:
    """Marks the patches that the vector is added to, as a function of the pixels alone.

    Args:
      images: normalised images.
      arch: architecture, whose `synthetic_outlier` selects the patches. `random` patches are drawn
        from a sum over the pixels, which is rounded so that it is the same in every program.
        `background` patches are those whose pixels vary least; of equal ones, the first.
    """
    if arch.synthetic_outlier == "random":
        levels = jnp.round(images.astype(jnp.float32) * 32).astype(jnp.int32).astype(jnp.uint32)
        levels = levels.reshape(images.shape[0], -1)
        places = jnp.arange(levels.shape[1], dtype=jnp.uint32) * jnp.uint32(2654435761)
        seeds = jnp.sum(levels * places, axis=1, dtype=jnp.uint32)  # wraps; exact in any order
        draw = jax.vmap(lambda seed: jax.random.uniform(jax.random.key(seed), arch.num_patches))
        scores = draw(seeds)
    else:
        (rows, columns), size = arch.grid, arch.patch_size
        shape = (images.shape[0], rows, size, columns, size, 3)
        scores = -jnp.var(images.astype(jnp.float32).reshape(shape), axis=(2, 4)).sum(-1)
        scores = scores.reshape(images.shape[0], arch.num_patches)
    best = jax.lax.top_k(scores, arch.synthetic_outlier_patches)[1]
    return jnp.any(best[:, :, None] == jnp.arange(arch.num_patches), axis=1)
