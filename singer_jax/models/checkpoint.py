"""Checkpoint files: their format is detected from the content, and tensors are read on demand.

Supported formats are safetensors (whole or sharded), both formats of PyTorch, and `.npz`. Any other
file is rejected with a one-line error.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from singer_jax.errors import InputError, excerpt, listed
from singer_jax.io import limits
from singer_jax.models.archive import FAILURES, open_archive
from singer_jax.models.npz_file import open_npz
from singer_jax.models.tensors import StoredTensor
from singer_jax.models.torch_file import LEGACY_MAGIC, Unknown, load_torch_file

INDEX = ".index.json"  # suffix of the index of a sharded file

_LARGEST_HEADER = _LARGEST_INDEX = 2**24  # bytes; timm's have 0.1 MiB
_MOST_SHARDS = 10_000
_BEGIN = 512  # bytes at the beginning that identify a format

# Dtypes of safetensors that NumPy supports.
_DTYPES = {
    **{f"F{bits}": f"float{bits}" for bits in (16, 32, 64)},
    **{
        f"{sign}{bits}": f"{name}{bits}"
        for sign, name in (("I", "int"), ("U", "uint"))
        for bits in (8, 16, 32, 64)
    },
    "BF16": ml_dtypes.bfloat16,
    "BOOL": "bool",
}

# The first bytes of unsupported files, and the end of the error.
_APPEARANCES = (
    (b"version https://git-lfs", "is a git-lfs pointer; fetch the weights with git lfs pull"),
    (b"<", "is a web page, not weights; download it again"),
    (b"\x80", "is a pickle that torch.save did not write: refused, opening it can run code"),
    (b"\x1f\x8b", "is compressed with gzip; unpack it"),
    (b"(\xb5/\xfd", "is compressed with zstd; unpack it"),
    (b"\xfd7zXZ", "is compressed with xz; unpack it"),
    (b"\x89HDF", "is an HDF5 file (Keras), which is not supported"),
    (b"GGUF", "is a GGUF file, which is not supported"),
    (b"\x93NUMPY", "is a single array (.npy), not weights"),
)


@dataclasses.dataclass(frozen=True)
class SafetensorsTensor:
    """A tensor still in its `.safetensors` file; `read` returns its values."""

    path: Path
    key: str
    shape: tuple[int, ...]
    dtype: np.dtype

    def read(self, part: tuple[slice, ...] = ()) -> np.ndarray:
        """Returns the values or a part; raises `InputError` for a damaged or changed file."""
        try:
            with safe_open(self.path, framework="numpy") as file:
                return file.get_slice(self.key)[part] if part else file.get_tensor(self.key)
        except (SafetensorError, OSError, TypeError, ValueError) as error:
            raise _not_complete(self.path, error) from error


def read_content(path: Path, shard: bool = False) -> Any:
    """Returns the tensors of a file by its own keys; a PyTorch file may have other objects too.

    Args:
      path: the file.
      shard: an index names it, so that it is no index itself.

    Raises:
      InputError: the file is damaged, is not readable or is not a checkpoint.
    """
    try:
        whole = limits.file_size(path)
        with path.open("rb") as file:
            begin = file.read(_BEGIN)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(f"weights {path}: cannot be read ({reason})") from error
    # Before archives: a header may have as many bytes as "PK" says, and none begins like this.
    if begin[8:9] == b"{" and int.from_bytes(begin[:8], "little") <= whole:
        return _open_safetensors(path)
    if begin.startswith(b"PK"):
        return open_npz(path) if _is_npz(path) else load_torch_file(path)
    if begin.startswith(b"\x80") and LEGACY_MAGIC in begin[:16]:
        return load_torch_file(path, legacy=True)
    if begin.lstrip().startswith(b"{"):
        if shard:
            raise InputError(f"{path} is named as a shard, but is an index of shards or other JSON")
        return _open_shards(path)
    for magic, problem in _APPEARANCES:
        if begin.lstrip().startswith(magic):
            raise InputError(f"{path} {problem}")
    if begin[257:262] == b"ustar":
        raise InputError(f"{path} is a tar archive; unpack it")
    if not begin:
        raise InputError(f"{path} is empty; download it again")
    if path.suffix == ".safetensors":
        return _open_safetensors(path)  # raises an error that names the damage
    raise InputError(
        f"{path} is not a checkpoint: it begins with {begin[:8]!r}; safetensors, PyTorch files and "
        ".npz are read"
    )


def _is_npz(path: Path) -> bool:
    """Returns whether every entry of an archive is an array; False for a damaged archive."""
    try:
        with open_archive(path) as archive:
            names = archive.namelist()
    except FAILURES:
        return False
    return bool(names) and all(name.endswith(".npy") for name in names)


def shards(path: Path) -> dict[str, str]:
    """Returns the file of each tensor that an index of shards names.

    Raises:
      InputError: the file is not an index of shards, or names a file outside its folder.
    """
    try:
        content = limits.read_json(path, _LARGEST_INDEX)
    except OSError as error:
        raise InputError(f"weights {path}: cannot be read ({error.strerror})") from error
    found = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(found, dict) or not found:
        raise InputError(f"{path} is JSON, but not an index of weights; give the weights file")
    for name in found.values():
        if not isinstance(name, str) or Path(name).name != name or not name.isprintable():
            raise InputError(f"{path} names {excerpt(str(name))!r}, no file of its folder: refused")
    limits.check(path, len(set(found.values())), _MOST_SHARDS, "shards")
    return found


def _open_shards(path: Path) -> dict[str, StoredTensor]:
    named = shards(path)
    files = sorted(set(named.values()))
    missing = [name for name in files if not (path.parent / name).is_file()]
    if missing:
        raise InputError(f"{path} names shards that do not exist: {listed(missing)}")
    tensors: dict[str, StoredTensor] = {}
    for name in files:
        content = _shard(path.parent / name)
        keys = [key for key, file in named.items() if file == name]
        lacking = [key for key in keys if not hasattr(content.get(key), "read")]
        if lacking:
            raise InputError(f"{path}: {name} does not hold {listed(lacking)}")
        tensors |= {key: content[key] for key in keys}
    return tensors


def _shard(path: Path) -> dict[str, Any]:
    """Returns the content of one shard, which is never an index of others."""
    content = read_content(path, shard=True)
    if not isinstance(content, dict):
        raise InputError(f"{path} is named as a shard, but holds no dict of tensors")
    return content


def _open_safetensors(path: Path) -> dict[str, StoredTensor | Unknown]:
    try:
        _check_header(path)
        with safe_open(path, framework="numpy") as file:
            return {
                key: _described(path, key, file.get_slice(key))
                for key in file.keys()  # noqa: SIM118 - safe_open is not a mapping
            }
    except (SafetensorError, OSError, _BadHeader) as error:
        raise _not_complete(path, error) from error


def _described(path: Path, key: str, part: Any) -> SafetensorsTensor | Unknown:
    kind = part.get_dtype()
    if kind not in _DTYPES:
        return Unknown(f"of dtype {kind}")
    return SafetensorsTensor(path, key, tuple(part.get_shape()), np.dtype(_DTYPES[kind]))


class _BadHeader(Exception):
    """Raised if the header of a safetensors file does not match the file."""


def _check_header(path: Path) -> None:
    """Raises `_BadHeader` for a header larger than its file or than the limit."""
    try:
        whole = limits.file_size(path)
    except ValueError as error:
        raise _BadHeader(str(error)) from error
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
    if size > whole:
        raise _BadHeader(f"{size} bytes of header in a file of {whole}")
    if excess := limits.excess(size, _LARGEST_HEADER, "bytes of header"):
        raise _BadHeader(excess)


def _not_complete(path: Path, error: Exception) -> InputError:
    return InputError(
        f"{path} is not a complete safetensors file ({error}); download or export it again"
    )
