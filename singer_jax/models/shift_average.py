"""Features averaged over shifted and flipped views of the images.

This is the teacher's part of "Vision Transformers with Self-Distilled Registers" (PH-Reg), NeurIPS
2025 (arXiv 2505.21501): artifacts appear at different positions in different views. The paper draws
random views. Here the views are fixed and shifts are whole patches, so that features can be aligned
without interpolation.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from singer_jax.models.architecture import Architecture


def views(grid: tuple[int, int]) -> Int[np.ndarray, "views 3"]:
    """Returns each view's shift down and to the right in patches, and whether it is flipped.

    The ten views are five shifts, each with and without a horizontal flip: no shift, and a shift by
    an eighth of the side (at least one patch) in each of four directions.
    """
    rows, columns = (max(1, round(side / 8)) for side in grid)
    shifts = ((0, 0), (rows, 0), (-rows, 0), (0, columns), (0, -columns))
    found = [(*shift, flipped) for shift, flipped in itertools.product(shifts, (0, 1))]
    return np.array(found, np.int32)


def averaged(
    compute: Callable[[Float[Array, "batch height width 3"]], Any],
    images: Float[Array, "batch height width 3"],
    arch: Architecture,
) -> Any:
    """Returns the mean over `views` of a tree of features [batch, tokens, dim].

    A shift fills the empty area by repeating the border of the image. A patch is averaged over the
    views in which it is visible, a prefix token over all views. Sums are in float32.

    Args:
      compute: function from images to features.
      images: normalised images.
      arch: architecture of the model, which has the grid of patches and the prefix tokens.
    """
    grid, size, prefix = arch.grid, arch.patch_size, arch.num_prefix_tokens
    every = views(grid)
    most = int(np.abs(every[:, :2]).max())
    around = ((0, 0), (most * size,) * 2, (most * size,) * 2, (0, 0))
    wide = jnp.pad(images, around, mode="edge")

    def put_back(found: Array, view: Array) -> Array:
        down, right, flipped = view
        found = found.astype(jnp.float32)
        patches = found[:, prefix:].reshape(found.shape[0], *grid, found.shape[-1])
        patches = jnp.where(flipped, patches[:, :, ::-1], patches)
        padded = jnp.pad(patches, ((0, 0), (most,) * 2, (most,) * 2, (0, 0)))
        start = (0, most + down, most + right, 0)
        patches = jax.lax.dynamic_slice(padded, start, patches.shape)
        return jnp.concatenate([found[:, :prefix], patches.reshape(found[:, prefix:].shape)], 1)

    def add(total: Any, view: Array) -> tuple[Any, None]:
        down, right, flipped = view
        start = (0, (most - down) * size, (most - right) * size, 0)
        seen = jax.lax.dynamic_slice(wide, start, images.shape)
        seen = jnp.where(flipped, seen[:, :, ::-1], seen)
        return jax.tree.map(lambda x, y: x + put_back(y, view), total, compute(seen)), None

    shapes = jax.eval_shape(compute, images)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), shapes)
    total, _ = jax.lax.scan(add, zeros, every)
    counts = np.concatenate([np.full(prefix, len(every)), _seen(every, grid).ravel()])
    means = jax.tree.map(lambda x: x / counts[:, None].astype(np.float32), total)
    return jax.tree.map(lambda x, like: x.astype(like.dtype), means, shapes)


def _seen(every: Int[np.ndarray, "views 3"], grid: tuple[int, int]) -> np.ndarray:
    """Returns the number of views in which each patch is visible."""
    row, column = np.indices(grid)
    at = [(row + down, column + right) for down, right, _ in every.tolist()]
    inside = [(r >= 0) & (r < grid[0]) & (c >= 0) & (c < grid[1]) for r, c in at]
    return np.sum(inside, axis=0)
