"""Several processes of one job: joining, stopping and failing together.

A thread of each process reads the key-value store of JAX's coordinator. A process that fails
reports the reason there, so that the others do not wait in a collective that never ends. A signal
to one process stops all of them after the same step.
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
_SILENCE = 40  # seconds without a heartbeat of a process, after which JAX ends all others
_EXPECTED = (InputError, RunError, Stopped, signals.Interrupted)
# Message of a collective on CPUs, mostly in a ValueError, if another process has died.
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
      coordinator: HOST:PORT of process 0, to disable the detection; by default
        JAX_COORDINATOR_ADDRESS of the environment.
      processes: Number of processes; by default JAX_NUM_PROCESSES.
      process: Index of this process, counted from 0; by default JAX_PROCESS_ID.
      timeout: Seconds to wait for the other processes.

    Raises:
      InputError: The three arguments are inconsistent, or the others cannot be found.
    """
    given = _given(coordinator, processes, process, os.environ)
    if given.get("num_processes") == 1 or (not given and _alone(os.environ)):
        return
    if not given and xla_bridge.backends_are_initialized():
        return  # JAX is already in use, with or without other processes
    # The preemption service would replace the handler of SIGTERM.
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
            LOG.setLevel(logging.WARNING)  # only the first process logs the progress
        signals.on_leaving(_group.fail)


def stop_after(step: int) -> bool:
    """Returns True to stop after this step, in all processes after the same step.

    Args:
      step: Number of the step. It increases from call to call, in all processes alike.
    """
    return _group.stop_after(step) if _group else signals.requested()


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Makes all processes leave the block together, or fail with one reason and exit status."""
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
    """Ends all processes at most `seconds` after a failure inside, even if the cleanup hangs.

    If another process has died, the limit is shorter: after `_SILENCE` JAX would end the others
    with a long message.
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
        return 1, f"another process died, finished checkpoints are kept: {lines[0]}"
    return 1, f"{type(error).__name__}: {lines[0]}"


def _given(
    coordinator: str | None,
    processes: int | None,
    process: int | None,
    environment: Mapping[str, str],
) -> dict[str, Any]:
    """Returns the arguments of `jax.distributed.initialize`; empty to use JAX's detection."""
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
                f"{flag} or {names[flag][0]}: {found[flag]!r} is not a number; give an integer"
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
            f"--process: {number} of --processes {count}; give N >= 1 processes, numbered from 0"
        )
    if number == 0 and count > 1:
        try:
            socket.create_server(("", int(match[1]))).close()
        except OSError as error:
            raise InputError(
                f"--coordinator: port {match[1]} of this machine: {error.strerror}; use a free port"
            ) from error
    return {
        "coordinator_address": address,
        "num_processes": count,
        "process_id": number,
        "cluster_detection_method": "deactivate",
    }


def _alone(environment: Mapping[str, str]) -> bool:
    """Returns True for a process started in a SLURM job without srun, which runs alone.

    JAX would wait for other tasks that never start.
    """
    started = {"SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"} & set(environment)
    alone = "SLURM_JOB_ID" in environment and all(environment[name] == "1" for name in started)
    if alone and environment.get("SLURM_NTASKS", "1") != "1":
        LOG.warning("running as one process of the SLURM job; use srun to start all tasks")
    return alone


def _no_cluster(error: Exception, environment: Mapping[str, str]) -> bool:
    """Returns True if JAX detected no cluster, or a Kubernetes pod outside an indexed job."""
    pod = "KUBERNETES_SERVICE_HOST" in environment and "JOB_COMPLETION_INDEX" not in environment
    return pod or "coordinator_address should be defined" in str(error)


def _check_alone(environment: Mapping[str, str]) -> None:
    for launcher, variable in (("srun", "SLURM_STEP_NUM_TASKS"), ("MPI", "OMPI_COMM_WORLD_SIZE")):
        count = int(environment.get(variable) or 1)
        if count > 1:
            raise InputError(
                f"{launcher} started {count} processes that JAX cannot detect; give each process "
                f"{_FLAGS}"
            )


@contextlib.contextmanager
def _deadline(timeout: int, given: dict[str, Any]) -> Iterator[None]:
    """Ends the process if the others do not join in time; JAX itself would abort it."""
    where = f" at {given['coordinator_address']}" if given else ""

    def leave() -> None:
        signals.say(f"the other processes did not join{where} within {timeout} s; check their logs")
        os._exit(1)

    timer = threading.Timer(timeout, leave)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


class _Group:
    """The coordination of this process with the others of the job."""

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
        # The watcher threads agree on a step, even if the main threads of their processes wait.
        self.agreed.wait()
        return step >= self.stop_step

    def fail(self, status: int, line: str) -> NoReturn:
        """Ends all processes; the first announced failure is reported."""
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            where = "" if status == Stopped.status else f" (process {self.process})"
            self.client.key_value_set(f"{_KEYS}failed", json.dumps([status, line + where]))
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            status, line = json.loads(self.client.key_value_try_get(f"{_KEYS}failed"))
        self._leave(status, line)

    def finish(self) -> None:
        """Waits until all processes have finished."""
        self.client.wait_at_barrier("singer_jax_end", 24 * 3600 * 1000)
        self.finished.set()
        self.watcher.join()
        jax.distributed.shutdown()

    def _leave(self, status: int, line: str) -> NoReturn:
        """Ends the process without JAX's shutdown barrier, which the others may never reach."""
        self.leaving.acquire()  # never released, so that only one thread reports
        signals.say(line)
        sys.stdout.flush()
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            self.client.key_value_set(f"{_KEYS}left/{self.process}", "")
            deadline = time.monotonic() + 20
            # Process 0 runs the coordinator; a process that loses it is aborted.
            while self.process == 0 and time.monotonic() < deadline:
                if len(self.client.key_value_dir_get(f"{_KEYS}left/")) == self.processes:
                    break
                time.sleep(_POLL / 5)
        os._exit(status)

    def _aborted(self, number: int) -> NoReturn:
        """Reports an abort by JAX in one line instead of the stack of every thread."""
        if self.leaving.acquire(timeout=30):
            signals.say("another process died, finished checkpoints are kept; see JAX's log above")
        os._exit(1)

    def _watch(self) -> None:
        while not self.finished.wait(_POLL):
            # If the coordinator has died, JAX ends this process.
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
    """Installs `leave` as handler of SIGABRT, which JAX raises if the coordinator has died.

    Python's own signal handlers run in the main thread, for which an abort does not wait. JAX's
    `missed_heartbeat_callback` is no alternative: it throws if it is a Python function.
    """
    handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(leave)
    ctypes.CDLL(None).signal(signal.SIGABRT, handler)
    return handler


_group: _Group | None = None
