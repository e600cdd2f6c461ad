"""Job `check_run`: verifies the checksums and formats of everything in a work directory."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
from etils import epath

from singer_jax.errors import InputError, RunError, listed
from singer_jax.io.files import as_path, download
from singer_jax.models.weight_files import CONFIG_FILE, WEIGHTS_FILE, open_weights
from singer_jax.runs import verify
from singer_jax.runs.metrics import read_rows
from singer_jax.runs.workdir import (
    checkpoints_folder,
    config_file,
    damaged_folder,
    export_folders,
    metrics_file,
    origins_file,
)
from singer_jax.settings.ranges import TEXT, OneOf
from singer_jax.settings.settings import Settings, setting


@dataclasses.dataclass(frozen=True)
class CheckRunSettings(Settings):
    """Settings of the job `check_run`."""

    job: str = setting("check_run", OneOf(("check_run",)), "Name of the command.")
    run: str = setting("", TEXT, "Work directory to check. Empty: --workdir.")


class Finding(NamedTuple):
    """Result of checking a file or checkpoint, as text."""

    name: str
    text: str
    damaged: bool = False


def check_run(settings: CheckRunSettings, workdir: epath.Path) -> None:
    """Prints a line for each checkpoint and file, and changes nothing.

    Args:
      settings: settings of the job.
      workdir: work directory to check, if `settings.run` is empty.

    Raises:
      InputError: the folder is not the work directory of a run.
      RunError: a file or checkpoint is corrupt.
    """
    run = as_path(settings.run) if settings.run else workdir
    if jax.process_index() > 0:
        return
    if not any(path(run).exists() for path in (config_file, checkpoints_folder)):
        if not settings.run and run == as_path(""):  # no --workdir either
            raise InputError("run: empty; give --config.run=DIR")
        raise InputError(f"run: {run} is not the work directory of a run; give one that is")
    damaged = []
    for name, text, wrong in _findings(run):
        print(f"{name}: {'CORRUPT: ' if wrong else ''}{text}")
        if wrong:
            damaged.append(name)
    if damaged:
        raise RunError(f"{run}: corrupt: {listed(damaged)}")


def _findings(run: epath.Path) -> Iterator[Finding]:
    checkpoints = checkpoints_folder(run)
    for step in verify.finished(checkpoints):
        reason = verify.find_corruption(checkpoints / str(step))
        yield Finding(
            f"{checkpoints.name}/{step}", reason or "every checksum matches", bool(reason)
        )
    damaged = damaged_folder(checkpoints)
    if damaged.is_dir():
        for file in sorted(damaged.glob("*.txt")):
            name = f"{damaged.name}/{file.stem}"
            yield Finding(name, f"moved here earlier: {file.read_text().strip()}")
    for file in (config_file(run), origins_file(run)):
        if file.exists():
            yield _json(run, file.name)
    metrics = metrics_file(run)
    if metrics.exists():
        rows, wrong = read_rows(metrics)
        also = f", {len(wrong)} invalid lines" if wrong else ""
        yield Finding(metrics.name, f"{len(rows)} rows{also}", bool(wrong))
    for folder in export_folders(run):
        if (folder / WEIGHTS_FILE).exists():
            yield from _export(run, folder)
    yield from _sources(run)


def _json(run: epath.Path, name: str) -> Finding:
    try:
        found = json.loads((run / name).read_text())
    except ValueError as error:
        return Finding(name, str(error), True)
    if not isinstance(found, dict):
        return Finding(name, "not a JSON object", True)
    return Finding(name, "readable")


def _export(run: epath.Path, folder: epath.Path) -> Iterator[Finding]:
    within = str(folder).removeprefix(f"{run}/")
    config = _json(run, f"{within}/{CONFIG_FILE}") if (folder / CONFIG_FILE).exists() else None
    if config:
        yield config
    name = f"{within}/{WEIGHTS_FILE}"
    file = download(folder / WEIGHTS_FILE)
    try:
        tensors = open_weights(file)
        for tensor in tensors.values():
            tensor.read()
    except InputError as error:
        yield Finding(name, str(error), True)
        return
    text = f"{len(tensors)} tensors"
    recorded = None
    if config and not config.damaged:
        origin = json.loads((folder / CONFIG_FILE).read_text()).get("singer_jax") or {}
        recorded = origin.get("sha256")
    yield _compared(name, text, file, recorded)


def _sources(run: epath.Path) -> Iterator[Finding]:
    """Yields the state of the run's weight files that are on this machine."""
    origins = origins_file(run)
    if not origins.exists() or _json(run, origins.name).damaged:
        return
    for role, described in json.loads(origins.read_text()).items():
        file = described.get("file")
        if file and Path(file).is_file():
            yield _compared(f"weights of {role}", file, Path(file), described.get("sha256"))
        elif file:
            yield Finding(f"weights of {role}", f"{file} is not on this machine")


def _compared(name: str, text: str, file: Path, recorded: Any) -> Finding:
    if recorded is None:
        return Finding(name, f"{text}, readable; no sha256 was recorded")
    with file.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != recorded:
        return Finding(name, f"{text}, sha256 is {found}, but {recorded} was recorded", True)
    return Finding(name, f"{text}, sha256 matches the recorded one")
