"""Several processes of one job: how they find each other, and how they stop and fail together.

Beside their computations they talk through the key-value store of JAX's coordinator, which a thread
of each process reads. So a process that fails tells the others why, instead of leaving them in a
collective that never ends, and a signal to one of them stops all after the same step.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import logging
import os
import re
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn

import jax
from jax._src import distributed, xla_bridge

from singer_jax.errors import InputError, RunError, Stopped
from singer_jax.platform import signals

LOG = logging.getLogger("singer_jax")

_POLL = 0.5  # seconds
_SILENCE = 40  # seconds without a sign of a process, after which JAX ends all others
_EXPECTED = (InputError, RunError, Stopped, signals.Interrupted)
# What a collective on CPUs raises, mostly as a ValueError, where another process is gone.
_GONE = re.compile(r"\bGloo\b")
_KEYS = "singer_jax/"
_FLAGS = "--coordinator=HOST:PORT --processes=N --process=I"


def join(
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
    timeout: int = 300,
) -> None:
    """Joins the other processes of the job, if there are any.

    Cloud TPU, SLURM, Open MPI and Kubernetes are detected by JAX.

    Args:
      coordinator: HOST:PORT of process 0, where nothing is to be detected; by default the
        environment's JAX_COORDINATOR_ADDRESS.
      processes: how many there are; JAX_NUM_PROCESSES.
      process: which one this is, from 0; JAX_PROCESS_ID.
      timeout: seconds to wait for the others.

    Raises:
      InputError: the three do not fit together, or the others cannot be found.
    """
    given = _given(coordinator, processes, process, os.environ)
    if given.get("num_processes") == 1 or (not given and _alone(os.environ)):
        return
    if not given and xla_bridge.backends_are_initialized():
        return  # already at work, alone or joined
    # It would take SIGTERM over.
    jax.config.update("jax_enable_preemption_service", False)
    with _deadline(timeout, given):
        try:
            jax.distributed.initialize(
                **given,
                initialization_timeout=2 * timeout,
                heartbeat_timeout_seconds=_SILENCE,
            )
        except (OSError, RuntimeError, ValueError) as error:
            if given or not _no_cluster(error, os.environ):
                reason = str(error).strip().splitlines()[0]
                raise InputError(f"cannot join the other processes: {reason}; {_FLAGS}") from error
    if not jax.distributed.is_initialized():
        _check_alone(os.environ)
    elif distributed.global_state.num_processes > 1:
        global _group
        _group = _Group(distributed.global_state)
        if _group.process > 0:
            LOG.setLevel(logging.WARNING)  # the first process tells the story
        signals.on_leaving(_group.fail)


def stop_after(step: int) -> bool:
    """Whether to stop after this step; all processes answer alike, at no cost.

    Args:
      step: rises from call to call, by the same steps in all processes.
    """
    return _group.stop_after(step) if _group else signals.requested()


@contextlib.contextmanager
def together() -> Iterator[None]:
    """All processes leave the block together, or fail together with one reason and status."""
    try:
        yield
    except BaseException as error:
        if _group:
            known = isinstance(error, (*_EXPECTED, jax.errors.JaxRuntimeError))
            if not known and not _GONE.search(str(error)):
                traceback.print_exc()
            _group.fail(*_reason(error))
        raise
    if _group:
        _group.finish()


@contextlib.contextmanager
def leaving_within(seconds: float) -> Iterator[None]:
    """A failure inside ends all processes by then, also where cleaning up waits for another one.

    One that is gone is not waited for: JAX would end the others, `_SILENCE` later and at length.
    """
    try:
        yield
    except BaseException as error:
        if _group:
            seconds = 5 if _GONE.search(str(error)) else seconds
            timer = threading.Timer(seconds, _group.fail, _reason(error))
            timer.daemon = True
            timer.start()
        raise


def _reason(error: BaseException) -> tuple[int, str]:
    lines = str(error).strip().splitlines() or [""]
    if isinstance(error, _EXPECTED):
        return error.status, lines[0]
    if _GONE.search(lines[0]):
        return 1, f"another process is gone, finished checkpoints are kept: {lines[0]}"
    return 1, f"{type(error).__name__}: {lines[0]}"


def _given(
    coordinator: str | None,
    processes: int | None,
    process: int | None,
    environment: Mapping[str, str],
) -> dict[str, Any]:
    """Arguments of `jax.distributed.initialize`; empty where all is left to detection."""
    names = {
        "--coordinator": ("JAX_COORDINATOR_ADDRESS", coordinator),
        "--processes": ("JAX_NUM_PROCESSES", processes),
        "--process": ("JAX_PROCESS_ID", process),
    }
    found: dict[str, Any] = {
        flag: environment.get(variable) or None if value is None else value
        for flag, (variable, value) in names.items()
    }
    for flag in ("--processes", "--process"):
        try:
            found[flag] = None if found[flag] is None else int(found[flag])
        except ValueError:
            raise InputError(
                f"{flag} or {names[flag][0]}: {found[flag]!r} is not a number"
            ) from None
    address, count, number = found.values()
    if count == 1 and not number and address is None:
        return {"num_processes": 1}
    if all(value is None for value in found.values()):
        return {}
    missing = [f"{f} (or {names[f][0]})" for f, value in found.items() if value is None]
    if missing:
        raise InputError(f"{' and '.join(missing)}: missing; give all of {_FLAGS}, or none")
    match = re.fullmatch(r"\S+:(\d{1,5})", address)
    if not match or not 0 < int(match[1]) < 2**16:
        raise InputError(f"--coordinator: {address!r}; give HOST:PORT of process 0")
    if count < 1 or not 0 <= number < count:
        raise InputError(
            f"--process: {number} of --processes {count}; processes are counted from 0"
        )
    if number == 0 and count > 1:
        try:
            socket.create_server(("", int(match[1]))).close()
        except OSError as error:
            raise InputError(
                f"--coordinator: port {match[1]} of this machine: {error.strerror}; give a free one"
            ) from error
    return {
        "coordinator_address": address,
        "num_processes": count,
        "process_id": number,
        "cluster_detection_method": "deactivate",
    }


def _alone(environment: Mapping[str, str]) -> bool:
    """Inside a SLURM job, but started by hand: JAX would wait for tasks that never come."""
    started = {"SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"} & set(environment)
    alone = "SLURM_JOB_ID" in environment and all(environment[name] == "1" for name in started)
    if alone and environment.get("SLURM_NTASKS", "1") != "1":
        LOG.warning("one process for all: SLURM starts several where srun starts this command")
    return alone


def _no_cluster(error: Exception, environment: Mapping[str, str]) -> bool:
    """Nothing was detected, or only a pod of Kubernetes that belongs to no indexed job."""
    pod = "KUBERNETES_SERVICE_HOST" in environment and "JOB_COMPLETION_INDEX" not in environment
    return pod or "coordinator_address should be defined" in str(error)


def _check_alone(environment: Mapping[str, str]) -> None:
    for launcher, variable in (("srun", "SLURM_STEP_NUM_TASKS"), ("MPI", "OMPI_COMM_WORLD_SIZE")):
        count = int(environment.get(variable) or 1)
        if count > 1:
            raise InputError(
                f"{launcher} started {count} processes, but not in a way that JAX can detect; "
                f"give each {_FLAGS}"
            )


@contextlib.contextmanager
def _deadline(timeout: int, given: dict[str, Any]) -> Iterator[None]:
    """Ends the process where the others don't come; JAX itself would abort it."""
    where = f" at {given['coordinator_address']}" if given else ""

    def leave() -> None:
        signals.say(f"the other processes did not come{where} within {timeout} s")
        os._exit(1)

    timer = threading.Timer(timeout, leave)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


class _Group:
    """This process among the others."""

    def __init__(self, state: Any) -> None:
        self.client, self.process, self.processes = (
            state.client,
            state.process_id,
            state.num_processes,
        )
        self.lock, self.leaving = threading.Lock(), threading.Lock()
        self.step, self.announced = 0, False
        self.stop_step, self.agreed = 0, threading.Event()
        self.finished = threading.Event()
        self.aborted = _on_abort(self._aborted)  # kept: C knows its address
        self.watcher = threading.Thread(target=self._watch, daemon=True, name="hosts")
        self.watcher.start()

    def stop_after(self, step: int) -> bool:
        with self.lock:
            self.step = step
            if not self.announced:
                return False
        # The threads agree among themselves, whatever their processes wait for.
        self.agreed.wait()
        return step >= self.stop_step

    def fail(self, status: int, line: str) -> NoReturn:
        """Ends all processes; what was announced first is the reason."""
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            where = "" if status == Stopped.status else f" (process {self.process})"
            self.client.key_value_set(f"{_KEYS}failed", json.dumps([status, line + where]))
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            status, line = json.loads(self.client.key_value_try_get(f"{_KEYS}failed"))
        self._leave(status, line)

    def finish(self) -> None:
        """Waits until all others have finished, too."""
        self.client.wait_at_barrier("singer_jax_end", 24 * 3600 * 1000)
        self.finished.set()
        self.watcher.join()
        jax.distributed.shutdown()

    def _leave(self, status: int, line: str) -> NoReturn:
        """Without the barrier of JAX's shutdown, at which the others may never arrive."""
        self.leaving.acquire()  # for good: one thread says it
        signals.say(line)
        sys.stdout.flush()
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            self.client.key_value_set(f"{_KEYS}left/{self.process}", "")
            deadline = time.monotonic() + 20
            # The coordinator lives in process 0; who loses it is aborted.
            while self.process == 0 and time.monotonic() < deadline:
                if len(self.client.key_value_dir_get(f"{_KEYS}left/")) == self.processes:
                    break
                time.sleep(_POLL / 5)
        os._exit(status)

    def _aborted(self, number: int) -> NoReturn:
        """Instead of the stack of every thread; a process that is leaving anyway does so."""
        if self.leaving.acquire(timeout=30):
            signals.say("another process is gone, finished checkpoints are kept; JAX says it above")
        os._exit(1)

    def _watch(self) -> None:
        while not self.finished.wait(_POLL):
            # Where the coordinator is gone, JAX ends this process.
            with contextlib.suppress(jax.errors.JaxRuntimeError):
                found = dict(self.client.key_value_dir_get(_KEYS))
                if f"{_KEYS}failed" in found:
                    self._leave(*json.loads(found[f"{_KEYS}failed"]))
                steps = [int(step) for key, step in found.items() if "/stop/" in key]
                if len(steps) == self.processes:
                    self.stop_step = max(steps) + 1
                    self.agreed.set()
                elif (steps or signals.requested()) and not self.announced:
                    with self.lock:
                        self.announced = True
                    self.client.key_value_set(f"{_KEYS}stop/{self.process}", str(self.step))


def _on_abort(leave: Callable[[int], NoReturn]) -> Any:
    """Has `leave` called where JAX aborts the process, as it does where the coordinator is gone.

    Python's own handlers run in the main thread, which an abort does not wait for, and what JAX
    calls instead (`missed_heartbeat_callback`) cannot be given a Python function: it throws.
    """
    handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(leave)
    ctypes.CDLL(None).signal(signal.SIGABRT, handler)
    return handler


_group: _Group | None = None
