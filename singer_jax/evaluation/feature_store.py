"""Stored features for repeated use: memory-mapped float16 files with checksums."""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath

from singer_jax.data.sources import Source
from singer_jax.errors import InputError, RunError
from singer_jax.evaluation.backbone import Backbone, Examples
from singer_jax.evaluation.heads import Task
from singer_jax.io.files import write_text
from singer_jax.io.limits import read_object
from singer_jax.models.inference import ImagePass
from singer_jax.platform import parallel
from singer_jax.runs.metrics import LOG

_FILES = ("features.npy", "labels.npy")
_CHUNK = 2**24


def views_of(
    source: Source, transforms: Sequence[Callable[..., Any]], workers: int = 0, seed: int = 0
) -> list[ImagePass]:
    """Returns a pass for each transform; a random one draws different numbers in each view."""
    return [
        ImagePass(source, transform, workers, seed + view)
        for view, transform in enumerate(transforms)
    ]


def stored_examples(
    folder: Path, backbone: Backbone, task: Task, views: Sequence[ImagePass]
) -> Examples:
    """Extracts the features of all images in every view, or reads stored ones back.

    Args:
      folder: folder of `features.npy`, `labels.npy` and `meta.json`, which only process 0 writes
        and reads; the files are replaced if they belong to another model, task, source or
        transform.
      backbone: model.
      task: task whose features are extracted.
      views: passes over the same source, from `views_of`.

    Returns:
      memory-mapped float16 features and their labels; every process must take the same rows.
    """
    first, meta = jax.process_index() == 0, folder / "meta.json"
    source, transforms = views[0].source, tuple(view.transform for view in views)
    parts = (backbone.digest(), source.fingerprint(), task, transforms, views[0].seed)
    key = hashlib.sha256(repr(parts).encode()).hexdigest()
    if not parallel.of_first_process(first and _intact(folder, key)):
        if first:
            folder.mkdir(parents=True, exist_ok=True)
            meta.unlink(missing_ok=True)
        LOG.info(
            "extracting features: %d view(s) of %d images, to %s",
            len(views),
            len(source),
            folder,
        )
        arrays: list[np.memmap] = []
        rows, row = len(source) * len(views), 0
        for view in views:
            for batch in backbone.batches(task, view):
                halves = (_halved(batch[0], folder), batch[1])
                if not first:
                    continue
                if not arrays:
                    arrays = [
                        reserved(folder / name, part.dtype, (rows, *part.shape[1:]))
                        for name, part in zip(_FILES, halves, strict=True)
                    ]
                for array, part in zip(arrays, halves, strict=True):
                    array[row : row + len(part)] = part
                row += len(batch[1])
        for array in arrays:
            array.flush()
        if first:
            checksums = {name: _checksum(folder / name) for name in _FILES}
            write_text(epath.Path(meta), json.dumps({"key": key, "checksums": checksums}) + "\n")
    files = [np.load(folder / name, mmap_mode="r") if first else None for name in _FILES]
    if jax.process_count() > 1:
        files = [_OfFirstProcess(file) for file in files]
    return Examples(*files, len(views))


def reserved(file: Path, dtype: np.dtype, shape: tuple[int, ...]) -> np.memmap:
    """Creates a memory-mapped `.npy` file and reserves its space on the disk.

    Without the reservation, a full disk would end the process with SIGBUS.

    Raises:
      OSError: the disk has no space for the file; the file is removed.
    """
    try:
        array = np.lib.format.open_memmap(file, "w+", dtype, shape)
        if hasattr(os, "posix_fallocate"):  # missing on macOS
            with file.open("r+b") as stream:
                os.posix_fallocate(stream.fileno(), 0, file.stat().st_size)
    except OSError as error:
        file.unlink(missing_ok=True)
        raise OSError(error.errno, os.strerror(error.errno), str(file)) from error
    return array


class _OfFirstProcess:
    """Array whose rows process 0 reads and broadcasts; all processes must read the same rows."""

    def __init__(self, rows: np.ndarray | None) -> None:
        self._rows = rows
        described = None if rows is None else (rows.shape, rows.dtype)
        self.shape, self.dtype = parallel.of_first_process(described)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> np.ndarray:
        return parallel.of_first_process(
            None if self._rows is None else np.array(self._rows[index])
        )


def _halved(features: np.ndarray, folder: Path) -> np.ndarray:
    with np.errstate(over="ignore"):
        halves = features.astype(np.float16)
    if not np.isfinite(halves).all():
        largest = np.abs(features).max()
        raise RunError(
            f"{folder}: features up to {largest:g} do not fit into float16; set "
            "probe.protocol=paper"
        )
    return halves


def _intact(folder: Path, key: str) -> bool:
    try:
        meta = read_object(folder / "meta.json")
    except (FileNotFoundError, InputError):
        return False
    if meta.get("key") != key:
        return False
    if {name: _checksum(folder / name) for name in _FILES} != meta.get("checksums"):
        LOG.warning("%s is corrupt; its features are extracted again", folder)
        return False
    return True


def _checksum(file: Path) -> int | None:
    if not file.exists():
        return None
    checksum = 0
    with file.open("rb") as content:
        while chunk := content.read(_CHUNK):
            checksum = zlib.crc32(chunk, checksum)
    return checksum
