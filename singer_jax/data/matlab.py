"""Numbers out of MATLAB's files; of those that code in C reads, what they hold is checked before.

Version 5 holds lists of numbers (`read_numbers`), version 7.3 is HDF5 (`open_frames`).
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

_LARGEST = 2**24  # bytes of a list, compressed or not; those of the data sets have 16 KiB
_LARGEST_FRAME = 2**28  # bytes of a frame, and of the piece in which it is compressed
_HEADER, _TAG = 128, 8
_MATRIX, _COMPRESSED = 14, 15
_NUMBERS = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8"}
_NUMBERS |= {13: "u8"}


def read_numbers(path: Path, name: str) -> np.ndarray:
    """The whole numbers of a variable, int64 and one after the other.

    Not by SciPy, whose reader in C ends the process at some damaged files.

    Raises:
      InputError: the file is damaged or too large, or holds no such whole numbers.
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
                limits.check(path, total, _LARGEST, "bytes when it is unpacked")
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
        raise InputError(f"{path} is a damaged list of numbers: {error!r}") from error
    raise InputError(f"{path} holds no numbers called {name}")


def _elements(content: bytes, order: str) -> Iterator[tuple[int, bytes]]:
    """Kind and content of each data element of MATLAB's MAT-file format, version 5."""
    number = {"<": "little", ">": "big"}[order]
    at = 0
    while at + _TAG <= len(content):
        kind, size = (int.from_bytes(content[k : k + 4], number) for k in (at, at + 4))
        if kind >> 16:  # of at most 4 bytes, inside the tag
            kind, size, start, end = kind & 0xFFFF, kind >> 16, at + 4, at + _TAG
        else:
            start = at + _TAG
            end = start + size + (0 if kind == _COMPRESSED else -size % 8)
        if start + size > len(content) or start + size > end:
            raise ValueError("an element ends behind the end")
        yield kind, content[start : start + size]
        at = end


def _whole(kind: int, data: bytes, order: str) -> np.ndarray:
    stored = np.frombuffer(data, order + _NUMBERS[kind])
    with np.errstate(invalid="ignore"):
        numbers = stored.astype(np.int64)
    if not np.array_equal(numbers, stored):
        raise ValueError("no whole numbers")
    return numbers


def open_frames(path: Path) -> Any:
    """NYU Depth v2's HDF5 file; `images` and `depths` in it are whole and its own.

    Raises:
      InputError: damaged, another file is linked in, or they are no frames of this data set.
    """
    import h5py

    try:
        limits.file_size(path)
        file = h5py.File(path, "r")
        for name, kind, axes in (("images", "u", 4), ("depths", "f", 3)):
            _check_frames(f"{path}: {name}", file, name, kind, axes)
    except InputError:
        raise
    except Exception as error:  # h5py raises anything at a damaged file
        raise InputError(f"{path} is damaged: {error}") from error
    return file


def _check_frames(where: str, file: Any, name: str, kind: str, axes: int) -> None:
    """Raises `InputError` for what is no array of frames, or not stored in the file."""
    import h5py

    whole = isinstance(file.get(name, getlink=True), h5py.HardLink)
    data = file[name] if whole else None
    if (
        not isinstance(data, h5py.Dataset)
        or (data.ndim, data.dtype.kind) != (axes, kind)
        or (kind == "u" and (data.dtype.itemsize, data.shape[1]) != (1, 3))
        or data.external  # HDF5 may say that numbers lie in any other file
        or data.is_virtual
        or 0 in data.shape[1:]
    ):
        raise InputError(f"{where} is no array of {axes} axes stored in this file")
    frame, piece = (math.prod(sides) for sides in (data.shape[1:], data.chunks or ()))
    limits.check(where, data.dtype.itemsize * max(frame, piece), _LARGEST_FRAME, "bytes a frame")
