"""Data sets in a few large files, which are assigned to splits by their names."""

from __future__ import annotations

import re
from pathlib import Path

from singer_jax.data.sources import TEST, TRAIN, NoSplit
from singer_jax.errors import InputError

_SPLITS = {
    "train": TRAIN,
    "training": TRAIN,
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "dev": "validation",
    "test": TEST,
    "testing": TEST,
    "eval": TEST,
}
_EXTRA = re.compile(r"ILSVRC2012_img_train_t3\.tar")  # dog images that the other file contains too
_MOST_FILES = 10**5


def find_shards(root: Path, suffix: str) -> list[Path]:
    """Returns the sorted files with a suffix in a folder and its direct subfolders.

    Args:
      root: a folder, or a single file with the suffix.
      suffix: suffix with its dot.

    Raises:
      InputError: there are too many files.
    """
    if root.is_file():
        return [root] if root.suffix.lower() == suffix else []
    found = [
        file
        for pattern in ("*", "*/*")
        for file in root.glob(pattern)
        if file.suffix.lower() == suffix
        and not file.name.startswith(".")
        and not _EXTRA.fullmatch(file.name)
        and file.is_file()
    ]
    if len(found) > _MOST_FILES:
        raise InputError(f"{root}: {len(found):,} {suffix} files, more than {_MOST_FILES:,}")
    return sorted(found)


def by_split(root: Path, suffix: str) -> dict[str, list[Path]]:
    """Returns the files of the splits `train` and `test`, one of which may be missing.

    The last word in a path that names a split decides (`imagenet-train-0001.tar`, `val/00.tar`). A
    file without such a word belongs to the training split. A validation split is preferred to a
    test split, whose labels are often unpublished.
    """
    found: dict[str, list[Path]] = {}
    for file in find_shards(root, suffix):
        relative = file.name if file == root else file.relative_to(root).as_posix()
        words = re.split("[^a-z]+", relative.lower())
        named = [_SPLITS[word] for word in words if word in _SPLITS]
        found.setdefault(named[-1] if named else TRAIN, []).append(file)
    validation = found.pop("validation", None)
    return found | ({TEST: validation} if validation else {})


def of_split(files: dict[str, list[Path]], root: Path, split: str) -> list[Path]:
    """Returns the files of one split; raises `NoSplit` if there are none."""
    if split not in files:
        kind = "training" if split == TRAIN else "test"
        raise NoSplit(f"data: no file name in {root} contains the name of a {kind} split")
    return files[split]
