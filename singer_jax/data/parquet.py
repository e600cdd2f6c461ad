"""Images and labels in Parquet shards, the format of data sets on the Hugging Face Hub.

A row group is read as a whole, so this source is efficient only when read in order. The job
`prepare` converts it into records, which can be read in any order.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import threading
from pathlib import Path
from typing import Any

import numpy as np

from singer_jax.data.images import UnreadableImage
from singer_jax.data.shard_files import by_split, of_split
from singer_jax.data.sources import Record, check_classes
from singer_jax.errors import InputError, shown
from singer_jax.io import limits

_LARGEST_GROUP = 2**33  # bytes of a row group; those on the Hub have a hundredth of it
_IMAGES = ("image", "img", "jpg", "jpeg", "png", "webp")
_LABELS = ("label", "labels", "cls")


@dataclasses.dataclass(frozen=True)
class Columns:
    """The columns of images and labels.

    Attributes:
      image: column of encoded bytes, or of structures with a field `bytes`.
      label: column of class numbers; None: no labels.
      names: class names, if the file lists them.
    """

    image: str
    label: str | None
    names: tuple[str, ...] = ()


class ParquetSource:
    """A split of a data set in Parquet shards.

    Args:
      root: a Parquet file, or a folder of them.
      split: `train` or `test`.
      image, label: column names; None: detected by names and types.

    Raises:
      InputError: there is no Parquet file, a file is damaged, or the columns are ambiguous.
      NoSplit: no file name contains the name of the split.
    """

    exif = True  # as in the library `datasets`

    def __init__(
        self, root: Path, split: str, image: str | None = None, label: str | None = None
    ) -> None:
        root = root.expanduser()
        files = by_split(root, ".parquet")
        self.files = of_split(files, root, split)
        opened = [_open(file) for file in self.files]
        self.columns = find_columns(self.files[0], opened[0].schema_arrow, image, label)
        groups: list[tuple[int, int, int]] = []
        for number, (path, file) in enumerate(zip(self.files, opened, strict=True)):
            if missing := {self.columns.image, self.columns.label} - {
                None,
                *file.schema_arrow.names,
            }:
                raise InputError(f"{path}: no column {missing.pop()!r}, which {self.files[0]} has")
            for group in range(file.num_row_groups):
                about = file.metadata.row_group(group)
                limits.check(path, about.total_byte_size, _LARGEST_GROUP, "bytes in a row group")
                groups.append((number, group, about.num_rows))
        self.groups = np.array(groups, np.int64).reshape(-1, 3)
        self.ends = np.cumsum(self.groups[:, 2])
        if not len(self):
            raise InputError(f"data: the Parquet files of {root} have no rows")
        self.class_names = self.columns.names
        self.num_classes = len(self.class_names)
        if self.columns.label and not self.num_classes:
            self.num_classes = _count_classes(files, self.columns.label)
        check_classes(root, self.num_classes)
        self._read = threading.local()

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def __getitem__(self, index: int) -> Record:
        group = int(np.searchsorted(self.ends, index, side="right"))
        within = int(index) - int(self.ends[group] - self.groups[group, 2])
        if getattr(self._read, "group", None) != group:
            self._read.table = self._table(group)
            self._read.group = group
        table = self._read.table
        label = table[self.columns.label][within].as_py() if self.columns.label else -1
        if label is None:
            label = -1
        if type(label) is not int or not -1 <= label < max(1, self.num_classes):
            raise InputError(f"{self.describe(index)}: label {str(label)[:50]!a} is not a class")
        value = table[self.columns.image][within].as_py()
        image = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(image, bytes):
            raise UnreadableImage("the row holds no encoded image, only a path or another value")
        return Record(image, label)

    def _table(self, group: int) -> Any:
        number, within, _ = self.groups[group]
        wanted = [name for name in (self.columns.image, self.columns.label) if name]
        path = self.files[number]
        try:
            return _open(path).read_row_group(int(within), columns=wanted, use_threads=False)
        except Exception as error:  # pyarrow raises many types
            raise InputError(f"{path}: damaged: {' '.join(str(error).split())[:100]}") from error

    def name(self, index: int) -> bytes:
        """Returns the file of an image, and its row in it, from 0."""
        group = int(np.searchsorted(self.ends, index, side="right"))
        number = int(self.groups[group, 0])
        before = self.groups[self.groups[:, 0] < number, 2].sum()
        return f"{self.files[number].name} row {index - before}".encode()

    def describe(self, index: int) -> str:
        return shown(self.name(index).decode())

    def fingerprint(self) -> str:
        described = [(file.name, file.stat().st_size) for file in self.files]
        content = [described, self.groups.tolist(), dataclasses.astuple(self.columns)]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _open(path: Path) -> Any:
    import pyarrow.parquet

    try:
        limits.file_size(path)
        return pyarrow.parquet.ParquetFile(path)
    except Exception as error:  # as above
        raise InputError(f"{path}: not a complete Parquet file: {str(error)[:100]}") from error


def find_columns(where: Path, schema: Any, image: str | None, label: str | None) -> Columns:
    """Returns the columns that hold images and labels.

    Args:
      where: file that is named in errors.
      schema: pyarrow schema of the file.
      image, label: requested column names. None: the images and class labels of the Hub's metadata,
        otherwise columns of a suitable type; of several columns, the one with a usual name.

    Raises:
      InputError: there is no such column, or there are several candidates.
    """
    import pyarrow.types

    try:
        about = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        features = dict(about.get("info", {}).get("features", {}))
        kinds = {name: dict(feature).get("_type") for name, feature in features.items()}
    except (ValueError, TypeError, AttributeError):
        features, kinds = {}, {}

    def holds_images(field: Any) -> bool:
        kind = field.type
        if pyarrow.types.is_struct(kind):
            return kind.get_field_index("bytes") >= 0
        return pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind)

    images = [f.name for f in schema if holds_images(f) and kinds.get(f.name, "Image") == "Image"]
    labels = [name for name in schema.names if kinds.get(name) == "ClassLabel"]
    numbers = [f.name for f in schema if pyarrow.types.is_integer(f.type)]
    labels = labels or [name for name in _LABELS if name in numbers][:1]
    chosen = _choose(where, "image", image, images, _IMAGES)
    if chosen is None:
        raise InputError(
            f"{where}: no column of images; its columns are {', '.join(schema.names)[:100]}"
        )
    given = _choose(where, "label", label, labels if label is None else numbers, _LABELS)
    names = features.get(given, {}).get("names", ()) if given else ()
    return Columns(chosen, given, tuple(map(str, names or ())))


def _choose(
    where: Path, key: str, asked: str | None, found: list[str], usual: tuple[str, ...]
) -> str | None:
    if asked is not None:
        if asked not in found:
            raise InputError(f"{key}: {asked!r} is not one of {where.name}'s: {', '.join(found)}")
        return asked
    if len(found) > 1:
        found = [name for name in usual if name in found][:1] or found
    if len(found) > 1:
        raise InputError(f"{key}: {where.name} has {', '.join(found)[:100]}; name one of them")
    return found[0] if found else None


def _count_classes(files: dict[str, list[Path]], label: str) -> int:
    """Returns one more than the largest label of both splits."""
    import pyarrow.compute

    largest = -1
    for path in (path for group in files.values() for path in group):
        file = _open(path)
        if label in file.schema_arrow.names:
            for batch in file.iter_batches(columns=[label]):
                largest = max(largest, pyarrow.compute.max(batch[label]).as_py() or 0)
    return largest + 1
