"""Manifests of checkpoints: the size and digest of each file of a verified checkpoint.

A manifest is stored in `checkpoints.manifests/STEP.json` next to the folder of the checkpoints.
With it a checkpoint is verified by hashing its files, without decoding arrays.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from etils import epath

from singer_jax.io.files import is_remote, object_digests, write_text
from singer_jax.runs.workdir import manifests_folder

_CHUNK = 2**24  # bytes
FileDigests = dict[str, list[Any]]
"""Size in bytes and digest by path within a checkpoint."""


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a JSON object with a digest of itself."""
    return dict(content) | {"digest": seal(content)}


def seal(content: Mapping[str, Any]) -> str:
    """Returns the digest of a JSON object without its key `digest`."""
    text = json.dumps({k: v for k, v in content.items() if k != "digest"}, sort_keys=True)
    return _blake2b(text.encode()).hexdigest()


def file_digests(folder: epath.Path, given_up: Callable[[], bool] = lambda: False) -> FileDigests:
    """Returns size and digest of each file of a checkpoint.

    Local files are hashed with BLAKE2b. For an object store the CRC32C that it computes itself is
    used, without reading the object.

    Args:
      folder: The folder of the checkpoint.
      given_up: Called between parts of a file; if it returns True, the result is incomplete.

    Raises:
      OSError: A file cannot be read.
    """
    if is_remote(folder):
        return {name: list(found) for name, found in object_digests(folder).items()}
    local, found = Path(folder), {}
    for file in sorted(path for path in local.rglob("*") if not path.is_dir()):
        digest = _blake2b()
        with file.open("rb") as stream:
            while not given_up() and (part := stream.read(_CHUNK)):
                digest.update(part)
            found[file.relative_to(local).as_posix()] = [stream.tell(), digest.hexdigest()]
    return found


def changed(known: FileDigests, files: FileDigests) -> list[str]:
    """Returns the files that are missing, new or different from the manifest."""
    names = known.keys() | files.keys()
    return sorted(name for name in names if known.get(name) != files.get(name))


def place(checkpoint: epath.Path) -> epath.Path:
    """Returns the path of the manifest of a checkpoint's folder."""
    return manifests_folder(checkpoint.parent) / f"{checkpoint.name}.json"


def write(checkpoint: epath.Path, files: FileDigests) -> None:
    """Writes the manifest of a checkpoint; a reader sees all of it or nothing."""
    write_text(place(checkpoint), json.dumps(sealed({"files": files})) + "\n")


def read(checkpoint: epath.Path) -> FileDigests | None:
    """Returns the content of the manifest of a checkpoint; None if there is none.

    Raises:
      ValueError: The manifest is damaged.
    """
    try:
        found = json.loads(place(checkpoint).read_text())
    except FileNotFoundError:
        return None
    if not isinstance(found, dict) or found.get("digest") != seal(found):
        raise ValueError("it does not match its digest")
    return found["files"]


def remove(checkpoint: epath.Path) -> None:
    """Removes the manifest of a checkpoint if it exists."""
    place(checkpoint).unlink(missing_ok=True)


def prune(checkpoints: epath.Path, steps: Collection[int]) -> None:
    """Removes the manifests of all checkpoints except those of `steps`."""
    folder = manifests_folder(checkpoints)
    if not folder.is_dir():
        return
    for path in folder.glob("*.json"):
        if path.stem.isdigit() and int(path.stem) not in steps:
            path.unlink(missing_ok=True)


def _blake2b(content: Any = b"") -> Any:
    return hashlib.blake2b(content, digest_size=16)
