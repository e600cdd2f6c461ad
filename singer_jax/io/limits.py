"""How much a file may ask for: files may be a stranger's.

Every limit is far above what honest files have. `SINGER_JAX_LIMITS=4` in the environment makes all
of them four times as high, in a loader's worker too.
"""

from __future__ import annotations

import json
import math
import os
import stat
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from singer_jax.errors import InputError

if TYPE_CHECKING:
    from etils import epath

FACTOR = "SINGER_JAX_LIMITS"
LARGEST_TEXT = 2**29  # bytes of JSON and of lists; iNaturalist's largest is a tenth
_LARGEST_ARRAYS = 2**33  # bytes of a head or of a probe's progress


def most(limit: int) -> int:
    """A limit as the user wants it.

    Raises:
      InputError: `SINGER_JAX_LIMITS` is no number above 0.
    """
    text = os.environ.get(FACTOR, "1")
    try:
        factor = float(text)
    except ValueError:
        factor = math.nan
    if not 0 < factor < math.inf:
        raise InputError(f"{FACTOR}={text} in the environment: give a number above 0")
    return int(limit * factor)


def excess(found: int, limit: int, unit: str) -> str:
    """What is wrong with a number, and what raises the limit; empty: nothing."""
    if found <= most(limit):
        return ""
    return f"{found:,} {unit}, more than {most(limit):,} ({FACTOR}=2 doubles every such limit)"


def check(where: object, found: int, limit: int, unit: str) -> None:
    """Raises `InputError` for a number above its limit."""
    if told := excess(found, limit, unit):
        raise InputError(f"{where}: {told}")


def file_size(path: str | os.PathLike[str]) -> int:
    """Bytes of a local file; `ValueError`: a pipe or a device, which would never end."""
    status = os.stat(path)
    if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
        raise ValueError("a pipe or a device, no file")
    return status.st_size


def check_size(path: epath.Path | Path, limit: int = LARGEST_TEXT) -> None:
    """Raises `InputError` for a file, local or behind a URL, that is larger than its limit."""
    remote = "://" in os.fspath(path)
    check(path, path.stat().length if remote else file_size(path), limit, "bytes")


def read_text(path: epath.Path | Path, limit: int = LARGEST_TEXT, kind: str = "text") -> str:
    """A whole file, local or behind a URL.

    Raises:
      InputError: too large, or not of its kind.
      OSError: it cannot be read.
    """
    try:
        check_size(path, limit)
        return path.read_text()
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"{path} is not {kind}: {error}") from error


def read_json(path: epath.Path | Path, limit: int = LARGEST_TEXT) -> Any:
    """What a JSON file says; raises as `read_text`."""
    text = read_text(path, limit, "JSON")
    try:
        return json.loads(text)
    except (RecursionError, ValueError) as error:
        raise InputError(f"{path} is not JSON: {error}") from error


def read_object(path: epath.Path | Path) -> dict[str, Any]:
    """What a JSON file says that holds one object; raises as `read_text`."""
    content = read_json(path)
    if not isinstance(content, dict):
        raise InputError(f"{path} is not a JSON object")
    return content


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a local `.npz` file, which holds them as `np.savez` writes them.

    Raises:
      InputError: damaged, too large, compressed, or with an array of objects.
      FileNotFoundError: no such file.
    """
    try:
        file_size(path)
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise ValueError("compressed, which it never is")
        check(path, sum(entry.file_size for entry in entries), _LARGEST_ARRAYS, "bytes")
        with np.load(path, allow_pickle=False) as content:
            return dict(content)
    except (FileNotFoundError, InputError):
        raise
    except Exception as error:  # whatever NumPy's and Python's readers raise
        raise InputError(f"{path} is no complete .npz file: {error}") from error
