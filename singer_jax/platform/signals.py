"""Requests to stop: what SIGTERM and SIGINT (Ctrl-C) do to a job.

By default either ends the command with one line and exit status 75: nothing is under way that the
same command would not do again. A job that has something to save does it inside `deferred`, where a
request only sets `requested`; there a second Ctrl-C, a second later, ends the process at once.
(Launchers deliver one signal twice, to a process and to its group.)
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, NoReturn

from singer_jax.errors import Stopped

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_PATIENCE = 20  # seconds for what runs and for cleaning up, outside of `deferred`
bar_is_shown = threading.Event()
"""Set while the last line on stderr is a progress bar's, which has no end."""

_asked = threading.Event()
_deferring = threading.Event()
_shielding = threading.Event()
_held: list[int] = []
_leaving: list[Callable[[int, str], NoReturn]] = []
_ignored: list[Callable[[Any], object]] = []  # what tells of other exceptions in finalisers


class Interrupted(BaseException):
    """A signal has come and nothing is to be saved; like KeyboardInterrupt no `Exception`.

    Args:
      number: of the signal.
    """

    status = Stopped.status

    def __init__(self, number: int) -> None:
        super().__init__(_stopped_by(number))
        self.number = number


@contextlib.contextmanager
def handled() -> Iterator[None]:
    """Answers the signals for the whole command; in the main thread, around everything.

    A thread hears them as well: Python's handlers wait until a compilation returns.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer)
    _take()
    _ignored.append(sys.unraisablehook)
    sys.unraisablehook = _ask_again
    # What is left behind where a process leaves at once is cleaned up; that needs no words.
    words = filter(None, (os.environ.get("PYTHONWARNINGS"), "ignore:resource_tracker:UserWarning"))
    os.environ["PYTHONWARNINGS"] = ",".join(words)
    threading.Thread(target=_listen, args=(reader,), daemon=True, name="signals").start()
    try:
        yield
    except Interrupted as error:
        say(str(error))
        _end(error.status)
    except SystemExit as error:
        if not isinstance(error.code, int):
            raise
        _end(error.code)


def requested() -> bool:
    """Whether this process was asked to stop."""
    return _asked.is_set()


def on_leaving(leave: Callable[[int, str], NoReturn]) -> None:
    """Where a signal ends the process at once, `leave(status, line)` does it."""
    _leaving.append(leave)


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Inside, the first request only sets `requested`: the job saves and raises `Stopped`.

    Raises:
      Stopped: at the end of the block, where the job has not answered the request itself.
    """
    if signal.getsignal(signal.SIGINT) is _interrupt:
        _take()  # again: libtpu takes SIGTERM over when JAX starts it
    _deferring.set()
    try:
        yield
    finally:
        _deferring.clear()
    if requested():
        raise Stopped("stopped, everything is saved; the same command continues")


@contextlib.contextmanager
def shielded() -> Iterator[None]:
    """What starts inside never sees the signals, and its start is not broken off; main thread only.

    A request waits for the end of the block.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    _shielding.set()  # other threads take the signals still, and Python answers them in this one
    try:
        yield
    finally:
        _shielding.clear()
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    if _held:
        _interrupt(_held.pop(), None)


def say(line: str) -> None:
    """One line of the command on stderr, from any thread."""
    # Past loggers and streams, whose locks the main thread may hold, and below a progress bar.
    bar = "\n" if bar_is_shown.is_set() else ""
    os.write(2, f"{bar}singer_jax: {line}\n".encode())


def _take() -> None:
    for number in _SIGNALS:
        signal.signal(number, _interrupt)


def _interrupt(number: int, frame: FrameType | None) -> None:
    if _shielding.is_set():
        _held.append(number)
    elif not _deferring.is_set() and not requested():
        _asked.set()
        raise Interrupted(number)


def _ask_again(given: Any) -> None:
    """Where the signal came in a finaliser, which raises nothing, it comes again a moment later."""
    if not isinstance(given.exc_value, Interrupted):
        _ignored[-1](given)
        return
    _asked.clear()
    again = threading.Timer(0.01, os.kill, (os.getpid(), given.exc_value.number))
    again.daemon = True
    again.start()


def _stopped_by(number: int) -> str:
    name = signal.Signals(number).name
    return f"stopped by {name}; the same command goes on from what is saved"


def _listen(reader: int) -> NoReturn:
    first = 0.0
    while True:
        number = os.read(reader, 1)[0]
        if number not in _SIGNALS:
            continue
        if not first:
            first = time.monotonic()
            if _deferring.is_set():
                _asked.set()
                say(f"{signal.Signals(number).name}: saving and stopping; Ctrl-C stops at once")
            else:
                timer = threading.Timer(_PATIENCE, _leave, (_stopped_by(number),))
                timer.daemon = True
                timer.start()
        elif number == signal.SIGINT and time.monotonic() > first + 1:
            _leave("stopped at once by a second Ctrl-C; the last finished checkpoint is kept")


def _leave(line: str) -> NoReturn:
    _kill_children()
    for leave in _leaving:
        leave(Stopped.status, line)
    say(line)
    os._exit(Stopped.status)


def _end(status: int) -> NoReturn:
    """At once: an interpreter that ends lets a second signal kill it and waits for all threads.

    Those of libraries wait for ever after a failed disk, or tell it again.
    """
    _asked.set()  # what comes now raises nothing
    _kill_children()
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    os._exit(status)


def _kill_children() -> None:
    for child in multiprocessing.active_children():
        child.kill()  # one that hangs does not see that this process ends
