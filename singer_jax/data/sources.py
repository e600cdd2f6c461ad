"""Where images come from: digits, folders, TFDS; random access by index, picklable."""

from __future__ import annotations

import hashlib
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from singer_jax.data.images import UnreadableImage
from singer_jax.errors import InputError, shown, unknown
from singer_jax.io import limits

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
TRAIN, TEST = "train", "test"
_TEST_FOLDERS = ("val", "validation", "test")
_MOST_CLASSES = 2**20
_MOST_LINKS = 10**5  # folders that are links: a link to itself is a folder again and again
_OF_TFDS = "tensorflow_datasets.core."
_LARGEST_DESCRIPTION = 2**24  # bytes of TFDS's JSON files


class Record(NamedTuple):
    """An image as stored (encoded bytes, a path, or uint8 pixels) and its label.

    The label is a class (-1: none), or for dense tasks a stored mask or a depth map in metres.
    """

    image: bytes | Path | np.ndarray
    label: int | bytes | Path | np.ndarray


class Source(Protocol):
    """A split of a data set.

    Attributes:
      num_classes: 0 where there are no labels.
      exif: whether images are to be turned as their EXIF orientation says.
    """

    num_classes: int
    exif: bool

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record: ...

    def describe(self, index: int) -> str:
        """Where record `index` lies, for messages."""

    def fingerprint(self) -> str:
        """A digest of what the split consists of; equal digests mean the same order of records."""


class DigitsSource:
    """scikit-learn's 1,797 scans of handwritten digits: 1,437 to train, 360 to test."""

    num_classes = 10
    exif = False

    def __init__(self, split: str) -> None:
        from sklearn.datasets import load_digits

        digits = load_digits()
        order = np.random.default_rng(0).permutation(len(digits.images))
        chosen = order[:1437] if split == TRAIN else order[1437:]
        grey = np.round(digits.images[chosen] * (255 / 16)).astype(np.uint8)
        self.images = np.repeat(grey[..., None], 3, axis=-1)
        self.labels = digits.target[chosen]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Record:
        return Record(self.images[index], int(self.labels[index]))

    def describe(self, index: int) -> str:
        return f"digit {index}"

    def fingerprint(self) -> str:
        return hashlib.sha256(self.images.tobytes() + self.labels.tobytes()).hexdigest()


class FolderSource:
    """Every image below a folder, in the order of their paths.

    The folders directly below are the classes, if each image lies in one; otherwise there are no
    labels. `train/` and `val/` (or `validation/`, `test/`) below the folder are its splits; without
    them all images are in the train split.

    Raises:
      InputError: no such folder, no image in it, or no test split.
    """

    def __init__(self, path: str, split: str, exif: bool = True) -> None:
        self.exif = exif
        self.root = _split_folder(Path(path).expanduser(), split)
        found, links = [], 0
        for folder, _, files in os.walk(self.root, followlinks=True):
            links += os.path.islink(folder)
            limits.check(self.root, links, _MOST_LINKS, "folders that are links")
            relative = os.path.relpath(folder, self.root)
            for file in files:
                if file.lower().endswith(IMAGE_SUFFIXES):
                    found.append(os.path.normpath(os.path.join(relative, file)))
        if not found:
            raise InputError(f"data.path: no image ({', '.join(IMAGE_SUFFIXES)}) below {self.root}")
        found.sort()
        # One block of bytes, so that a million paths are cheap to hand to each worker.
        self.paths = np.array([os.fsencode(file) for file in found])
        classes = [file.split(os.sep)[0] if os.sep in file else None for file in found]
        names = sorted(set(classes) - {None})
        labelled = None not in classes and len(names) > 1
        train = Path(path).expanduser() / "train"
        if labelled and self.root != train and train.is_dir():
            # Both splits number the classes of the training split.
            trained = sorted(entry.name for entry in train.iterdir() if entry.is_dir())
            foreign = [name for name in names if name not in trained]
            if foreign:
                raise InputError(f"data.path: {self.root / foreign[0]} is no class of {train}")
            names = trained
        self.num_classes = len(names) if labelled else 0
        self.class_names = tuple(names) if labelled else ()
        index = {name: number for number, name in enumerate(names)}
        self.labels = np.array([index[name] if labelled else -1 for name in classes], np.int32)

    def __len__(self) -> int:
        return len(self.paths)

    def _path(self, index: int) -> Path:
        return self.root / os.fsdecode(bytes(self.paths[index]))

    def __getitem__(self, index: int) -> Record:
        return Record(self._path(index), int(self.labels[index]))

    def describe(self, index: int) -> str:
        return shown(str(self._path(index)))

    def fingerprint(self) -> str:
        return hashlib.sha256(b"\0".join(self.paths.tolist())).hexdigest()


class NoSplit(InputError):
    """A data set is there, but it has no such split."""


def check_classes(where: object, number: Any) -> None:
    """Raises `InputError` where a data set has more classes than a head should have."""
    if not isinstance(number, int):
        raise InputError(f"{where}: {number!r} is no number of classes")
    limits.check(where, number, _MOST_CLASSES, "classes")


def _split_folder(root: Path, split: str) -> Path:
    if not root.is_dir():
        raise InputError(f"data.path: no folder at {root}")
    if split == TRAIN:
        return root / "train" if (root / "train").is_dir() else root
    for name in _TEST_FOLDERS:
        if (root / name).is_dir():
            return root / name
    raise NoSplit(f"data.path: {root} has no test split ({', '.join(_TEST_FOLDERS)})")


class TfdsSource:
    """A split of a prepared TensorFlow Datasets set in ArrayRecord format, without TensorFlow.

    Args:
      name: of the set.
      path: the data directory; empty: TFDS's own.
      split: `train` or `test`.
      known: names for the message about an unknown one.

    Raises:
      InputError: unknown name, or not prepared in ArrayRecord format.
    """

    exif = False

    def __init__(self, name: str, path: str, split: str, known: Sequence[str] = ()) -> None:
        import tensorflow_datasets as tfds

        options: dict[str, Any] = {"data_dir": path} if path else {}
        _check_descriptions(Path(path or tfds.core.constants.DATA_DIR).expanduser(), name)
        try:
            builder = tfds.builder(name, file_format="array_record", **options)
            split = _tfds_split(name, list(builder.info.splits), split)
            images, self.image, self.label, classes = _tfds_features(name, builder.info.features)
            _check_shards(builder, split)
            self.records = builder.as_data_source(
                split=split, decoders={key: tfds.decode.SkipDecoding() for key in images}
            )
            check_classes(f"{name}/{split}", classes)
        except tfds.core.registered.DatasetNotFoundError as error:
            raise unknown("data.source", name, known) from error
        except InputError:
            raise
        except Exception as error:  # TFDS raises anything at a damaged description
            raise InputError(
                f"data.source: {name} is not prepared in ArrayRecord format below "
                f"{path or 'the TFDS data directory'}; give a folder of images, tar files or "
                "prepared records (docs/data.md)"
            ) from error
        self.name = f"{name}/{split}"
        self.num_classes = classes
        self._fingerprint = f"{builder.info.full_name}/{split}/{len(self.records)}"

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Record:
        try:
            record = self.records[index]
            label = record[self.label] if self.label else -1
            return Record(record[self.image], label if isinstance(label, bytes) else int(label))
        except Exception as error:  # whatever TFDS and its readers in C++ raise
            raise UnreadableImage(str(error).strip() or type(error).__name__) from error

    def describe(self, index: int) -> str:
        return f"{self.name} record {index}"

    def fingerprint(self) -> str:
        return self._fingerprint


# The first of these that a set has.
_TFDS_SPLITS = {
    TRAIN: ("train", "training", "trainval", "full"),
    TEST: ("validation", "val", "valid", "test", "testing", "dev"),
}


def _tfds_split(name: str, there: Sequence[str], split: str) -> str:
    """Returns the name of a split; raises `NoSplit` where the set has none like it, or none."""
    if not there:
        raise LookupError("no splits: it is not prepared")
    for known in _TFDS_SPLITS[split]:
        if known in there:
            return known
    kind = "training" if split == TRAIN else "test"
    raise NoSplit(f"data.source: {name} has no {kind} split; it has {', '.join(there)[:100]}")


def _tfds_features(name: str, features: Any) -> tuple[list[str], str, str, int]:
    """Returns all images of an example, the one to read, the label, and the number of classes.

    Of several images that is `image`; of several class labels `label`. The label is empty where
    there is none.

    Raises:
      InputError: no image, or several of which none is called `image`.
    """
    import tensorflow_datasets as tfds

    images = sorted(key for key, one in features.items() if isinstance(one, tfds.features.Image))
    labels = [key for key, one in features.items() if isinstance(one, tfds.features.ClassLabel)]
    image = "image" if "image" in images else images[0] if len(images) == 1 else ""
    if not image:
        found = f"several images, {', '.join(images)}; one" if images else "no image; a feature"
        others = "" if images else f", it has {', '.join(features)}"
        raise InputError(f"data.source: {name} has {found} must be called image{others[:100]}")
    if "annotation" in images:  # scene_parse150 is the only one with masks
        return images, image, "annotation", 150
    label = "label" if "label" in labels else labels[0] if len(labels) == 1 else ""
    return images, image, label, features[label].num_classes if label else 0


def _check_descriptions(root: Path, name: str) -> None:
    """Raises `InputError` for a prepared set with a feature of a class that is not TFDS's own.

    TFDS would import the module that the class is said to be in.
    """
    folder = root / re.split("[:/]", name)[0]
    for depth in ("*", "*/*"):
        for file in folder.glob(f"{depth}/features.json"):
            remaining = [limits.read_json(file, _LARGEST_DESCRIPTION)]
            while remaining:
                value = remaining.pop()
                if isinstance(value, list):
                    remaining += value
                if not isinstance(value, dict):
                    continue
                remaining += value.values()
                for key in ("pythonClassName", "python_class_name", "type"):
                    module = str(value.get(key, "")).rpartition(".")[0]
                    if not (module.startswith(_OF_TFDS) or module in ("", *sys.modules)):
                        raise InputError(f"{file} wants to import {module[:100]!a}: refused")


def _check_shards(builder: Any, split: str) -> None:
    """Raises `InputError` for a set whose records are said to lie outside its folder."""
    folder = os.path.abspath(builder.data_dir)
    for file in builder.info.splits[split].filepaths:
        if not os.path.abspath(file).startswith(folder + os.sep):  # links in it are its owner's
            raise InputError(f"{folder} takes its records from {file}, outside it: refused")


class Subset:
    """Some records of a source, in a given order."""

    def __init__(self, source: Source, chosen: np.ndarray) -> None:
        self.source, self.chosen = source, chosen
        self.num_classes, self.exif = source.num_classes, source.exif

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, index: int) -> Record:
        return self.source[int(self.chosen[index])]

    def describe(self, index: int) -> str:
        return self.source.describe(int(self.chosen[index]))

    def fingerprint(self) -> str:
        return f"{self.source.fingerprint()} {hashlib.sha256(self.chosen.tobytes()).hexdigest()}"


def evenly(source: Source, count: int) -> Subset:
    """`count` records at even distances (all, if there are fewer): sources are sorted by class."""
    chosen = np.linspace(0, len(source) - 1, min(count, len(source))).astype(int)
    return Subset(source, np.unique(chosen))
