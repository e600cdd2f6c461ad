"""Faults of files: in the work directory, among the images, and of the clock."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.faults.bench import EVERY, STEPS
from benchmarks.faults.processes import between_steps
from benchmarks.faults.trial import Inject, Trial, Wrong
from tests import damage

# Files of a work directory, between two starts.


def _damaged(harm: Callable[[Path, random.Random], None]) -> Inject:
    """Damages the newest of two checkpoints."""

    def inject(trial: Trial) -> None:
        newest = trial.begin(2 * EVERY)
        harm(newest, trial.rng)
        trial.safe = EVERY
        trial.end(trial.start())

    return inject


def _a_file(folder: Path, rng: random.Random) -> Path:
    return rng.choice(damage.files(folder))


def _truncate(folder: Path, rng: random.Random) -> None:
    file = _a_file(folder, rng)
    os.truncate(file, rng.randrange(max(1, file.stat().st_size)))


def _half_copied(folder: Path, rng: random.Random) -> None:
    found = damage.files(folder)
    for file in found[rng.randrange(len(found)) :]:
        file.unlink()


def _without_checksums(folder: Path, rng: random.Random) -> None:
    file = folder / "meta" / "metadata"
    meta = json.loads(file.read_text())
    for key in ("checksums", "digest"):
        del meta[key]
    file.write_text(json.dumps(meta))


DAMAGES = {
    "a file truncated": _truncate,
    "a file emptied": lambda folder, rng: _a_file(folder, rng).write_bytes(b""),
    "a bit flipped": lambda folder, rng: damage.flip(
        _a_file(folder, rng), rng.randrange(2**30), rng.randrange(8)
    ),
    "half copied": _half_copied,
    "without its checksums": _without_checksums,
}


def _cut(name: str) -> Inject:
    """Truncates a file of the work directory in the middle of a line."""

    def inject(trial: Trial) -> None:
        trial.begin(2 * EVERY)
        file = trial.workdir / name
        os.truncate(file, trial.rng.randrange(file.stat().st_size))
        trial.end(trial.start())

    return inject


def _no_tensorboard(trial: Trial) -> None:
    trial.begin(2 * EVERY)
    if trial.rng.random() < 0.5:
        shutil.rmtree(trial.workdir / "tensorboard")
    else:
        _truncate(trial.workdir / "tensorboard", trial.rng)
    trial.end(trial.start())


def _moved(trial: Trial) -> None:
    process = between_steps(trial)
    trial.note()
    os.killpg(process.pid, signal.SIGKILL)
    trial.end(process, signal.SIGKILL)
    place = trial.folder / "elsewhere" / "run"
    place.parent.mkdir()
    trial.workdir.rename(place)
    trial.workdir = place


def _copied(trial: Trial) -> None:
    process = between_steps(trial)
    original, trial.workdir = trial.workdir, trial.folder / "copy"
    subprocess.run(["cp", "-r", original, trial.workdir], stderr=subprocess.DEVNULL, check=False)
    trial.end(process)
    if trial.end(trial.start()).status != 0:  # what was caught half written is of no use
        shutil.rmtree(trial.workdir)
        shutil.copytree(original, trial.workdir)
    trial.compare(original)


def _clock_set_back(trial: Trial) -> None:
    process = between_steps(trial)
    trial.note()
    os.killpg(process.pid, signal.SIGKILL)
    trial.end(process, signal.SIGKILL)
    ahead = trial.rng.choice((3600, 86_400, 400 * 86_400))
    for path in trial.workdir.rglob("*"):  # written by a clock that was ahead
        os.utime(path, (time.time() + ahead,) * 2)
    trial.end(trial.start(**_hook(trial, _BACK.format(seconds=ahead))))


_BACK = """
import time
_time, _time_ns = time.time, time.time_ns
time.time = lambda: _time() - {seconds}
time.time_ns = lambda: _time_ns() - {seconds} * 10**9
"""


def _hook(trial: Trial, code: str) -> dict[str, str]:
    """Returns environment variables with which the command runs this code first."""
    folder = trial.folder / "hook"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(code)
    return {"PYTHONPATH": f"{folder}:{trial.bench.environment['PYTHONPATH']}"}


_NAN = """
import jax
from singer_jax.training import program
_compile = program.compile_step
def compile_step(*given):
    found, calls = _compile(*given), [0]
    def step(states, teacher, *others):
        calls[0] += 1
        bad = jax.tree.map(lambda leaf: leaf * float("nan"), teacher)
        return found.step(states, bad if calls[0] == {step} else teacher, *others)
    return found._replace(step=step)
program.compile_step = compile_step
"""


def _nan(trial: Trial) -> None:
    step = trial.rng.randrange(1, STEPS + 1)
    ended = trial.end(trial.start(**_hook(trial, _NAN.format(step=step))))
    if ended.status != 1 or f"at step {step};" not in ended.line:
        raise Wrong(f"status {ended.status}: {ended.line}")
    trial.note()


# Images. With data.fail_on_unreadable, an unreadable image ends a run.


def _bad_images(harm: Callable[[Path], None]) -> Inject:
    def inject(trial: Trial) -> None:
        folder = trial.own_images()
        process = trial.start("--config.data.fail_on_unreadable=True")
        trial.past(trial.rng.randrange(1, 4), process)
        kept = trial.folder / "kept"
        shutil.copytree(folder, kept)
        for file in trial.rng.sample(sorted(folder.iterdir()), 30):
            harm(file)
        trial.end(process)
        trial.note()
        shutil.rmtree(folder)
        kept.rename(folder)

    return inject


def _a_folder_instead(file: Path) -> None:
    file.unlink()
    file.mkdir()


HARMS = {
    "unreadable": lambda file: file.write_bytes(file.read_bytes()[:50]),
    "vanished": Path.unlink,
    "replaced by a folder": _a_folder_instead,
}


def _replaced(trial: Trial) -> None:
    trial.images = trial.bench.broken
    trial.more.append(f"--config.data.path={trial.images}")
    process = between_steps(trial)
    trial.note()
    os.killpg(process.pid, signal.SIGKILL)
    trial.end(process, signal.SIGKILL)


def _other_folder(change: Callable[[Path, random.Random], None]) -> Inject:
    def inject(trial: Trial) -> None:
        trial.begin(2 * EVERY)
        folder = trial.own_images()
        change(folder, trial.rng)
        ended = trial.end(trial.start())
        if ended.status != 2:
            raise Wrong(f"status {ended.status}: {ended.line}")
        shutil.rmtree(folder)
        shutil.copytree(trial.bench.images, folder)

    return inject


def _shrink(folder: Path, rng: random.Random) -> None:
    for file in rng.sample(sorted(folder.iterdir()), rng.randrange(1, 39)):
        file.unlink()


def _grow(folder: Path, rng: random.Random) -> None:
    for file in rng.sample(sorted(folder.iterdir()), rng.randrange(1, 39)):
        shutil.copy(file, folder / f"{rng.choice('09z')}{file.name}")


FAULTS = (
    {f"newest checkpoint: {name}": _damaged(harm) for name, harm in DAMAGES.items()}
    | {f"{name} cut": _cut(name) for name in ("config.json", "weights.json", "metrics.jsonl")}
    | {f"images {name} during a strict run": _bad_images(harm) for name, harm in HARMS.items()}
    | {
        "SIGKILL while images cannot be read": _replaced,
        "images fewer at the next start": _other_folder(_shrink),
        "images more at the next start": _other_folder(_grow),
        "TensorBoard's file cut or gone": _no_tensorboard,
        "work directory moved": _moved,
        "work directory copied while the run goes on, and continued there": _copied,
        "clock set back": _clock_set_back,
        "NaN in the features of a batch": _nan,
    }
)
