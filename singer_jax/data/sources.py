"""Image sources: digits, folders, TFDS; picklable, with random access by index."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from singer_jax.data.images import UnreadableImage
from singer_jax.data.listing import class_folders, few, list_images
from singer_jax.errors import InputError, excerpt, shown, unknown
from singer_jax.io import limits

TRAIN, TEST = "train", "test"
# Names in the order of the search, which ignores case.
SPLIT_FOLDERS = {
    TRAIN: ("train", "training"),
    TEST: ("val", "validation", "valid", "test", "testing"),
}
_LOG = logging.getLogger("singer_jax")
_MOST_CLASSES = 2**20
_OF_TFDS = "tensorflow_datasets.core."
_LARGEST_DESCRIPTION = 2**24  # bytes of a JSON file of TFDS


class Record(NamedTuple):
    """A stored image (encoded bytes, a path, or uint8 pixels) and its label.

    The label is a class (-1: none), or in dense tasks a stored mask or a depth map in metres.
    """

    image: bytes | Path | np.ndarray
    label: int | bytes | Path | np.ndarray


class Source(Protocol):
    """A split of a data set.

    Attributes:
      num_classes: number of classes; 0: no labels.
      exif: True if the EXIF orientation of the images is to be applied.
    """

    num_classes: int
    exif: bool

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record: ...

    def describe(self, index: int) -> str:
        """Returns the location of record `index`, for messages."""

    def fingerprint(self) -> str:
        """Returns a digest of the split; equal digests mean equal records in the same order."""


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
    """All images below a folder, in the order of their paths.

    The direct subfolders are the classes if there are several and each image is in one of them;
    otherwise there are no labels. Subfolders `train/` and `val/` (or another name of
    `SPLIT_FOLDERS`) are the splits; without a training folder, all other images are the training
    split. Both splits number the classes by the sorted folders of the training split. Hidden
    folders and system folders are not classes.

    Attributes:
      left_out: description of the files that are not images; empty if there are none.

    Raises:
      InputError: the folder does not exist, has no images or no test split, or the test split has
        a class that the training split lacks.
    """

    def __init__(self, path: str, split: str, exif: bool = True) -> None:
        self.exif = exif
        top = Path(path).expanduser()
        self.root, train, tests = _split_folder(top, split)
        listing = list_images(self.root, tests if self.root == top else ())
        self.left_out, found = listing.left_out, listing.images
        if not found:
            more = f"; {self.left_out}" if self.left_out else ""
            raise InputError(f"data.path: no image (.jpg, .png, ...) below {self.root}{more}")
        # A single block of bytes, so that a million paths can be sent to each worker cheaply.
        self.paths = np.array([os.fsencode(file) for file in found])
        folders = [file.split(os.sep)[0] if os.sep in file else None for file in found]
        classes = [name for name in class_folders(train) if train != top or name not in tests]
        labelled = _check_labels(self.root, classes, folders, split)
        if listing.unreadable:
            _LOG.warning("%s: skipping unreadable folders: %s", self.root, few(listing.unreadable))
        self.num_classes = len(classes) if labelled else 0
        index = {name: number for number, name in enumerate(classes)}
        self.labels = np.array([index[name] if labelled else -1 for name in folders], np.int32)
        self.class_names = tuple(classes) if labelled else ()

    def __len__(self) -> int:
        return len(self.paths)

    def _path(self, index: int) -> Path:
        return self.root / os.fsdecode(bytes(self.paths[index]))

    def __getitem__(self, index: int) -> Record:
        return Record(self._path(index), int(self.labels[index]))

    def describe(self, index: int) -> str:
        return shown(str(self._path(index)))

    def fingerprint(self) -> str:
        digest = self._digest_of_paths()
        if self.num_classes:
            digest.update(self.labels.astype("<i4").tobytes())
            digest.update(os.fsencode("\0".join(self.class_names)))
        return digest.hexdigest()

    def former_fingerprint(self) -> str:
        """Returns the digest that runs of older versions saved where their labels were these."""
        if len(np.unique(self.labels)) < self.num_classes:
            return self.fingerprint()  # they did not count an empty class folder
        return self._digest_of_paths().hexdigest()

    def _digest_of_paths(self) -> Any:
        return hashlib.sha256(b"\0".join(self.paths.tolist()))


def _check_labels(
    root: Path, classes: Sequence[str], folders: Sequence[str | None], split: str
) -> bool:
    """Decides whether the images of a split have labels, and warns if that may be unexpected.

    Args:
      root: folder of the split.
      classes: the class folders of the training split.
      folders: direct subfolder of `root` that each image is in; None: no subfolder.
      split: `train` or `test`.

    Raises:
      InputError: the test split has a class that the training split lacks.
    """
    holding = set(folders) - {None}
    several = len(holding if split == TRAIN else classes) > 1
    if not several or None in folders:
        flat = folders.count(None)
        reason = f"{flat} of {len(folders)} images are in no class folder"
        if not flat:
            reason = f"one of its {len(classes)} class folders contains all images"
        if len(classes) > 1:
            _LOG.warning("%s: no labels, since %s", root, reason)
        return False
    foreign = sorted(holding - set(classes))
    if foreign and len(holding) == 1:
        _LOG.warning("%s: no labels, since its only folder %s is not a class", root, foreign[0])
        return False
    if foreign:
        text = (
            f"{few(foreign)} is not a class"
            if len(foreign) == 1
            else f"{few(foreign)} are not classes"
        )
        raise InputError(f"data.path: {root}: {text} of the training split")
    empty = [name for name in classes if name not in holding]
    if empty:
        _LOG.warning(
            "%s: %d of %d classes have no images: %s", root, len(empty), len(classes), few(empty)
        )
    return True


class NoSplit(InputError):
    """Raised if a data set exists but does not have the requested split."""


def check_classes(where: object, number: Any) -> None:
    """Raises `InputError` if a data set has more classes than a head may have."""
    if not isinstance(number, int):
        raise InputError(f"{where}: {number!r} is not a valid number of classes")
    limits.check(where, number, _MOST_CLASSES, "classes")


def check_same_classes(train: Source, test: Source) -> None:
    """Raises `InputError` where the labels of two splits of a data set do not mean the same.

    Numbers are compared where both splits have labels, names where both have some.
    """
    numbers = train.num_classes, test.num_classes
    if all(numbers) and numbers[0] != numbers[1]:
        raise InputError(
            f"data: the training split has {numbers[0]:,} classes, the test split {numbers[1]:,}; "
            "give both the same classes"
        )
    names = [getattr(source, "class_names", ()) for source in (train, test)]
    if all(names) and names[0] != names[1]:
        pairs = enumerate(zip(*names, strict=True))
        number, (own, other) = next((n, pair) for n, pair in pairs if pair[0] != pair[1])
        raise InputError(
            f"data: class {number} is {excerpt(own, 40)} in the training split, "
            f"{excerpt(other, 40)} in the test split; give both the same classes"
        )


def _split_folder(root: Path, split: str) -> tuple[Path, Path, list[str]]:
    """Finds the folders of a split.

    Returns:
      The folder of the split, the folder of the training split, and the names of the folders of
      test splits.
    """
    if not root.is_dir():
        raise InputError(f"data.path: no folder at {root}")
    present = class_folders(root)
    found = {
        kind: [name for wanted in names for name in present if name.lower() == wanted]
        for kind, names in SPLIT_FOLDERS.items()
    }
    train = root / found[TRAIN][0] if found[TRAIN] else root
    if split == TRAIN:
        return train, train, found[TEST]
    if not found[TEST]:
        raise NoSplit(f"data.path: {root} has no test split ({', '.join(SPLIT_FOLDERS[TEST])})")
    return root / found[TEST][0], train, found[TEST]


class TfdsSource:
    """A split of a TFDS data set in ArrayRecord format, read without TensorFlow.

    Args:
      name: name of the data set.
      path: the data directory; empty: the default of TFDS.
      split: `train` or `test`.
      known: names to suggest if `name` is unknown.

    Raises:
      InputError: the name is unknown, or the data set is not prepared in ArrayRecord format.
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
        except Exception as error:  # TFDS raises many types for a damaged description
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
        except Exception as error:  # TFDS and its C++ readers raise many types
            raise UnreadableImage(str(error).strip() or type(error).__name__) from error

    def describe(self, index: int) -> str:
        return f"{self.name} record {index}"

    def fingerprint(self) -> str:
        return self._fingerprint


# The first of these splits that a data set has is used.
_TFDS_SPLITS = {
    TRAIN: ("train", "training", "trainval", "full"),
    TEST: ("validation", "val", "valid", "test", "testing", "dev"),
}


def _tfds_split(name: str, there: Sequence[str], split: str) -> str:
    """Returns the data set's name of a split; raises `NoSplit` if there is no such split."""
    if not there:
        raise LookupError("no splits: the data set is not prepared")
    for known in _TFDS_SPLITS[split]:
        if known in there:
            return known
    kind = "training" if split == TRAIN else "test"
    raise NoSplit(f"data.source: {name} has no {kind} split; it has {', '.join(there)[:100]}")


def _tfds_features(name: str, features: Any) -> tuple[list[str], str, str, int]:
    """Returns all images of an example, the one to read, the label, and the number of classes.

    Of several images, `image` is read; of several class labels, `label`. The label's name is empty
    if there is no label.

    Raises:
      InputError: there is no image, or none of several images is called `image`.
    """
    import tensorflow_datasets as tfds

    images = sorted(key for key, one in features.items() if isinstance(one, tfds.features.Image))
    labels = [key for key, one in features.items() if isinstance(one, tfds.features.ClassLabel)]
    image = "image" if "image" in images else images[0] if len(images) == 1 else ""
    if not image:
        found = f"several images, {', '.join(images)}; one" if images else "no image; a feature"
        others = "" if images else f", it has {', '.join(features)}"
        raise InputError(f"data.source: {name} has {found} must be called image{others[:100]}")
    if "annotation" in images:  # scene_parse150 is the only data set with masks
        return images, image, "annotation", 150
    label = "label" if "label" in labels else labels[0] if len(labels) == 1 else ""
    return images, image, label, features[label].num_classes if label else 0


def _check_descriptions(root: Path, name: str) -> None:
    """Raises `InputError` for a data set with a feature class from outside TFDS.

    TFDS would import the module that the data set names for the class.
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
    """Raises `InputError` for a data set whose record files are outside its folder."""
    folder = os.path.abspath(builder.data_dir)
    for file in builder.info.splits[split].filepaths:
        if not os.path.abspath(file).startswith(folder + os.sep):  # the owner's links are allowed
            raise InputError(f"{folder} refers to records in {file}, outside it: refused")


class Subset:
    """Selected records of a source, in a given order."""

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
    """Returns up to `count` evenly spaced records; even spacing covers sources sorted by class."""
    chosen = np.linspace(0, len(source) - 1, min(count, len(source))).astype(int)
    return Subset(source, np.unique(chosen))
