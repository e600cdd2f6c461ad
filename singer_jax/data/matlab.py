"""Reader of numbers in MATLAB files, whose content is checked before any C code reads it.

Files of version 5 hold lists of numbers (`read_numbers`), version 7.3 is HDF5 (`open_frames`).
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from singer_jax.errors import InputError
from singer_jax.io import limits

_LARGEST = 2**24  # bytes of a list, compressed or not; the data sets' lists have 16 KiB
_LARGEST_FRAME = 2**28  # bytes of a frame, and of an HDF5 chunk
_HEADER, _TAG = 128, 8
_MATRIX, _COMPRESSED = 14, 15
_NUMBERS = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8"}
_NUMBERS |= {13: "u8"}


def read_numbers(path: Path, name: str) -> np.ndarray:
    """Returns the integers of a variable as a flat int64 array.

    SciPy is not used, because its C reader crashes on some damaged files.

    Raises:
      InputError: the file is damaged or too large, or has no such variable of integers.
    """
    try:
        limits.check(path, limits.file_size(path), _LARGEST, "bytes")
        content = path.read_bytes()
        order = {b"IM": "<", b"MI": ">"}[content[126:128]]
        total = 0
        for kind, data in _elements(content[_HEADER:], order):
            if kind == _COMPRESSED:
                unpacked = zlib.decompressobj().decompress(data, limits.most(_LARGEST) + 1)
                total += len(unpacked)
                limits.check(path, total, _LARGEST, "bytes after decompression")
                kind, data = next(_elements(unpacked, order))
            if kind != _MATRIX:
                continue
            parts = _elements(data, order)  # flags, dimensions, name, numbers
            _, _, (_, called) = next(parts), next(parts), next(parts)
            if called == name.encode():
                return _whole(*next(parts), order)
    except InputError:
        raise
    except (OSError, LookupError, StopIteration, ValueError, zlib.error) as error:
        raise InputError(f"{path} is a damaged MATLAB file: {error!r}") from error
    raise InputError(f"{path} has no variable {name} of numbers")


def _elements(content: bytes, order: str) -> Iterator[tuple[int, bytes]]:
    """Yields kind and content of each data element of a MAT-file, version 5."""
    number = {"<": "little", ">": "big"}[order]
    at = 0
    while at + _TAG <= len(content):
        kind, size = (int.from_bytes(content[k : k + 4], number) for k in (at, at + 4))
        if kind >> 16:  # content of at most 4 bytes inside the tag
            kind, size, start, end = kind & 0xFFFF, kind >> 16, at + 4, at + _TAG
        else:
            start = at + _TAG
            end = start + size + (0 if kind == _COMPRESSED else -size % 8)
        if start + size > len(content) or start + size > end:
            raise ValueError("an element extends past the end of the file")
        yield kind, content[start : start + size]
        at = end


def _whole(kind: int, data: bytes, order: str) -> np.ndarray:
    stored = np.frombuffer(data, order + _NUMBERS[kind])
    with np.errstate(invalid="ignore"):
        numbers = stored.astype(np.int64)
    if not np.array_equal(numbers, stored):
        raise ValueError("the numbers are not integers")
    return numbers


def open_frames(path: Path) -> Any:
    """Opens the HDF5 file of NYU Depth v2 and checks its arrays `images` and `depths`.

    Raises:
      InputError: the file is damaged or links to another file, or the arrays have other shapes.
    """
    import h5py

    try:
        limits.file_size(path)
        file = h5py.File(path, "r")
        for name, kind, axes in (("images", "u", 4), ("depths", "f", 3)):
            _check_frames(f"{path}: {name}", file, name, kind, axes)
    except InputError:
        raise
    except Exception as error:  # h5py raises exceptions of many types for a damaged file
        raise InputError(f"{path} is damaged: {error}") from error
    return file


def _check_frames(where: str, file: Any, name: str, kind: str, axes: int) -> None:
    """Raises `InputError` unless a name is an array of frames that is stored in the file."""
    import h5py

    whole = isinstance(file.get(name, getlink=True), h5py.HardLink)
    data = file[name] if whole else None
    if (
        not isinstance(data, h5py.Dataset)
        or (data.ndim, data.dtype.kind) != (axes, kind)
        or (kind == "u" and (data.dtype.itemsize, data.shape[1]) != (1, 3))
        or data.external  # HDF5 can refer to data in any other file
        or data.is_virtual
        or 0 in data.shape[1:]
    ):
        raise InputError(f"{where} is not an array of {axes} axes stored in this file")
    frame, piece = (math.prod(sides) for sides in (data.shape[1:], data.chunks or ()))
    limits.check(where, data.dtype.itemsize * max(frame, piece), _LARGEST_FRAME, "bytes a frame")
