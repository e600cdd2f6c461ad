"""How much of an evaluation is on a device at once."""

from __future__ import annotations

import functools
import os

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

_SHARE = 4  # a quarter of the memory; the rest is for parameters, programs and their temporaries


@functools.cache
def device_memory(mesh: Mesh) -> int:
    """Bytes of the smallest of the mesh's devices.

    What the device says (GPU, TPU); the CPU says nothing, its devices share the host's memory.
    """
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // jax.local_device_count()
    found = min(
        (device.memory_stats() or {}).get("bytes_limit", host) for device in mesh.local_devices
    )
    if jax.process_count() > 1:  # all must choose the same sizes; MiB, as integers have 32 bits
        found = int(multihost_utils.process_allgather(np.int32(found >> 20)).min()) << 20
    return found


def fitting(mesh: Mesh, bytes_each: float) -> int:
    """How many things of a size fit onto each device of a mesh, beside all else: at least one.

    Every size of a batch, of a bank and of a chunk that an evaluation chooses by itself comes from
    here. The answer is the same in every process.

    Args:
      mesh: of the devices.
      bytes_each: what one of the things takes on a device.
    """
    return max(1, int(device_memory(mesh) / _SHARE // bytes_each))
