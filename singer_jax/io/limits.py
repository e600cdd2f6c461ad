"""Limits on the memory and time that untrusted files can take.

Every limit is far above the size of ordinary files. `SINGER_JAX_LIMITS=4` in the environment
raises all limits by a factor of four, in the loader's workers too.
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
    """Returns a limit multiplied by the user's factor.

    Raises:
      InputError: `SINGER_JAX_LIMITS` is not a number above 0.
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
    """Returns the message for a number above its limit, or an empty string."""
    if found <= most(limit):
        return ""
    return f"{found:,} {unit}, more than {most(limit):,} ({FACTOR}=2 doubles every such limit)"


def check(where: object, found: int, limit: int, unit: str) -> None:
    """Raises `InputError` for a number above its limit."""
    if message := excess(found, limit, unit):
        raise InputError(f"{where}: {message}")


def file_size(path: str | os.PathLike[str]) -> int:
    """Returns the size of a local file in bytes.

    Raises:
      ValueError: the path is a pipe or a device, which may be endless.
    """
    status = os.stat(path)
    if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
        raise ValueError("it is a pipe or a device, not a file")
    return status.st_size


def read_text(path: epath.Path | Path, limit: int = LARGEST_TEXT, kind: str = "text") -> str:
    """Returns the text of a local file or a URL.

    Raises:
      InputError: the file is too large or is not text.
      OSError: the file cannot be read.
    """
    try:
        remote = "://" in os.fspath(path)
        check(path, path.stat().length if remote else file_size(path), limit, "bytes")
        return path.read_text()
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"{path} is not {kind}: {error}") from error


def read_json(path: epath.Path | Path, limit: int = LARGEST_TEXT) -> Any:
    """Returns the content of a JSON file; raises the errors of `read_text`."""
    text = read_text(path, limit, "JSON")
    try:
        return json.loads(text)
    except (RecursionError, ValueError) as error:
        raise InputError(f"{path} is not JSON: {error}") from error


def read_object(path: epath.Path | Path) -> dict[str, Any]:
    """Returns the object of a JSON file; raises the errors of `read_text`."""
    content = read_json(path)
    if not isinstance(content, dict):
        raise InputError(f"{path} is not a JSON object")
    return content


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Returns the arrays of a local `.npz` file that `np.savez` has written.

    Raises:
      InputError: the file is damaged, too large or compressed, or has an array of objects.
      FileNotFoundError: there is no such file.
    """
    try:
        file_size(path)
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise ValueError("it is compressed, but np.savez does not compress")
        check(path, sum(entry.file_size for entry in entries), _LARGEST_ARRAYS, "bytes")
        with np.load(path, allow_pickle=False) as content:
            return dict(content)
    except (FileNotFoundError, InputError):
        raise
    except Exception as error:  # the readers of NumPy and Python raise many types
        raise InputError(f"{path} is not a complete .npz file: {error}") from error
