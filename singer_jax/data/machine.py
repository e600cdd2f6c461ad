"""What a machine, or the container on it, gives the loader: processors and shared memory."""

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
_LEAST = 2**20  # bytes of shared memory for the locks of decoding processes
# Batches that each decoding process has in shared memory at the same time: two that wait, one that
# is written and one that is taken over; and those that the main process holds.
_OF_WORKER, _OF_MAIN = 4, 2
_TASKS = re.compile(r"(\d+)(?:\(x(\d+)\))?")  # SLURM's number of tasks on a node, or on several
_MOST_NODES = 10**5
_warned: set[str] = set()  # what this process has said


def processors(own_groups: Path = _OWN_GROUPS, groups: Path = _GROUPS) -> int:
    """Returns how many processors this process may use, by its affinity and its control groups.

    Args:
      own_groups: the file that names the control groups of this process.
      groups: where control groups (version 1 or 2) are mounted.
    """
    affine = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, math.floor(min(affine or 1, _quota(own_groups, groups))))


def _quota(own_groups: Path, groups: Path) -> float:
    """Returns the processors that `docker run --cpus` or a Kubernetes limit leaves; inf: all."""
    found = [math.inf]
    for line in _read(own_groups).splitlines():
        _, controllers, path = line.split(":", 2)
        names = controllers.split(",")
        if controllers and "cpu" not in names:
            continue
        mounts = ("", "unified") if not controllers else ("cpu", controllers)
        # A container may show a path of the host, of which it sees only the last part as root.
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
    """Returns the processors of a quota and a period; inf where it is no limit."""
    try:
        limit, period = (int(part) for part in quota)
    except ValueError:  # "max", or no such file
        return math.inf
    return limit / period if limit > 0 and period > 0 else math.inf


def _read(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:
        return ""


def sharing(workers: int, batch_bytes: int, folder: Path = _SHARED) -> tuple[int, bool]:
    """Returns how many decoding processes can run, and whether they may use shared memory.

    Without enough of it batches go through pipes, which takes the main process a copy more. What is
    missing is said in one line, once in a process. Processes of one job on this machine have equal
    parts of the memory.

    Args:
      workers: decoding processes that are wanted.
      batch_bytes: bytes of a batch of this process.
      folder: where shared memory is mounted.
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
        _warn_once("%s: no room for decoding processes; images are decoded in a thread", folder)
        return 0, False
    needed = batch_bytes * (_OF_WORKER * workers + _OF_MAIN)
    if needed <= free:
        return workers, True
    _warn_once(
        "%s: %d MB free, %d MB needed; batches go through pipes, which is slower: start the "
        "container with --shm-size=%dg, or lower data.workers (%d)",
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
