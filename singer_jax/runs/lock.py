"""A lock that lets only one job at a time write to a work directory or a folder in it.

The job that holds the lock keeps `running.json` there, with its host, its process and its start
time, and touches it every few seconds as a heartbeat. File-system locks are not used, because they
are unreliable on shared disks, and object stores have none.

If two jobs start at the same time, one of them refuses. The lock of a killed process is taken over:
at once on the same machine, and on another machine after `SILENCE` seconds without a heartbeat; no
clocks are compared. A run that was considered dead (suspended, or cut off from the disk) checks the
lock before each save and then saves nothing more. For a URL, two starts at the same time can both
succeed if a write takes longer than `SETTLE`; the one that wrote first stops before its next save.
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

BEAT = 10.0  # seconds between two heartbeats
SILENCE = 60.0  # seconds without a heartbeat after which a run on another machine counts as dead
SETTLE = 1.0  # seconds within which another start at the same time has written its file


@contextlib.contextmanager
def holding(folder: epath.Path, active: bool = True) -> Iterator[RunLock]:
    """Holds the lock of an existing work directory inside the context.

    Args:
      folder: The work directory.
      active: True in one of the processes that share the directory; False in the others, which do
        nothing.

    Raises:
      InputError: Another run holds the lock.
    """
    holder = RunLock(folder, active)
    try:
        holder.take()
        yield holder
    finally:
        holder.release()


class RunLock:
    """The lock of a run on its work directory; see `holding`."""

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
        """Takes the lock.

        Raises:
          InputError: Another run holds it.
        """
        if not self.active:
            return
        with writing(self.folder):
            if not self._make():
                self._replace()
        self._thread.start()

    def check(self) -> None:
        """Checks that this run still holds the lock.

        Raises:
          RunError: The lock was taken over or removed, or cannot be read.
        """
        if not self.active:
            return
        try:
            found = _read(self.file)
        except failures(self.folder) as error:
            raise RunError(f"cannot read {self.file}: {error}") from error
        if not self._own(found):
            by = f"taken over by {_told(found)}" if found else f"{LOCK_FILE} is missing"
            raise RunError(f"{self.folder} no longer belongs to this run, which stops saving: {by}")

    def release(self) -> None:
        """Releases the lock."""
        self._ended.set()
        if self._thread.ident is not None:
            self._thread.join()
        with contextlib.suppress(*failures(self.folder)):  # if it fails, the next start takes over
            if self.active and self._own(_read(self.file)):
                self.file.unlink()

    def _own(self, found: Mapping[str, Any] | None) -> bool:
        return bool(found) and found.get("id") == self.content["id"]

    def _make(self) -> bool:
        """Writes the file and returns True, unless it exists."""
        if is_remote(self.file):  # an existing object would be overwritten
            return False
        try:
            with Path(self.file).open("x") as file:
                json.dump(self.content, file)
        except FileExistsError:
            return False
        except OSError:
            self.file.unlink(missing_ok=True)  # on a full disk it exists, but is empty
            raise
        return True

    def _replace(self) -> None:
        """Takes over an existing lock if its run is dead."""
        found = _read(self.file)
        if found is not None and not self._ends(found):
            raise InputError(
                f"--workdir: {self.folder} is in use by {_told(found)}; wait for its end, or use "
                "another --workdir"
            )
        self._write()
        time.sleep(SETTLE)
        found = _read(self.file)
        if not self._own(found):
            raise InputError(
                f"--workdir: {self.folder} is in use by {_told(found or {})}, which started at the "
                "same time; use another --workdir"
            )

    def _write(self) -> None:
        """Writes the file and replaces an existing one."""
        if is_remote(self.file):
            self.file.write_text(json.dumps(self.content))
        else:
            own = Path(self.file).with_suffix(f".{self.content['id']}.json")
            own.write_text(json.dumps(self.content))
            own.replace(self.file)

    def _ends(self, found: Mapping[str, Any]) -> bool:
        """Returns True if the run that holds the lock is dead, or ends within `SILENCE`."""
        if found.get("machine") and found["machine"] == self.content.get("machine"):
            if _born(found.get("process")) == found.get("born"):
                return False
            LOG.warning("%s: taken over from %s, which is dead", self.folder, _told(found))
            return True
        LOG.info(
            "%s is in use by %s; waiting %.0f s for a heartbeat",
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
        LOG.warning("%s: taken over from %s, which has no heartbeat", self.folder, _told(found))
        return True

    def _sign(self) -> object:
        """Returns a value that changes with each heartbeat; None if there is no lock."""
        try:
            return self.file.read_text(), is_remote(self.file) or os.stat(self.file).st_mtime_ns
        except FileNotFoundError:
            return None

    def _live(self) -> None:
        while not self._ended.wait(BEAT):
            with contextlib.suppress(Exception):  # no heartbeat if the disk does not answer
                if not self._own(_read(self.file)):
                    continue
                if is_remote(self.file):
                    self.content["beat"] = self.content.get("beat", 0) + 1
                    self._write()
                else:
                    os.utime(self.file)


def _read(file: epath.Path) -> dict[str, Any] | None:
    """Returns the content of a lock file: None without a file, empty for a truncated one."""
    try:
        found = json.loads(file.read_text())
    except FileNotFoundError:
        return None
    except ValueError:
        found = {}
    return found if isinstance(found, dict) else {}


def _told(found: Mapping[str, Any]) -> str:
    if not {"process", "host", "since"} <= set(found):
        return f"an unknown process ({LOCK_FILE} is incomplete)"
    return f"process {found['process']} of {found['host']} since {found['since']}"


def _machine() -> str:
    """Returns an identifier of this boot of this machine and of its process namespace."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {os.readlink('/proc/self/ns/pid')}"


def _born(process: object) -> str | None:
    """Returns the start time of a process in kernel ticks, because process numbers are reused.

    It is None if the process has ended or the kernel does not report it.
    """
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return fields[19] if fields[0] not in "XZ" else None
