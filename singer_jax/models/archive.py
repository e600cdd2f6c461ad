"""Zip archives of `torch.save` and `numpy.savez`, whose entries are not compressed.

Every size is compared with the file and with a limit before memory is allocated.
"""

from __future__ import annotations

import contextlib
import io
import pickle
import struct
import tokenize
import zipfile
from collections.abc import Iterator
from pathlib import Path

from singer_jax.io import limits

LARGEST_DIRECTORY = 2**24  # bytes, also of a pickle; that of a published checkpoint has 0.1 MB

# Exceptions of zipfile, pickletools, NumPy and our interpreter for a damaged or hostile file.
FAILURES = (
    zipfile.BadZipFile,
    pickle.UnpicklingError,
    struct.error,
    EOFError,
    LookupError,
    MemoryError,
    OSError,
    OverflowError,
    RuntimeError,  # an encrypted entry; NotImplementedError: a zip format that Python cannot read
    SyntaxError,  # raised for the header of an array
    tokenize.TokenError,
    TypeError,
    ValueError,
)


class BoundedFile(io.FileIO):
    """A file that refuses to read more bytes at once than an archive's directory may have."""

    def read(self, size: int = -1) -> bytes:
        if excess := limits.excess(size, LARGEST_DIRECTORY, "bytes"):
            raise zipfile.BadZipFile(f"its directory has {excess}")
        return super().read(size)


@contextlib.contextmanager
def open_archive(path: Path) -> Iterator[zipfile.ZipFile]:
    """Opens an archive with a directory of bounded size and without duplicate names."""
    limits.file_size(path)
    with BoundedFile(path) as file, zipfile.ZipFile(file) as archive:
        names = archive.namelist()
        if len(set(names)) < len(names):
            raise zipfile.BadZipFile("it has two entries with the same name")
        yield archive


def check_entry(archive: zipfile.ZipFile, name: str) -> zipfile.ZipInfo:
    """Returns an uncompressed entry that lies inside the file."""
    entry = archive.getinfo(name)
    if entry.flag_bits & 1:
        raise zipfile.BadZipFile(f"{name} is encrypted")
    if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
        raise zipfile.BadZipFile(f"{name} is compressed; save it without compression")
    whole = Path(archive.filename).stat().st_size
    if entry.header_offset + entry.file_size > whole:
        raise zipfile.BadZipFile(f"{name} extends past the end of the file")
    return entry


def read_entry(archive: zipfile.ZipFile, name: str, limit: int | None = None) -> bytes:
    """Returns the content of an entry, of at most `limit` bytes."""
    entry = check_entry(archive, name)
    if limit is not None and (excess := limits.excess(entry.file_size, limit, "bytes")):
        raise zipfile.BadZipFile(f"{name} has {excess}")
    return archive.read(entry)


_LOCAL_HEADER = struct.Struct("<4s22xHH")  # lengths of an entry's name and extra field


def entry_start(archive: zipfile.ZipFile, name: str) -> int:
    """Returns the position in the file of the first byte of an uncompressed entry."""
    entry = check_entry(archive, name)
    with Path(archive.filename).open("rb") as file:
        file.seek(entry.header_offset)
        magic, name_length, extra_length = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
        if magic != b"PK\x03\x04":
            raise zipfile.BadZipFile(f"{name} does not begin at the position in the directory")
        start = entry.header_offset + _LOCAL_HEADER.size + name_length + extra_length
        if start + entry.file_size > file.seek(0, 2):
            raise zipfile.BadZipFile(f"{name} extends past the end of the file")
    return start
