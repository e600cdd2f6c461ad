"""Handling of stop requests by SIGTERM and SIGINT (Ctrl-C).

By default either signal ends the command with one line and exit status 75; the same command repeats
the interrupted work. A job with something to save runs inside `deferred`, where a request only sets
`requested`. There a second Ctrl-C, at least a second later, ends the process at once. (Launchers
deliver one signal twice, to a process and to its group.)
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
_PATIENCE = 20  # seconds for the running operation and the cleanup, outside of `deferred`
bar_is_shown = threading.Event()
"""Set while the last line on stderr is a progress bar without a newline."""

_asked = threading.Event()
_deferring = threading.Event()
_shielding = threading.Event()
_held: list[int] = []
_leaving: list[Callable[[int, str], NoReturn]] = []
_ignored: list[Callable[[Any], object]] = []  # hooks for other exceptions in finalisers
_uncaught: list[Callable[..., object]] = []  # hooks for other exceptions that end the command


class Interrupted(BaseException):
    """A signal stopped the command, and there is nothing to save.

    Like KeyboardInterrupt it is no subclass of `Exception`.

    Args:
      number: Number of the signal.
    """

    status = Stopped.status

    def __init__(self, number: int) -> None:
        super().__init__(_stopped_by(number))
        self.number = number


@contextlib.contextmanager
def handled() -> Iterator[None]:
    """Handles the signals for the whole command; enter it in the main thread, around everything.

    A thread receives the signals as well, because Python's handlers wait until a compilation
    returns.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer)
    _take()
    _ignored.append(sys.unraisablehook)
    _uncaught.append(sys.excepthook)
    sys.unraisablehook, sys.excepthook = _ask_again, _end_if_interrupted
    # The resource tracker cleans up after a process that ends at once; its warning is not useful.
    words = filter(None, (os.environ.get("PYTHONWARNINGS"), "ignore:resource_tracker:UserWarning"))
    os.environ["PYTHONWARNINGS"] = ",".join(words)
    threading.Thread(target=_listen, args=(reader,), daemon=True, name="signals").start()
    try:
        yield
    except Interrupted as error:
        _end_if_interrupted(type(error), error, None)
    except SystemExit as error:
        if not isinstance(error.code, int):
            raise
        _end(error.code)


def requested() -> bool:
    """Returns True if this process was asked to stop."""
    return _asked.is_set()


def on_leaving(leave: Callable[[int, str], NoReturn]) -> None:
    """Registers `leave(status, line)` to end the process when a signal ends it at once."""
    _leaving.append(leave)


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Makes the first request only set `requested`, so that the job saves and raises `Stopped`.

    Raises:
      Stopped: At the end of the block, if the job has not raised it itself.
    """
    if signal.getsignal(signal.SIGINT) is _interrupt:
        _take()  # again, because libtpu replaces the handler of SIGTERM when JAX starts it
    _deferring.set()
    try:
        yield
    finally:
        _deferring.clear()
    if requested():
        raise Stopped("stopped, everything is saved; run the same command to continue")


@contextlib.contextmanager
def shielded() -> Iterator[None]:
    """Blocks the signals for processes that start inside, and delays requests until its end.

    It works in the main thread only.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    _shielding.set()  # other threads still receive the signals, and Python handles them in this one
    try:
        yield
    finally:
        _shielding.clear()
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    if _held:
        _interrupt(_held.pop(), None)


def say(line: str) -> None:
    """Writes one line to stderr, from any thread."""
    # Loggers and streams are bypassed, because the main thread may hold their locks. The line is
    # written below a progress bar.
    bar = "\n" if bar_is_shown.is_set() else ""
    os.write(2, f"{bar}singer_jax: {line}\n".encode())


def _take() -> None:
    for number in _SIGNALS:
        signal.signal(number, _interrupt)


def _interrupt(number: int, frame: FrameType | None) -> None:
    if _shielding.is_set():
        _held.append(number)
    elif not _deferring.is_set() and not requested():
        if _in_ask_again(frame):  # a hook cannot raise either
            _send_later(number)
            return
        _asked.set()
        raise Interrupted(number)


def _ask_again(given: Any) -> None:
    """Sends the signal again a moment later if it arrived in a finaliser, which cannot raise."""
    if not isinstance(given.exc_value, Interrupted):
        _ignored[-1](given)
        return
    _asked.clear()
    _send_later(given.exc_value.number)


def _in_ask_again(frame: FrameType | None) -> bool:
    while frame is not None and frame.f_code is not _ask_again.__code__:
        frame = frame.f_back
    return frame is not None


def _send_later(number: int) -> None:
    again = threading.Timer(0.01, os.kill, (os.getpid(), number))
    again.daemon = True
    again.start()


def _end_if_interrupted(kind: Any, error: BaseException, where: Any) -> None:
    """Ends the process after `Interrupted`, also if it was raised while `handled` was ending."""
    if not isinstance(error, Interrupted):
        _uncaught[-1](kind, error, where)
        return
    say(str(error))
    _end(error.status)


def _stopped_by(number: int) -> str:
    name = signal.Signals(number).name
    return f"stopped by {name}; run the same command to continue from the last saved state"


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
    """Ends the process at once, without the shutdown of the interpreter.

    During the shutdown a second signal would kill the process, and threads of libraries can wait
    for ever after a disk failure or report it again.
    """
    _asked.set()  # later signals raise nothing
    _kill_children()
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    os._exit(status)


def _kill_children() -> None:
    for child in multiprocessing.active_children():
        child.kill()  # a child that hangs would not notice the end of this process
