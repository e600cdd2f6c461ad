"""Rows of features that are split over the devices of a mesh, and batches of these rows."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Int, Num

from singer_jax.platform import parallel


def spread(mesh: Mesh, rows: Any, count: int) -> Num[Array, "devices*rows ..."]:
    """Splits the first rows into blocks of equal size, one for each device, padded with zeros.

    Args:
      mesh: Mesh of the devices.
      rows: An array or a memory-mapped file; every process reads all blocks and keeps its own.
      count: Number of rows to use.
    """
    size = -(-count // mesh.size)
    shape = (size * mesh.size, *rows.shape[1:])
    sharding = parallel.batch_sharding(mesh)
    blocks = []
    for device, index in sharding.devices_indices_map(shape).items():
        start, stop, _ = index[0].indices(shape[0])
        block = np.asarray(rows[min(start, count) : min(stop, count)])
        if device.process_index == jax.process_index():
            padding = [(0, size - len(block))] + [(0, 0)] * (block.ndim - 1)
            blocks.append(jax.device_put(np.pad(block, padding), device))
    return jax.make_array_from_single_device_arrays(shape, sharding, blocks)


def pick(
    mesh: Mesh, rows: Num[Array, "rows ..."], index: Int[Array, " batch"]
) -> Num[Array, "batch ..."]:
    """Returns `rows[index]` of spread rows, split over the devices; traceable.

    Each device contributes the rows that it holds, so only a batch is communicated.
    """
    axes = mesh.axis_names
    whole, part = (s.spec for s in (parallel.replicated(mesh), parallel.batch_sharding(mesh)))

    def of_device(rows: Array, index: Array) -> Array:
        local = index - jax.lax.axis_index(axes) * len(rows)
        held = (local >= 0) & (local < len(rows))
        found = rows[jnp.clip(local, 0, len(rows) - 1)]
        mine = jnp.where(held.reshape(-1, *[1] * (rows.ndim - 1)), found, 0)
        return jax.lax.psum_scatter(mine, axes, tiled=True)

    return jax.shard_map(of_device, mesh=mesh, in_specs=(part, whole), out_specs=part)(rows, index)
