"""Sources by name."""

from __future__ import annotations

import os
from pathlib import Path

from singer_jax.data.benchmarks import BENCHMARKS, open_benchmark
from singer_jax.data.sources import DigitsSource, FolderSource, Source, TfdsSource
from singer_jax.errors import InputError
from singer_jax.files import check_local

# Named in messages; any other TFDS name is read too.
SOURCES = (
    "digits",
    "folder",
    "imagenet2012",
    "imagenet_v2",
    "imagenet_r",
    "ade20k",
    "nyud",
    "inat19",
    "aircraft",
    "pet",
    "food",
    "flowers",
)


def make_source(name: str, path: str, split: str) -> Source:
    """The source of a name.

    Args:
      name: `digits`; `folder`, or itself the path of a folder; a data set of `benchmarks`; else a
        TFDS name.
      path: the folder; for TFDS the data directory, or a folder with the set's own layout
        (`train/` and `val/` with class folders), or one that holds the official archives' folders.
      split: `train` or `test`.

    Raises:
      InputError: unknown name, missing or empty folder, data that is not prepared.
    """
    check_local("data.source", name)
    check_local("data.path", path)
    if name == "digits":
        return DigitsSource(split)
    if os.sep in name or Path(name).is_dir():
        return FolderSource(name, split)
    if name == "folder":
        if not path:
            raise InputError("data.path: empty; give the folder of images")
        return FolderSource(path, split)
    if path and (Path(path) / "train").is_dir():
        return FolderSource(path, split, exif=False)
    if name in BENCHMARKS:
        return open_benchmark(name, path, split)
    return TfdsSource(name, path, split, SOURCES)
