"""Processors and shared memory that a machine or container provides to the loader."""

from __future__ import annotations

import logging
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path

LOG = logging.getLogger("singer_jax")

_GROUPS = Path("/sys/fs/cgroup")
_OWN_GROUPS = Path("/proc/self/cgroup")
_SHARED = Path("/dev/shm")
_LEAST = 2**20  # bytes of shared memory, for the locks of the decoding processes
# Batches in shared memory at the same time. Each decoding process has two finished batches, one
# being written and one being transferred; the main process holds two.
_OF_WORKER, _OF_MAIN = 4, 2
_TASKS = re.compile(r"(\d+)(?:\(x(\d+)\))?")  # SLURM's number of tasks on a node, or on several
_MOST_NODES = 10**5
_warned: set[str] = set()  # what this process has said


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
    more copy. One warning in each process states the missing memory. The processes of a job on this
    machine have equal parts of the memory.

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
    free //= processes_here(os.environ)
    if free < _LEAST:
        _warn_once(
            "%s: too little shared memory for decoding processes; using one decoding thread", folder
        )
        return 0, False
    needed = batch_bytes * (_OF_WORKER * workers + _OF_MAIN)
    if needed <= free:
        return workers, True
    _warn_once(
        "%s: %d MB free, %d MB needed; batches are sent through slower pipes: start the container "
        "with --shm-size=%dg, or lower data.workers (%d)",
        folder,
        free // 10**6,
        math.ceil(needed / 10**6),
        math.ceil(needed / 2**30),
        workers,
    )
    return workers, False


def processes_here(environment: Mapping[str, str]) -> int:
    """Returns how many processes of this job run on this machine, as far as its launcher says.

    Args:
      environment: the variables of Open MPI, of SLURM, or, with a coordinator on this machine,
        those of JAX.
    """
    number = environment.get("OMPI_COMM_WORLD_LOCAL_SIZE", "")
    if not number and "SLURM_STEP_TASKS_PER_NODE" in environment:
        tasks: list[str] = []  # of each node; "4(x2),3" are 4, 4 and 3
        for part in environment["SLURM_STEP_TASKS_PER_NODE"].split(","):
            if match := _TASKS.fullmatch(part):
                tasks += [match[1]] * min(int(match[2] or 1), _MOST_NODES)
        node = environment.get("SLURM_NODEID", "0")
        number = tasks[int(node)] if node.isdecimal() and int(node) < len(tasks) else ""
    coordinator = environment.get("JAX_COORDINATOR_ADDRESS", "").rpartition(":")[0]
    if not number and coordinator in ("localhost", "127.0.0.1"):
        number = environment.get("JAX_NUM_PROCESSES", "")
    return max(1, int(number)) if number.isdecimal() else 1


def _warn_once(text: str, *values: object) -> None:
    if text not in _warned:
        _warned.add(text)
        LOG.warning(text, *values)
