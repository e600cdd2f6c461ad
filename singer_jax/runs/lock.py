"""A work directory, or a folder of one that a job writes, belongs to one job at a time.

The job that holds it keeps `running.json` there: which machine and process it is and since when,
touched every few seconds as a sign of life. No lock of the file system is asked for: those of
shared disks are not to be trusted, and object stores have none.

Of two starts at the same time one refuses. What a killed process left behind is taken over: on its
own machine at once, on another one when no sign of life came for `SILENCE`; no clocks are compared.
A run that was taken for dead (suspended, or cut off from the disk) saves nothing more: it looks
before each save. Behind a URL two starts at the same time can both pass where a write takes longer
than `SETTLE`; then the one that wrote first stops before its next save.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from etils import epath

from singer_jax.errors import InputError, RunError
from singer_jax.io.files import failures, is_remote, writing
from singer_jax.runs.workdir import LOCK_FILE

LOG = logging.getLogger("singer_jax")

BEAT = 10.0  # seconds between two signs of life
SILENCE = 60.0  # seconds without one, after which a run of another machine is taken for dead
SETTLE = 1.0  # seconds in which another start at the same time will have written


@contextlib.contextmanager
def holding(folder: epath.Path, active: bool = True) -> Iterator[RunLock]:
    """Holds a work directory, which is there, for the time of the block.

    Args:
      folder: the work directory.
      active: False in all but one of the processes that share it: nothing is done.

    Raises:
      InputError: another run holds it.
    """
    holder = RunLock(folder, active)
    try:
        holder.take()
        yield holder
    finally:
        holder.release()


class RunLock:
    """A run in its work directory; see `holding`."""

    def __init__(self, folder: epath.Path, active: bool = True) -> None:
        self.folder, self.file, self.active = folder, folder / LOCK_FILE, active
        born = _born(os.getpid())
        self.content = {
            "id": uuid.uuid4().hex,
            "host": socket.gethostname(),
            "process": os.getpid(),
            "since": datetime.datetime.now().astimezone().isoformat(" ", "seconds"),
        } | ({"born": born, "machine": _machine()} if born else {})
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._live, daemon=True, name="holding")

    def take(self) -> None:
        """Raises `InputError` where another run holds the folder."""
        if not self.active:
            return
        with writing(self.folder):
            if not self._make():
                self._replace()
        self._thread.start()

    def check(self) -> None:
        """Raises `RunError` where the folder is no longer this run's."""
        if not self.active:
            return
        try:
            found = _read(self.file)
        except failures(self.folder) as error:
            raise RunError(f"cannot read {self.file}: {error}") from error
        if not self._own(found):
            by = f"taken over by {_told(found)}" if found else f"{LOCK_FILE} is gone"
            raise RunError(f"{self.folder} is no longer this run's, nothing more is saved: {by}")

    def release(self) -> None:
        """Leaves the folder to others."""
        self._ended.set()
        if self._thread.ident is not None:
            self._thread.join()
        with contextlib.suppress(*failures(self.folder)):  # then the next start finds it dead
            if self.active and self._own(_read(self.file)):
                self.file.unlink()

    def _own(self, found: Mapping[str, Any] | None) -> bool:
        return bool(found) and found.get("id") == self.content["id"]

    def _make(self) -> bool:
        """Writes the file where there is none."""
        if is_remote(self.file):  # an object would be written over
            return False
        try:
            with Path(self.file).open("x") as file:
                json.dump(self.content, file)
        except FileExistsError:
            return False
        except OSError:
            self.file.unlink(missing_ok=True)  # of a full disk: there, and empty
            raise
        return True

    def _replace(self) -> None:
        """Takes the place of what is there, where that is no living run."""
        found = _read(self.file)
        if found is not None and not self._ends(found):
            raise InputError(
                f"--workdir: {self.folder} is held by {_told(found)}; wait for its end, or use "
                "another --workdir"
            )
        self._write()
        time.sleep(SETTLE)
        found = _read(self.file)
        if not self._own(found):
            raise InputError(f"--workdir: {self.folder} was just taken by {_told(found or {})}")

    def _write(self) -> None:
        """Puts the file in place of what is there."""
        if is_remote(self.file):
            self.file.write_text(json.dumps(self.content))
        else:
            own = Path(self.file).with_suffix(f".{self.content['id']}.json")
            own.write_text(json.dumps(self.content))
            own.replace(self.file)

    def _ends(self, found: Mapping[str, Any]) -> bool:
        """Whether the run that holds the folder is dead, or ends within `SILENCE`."""
        if found.get("machine") and found["machine"] == self.content.get("machine"):
            if _born(found.get("process")) == found.get("born"):
                return False
            LOG.warning("%s: taken over from %s, which is dead", self.folder, _told(found))
            return True
        LOG.info(
            "%s is held by %s; waiting %.0f s for a sign of life",
            self.folder,
            _told(found),
            SILENCE,
        )
        seen, deadline = self._sign(), time.monotonic() + SILENCE
        while time.monotonic() < deadline:
            time.sleep(min(1.0, SILENCE / 5))
            now = self._sign()
            if now is None:
                return True
            if now != seen:
                return False
        LOG.warning("%s: taken over from %s, which is silent", self.folder, _told(found))
        return True

    def _sign(self) -> object:
        """What changes with each sign of life; None where the folder is free."""
        try:
            return self.file.read_text(), is_remote(self.file) or os.stat(self.file).st_mtime_ns
        except FileNotFoundError:
            return None

    def _live(self) -> None:
        while not self._ended.wait(BEAT):
            with contextlib.suppress(Exception):  # a disk that does not answer: no sign of life
                if not self._own(_read(self.file)):
                    continue
                if is_remote(self.file):
                    self.content["beat"] = self.content.get("beat", 0) + 1
                    self._write()
                else:
                    os.utime(self.file)


def _read(file: epath.Path) -> dict[str, Any] | None:
    """What a file says; None where there is none, and nothing known of one that is cut."""
    try:
        found = json.loads(file.read_text())
    except FileNotFoundError:
        return None
    except ValueError:
        found = {}
    return found if isinstance(found, dict) else {}


def _told(found: Mapping[str, Any]) -> str:
    if not {"process", "host", "since"} <= set(found):
        return f"a run that {LOCK_FILE} does not name"
    return f"process {found['process']} of {found['host']} since {found['since']}"


def _machine() -> str:
    """This boot of this machine, and within it the container whose process numbers these are."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {os.readlink('/proc/self/ns/pid')}"


def _born(process: object) -> str | None:
    """When a process started, as the kernel counts (their numbers are used again).

    None: it has ended, or the kernel tells nothing.
    """
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return fields[19] if fields[0] not in "XZ" else None
