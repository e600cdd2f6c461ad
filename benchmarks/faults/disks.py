"""Faults of disks, on a small ext4 file system that is mounted for each fault (Linux, root).

Full, read-only after an error of its own, or frozen, it answers as a real one does.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.faults.bench import EVERY, STEPS
from benchmarks.faults.processes import MOMENTS
from benchmarks.faults.trial import Inject, Trial

_SIZE, _BLOCK = 24 * 2**20, 4096  # bytes


def _run(*command: object) -> None:
    subprocess.run(list(map(str, command)), check=True, capture_output=True)


class Disk:
    """A file system in a file.

    Args:
      folder: where both are made.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.image, self.place = folder / "disk.img", folder / "disk"
        self.filler = self.place / "filler"
        self.place.mkdir()
        with self.image.open("wb") as file:
            file.truncate(_SIZE)
        _run("mkfs.ext4", "-q", "-m", "0", "-b", _BLOCK, self.image)
        self.mount()

    def mount(self) -> None:
        """Mounts the file system, also after an error."""
        subprocess.run(["e2fsck", "-fy", self.image], check=False, capture_output=True)
        _run("mount", "-o", "loop,errors=remount-ro", self.image, self.place)

    def unmount(self) -> None:
        """Unmounts the file system when no file is open."""
        _run("umount", self.place)

    def leave(self) -> None:
        """Unmounts the file system even if files are open."""
        subprocess.run(["umount", "--lazy", self.place], check=False, capture_output=True)

    def fill(self, left: int = 0) -> None:
        """Fills the disk except for so many blocks."""
        with self.filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(_BLOCK))
        os.truncate(self.filler, max(0, self.filler.stat().st_size - left * _BLOCK))

    def empty(self) -> None:
        """Frees the space that `fill` has taken."""
        self.filler.unlink()

    def turn_read_only(self) -> None:
        """Makes the file system read-only by an error that it reports itself, after a sync."""
        _run("sync", "-f", self.place)
        device = subprocess.check_output(["findmnt", "-no", "SOURCE", self.place], text=True)
        Path(f"/sys/fs/ext4/{Path(device.strip()).name}/trigger_fs_error").write_text("1")

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """Freezes the file system, so that all writes hang."""
        _run("fsfreeze", "--freeze", self.place)
        try:
            yield
        finally:
            _run("fsfreeze", "--unfreeze", self.place)


@functools.cache
def fit(folder: Path) -> bool:
    """Returns True if such file systems can be created on this machine."""
    tried = folder / "disks"
    try:
        disk = Disk(tried)
        disk.unmount()
    except (OSError, subprocess.CalledProcessError):
        return False
    finally:
        shutil.rmtree(tried, ignore_errors=True)
    return True


def _on_a_disk(trial: Trial) -> Disk:
    disk = Disk(trial.folder)
    trial.cleanup.append(disk.leave)
    trial.workdir = disk.place / "run"
    return disk


def _full(moment: str) -> Inject:
    def inject(trial: Trial) -> None:
        disk = _on_a_disk(trial)
        process = MOMENTS[moment](trial)
        trial.note()
        disk.fill(trial.rng.choice((0, 0, 1, 4, 16)))
        trial.end(process)
        disk.empty()

    return inject


def _full_export(trial: Trial) -> None:
    disk = _on_a_disk(trial)
    trial.begin(STEPS)
    disk.fill(trial.rng.randrange(2, 12))
    trial.end(trial.start())
    disk.empty()


def _full_before(trial: Trial) -> None:
    disk = _on_a_disk(trial)
    trial.begin(trial.rng.choice((EVERY, 2 * EVERY)))
    disk.fill(trial.rng.choice((0, 1, 4)))
    trial.end(trial.start())
    disk.empty()


def _full_metrics(trial: Trial) -> None:
    disk = _on_a_disk(trial)
    trial.begin(EVERY)
    inside, outside = trial.workdir / "checkpoints", trial.folder / "checkpoints"
    shutil.move(inside, outside)
    inside.symlink_to(outside)
    process = trial.start()
    trial.past(trial.rng.randrange(EVERY + 1, STEPS - 1), process)
    trial.note()
    disk.fill()
    trial.end(process)
    disk.empty()


def _full_cache(trial: Trial) -> None:
    disk = Disk(trial.folder)
    trial.cleanup.append(disk.leave)
    disk.fill(trial.rng.randrange(10))
    trial.end(trial.start(JAX_COMPILATION_CACHE_DIR=str(disk.place / "compiled")))
    disk.empty()


def _read_only(moment: str) -> Inject:
    def inject(trial: Trial) -> None:
        disk = _on_a_disk(trial)
        process = MOMENTS[moment](trial)
        trial.note()
        disk.turn_read_only()
        trial.end(process)
        disk.unmount()
        disk.mount()

    return inject


def _hangs(trial: Trial) -> None:
    disk = _on_a_disk(trial)
    process = MOMENTS[trial.rng.choice(sorted(MOMENTS))](trial)
    with disk.frozen():
        time.sleep(trial.rng.uniform(0.5, 4))
    trial.end(process)


_FULL = ("at any time", "between steps", "during a save", "while config.json is written")
FAULTS = (
    {f"disk full {moment}": _full(moment) for moment in _FULL}
    | {f"disk turns read-only {moment}": _read_only(moment) for moment in _FULL[:3]}
    | {
        "disk full during the export": _full_export,
        "disk full before a start": _full_before,
        "disk of the metrics full, that of the checkpoints not": _full_metrics,
        "disk of the compiled programs full": _full_cache,
        "disk hangs for a while": _hangs,
    }
)
