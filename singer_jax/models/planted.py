"""Artifacts of known size, place and direction: a vector that is added to a few patches.

For studies of what distillation and cleaning do to outlier tokens. A teacher that is trained with
them (`Architecture.planted`) learns to live with them, as large transformers do with their own.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from singer_jax.models.architecture import Architecture


class Planted(nnx.Module):
    """The vector; no optimiser changes it.

    Args:
      arch: for its width and the vector's length.
      dtype: of the vector.
      rngs: stream `params`, of its direction.

    Attributes:
      vector: [dim].
    """

    def __init__(self, arch: Architecture, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        drawn = jax.random.normal(rngs.params(), (arch.embed_dim,))
        length = arch.planted_length / jnp.linalg.norm(drawn)
        self.vector = nnx.Param((length * drawn).astype(dtype))


def marked_patches(
    images: Float[Array, "batch height width 3"], arch: Architecture
) -> Bool[Array, "batch patches"]:
    """The patches of each image to which the vector is added: a function of its pixels alone.

    Args:
      images: as the model takes them.
      arch: with `planted`: `random` patches, drawn by the sum of the pixels' bits, or the
        `background`, whose pixels vary least; where several vary alike, the first.
    """
    if arch.planted == "random":
        bits = jax.lax.bitcast_convert_type(images.astype(jnp.float32), jnp.uint32)
        seeds = jnp.sum(bits, axis=(1, 2, 3), dtype=jnp.uint32)  # wraps; of no order
        draw = jax.vmap(lambda seed: jax.random.uniform(jax.random.key(seed), arch.num_patches))
        scores = draw(seeds)
    else:
        (rows, columns), size = arch.grid, arch.patch_size
        shape = (len(images), rows, size, columns, size, 3)
        scores = -jnp.var(images.astype(jnp.float32).reshape(shape), axis=(2, 4)).sum(-1)
        scores = scores.reshape(len(images), arch.num_patches)
    best = jax.lax.top_k(scores, arch.planted_patches)[1]
    return jnp.any(best[:, :, None] == jnp.arange(arch.num_patches), axis=1)
