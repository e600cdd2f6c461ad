"""Arrays of an `.npz` file, such as the original ViT and augreg releases, read on demand."""

from __future__ import annotations

import dataclasses
import io
import math
import zipfile
from pathlib import Path

import numpy as np

from singer_jax.errors import InputError, excerpt
from singer_jax.models.archive import FAILURES, check_entry, open_archive, read_entry

_LARGEST_HEADER = 10_000  # bytes; the header of a numeric array has 128
_READABLE = "fiub"  # kinds of dtypes: floats, integers, booleans


@dataclasses.dataclass(frozen=True)
class NpzArray:
    """An array in a file, which `read` loads.

    Attributes:
      path: the file.
      entry: entry of the archive.
      start: offset of the data in the entry, in bytes.
      shape: shape of the array.
      dtype: dtype of the array.
      columns_first: True if the data are in Fortran order.
    """

    path: Path
    entry: str
    start: int
    shape: tuple[int, ...]
    dtype: np.dtype
    columns_first: bool

    def read(self, part: tuple[slice, ...] = ()) -> np.ndarray:
        """Returns the values or a part; raises `InputError` if the file has changed."""
        try:
            with zipfile.ZipFile(self.path) as archive:
                content = read_entry(archive, self.entry)
            array = np.frombuffer(content, self.dtype, math.prod(self.shape), self.start)
        except FAILURES as error:
            raise _not_complete(self.path, error) from error
        array = array.reshape(self.shape, order="F" if self.columns_first else "C")
        return np.array(array[part], order="C")


def _not_complete(path: Path, error: BaseException) -> InputError:
    reason = excerpt(str(error) or type(error).__name__, 120)
    return InputError(f"{path} is not a complete .npz file ({reason}); download it again")


def open_npz(path: Path) -> dict[str, NpzArray]:
    """Returns the arrays of a file by name.

    Raises:
      InputError: the file is damaged or compressed, or contains arrays of objects.
    """
    try:
        with open_archive(path) as archive:
            return {
                name.removesuffix(".npy"): _described(path, archive, name)
                for name in archive.namelist()
            }
    except FAILURES as error:
        raise _not_complete(path, error) from error


def _described(path: Path, archive: zipfile.ZipFile, name: str) -> NpzArray:
    size = check_entry(archive, name).file_size
    with archive.open(name) as entry:
        begin = io.BytesIO(entry.read(_LARGEST_HEADER + 16))
    version = np.lib.format.read_magic(begin)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"{excerpt(name)} has an unknown version {version} of the format")
    read_header = (
        np.lib.format.read_array_header_1_0
        if version == (1, 0)
        else np.lib.format.read_array_header_2_0
    )
    shape, columns_first, dtype = read_header(begin, max_header_size=_LARGEST_HEADER)
    if dtype.kind not in _READABLE or not dtype.isnative:
        raise ValueError(f"{excerpt(name)} has dtype {excerpt(str(dtype))}, which is not supported")
    if any(side < 0 for side in shape) or len(shape) > 16:
        raise ValueError(f"{excerpt(name)} has shape {excerpt(str(shape))}")
    if begin.tell() + math.prod(shape) * dtype.itemsize > size:
        raise ValueError(f"{excerpt(name)} has {size:,} bytes, too few for its shape")
    if math.prod(side or 1 for side in shape) > 2**48:
        raise ValueError(f"{excerpt(name)} has shape {excerpt(str(shape))}")
    return NpzArray(path, name, begin.tell(), tuple(shape), dtype, bool(columns_first))
