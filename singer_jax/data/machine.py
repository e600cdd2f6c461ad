"""Processors and shared memory that a machine or container provides to the loader."""

from __future__ import annotations

import logging
import math
import os
from pathlib import Path

LOG = logging.getLogger("singer_jax")

_GROUPS = Path("/sys/fs/cgroup")
_OWN_GROUPS = Path("/proc/self/cgroup")
_SHARED = Path("/dev/shm")
_LEAST = 2**20  # bytes of shared memory, for the locks of the decoding processes
# Batches in shared memory at the same time. Each decoding process has two finished batches, one
# being written and one being transferred; the main process holds two.
_OF_WORKER, _OF_MAIN = 4, 2


def processors(own_groups: Path = _OWN_GROUPS, groups: Path = _GROUPS) -> int:
    """Returns the number of processors that affinity and control groups allow this process.

    Args:
      own_groups: file that lists the control groups of this process.
      groups: mount point of control groups (version 1 or 2).
    """
    affine = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, math.floor(min(affine or 1, _quota(own_groups, groups))))


def _quota(own_groups: Path, groups: Path) -> float:
    """Returns the processor limit of `docker run --cpus` or Kubernetes; inf: no limit."""
    found = [math.inf]
    for line in _read(own_groups).splitlines():
        _, controllers, path = line.split(":", 2)
        names = controllers.split(",")
        if controllers and "cpu" not in names:
            continue
        mounts = ("", "unified") if not controllers else ("cpu", controllers)
        # A container may show the path on the host, only the last part of which is mounted.
        within = Path("/", path).parts[1:]
        for mount in mounts:
            for depth in range(len(within) + 1):
                folder = groups.joinpath(mount, *within[:depth])
                if controllers:
                    quota = [_read(folder / f"cpu.cfs_{name}_us") for name in ("quota", "period")]
                else:
                    quota = _read(folder / "cpu.max").split()
                found.append(_ratio(quota))
    return min(found)


def _ratio(quota: list[str]) -> float:
    """Returns the number of processors of a quota and a period; inf: no limit."""
    try:
        limit, period = (int(part) for part in quota)
    except ValueError:  # "max", or the file does not exist
        return math.inf
    return limit / period if limit > 0 and period > 0 else math.inf


def _read(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:
        return ""


def sharing(workers: int, batch_bytes: int, folder: Path = _SHARED) -> tuple[int, bool]:
    """Returns how many decoding processes can run, and whether they may use shared memory.

    Without enough shared memory, batches are sent through pipes, which costs the main process one
    more copy. A warning states the missing memory.

    Args:
      workers: requested number of decoding processes.
      batch_bytes: size of this process's part of a batch, in bytes.
      folder: mount point of shared memory.
    """
    if workers == 0 or os.name != "posix" or not Path("/proc").is_dir():
        return workers, True
    try:
        status = os.statvfs(folder)
        free = status.f_bavail * status.f_frsize if os.access(folder, os.W_OK) else 0
    except OSError:
        free = 0
    if free < _LEAST:
        LOG.warning(
            "%s: too little shared memory for decoding processes; using one decoding thread", folder
        )
        return 0, False
    needed = batch_bytes * (_OF_WORKER * workers + _OF_MAIN)
    if needed <= free:
        return workers, True
    LOG.warning(
        "%s: %d MB free, %d MB needed; batches are sent through slower pipes: start the container "
        "with --shm-size=%dg, or lower data.workers (%d)",
        folder,
        free // 10**6,
        math.ceil(needed / 10**6),
        math.ceil(needed / 2**30),
        workers,
    )
    return workers, False
