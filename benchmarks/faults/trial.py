"""One injected fault and its outcome: a whole run in its own processes."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.faults.bench import EVERY, STEPS, Bench
from tests import cli

STOPPED = (1, 2, 75)  # statuses of one clear line
_HANGS = 900  # seconds, on a busy machine, too
_LEAVING = 120  # seconds until what a command started has ended, too
_SHARED = Path("/dev/shm")


class Missed(Exception):
    """The command had ended before the moment of the fault; nothing was injected."""


class Lost(Exception):
    """Finished checkpoints are missing, or the run cannot resume."""


class Wrong(Exception):
    """Another result, a traceback, a hang, a status without a message, or leftover processes."""


@dataclasses.dataclass(frozen=True)
class Ended:
    """The status of a command (negative: ended by that signal) and its stderr."""

    status: int
    printed: str

    @property
    def line(self) -> str:
        """The last line."""
        return (self.printed.strip().splitlines() or [""])[-1]


class Trial:
    """A run with an injected fault, which must then resume to the same bits.

    Args:
      bench: what it shares with others.
      folder: its own; empty.
      rng: of its moments and places.

    Attributes:
      workdir: of the run.
      more: arguments of every start.
      images: where these are not those of the bench.
      processes: how many do it together.
      safe: steps of the latest checkpoint from which it must go on.
      ended: the commands under the fault.
      cleanup: called at the end, the last first.
    """

    def __init__(self, bench: Bench, folder: Path, rng: random.Random) -> None:
        self.bench, self.folder, self.rng = bench, folder, rng
        self.workdir, self.more, self.processes = folder / "run", [], 1
        self.images: Path | None = None
        self.safe = 0
        self.ended: list[Ended] = []
        self.cleanup: list[Callable[[], object]] = []
        self._started: list[subprocess.Popen] = []
        folder.mkdir(parents=True)

    def begin(self, step: int) -> Path:
        """Writes the work directory of a run that was killed after this step."""
        whole = self.bench.whole(images=self.images, processes=self.processes)
        shutil.copytree(whole, self.workdir, ignore=lambda *_: ["student"])
        for found in finished(self.workdir):
            if found > step or found <= step - 2 * EVERY:
                shutil.rmtree(self.workdir / "checkpoints" / str(found))
        metrics = self.workdir / "metrics.jsonl"
        metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[:step]))
        self.safe = step
        return self.workdir / "checkpoints" / str(step)

    def own_images(self) -> Path:
        """Returns a copy of the images for this trial."""
        folder = self.folder / "images"
        shutil.copytree(self.bench.images, folder)
        self.more.append(f"--config.data.path={folder}")
        return folder

    def start(self, *more: str, **variables: str) -> subprocess.Popen:
        """Starts the command in its own session; stderr is written to a file."""
        arguments = self.bench.arguments(self.workdir)
        log = self.folder / f"printed.{len(self._started)}"
        with log.open("wb") as printed:
            process = subprocess.Popen(
                [sys.executable, *self.bench.program, *arguments, *self.more, *more],
                env=self.bench.environment | variables,
                stdout=subprocess.DEVNULL,
                stderr=printed,
                start_new_session=True,
            )
        process.log = log
        self._started.append(process)
        return process

    def start_all(self, *more: str) -> list[subprocess.Popen]:
        """Starts all processes of the run."""
        if self.processes == 1:
            return [self.start(*more)]
        flags = cli.joining(self.processes)
        return [self.start(*more, *own) for own in flags]

    def until(self, happened: Callable[[], bool], process: subprocess.Popen) -> None:
        """Waits; raises `Missed` if the command ends first, `Wrong` if neither happens in time."""
        deadline = time.monotonic() + _HANGS
        while not happened():
            if process.poll() is not None:
                raise Missed(process.log.read_text())
            if time.monotonic() > deadline:
                raise Wrong("hangs before the fault")
            time.sleep(0.001)

    def wait(self, seconds: float, process: subprocess.Popen) -> None:
        """Waits for a time; raises the errors of `until`."""
        end = time.monotonic() + seconds
        self.until(lambda: time.monotonic() >= end, process)

    def work(self, seconds: float, process: subprocess.Popen) -> None:
        """Waits until a process has used so many CPU seconds; raises the errors of `until`."""
        clock = os.sysconf("SC_CLK_TCK")

        def taken() -> bool:
            fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
            return sum(map(int, fields[11:13])) / clock >= seconds

        self.until(taken, process)

    def past(self, step: int, process: subprocess.Popen) -> None:
        """Waits for a row of metrics; raises the errors of `until`."""
        self.until(lambda: max(rows(self.workdir), default=0) >= step, process)

    def note(self) -> None:
        """Records the finished checkpoints, which must not be lost."""
        self.safe = max([self.safe, *finished(self.workdir)])

    def end(self, process: subprocess.Popen, *signals: int, timeout: float = _HANGS) -> Ended:
        """Waits for the end of a command with an injected fault and checks it.

        Args:
          process: returned by `start`.
          *signals: that may have ended it.
          timeout: in seconds.

        Raises:
          Wrong: the end is not one of the allowed outcomes.
        """
        ended = self._end(process, timeout)
        self.ended.append(ended)
        if ended.status == 0 or -ended.status in signals:
            return ended
        if ended.status not in STOPPED or not ended.line.startswith("singer_jax: "):
            raise Wrong(f"status {ended.status}: {ended.line}")
        return ended

    def _end(self, process: subprocess.Popen, timeout: float = _HANGS) -> Ended:
        try:
            process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise Wrong(f"hangs: {Ended(0, process.log.read_text()).line}") from None
        printed = process.log.read_text(errors="replace")
        if "Traceback" in printed:
            raise Wrong(f"status {process.returncode}, Traceback: {Ended(0, printed).line}")
        self._nothing_is_left(process)
        return Ended(process.returncode, printed)

    def _nothing_is_left(self, process: subprocess.Popen) -> None:
        deadline = time.monotonic() + _LEAVING
        while time.monotonic() < deadline:
            left = [f"process {pid}" for pid in session(process.pid)]
            others = any(other.poll() is None for other in self._started)
            if self.bench.alone and not others:
                left += [str(path) for path in _SHARED.iterdir()]
            if not left:
                return
            time.sleep(0.01)
        raise Wrong(f"{len(left)} left behind: {', '.join(left[:3])}")

    def go_on(self) -> None:
        """Starts the same command again without the fault; raises `Lost` or `Wrong`."""
        found = finished(self.workdir)
        if self.safe and max(found, default=0) < self.safe:
            raise Lost(f"checkpoint {self.safe} is missing")
        ended = [self._end(process) for process in self.start_all()]
        for one in ended:
            if one.status != 0:
                raise Lost(f"does not resume: {one.line}")
        continued = re.search(r"continuing after step (\d+) ", ended[0].printed)
        if int(continued[1] if continued else 0) < self.safe:
            raise Lost(f"resumes before checkpoint {self.safe}")
        self.compare(self.workdir)

    def compare(self, workdir: Path) -> None:
        """Compares the student with that of the undisturbed run; raises `Wrong`."""
        whole = self.bench.whole(images=self.images, processes=self.processes)
        expected, given = cli.student(whole), cli.student(workdir)
        same = expected.keys() == given.keys() and all(
            value.tobytes() == given[name].tobytes() for name, value in expected.items()
        )
        if not same:
            raise Wrong("another student")
        found = rows(workdir)
        again = set(range(self.safe + 1, STEPS + 1))  # those before may be what was harmed
        if found != sorted(set(found)) or not again <= set(found):
            raise Wrong(f"rows of metrics {found}")

    def close(self) -> None:
        """Ends everything that this trial started."""
        for process in self._started:
            for pid in session(process.pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.wait()
        for undo in reversed(self.cleanup):
            undo()
        for left in _SHARED.iterdir() if self.bench.alone else ():
            left.unlink(missing_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)


Inject = Callable[[Trial], None]
"""Injects a fault: starts the command, injects the fault, waits for the end of what it started, and
restores what a user would restore."""


def finished(workdir: Path) -> list[int]:
    """Returns the steps of the finished checkpoints in ascending order."""
    folder = workdir / "checkpoints"
    names = os.listdir(folder) if folder.is_dir() else []
    return sorted(int(name) for name in names if name.isdigit())


def rows(workdir: Path) -> list[int]:
    """Returns the steps of the complete lines of metrics."""
    file = workdir / "metrics.jsonl"
    text = file.read_text(errors="replace") if file.is_file() else ""
    return [int(found) for found in re.findall(r'^\{"step": (\d+),.*\}$', text, re.MULTILINE)]


def session(leader: int) -> list[int]:
    """Returns the running processes of a session."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, of = stat.read_text().rpartition(")")[2].split()[:4]
        except OSError:
            continue
        if int(of) == leader and state != "Z":
            found.append(int(stat.parent.name))
    return found
