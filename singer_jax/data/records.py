"""Prepared records: ArrayRecord shards with a manifest, written once and read in any order.

A folder of records contains `records.json` and the shards that it lists. A record consists of a
label (int32, -1: none), the length of a name (uint16), the name, and the image's encoded bytes.
Numbers are little-endian.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from singer_jax.data.images import LARGEST_FILE, UnreadableImage
from singer_jax.data.sources import NoSplit, Record, Source, check_classes
from singer_jax.errors import InputError, RunError, shown
from singer_jax.io import limits

MANIFEST = "records.json"
FORMAT = "singer_jax records 1"
_HEADER = struct.Struct("<iH")
_LONGEST_NAME = 1024  # bytes
_WRITER = "group_size:1,uncompressed"  # images are compressed; each record is read separately
_FILE = re.compile(r"\w[\w.-]*")
_DIGEST = re.compile("[0-9a-f]{64}")


@dataclasses.dataclass(frozen=True)
class Shard:
    """A file of records.

    Attributes:
      file: its name in the folder.
      images: number of records.
      size: size of the file in bytes.
      sha256: SHA-256 of the file.
    """

    file: str
    images: int
    size: int
    sha256: str


def read_shard(where: object, entry: Any) -> Shard:
    """Returns the shard that a JSON object describes; `where` is named in errors.

    Raises:
      InputError: the object does not describe a shard.
    """
    try:
        shard = Shard(**entry)
    except TypeError as error:
        raise InputError(f"{where}: damaged: {error}") from error
    numbers = (shard.images, shard.size)
    if not (
        isinstance(shard.file, str)
        and _FILE.fullmatch(shard.file)
        and isinstance(shard.sha256, str)
        and _DIGEST.fullmatch(shard.sha256)
        and all(type(number) is int and number > 0 for number in numbers)
    ):
        raise InputError(f"{where}: damaged: {str(entry)[:100]!a} does not describe a shard")
    return shard


class RecordSource:
    """A split of prepared records.

    Args:
      folder: folder of the records.
      split: `train` or `test`.

    Raises:
      InputError: the manifest is damaged, or a shard is missing or incomplete.
      NoSplit: the records do not have the split.
    """

    def __init__(self, folder: Path, split: str) -> None:
        self.root = folder.expanduser()
        manifest = self.root / MANIFEST
        content = limits.read_json(manifest)
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise InputError(f"{manifest}: not in the format {FORMAT!r}")
        check_classes(manifest, content.get("classes"))
        splits = content.get("splits")
        if not isinstance(splits, dict) or not isinstance(splits.get(split, []), list):
            raise InputError(f"{manifest}: damaged: its splits are not lists of shards")
        if split not in splits:
            raise NoSplit(f"data: {self.root} has no {split} split; it has {', '.join(splits)}")
        self.num_classes, self.exif = content["classes"], bool(content.get("exif"))
        self.class_names = _class_names(manifest, content.get("class_names"), self.num_classes)
        self.shards = [read_shard(manifest, entry) for entry in splits[split]]
        for shard in self.shards:
            _check_size(self.root / shard.file, shard)
        self._records = self._open()
        digests = "".join(shard.sha256 for shard in self.shards)
        described = f"{self.num_classes} {self.exif} {digests}"
        self._fingerprint = hashlib.sha256(described.encode()).hexdigest()

    def _open(self) -> Any:
        from array_record.python import array_record_data_source

        return array_record_data_source.ArrayRecordDataSource(
            # With explicit ranges of records, a file is opened only when it is first read.
            [f"{self.root / shard.file}[0:{shard.images}]" for shard in self.shards],
            {"max_parallelism": "0"},
        )

    def __len__(self) -> int:
        return len(self._records)

    def _read(self, index: int) -> tuple[int, bytes, bytes]:
        try:
            return decode_record(self._records[index])
        except Exception as error:  # ArrayRecord raises many types
            raise UnreadableImage(str(error).strip() or type(error).__name__) from error

    def __getitem__(self, index: int) -> Record:
        label, _, image = self._read(index)
        if not -1 <= label < max(self.num_classes, 1):
            raise UnreadableImage(f"label {label} is not one of {self.num_classes} classes")
        return Record(image, label)

    def describe(self, index: int) -> str:
        try:
            name = os.fsdecode(self._read(index)[1])
        except UnreadableImage:
            name = "damaged"
        return shown(f"{self.root} record {index} ({name})")

    def fingerprint(self) -> str:
        return self._fingerprint


def _class_names(manifest: Path, names: Any, classes: int) -> tuple[str, ...]:
    """Returns the names of the classes; empty where the manifest says none."""
    names = [] if names is None else names
    named = isinstance(names, list) and all(isinstance(name, str) for name in names)
    if not named or len(names) not in (0, classes):
        raise InputError(f"{manifest}: damaged: its class_names are not those of {classes} classes")
    return tuple(names)


def _check_size(path: Path, shard: Shard) -> None:
    try:
        size = limits.file_size(path)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: {getattr(error, 'strerror', None) or error}") from error
    if size != shard.size:
        raise InputError(f"{path}: {size:,} bytes, {MANIFEST} says {shard.size:,}; prepare again")


def encode_record(label: int, name: bytes, image: bytes) -> bytes:
    """Returns one record."""
    name = name[:_LONGEST_NAME]
    return _HEADER.pack(label, len(name)) + name + image


def decode_record(record: bytes) -> tuple[int, bytes, bytes]:
    """Returns label, name and image of a record; raises `UnreadableImage` if it is truncated."""
    if len(record) < _HEADER.size:
        raise UnreadableImage("an incomplete record")
    label, length = _HEADER.unpack_from(record)
    start = _HEADER.size + length
    if len(record) < start:
        raise UnreadableImage("an incomplete record")
    return label, record[_HEADER.size : start], record[start:]


def stored_bytes(image: Any) -> bytes:
    """Returns the encoded image of a record, which holds the bytes or the path of a file.

    Raises:
      UnreadableImage: the file cannot be read or is too large.
    """
    if isinstance(image, bytes):
        return image
    try:
        size = limits.file_size(image)
        if excess := limits.excess(size, LARGEST_FILE, "bytes"):
            raise ValueError(excess)
        return image.read_bytes()
    except (OSError, ValueError) as error:
        raise UnreadableImage(getattr(error, "strerror", None) or str(error)) from error


def write_shard(
    path: Path,
    source: Source,
    indices: range,
    unreadable: Callable[[int, str], None],
) -> Iterator[int]:
    """Writes some records of a source to a file that gets its name when it is complete.

    An unreadable image becomes a record without an image, so that no index changes.

    Args:
      path: path of the shard, which is first written as `path.partial`.
      source: source of images with classes or without labels.
      indices: indices of the records to write.
      unreadable: function that is called with the index and the reason for each unreadable image.

    Yields:
      The index of each written record; the file is complete when the iterator ends.

    Raises:
      RunError: the disk is full or fails.
    """
    from array_record.python.array_record_module import ArrayRecordWriter

    partial = path.with_name(f"{path.name}.partial")
    try:
        writer = ArrayRecordWriter(str(partial), _WRITER)
        name_of = getattr(source, "name", lambda index: os.fsencode(source.describe(index)))
        for index in indices:
            label, image = -1, b""
            try:
                record = source[index]
                label = record.label if isinstance(record.label, int) else -1
                image = stored_bytes(record.image)
            except UnreadableImage as error:
                unreadable(index, str(error))
            writer.write(encode_record(label, name_of(index), image))
            if not writer.ok():
                raise OSError("the writer failed")
            yield index
        writer.close()
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    except (OSError, RuntimeError) as error:  # ArrayRecord raises RuntimeError on a full disk
        if isinstance(error, RunError):
            raise
        reason = getattr(error, "strerror", None) or str(error).split(";")[0]
        raise RunError(f"cannot write {path}: {reason}; finished shards are kept") from error


def sha256_of(path: Path) -> str:
    """Returns the SHA-256 of a file in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
