"""Settings of the C library's memory allocator."""

from __future__ import annotations

import ctypes
import glob
import os

import jax

# Device files of NVIDIA and AMD GPUs, of TPUs, and of GPUs in Windows's subsystem for Linux.
_ACCELERATORS = ("/dev/nvidia[0-9]*", "/dev/kfd", "/dev/accel*", "/dev/vfio/[0-9]*", "/dev/dxg")
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8  # names of mallopt(3)


def keep_freed_memory() -> None:
    """Makes the process keep the memory that a step on the CPU frees, for the next step.

    XLA allocates the temporaries of a program at each call. By default glibc returns them to the
    operating system after the call, which then clears every page again: 6 % of the time of a step
    (benchmarks/README.md, measured with two cores). All threads then share one arena.

    The setting holds for threads that start later, so call this before JAX starts a backend. It has
    no effect if the machine has an accelerator, if the environment sets the allocator, or with
    another C library.
    """
    if jax.config.jax_platforms != "cpu" and any(map(glob.glob, _ACCELERATORS)):
        return
    if any(name == "GLIBC_TUNABLES" or name.startswith("MALLOC_") for name in os.environ):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # TypeError: Windows
        return
    mallopt(_ARENA_MAX, 1)  # only the first arena keeps memory of this size
    mallopt(_MMAP_MAX, 0)
    mallopt(_TRIM_THRESHOLD, -1)
