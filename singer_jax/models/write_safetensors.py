"""Writes tensors to a safetensors file with reproducible bytes, and verifies the file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from etils import epath
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from singer_jax.errors import RunError
from singer_jax.io.files import replacing


def write_safetensors(
    path: epath.Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]
) -> str:
    """Writes a safetensors file, reads it back and compares it bit for bit.

    The file gets its final name only after the comparison.

    Args:
      path: path of the file, whose folder is made if needed.
      tensors: tensors by key.
      metadata: metadata of the file's header.

    Returns:
      The SHA-256 of the file.

    Raises:
      RunError: the file cannot be written, or differs when it is read back.
    """
    with replacing(path) as file:
        try:
            save_file(dict(tensors), file, metadata=dict(metadata))
        except SafetensorError as error:  # the disk's error, without its number
            raise RunError(f"cannot write {path}: {error}") from error
        _order_metadata(file)
        file.chmod(0o644)  # safetensors makes it readable for the owner only
        if different := _differences(file, tensors):
            file.unlink()
            raise RunError(
                f"{path}: {len(different)} tensors read back differ from those written, first "
                f"{different[0]}; check the disk and export again"
            )
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()


def _order_metadata(file: Path) -> None:
    """Sorts the metadata, which the library writes in an arbitrary order."""
    with file.open("r+b") as stream:
        size = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        stream.seek(8)
        stream.write(text.ljust(size))


def _differences(file: Path, tensors: Mapping[str, np.ndarray]) -> list[str]:
    """Returns the keys of tensors whose bits differ in the file."""
    with safe_open(file, framework="numpy") as stored:
        keys = set(stored.keys())
        return sorted(keys ^ set(tensors)) + [
            key
            for key, tensor in tensors.items()
            if key in keys and not _same_bits(stored.get_tensor(key), tensor)
        ]


def _same_bits(stored: np.ndarray, given: np.ndarray) -> bool:
    same_kind = (stored.shape, stored.dtype) == (given.shape, given.dtype)
    return same_kind and stored.tobytes() == given.tobytes()
