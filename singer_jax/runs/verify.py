"""Checkpoints as they lie on disk: read back and compared, and set aside where they are damaged.

Only files are read here, leaf by leaf and without a device, so that a thread may do it beside a
training, and one process for all.
"""

from __future__ import annotations

import errno
import hashlib
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

LOG = logging.getLogger("singer_jax")

_PART = 2**20  # elements of a leaf whose products are in memory at a time
# Where a disk or store cannot be reached now: no sign of damage.
_NOT_NOW = {
    getattr(errno, name)
    for name in ("EACCES", "EPERM", "ETIMEDOUT", "ESTALE", "EMFILE", "ENFILE", "ENOMEM")
}
_UNREACHABLE = re.compile(
    "PERMISSION_DENIED|UNAUTHENTICATED|UNAVAILABLE|DEADLINE_EXCEEDED|RESOURCE_EXHAUSTED|ABORTED"
)


def checksum(leaf: np.ndarray) -> int:
    """As `checkpoints.checksum`, of an array in memory."""
    unsigned = {1: np.uint8, 2: np.uint16, 4: np.uint32}[leaf.dtype.itemsize]
    bits = np.ascontiguousarray(leaf).reshape(-1).view(unsigned)
    total = 0
    for start in range(0, bits.size, _PART):
        part = bits[start : start + _PART].astype(np.uint32)
        odd = 2 * np.arange(start, start + part.size, dtype=np.uint32) + 1
        total += int((part * odd).sum(dtype=np.uint32))
    return total % 2**32


def by_name(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by `parallel.leaf_name`."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {parallel.leaf_name(path): leaf for path, leaf in leaves}


def sealed(meta: Mapping[str, Any]) -> dict[str, Any]:
    """What is stored beside a state, with a digest of itself."""
    return dict(meta) | {"digest": _digest(meta)}


def _digest(meta: Mapping[str, Any]) -> str:
    text = json.dumps(
        {key: value for key, value in meta.items() if key != "digest"}, sort_keys=True
    )
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def finished(folder: epath.Path) -> list[int]:
    """Steps of the finished checkpoints in a folder, ascending; none where it is not there."""
    if not folder.is_dir():
        return []
    return sorted(found.step for found in ocp.path.step.standard_name_format().find_all(folder))


def find_corruption(folder: epath.Path, given_up: Callable[[], bool] = lambda: False) -> str | None:
    """Why a finished checkpoint is not what was saved, in words; None where it is whole.

    Args:
      folder: of the checkpoint.
      given_up: asked before each leaf; then None is returned.

    Raises:
      RunError: it cannot be read now, which says nothing of it.
    """
    try:
        return _difference(folder, given_up)
    except Exception as error:  # what readers raise on any bytes at all
        found = error.__cause__ if type(error) is Exception else error
        lines = str(found).split("[tensorstore_spec")[0].strip().splitlines() or [""]
        told = f"{type(found).__name__}: {lines[0]}"
        if _not_now(found, folder):
            raise RunError(f"cannot read {folder}: {told}") from error
        return told


def _not_now(error: BaseException, folder: epath.Path) -> bool:
    if isinstance(error, MemoryError) or _UNREACHABLE.match(str(error)):
        return True
    if isinstance(error, FileNotFoundError | IsADirectoryError | NotADirectoryError):
        return False
    if is_remote(folder):
        return isinstance(error, failures(folder))
    return isinstance(error, OSError) and error.errno in _NOT_NOW


def _difference(folder: epath.Path, given_up: Callable[[], bool]) -> str | None:
    meta = json.loads((folder / "meta" / "metadata").read_text())
    if "digest" in meta and meta["digest"] != _digest(meta):  # older ones have none
        return "what is stored beside the state does not match its digest"
    if "checksums" not in meta:
        return "it holds no checksums"
    described = by_name(ocp.PyTreeCheckpointHandler().metadata(folder / "state").tree)
    expected = meta["checksums"]
    listed = [
        entry["array_metadata"]["param_name"]
        for file in (folder / "state" / "array_metadatas").iterdir()
        for entry in json.loads(file.read_text())["array_metadatas"]
        if {"write_shape", "chunk_shape", "ext_metadata"} <= set(entry["array_metadata"])
    ]
    unlike = sorted((set(expected) ^ set(described)) | (set(map(_path, expected)) ^ set(listed)))
    if unlike:
        return f"what it holds is not what was saved: {unlike[0]}"
    read = _reader(folder / "state")
    for name, value in expected.items():
        if given_up():
            return None
        leaf, like = read(name), described[name]
        if (leaf.shape, leaf.dtype) != (tuple(like.shape), like.dtype):
            return f"{name} is described as {like.dtype}{list(like.shape)}"
        if checksum(leaf) != value:
            return f"the checksum of {name} does not match"
    return None


def _path(name: str) -> str:
    """Of a leaf in the storage."""
    return re.sub(r"\[(\d+)\]", r"\1", name).replace("/", ".")


def _reader(folder: epath.Path) -> Callable[[str], np.ndarray]:
    base = f"{folder}/" if is_remote(folder) else {"driver": "file", "path": f"{folder}/"}
    store = {"driver": "ocdbt", "base": base}
    # One leaf in memory at a time, and one thread: the cores are the training's.
    one = {"limit": 1}
    limits = {"data_copy_concurrency": one, "cache_pool": {"total_bytes_limit": 0}}
    context = tensorstore.Context(limits)

    def read(name: str) -> np.ndarray:
        spec = {"driver": "zarr", "kvstore": store | {"path": f"{_path(name)}/"}}
        return tensorstore.open(spec, context=context, read=True).result().read().result()

    return read


def set_aside(folder: epath.Path, reason: str) -> epath.Path:
    """Moves a damaged checkpoint to `checkpoints.damaged/`, with the reason in a file beside."""
    aside = folder.parent.with_name(f"{folder.parent.name}.damaged")
    place, number = aside / folder.name, 1
    while place.exists():
        number += 1
        place = aside / f"{folder.name}.{number}"
    write_text(aside / f"{place.name}.txt", reason + "\n")
    move(folder, place)
    return place


class Watch:
    """Reads back what was saved while the training goes on.

    After each save the new checkpoint is read, and one of the older ones in turn, so that rot is
    found while there is still a whole one. An object store checks and repairs what it holds itself:
    there each checkpoint is read once. (What was just written may come from the memory of the
    machine and not from its disk.)

    Args:
      folder: of the checkpoints.

    Attributes:
      damaged: reasons by step.
    """

    def __init__(self, folder: epath.Path) -> None:
        self.folder, self.damaged = folder, {}
        self._poll = 10.0 if is_remote(folder) else 0.5  # seconds
        self._turn = 0
        self._started: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="checkpoints")

    def started(self, step: int) -> None:
        """A save has begun; it is read when it is finished."""
        if self._thread.ident is None:
            self._thread.start()
        self._started.put(step)

    def close(self) -> None:
        """Ends it, after the leaf that is being read."""
        self._closed.set()
        self._started.put(None)
        if self._thread.ident is not None:
            self._thread.join()

    def _watch(self) -> None:
        while (step := self._latest()) is not None:
            try:
                self._read_back(step)
            except (RunError, *failures(self.folder)) as error:
                LOG.warning("%s: cannot be read back now: %s", self.folder, error)

    def _latest(self) -> int | None:
        """Waits for a save; where several came meanwhile, the last of them."""
        step = self._started.get()
        while not self._started.empty():
            step = self._started.get()
        return step

    def _read_back(self, step: int) -> None:
        while max(steps := finished(self.folder), default=-1) < step:
            if self._closed.wait(self._poll):
                return
        older = [other for other in steps if other < step and not is_remote(self.folder)]
        self._turn += 1
        for each in {step, older[self._turn % len(older)]} if older else {step}:
            reason = self._damage(each)
            # It may just be removed, because it is one more than are kept.
            if reason and not self._closed.wait(4 * self._poll) and self._damage(each):
                self.damaged[each] = reason

    def _damage(self, step: int) -> str | None:
        if step not in finished(self.folder):
            return None
        return find_corruption(self.folder / str(step), self._closed.is_set)
