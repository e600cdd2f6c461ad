"""Sizes of the batches and chunks of an evaluation, chosen from the memory of a device."""

from __future__ import annotations

from jax.sharding import Mesh

from singer_jax.platform.parallel import device_memory

_SHARE = 4  # a quarter of the memory; the rest is for parameters, programs and their temporaries


def fitting(mesh: Mesh, bytes_each: float) -> int:
    """Returns how many items of a size fit into a quarter of each device's memory, at least one.

    An evaluation chooses the sizes of its batches, feature banks and chunks with it. The result is
    the same in every process.

    Args:
      mesh: Mesh of the devices.
      bytes_each: Memory of one item on a device in bytes.
    """
    return max(1, int(device_memory(mesh) / _SHARE // bytes_each))
