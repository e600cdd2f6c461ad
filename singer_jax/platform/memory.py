"""How much of an evaluation is on a device at once."""

from __future__ import annotations

from jax.sharding import Mesh

from singer_jax.platform.parallel import device_memory

_SHARE = 4  # a quarter of the memory; the rest is for parameters, programs and their temporaries


def fitting(mesh: Mesh, bytes_each: float) -> int:
    """How many things of a size fit onto each device of a mesh, beside all else: at least one.

    Every size of a batch, of a bank and of a chunk that an evaluation chooses by itself comes from
    here. The answer is the same in every process.

    Args:
      mesh: of the devices.
      bytes_each: what one of the things takes on a device.
    """
    return max(1, int(device_memory(mesh) / _SHARE // bytes_each))
