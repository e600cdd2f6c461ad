"""Verifies checkpoints on disk, and moves damaged ones to `checkpoints.damaged/`.

The first check after a save reads every array back, compares it with the checksum that was computed
on the device, and writes a manifest. Later checks hash the files and compare them with the
manifest. They read the arrays again only if a file differs.

Verification reads files array by array and needs no device. Therefore a thread can verify during
training, and one process can verify for all.
"""

from __future__ import annotations

import errno
import json
import logging
import queue
import re
import threading
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from etils import epath

from singer_jax.errors import RunError
from singer_jax.io.files import failures, is_remote, move, write_text
from singer_jax.platform import parallel
from singer_jax.runs import manifests
from singer_jax.runs.workdir import damaged_folder

LOG = logging.getLogger("singer_jax")

CHECKSUM = 2  # version of the checksums of new checkpoints
_PART = 2**20  # elements of a leaf that are processed at a time
# Errors of a disk or store that cannot be reached now, which do not indicate corruption.
_NOT_NOW = {
    getattr(errno, name)
    for name in ("EACCES", "EPERM", "ETIMEDOUT", "ESTALE", "EMFILE", "ENFILE", "ENOMEM")
}
_UNREACHABLE = re.compile(
    "PERMISSION_DENIED|UNAUTHENTICATED|UNAVAILABLE|DEADLINE_EXCEEDED|RESOURCE_EXHAUSTED|ABORTED"
)


def mix(bits: Any, index: Any) -> Any:
    """Mixes the bits of values with their indices; both are uint32 arrays of NumPy or JAX.

    The map of the values is one to one for each index. It is the finaliser of MurmurHash3.
    """
    bits = bits ^ (index * np.uint32(0x9E3779B1))
    bits = (bits ^ (bits >> 16)) * np.uint32(0x85EBCA6B)
    bits = (bits ^ (bits >> 13)) * np.uint32(0xC2B2AE35)
    return bits ^ (bits >> 16)


def checksum(leaf: np.ndarray, version: int = 1) -> int:
    """Returns the same value as `checkpoints.checksum`, for an array in host memory."""
    unsigned = {1: np.uint8, 2: np.uint16, 4: np.uint32}[leaf.dtype.itemsize]
    bits = np.ascontiguousarray(leaf).reshape(-1).view(unsigned)
    total = 0
    for start in range(0, bits.size, _PART):
        part = bits[start : start + _PART].astype(np.uint32)
        index = np.arange(start, start + part.size, dtype=np.uint32)
        terms = mix(part, index) if version == 2 else part * (2 * index + 1)
        total += int(terms.sum(dtype=np.uint32))
    return total % 2**32


def checksum_version(meta: Mapping[str, Any]) -> int:
    """Returns the version of the checksums of a checkpoint from its metadata.

    Raises:
      ValueError: The version is unknown.
    """
    version = meta.get("checksum_version", 1)
    if version not in (1, 2):
        raise ValueError(
            f"unknown checksum version {version!r}; a newer version of singer_jax wrote it"
        )
    return version


def by_name(tree: Any) -> dict[str, Any]:
    """Returns the leaves of a tree by `parallel.leaf_name`."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {parallel.leaf_name(path): leaf for path, leaf in leaves}


def finished(folder: epath.Path) -> list[int]:
    """Returns the steps of the finished checkpoints in a folder in ascending order.

    It returns an empty list if the folder does not exist.
    """
    if not folder.is_dir():
        return []
    return sorted(found.step for found in ocp.path.step.standard_name_format().find_all(folder))


def find_corruption(
    folder: epath.Path, given_up: Callable[[], bool] = lambda: False, *, record: bool = False
) -> str | None:
    """Returns the reason why a finished checkpoint is corrupt; None if it is not.

    A checkpoint whose files differ from its manifest, but whose arrays and settings are those that
    were saved, is not corrupt; a warning names the files.

    Args:
      folder: The folder of the checkpoint.
      given_up: Called before each array; if it returns True, the result is None.
      record: Writes the manifest of a valid checkpoint that has none.

    Raises:
      RunError: The checkpoint cannot be read at present; it need not be corrupt.
    """
    try:
        return _verify(folder, given_up, record)
    except Exception as error:  # readers may raise any exception on corrupt bytes
        found = error.__cause__ if type(error) is Exception else error
        lines = str(found).split("[tensorstore_spec")[0].strip().splitlines() or [""]
        reason = f"{type(found).__name__}: {lines[0]}"
        if _not_now(found, folder):
            raise RunError(f"cannot read {folder} at present, try again: {reason}") from error
        return reason


def _verify(folder: epath.Path, given_up: Callable[[], bool], record: bool) -> str | None:
    known, files, suspect = None, None, ""
    try:
        known = manifests.read(folder)
    except (KeyError, ValueError, *failures(folder)) as error:
        suspect = f"its manifest is damaged ({error})"
    try:
        # Hashed before they are read, so that a later check detects a change in between.
        files = manifests.file_digests(folder, given_up) if known or record else {}
    except OSError as error:
        if _not_now(error, folder):
            raise
        suspect = f"a file cannot be read ({error})"
    if given_up():
        return None
    if known and files is not None:
        names = manifests.changed(known, files)
        if not names:
            return None
        suspect = f"files changed since they were verified: {len(names)}, first {names[0]}"
    reason = _difference(folder, given_up)
    if reason or given_up():
        return reason
    if suspect:
        LOG.warning("%s: %s; its arrays match their checksums, so it is used", folder, suspect)
    elif record:
        _record(folder, files)
    return None


def _record(folder: epath.Path, files: manifests.FileDigests) -> None:
    """Writes a manifest; a failure to write it is only a warning."""
    try:
        manifests.write(folder, files)
    except failures(folder) as error:
        LOG.warning("%s: cannot write its manifest, a later check tries again: %s", folder, error)


def _not_now(error: BaseException, folder: epath.Path) -> bool:
    if isinstance(error, MemoryError) or _UNREACHABLE.match(str(error)):
        return True
    if isinstance(error, FileNotFoundError | IsADirectoryError | NotADirectoryError):
        return False
    if is_remote(folder):
        return isinstance(error, failures(folder))
    return isinstance(error, OSError) and error.errno in _NOT_NOW


def _difference(folder: epath.Path, given_up: Callable[[], bool]) -> str | None:
    """Reads everything back and returns a difference from what was saved; None without any."""
    meta = json.loads((folder / "meta" / "metadata").read_text())
    if "digest" in meta and meta["digest"] != manifests.seal(meta):  # older checkpoints have none
        return "its metadata does not match its digest"
    if "checksums" not in meta:
        return "it holds no checksums"
    described = by_name(ocp.PyTreeCheckpointHandler().metadata(folder / "state").tree)
    expected, version = meta["checksums"], checksum_version(meta)
    listed = [
        entry["array_metadata"]["param_name"]
        for file in (folder / "state" / "array_metadatas").iterdir()
        for entry in json.loads(file.read_text())["array_metadatas"]
        if {"write_shape", "chunk_shape", "ext_metadata"} <= set(entry["array_metadata"])
    ]
    unlike = sorted((set(expected) ^ set(described)) | (set(map(_path, expected)) ^ set(listed)))
    if unlike:
        return f"it does not hold the arrays that were saved: {unlike[0]}"
    read = _reader(folder / "state")
    for name, value in expected.items():
        if given_up():
            return None
        leaf, like = read(name), described[name]
        if (leaf.shape, leaf.dtype) != (tuple(like.shape), like.dtype):
            return f"{name} is described as {like.dtype}{list(like.shape)}"
        if checksum(leaf, version) != value:
            return f"the checksum of {name} does not match"
    return None


def _path(name: str) -> str:
    """Returns the path of an array in the storage."""
    return re.sub(r"\[(\d+)\]", r"\1", name).replace("/", ".")


def _reader(folder: epath.Path) -> Callable[[str], np.ndarray]:
    base = f"{folder}/" if is_remote(folder) else {"driver": "file", "path": f"{folder}/"}
    store = {"driver": "ocdbt", "base": base}
    # One leaf in memory at a time and one thread, because the training needs the cores.
    one = {"limit": 1}
    limits = {"data_copy_concurrency": one, "cache_pool": {"total_bytes_limit": 0}}
    context = tensorstore.Context(limits)

    def read(name: str) -> np.ndarray:
        spec = {"driver": "zarr", "kvstore": store | {"path": f"{_path(name)}/"}}
        return tensorstore.open(spec, context=context, read=True).result().read().result()

    return read


def set_aside(folder: epath.Path, reason: str) -> epath.Path:
    """Moves a damaged checkpoint to `checkpoints.damaged/` and writes the reason to a file there.

    It removes the manifest, so that it is not used for the next checkpoint of the same step.
    """
    aside = damaged_folder(folder.parent)
    place, number = aside / folder.name, 1
    while place.exists():
        number += 1
        place = aside / f"{folder.name}.{number}"
    write_text(aside / f"{place.name}.txt", reason + "\n")
    move(folder, place)
    manifests.remove(folder)
    return place


class BackgroundVerifier:
    """Verifies saved checkpoints in a thread while the training continues.

    After each save the new checkpoint is read back and its manifest is written. One of the older
    checkpoints is hashed in turn, so that corruption is detected while there is still a valid
    checkpoint. An object store checks and repairs its objects itself, so each checkpoint is read
    only once there. (A new checkpoint may be read from the page cache instead of the disk.)

    Args:
      folder: The folder of the checkpoints.

    Attributes:
      damaged: Reasons of corruption by step.
    """

    def __init__(self, folder: epath.Path) -> None:
        self.folder, self.damaged = folder, {}
        self._poll = 10.0 if is_remote(folder) else 0.5  # seconds
        self._turn = 0
        self._started: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._ending, self._closed = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="checkpoints")

    def started(self, step: int) -> None:
        """Announces a save, which is verified once it is finished."""
        if self._thread.ident is None:
            self._thread.start()
        self._started.put(step)

    def finish(self) -> None:
        """Verifies the last save, which is on disk, and ends the thread."""
        self._end()

    def close(self) -> None:
        """Ends the thread after the array or part of a file that it is reading."""
        self._closed.set()
        self._end()

    def _end(self) -> None:
        self._ending.set()
        self._started.put(None)
        if self._thread.ident is not None:
            self._thread.join()

    def _watch(self) -> None:
        while (step := self._latest()) is not None:
            try:
                self._read_back(step)
            except (RunError, *failures(self.folder)) as error:
                LOG.warning("%s: cannot read back a checkpoint: %s", self.folder, error)

    def _latest(self) -> int | None:
        """Waits for a save and returns its step; after several saves that of the last."""
        step = self._started.get()
        while step is not None and not self._started.empty():
            newer = self._started.get()
            if newer is None:
                self._started.put(None)
                break
            step = newer
        return step

    def _read_back(self, step: int) -> None:
        while max(steps := finished(self.folder), default=-1) < step:
            if self._ending.is_set():  # the save has failed, or the job is ending
                return
            self._ending.wait(self._poll)
        older = [other for other in steps if other < step and not is_remote(self.folder)]
        self._turn += 1
        for each in {step, older[self._turn % len(older)]} if older else {step}:
            reason = self._damage(each)
            # It may be in the process of removal, because only the latest ones are kept.
            if reason and not self._closed.wait(4 * self._poll) and self._damage(each):
                self.damaged[each] = reason
                LOG.warning("%s is damaged: %s", self.folder / str(each), reason)
        manifests.prune(self.folder, finished(self.folder))

    def _damage(self, step: int) -> str | None:
        if step not in finished(self.folder):
            return None
        return find_corruption(self.folder / str(step), self._closed.is_set, record=True)
