"""Rotary and relative positions, equal to timm's modules, and the resampling of stored ones.

Axis names: patches (row by row), heads, head_dim.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from singer_jax.models.architecture import Architecture

Rotation = Float[Array, "2 patches heads head_dim"]
"""Sine and cosine of the rotation of each pair of channels at each patch."""


class MixedFrequencies(nnx.Module):
    """Learned frequencies for each coordinate, block and head (`rope_type` `mixed`)."""

    def __init__(self, arch: Architecture, param_dtype: Any, rngs: nnx.Rngs) -> None:
        width = arch.embed_dim // arch.num_heads
        magnitude = arch.rope_temperature ** -jnp.repeat(
            jnp.arange(0, width, 4)[None] / width, 2, axis=0
        )
        turned = jax.random.uniform(rngs.params(), (arch.depth, arch.num_heads, 1, 1))
        angles = 2 * math.pi * turned + jnp.asarray([[0.0], [math.pi / 2]])
        both = jnp.stack([magnitude * jnp.cos(angles), magnitude * jnp.sin(angles)])
        self.freqs = nnx.Param(both.reshape(*both.shape[:3], -1).astype(param_dtype))

    def rotation(self, arch: Architecture, index: int | Int[Array, ""]) -> Rotation:
        """Returns the rotation of block `index` in float32."""
        place = jnp.asarray(_places(arch), jnp.float32)  # patches, 2
        angles = jnp.einsum("pc,chk->phk", place, self.freqs[...][:, index].astype(jnp.float32))
        return jnp.repeat(jnp.stack([jnp.sin(angles), jnp.cos(angles)]), 2, axis=-1)


@functools.lru_cache(maxsize=32)
def fixed_rotation(arch: Architecture) -> Float[np.ndarray, "2 patches 1 head_dim"]:
    """Returns the rotation that all blocks share, in float32.

    `dinov3` (timm `RotaryEmbeddingDinoV3`): patch centres have coordinates in [-1, 1]; the first
    quarter of the channels depends on the row, the second quarter on the column, and the other half
    repeats both. `cat` (timm `RotaryEmbeddingCat`): coordinates start at `rope_grid_offset`; pairs
    of neighbouring channels are rotated, the first half of them by the first coordinate.
    """
    width, whole = arch.embed_dim // arch.num_heads, arch.rope_type == "dinov3"
    periods = arch.rope_temperature ** (4 * np.arange(width // 4) / width)
    turns = (2 * math.pi if whole else 1) * _places(arch)[..., None]
    angles = (turns / periods).reshape(arch.num_patches, 1, -1)
    angles = np.tile(angles, 2) if whole else np.repeat(angles, 2, axis=-1)
    return np.stack([np.sin(angles), np.cos(angles)]).astype(np.float32)


def _places(arch: Architecture) -> Float[np.ndarray, "patches 2"]:
    """Returns two coordinates of each patch; with `rope_grid_indexing` `xy` the column is first."""
    sides, reference = arch.grid, arch.ref_feat_shape or arch.grid
    if arch.rope_type == "dinov3":
        along = [(2 * np.arange(side) + 1) / side - 1 for side in sides]
    elif arch.rope_type == "cat":
        along = [
            (np.arange(side) + arch.rope_grid_offset) / side * other
            for side, other in zip(sides, reference, strict=True)
        ]
    else:
        along = [np.arange(side) for side in sides]
    places = np.stack(np.meshgrid(*along, indexing="ij"), axis=-1).reshape(-1, 2)
    return places[:, ::-1] if arch.rope_grid_indexing == "xy" else places


def rotate(
    x: Float[Array, "batch tokens heads head_dim"], by: Rotation, halves: bool
) -> Float[Array, "batch tokens heads head_dim"]:
    """Rotates the patches in float32; prefix tokens are unchanged.

    Args:
      x: tokens, prefix tokens first.
      by: rotation of the patches.
      halves: pair each channel with the one half a head further, instead of its neighbour.
    """
    prefix, patches = jnp.split(x, [x.shape[1] - by.shape[1]], axis=1)
    wide = patches.astype(jnp.float32)
    if halves:
        first, second = jnp.split(wide, 2, axis=-1)
        across = jnp.concatenate([-second, first], -1)
    else:
        across = jnp.stack([-wide[..., 1::2], wide[..., ::2]], -1).reshape(wide.shape)
    sine, cosine = by
    return jnp.concatenate([prefix, (wide * cosine + across * sine).astype(x.dtype)], axis=1)


@functools.lru_cache(maxsize=32)
def relative_positions(grid: tuple[int, int]) -> Int[np.ndarray, "tokens tokens"]:
    """Returns the row of Beit's table for each pair of tokens; the class token is the first token.

    The last three rows are for pairs from the class token, to it, and from it to itself.
    """
    rows, columns = (np.arange(side) for side in grid)
    row, column = (part.ravel() for part in np.meshgrid(rows, columns, indexing="ij"))
    between = (row[:, None] - row + grid[0] - 1) * (2 * grid[1] - 1)
    between += column[:, None] - column + grid[1] - 1
    count = (2 * grid[0] - 1) * (2 * grid[1] - 1)
    index = np.empty((1 + len(row),) * 2, np.int32)
    index[1:, 1:], index[0], index[:, 0], index[0, 0] = between, count, count + 1, count + 2
    return index


def resample_relative_positions(
    table: Float[np.ndarray, "distances heads"], grid: tuple[int, int], others: int
) -> Float[np.ndarray, "distances heads"]:
    """Resamples Beit's table of a square grid to another grid (timm `resize_rel_pos_bias_table`).

    The stored distances are placed on a geometric progression that covers the new distances, and
    the bias is interpolated linearly between them.

    Args:
      table: one row for each distance between patches, row by row, then `others` rows.
      grid: rows and columns to resample to.
      others: number of last rows that are not distances between patches; they are kept.
    """
    patches, kept = np.split(table.astype(np.float32), [len(table) - others])
    side = math.isqrt(len(patches))
    square = patches.reshape(side, side, -1)
    for axis, size in enumerate(grid):
        weights = _interpolation(side, 2 * size - 1)
        square = np.moveaxis(np.tensordot(weights, square, (1, axis)), 0, axis)
    return np.concatenate([square.reshape(-1, table.shape[1]), kept]).astype(table.dtype)


def _interpolation(stored: int, wanted: int) -> Float[np.ndarray, "wanted stored"]:
    """Returns the matrix of the linear interpolation along one axis."""
    half, reach = stored // 2, wanted // 2
    low, high = 1.01, 1.5
    while high - low > 1e-6:  # the ratio for which the progression ends at `reach`
        ratio = (low + high) / 2
        low, high = (low, ratio) if (1 - ratio**half) / (1 - ratio) > reach else (ratio, high)
    places = np.cumsum(ratio ** np.arange(half))
    places = np.concatenate([-places[::-1], [0], places])
    targets = np.arange(-reach, reach + 1)
    return np.stack([np.interp(targets, places, row) for row in np.eye(stored)], axis=1)
