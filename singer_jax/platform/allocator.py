"""Settings of the C library's memory allocator."""

from __future__ import annotations

import ctypes
import glob

import jax

# Device files of NVIDIA and AMD GPUs and of TPUs.
_ACCELERATORS = ("/dev/nvidia[0-9]*", "/dev/kfd", "/dev/accel*", "/dev/vfio/[0-9]*")
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8  # names of mallopt(3)


def keep_freed_memory() -> None:
    """Makes the process keep the memory that a step on the CPU frees, for the next step.

    XLA allocates the temporaries of a program at each call. By default glibc returns them to the
    operating system after the call, which then clears every page again: 6 % of the time of a step
    (benchmarks/README.md). The setting holds for threads that start later, so call this before JAX
    starts a backend. It has no effect if the machine has an accelerator or another C library.
    """
    if jax.config.jax_platforms != "cpu" and any(map(glob.glob, _ACCELERATORS)):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # TypeError: Windows
        return
    mallopt(_ARENA_MAX, 1)  # only the first arena keeps memory of this size
    mallopt(_MMAP_MAX, 0)
    mallopt(_TRIM_THRESHOLD, -1)
