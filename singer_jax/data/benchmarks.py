"""Data sets of the paper's Table 1, in their official layout on disk or prepared by TFDS.

`open_benchmark(name, root, split)` searches `root` for the folder of the unpacked official archive,
then for a prepared TFDS data set. No EXIF rotation is applied, as in torchvision.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from singer_jax.data.dense import ADE20K_CLASSES
from singer_jax.data.formats import is_image
from singer_jax.data.imagenet import imagenet_wnids
from singer_jax.data.images import UnreadableImage
from singer_jax.data.listing import class_folders, few
from singer_jax.data.matlab import open_frames, read_numbers
from singer_jax.data.sources import (
    TEST,
    TRAIN,
    FolderSource,
    NoSplit,
    Record,
    Source,
    TfdsSource,
    check_classes,
)
from singer_jax.errors import InputError, shown, unknown
from singer_jax.io import limits

_LOG = logging.getLogger("singer_jax")
_LONGEST_NAME = 1024  # characters; all names are stored with the length of the longest


class NotInstalled(InputError):
    """Raised if a data set is not found."""


class ListedSource:
    """Files below a root, each with a class or a label file.

    Args:
      root: folder of the data set.
      files: paths relative to `root`.
      labels: class of each file, or path of its mask relative to `root`.
      num_classes: number of classes of the task.

    Raises:
      InputError: a file is outside the root, a label is not a class, or there are too many classes.
    """

    exif = False

    def __init__(
        self, root: Path, files: Sequence[str], labels: Sequence[int | str], num_classes: int
    ) -> None:
        _check_below(root, files)
        check_classes(root, num_classes)
        dense = bool(labels) and all(isinstance(label, str) for label in labels)
        if dense:
            _check_below(root, labels)
        for label in labels if not dense else ():
            if type(label) is not int or not 0 <= label < num_classes:
                raise InputError(f"{root}: label {label!r} is not one of its {num_classes} classes")
        self.root, self.num_classes = root, num_classes
        self.files = np.array([file.encode() for file in files])
        self.labels = np.array([label.encode() for label in labels] if dense else labels)

    def __len__(self) -> int:
        return len(self.files)

    def _path(self, stored: np.bytes_) -> Path:
        return self.root / bytes(stored).decode()

    def __getitem__(self, index: int) -> Record:
        label = self.labels[index]
        dense = isinstance(label, np.bytes_)
        return Record(self._path(self.files[index]), self._path(label) if dense else int(label))

    def describe(self, index: int) -> str:
        return shown(str(self._path(self.files[index])))

    def fingerprint(self) -> str:
        parts = (self.files, self.labels)
        return hashlib.sha256(b"".join(part.tobytes() for part in parts)).hexdigest()


class NyuSource:
    """Labelled frames of NYU Depth v2: `nyu_depth_v2_labeled.mat` (HDF5) and `splits.mat`.

    The arrays in the file are transposed, [frame, (3,) width, height]; depths are in metres.
    """

    exif = False
    num_classes = 0

    def __init__(self, root: Path, split: str) -> None:
        _require(root, ["nyu_depth_v2_labeled.mat", "splits.mat"])
        self.path = root / "nyu_depth_v2_labeled.mat"
        key = {TRAIN: "trainNdxs", TEST: "testNdxs"}[split]
        self.frames = read_numbers(root / "splits.mat", key) - 1
        with open_frames(self.path) as file:
            stored = min(len(file["images"]), len(file["depths"]))
        outside = self.frames[(self.frames < 0) | (self.frames >= stored)]
        if outside.size:
            raise InputError(
                f"{self.path} has {stored} frames, but {root / 'splits.mat'} lists "
                f"frame {outside[-1] + 1}"
            )
        self._file: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_file": None}  # each process opens the file itself

    def __len__(self) -> int:
        return len(self.frames)

    def __getitem__(self, index: int) -> Record:
        if self._file is None:
            self._file = open_frames(self.path)
        frame = int(self.frames[index])
        try:
            image, depth = (self._file[name][frame] for name in ("images", "depths"))
        except Exception as error:  # h5py raises exceptions of many types for a damaged file
            raise UnreadableImage(str(error)) from error
        return Record(np.ascontiguousarray(image.transpose(2, 1, 0)), np.ascontiguousarray(depth.T))

    def describe(self, index: int) -> str:
        return f"{self.path} frame {self.frames[index] + 1}"

    def fingerprint(self) -> str:
        size = self.path.stat().st_size
        return hashlib.sha256(self.frames.tobytes() + str(size).encode()).hexdigest()


def _require(root: Path, names: Sequence[str]) -> None:
    missing = [name for name in names if not (root / name).exists()]
    if missing:
        raise InputError(
            f"{root} is not completely unpacked: missing {', '.join(missing)} (docs/data.md)"
        )


def _check_below(root: Path, files: Sequence[str]) -> None:
    """Raises `InputError` for a listed name that is outside its folder or is not a file name."""
    for file in files:
        path = PurePosixPath(file)
        if path.is_absolute() or ".." in path.parts or len(file) > _LONGEST_NAME or "\0" in file:
            raise InputError(f"{root}: its list names {file[:_LONGEST_NAME]!a}, no file below it")


def _lines(path: Path) -> list[list[str]]:
    rows = (line.split() for line in limits.read_text(path).splitlines())
    return [row for row in rows if row and not row[0].startswith("#")]


def _require_images(root: Path, files: Sequence[str]) -> None:
    """Raises `InputError` unless every listed file exists below the root."""
    _check_below(root, files)
    present: dict[str, set[str]] = {}
    missing = []
    for file in files:
        folder, name = os.path.split(file)
        if folder not in present:
            path = root / folder
            present[folder] = set(os.listdir(path)) if path.is_dir() else set()
        if name not in present[folder]:
            missing.append(file)
    if missing:
        raise InputError(
            f"{root} is not completely unpacked: missing {len(missing)} of {len(files)} listed "
            f"files, the first {shown(missing[0])}"
        )


def _imagenet(root: Path, split: str) -> Source:
    _require(root, ["train", "val"])
    return _wnid_folders(root / {TRAIN: "train", TEST: "val"}[split])


def _imagenet_v2(root: Path, split: str) -> Source:
    folders = class_folders(root)
    names = sorted(filter(str.isdigit, folders), key=int)
    if not names and len(folders) == 1:  # a folder inside, with the name of the archive
        return _imagenet_v2(root / folders[0], split)
    if not names:
        raise InputError(f"{root} is not completely unpacked: missing the folders 0 to 999")
    files = [(f"{name}/{file}", int(name)) for name in names for file in _images(root / name)]
    return ListedSource(root, *_columns(files), num_classes=len(imagenet_wnids()))


def _imagenet_r(root: Path, split: str) -> Source:
    inner = root / "imagenet-r"
    return _wnid_folders(inner if inner.is_dir() else root)


def _wnid_folders(root: Path) -> Source:
    """Reads class folders named by WordNet ids; labels are the ids' positions in ImageNet-1k."""
    index = {wnid: number for number, wnid in enumerate(imagenet_wnids())}
    names = class_folders(root)
    foreign = [name for name in names if name not in index]
    if foreign or not names:
        found = f"folder {foreign[0]} is" if foreign else "no folder there is"
        raise InputError(f"{root}: {found} named by a WordNet id of ImageNet-1k's classes")
    images = {name: _images(root / name) for name in names}
    if empty := [name for name, found in images.items() if not found]:
        _LOG.warning("%s: %d class folders without images: %s", root, len(empty), few(empty))
    files = [(f"{name}/{file}", index[name]) for name in names for file in images[name]]
    return ListedSource(root, *_columns(files), num_classes=len(index))


def _images(folder: Path) -> list[str]:
    return sorted(filter(is_image, os.listdir(folder)))


def _columns(rows: Sequence[tuple[str, Any]]) -> tuple[list[str], list[Any]]:
    return [file for file, _ in rows], [label for _, label in rows]


def _ade20k(root: Path, split: str) -> Source:
    part = {TRAIN: "training", TEST: "validation"}[split]
    _require(root, [f"{kind}/{part}" for kind in ("images", "annotations")])
    files = [f"images/{part}/{file}" for file in _images(root / "images" / part)]
    masks = [f"annotations/{part}/{Path(file).stem}.png" for file in files]
    if not files:
        raise InputError(f"{root} is not completely unpacked: no image in images/{part}")
    _require_images(root, masks)
    return ListedSource(root, files, masks, ADE20K_CLASSES)


def _inat19(root: Path, split: str) -> Source:
    name = {TRAIN: "train2019.json", TEST: "val2019.json"}[split]
    if not (root / name).exists() and (root / "train").is_dir():
        return FolderSource(str(root), split, exif=False)
    _require(root, [name])
    content = limits.read_json(root / name)
    labels = {row["image_id"]: row["category_id"] for row in content["annotations"]}
    files = [(row["file_name"], labels[row["id"]]) for row in content["images"]]
    _require_images(root, [file for file, _ in files])
    return ListedSource(root, *_columns(files), num_classes=len(content["categories"]))


def _aircraft(root: Path, split: str) -> Source:
    data = root / "data" if (root / "data").is_dir() else root
    part = {TRAIN: "train", TEST: "val"}[split]
    _require(data, ["variants.txt", f"images_variant_{part}.txt", "images"])
    names = limits.read_text(data / "variants.txt").splitlines()
    index = {name.strip(): number for number, name in enumerate(names) if name.strip()}
    rows = (
        line.split(" ", 1)
        for line in limits.read_text(data / f"images_variant_{part}.txt").splitlines()
        if line.strip()
    )
    files = [(f"images/{image}.jpg", index[variant.strip()]) for image, variant in rows]
    _require_images(data, [file for file, _ in files])
    return ListedSource(data, *_columns(files), num_classes=len(index))


def _pet(root: Path, split: str) -> Source:
    part = {TRAIN: "trainval", TEST: "test"}[split]
    _require(root, [f"annotations/{part}.txt", "images"])
    rows = _lines(root / "annotations" / f"{part}.txt")
    files = [(f"images/{row[0]}.jpg", int(row[1]) - 1) for row in rows]
    _require_images(root, [file for file, _ in files])
    return ListedSource(root, *_columns(files), num_classes=max(label for _, label in files) + 1)


def _food(root: Path, split: str) -> Source:
    _require(root, ["meta/classes.txt", f"meta/{split}.txt", "images"])
    index = {name: n for n, (name, *_) in enumerate(_lines(root / "meta" / "classes.txt"))}
    names = [row[0] for row in _lines(root / "meta" / f"{split}.txt")]
    files = [(f"images/{name}.jpg", index[name.split("/")[0]]) for name in names]
    _require_images(root, [file for file, _ in files])
    return ListedSource(root, *_columns(files), num_classes=len(index))


def _flowers(root: Path, split: str) -> Source:
    _require(root, ["setid.mat", "imagelabels.mat", "jpg"])
    labels = read_numbers(root / "imagelabels.mat", "labels")
    key = {TRAIN: "trnid", TEST: "valid"}[split]
    numbers = read_numbers(root / "setid.mat", key)
    if numbers.min(initial=1) < 1:
        raise InputError(f"{root / 'setid.mat'}: images are numbered from 1")
    files = [(f"jpg/image_{n:05}.jpg", int(labels[n - 1]) - 1) for n in numbers]
    _require_images(root, [file for file, _ in files])
    return ListedSource(root, *_columns(files), num_classes=int(labels.max()))


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """A data set of Table 1.

    Attributes:
      folders: names that the folder of the unpacked archive may have.
      read: function from such a folder and a split to a source.
      tfds: TFDS name; empty if TFDS does not have the data set.
      test_only: True if there is no training split.
      marks: files or folders, any of which identifies the folder of this data set.
    """

    folders: tuple[str, ...]
    read: Callable[[Path, str], Source]
    tfds: str = ""
    test_only: bool = False
    marks: tuple[str, ...] = ()


BENCHMARKS: dict[str, Benchmark] = {
    "imagenet2012": Benchmark(
        ("imagenet", "imagenet2012", "ILSVRC2012"),
        _imagenet,
        "imagenet2012",
        marks=("train/n01440764", "val/n01440764"),
    ),
    "imagenet_v2": Benchmark(
        ("imagenetv2-matched-frequency-format-val", "imagenet_v2", "imagenetv2"),
        _imagenet_v2,
        "imagenet_v2",
        test_only=True,
        marks=("999",),
    ),
    "imagenet_r": Benchmark(
        ("imagenet-r", "imagenet_r"), _imagenet_r, "imagenet_r", test_only=True
    ),
    "ade20k": Benchmark(
        ("ADEChallengeData2016", "ade20k"),
        _ade20k,
        "scene_parse150",
        marks=("annotations/training", "annotations/validation"),
    ),
    "nyud": Benchmark(("nyu_depth_v2", "nyud"), NyuSource, marks=("nyu_depth_v2_labeled.mat",)),
    "inat19": Benchmark(
        ("inaturalist2019", "inat19", "iNaturalist2019"),
        _inat19,
        marks=("train2019.json", "val2019.json"),
    ),
    "aircraft": Benchmark(
        ("fgvc-aircraft-2013b", "aircraft"), _aircraft, marks=("variants.txt", "data/variants.txt")
    ),
    "pet": Benchmark(
        ("oxford-iiit-pet", "pet"), _pet, "oxford_iiit_pet", marks=("annotations/trainval.txt",)
    ),
    "food": Benchmark(("food-101", "food"), _food, "food101", marks=("meta/classes.txt",)),
    "flowers": Benchmark(
        ("flowers-102", "flowers"), _flowers, "oxford_flowers102", marks=("setid.mat",)
    ),
}


def _of_tfds(folder: Path) -> bool:
    """Returns whether TFDS prepared a folder, which can have the name of an official archive."""
    return any(any(folder.glob(f"{depth}dataset_info.json")) for depth in ("*/", "*/*/"))


def find_folder(name: str, path: str) -> Path | None:
    """Finds the folder of a data set in its official layout.

    Args:
      name: a key of `BENCHMARKS`.
      path: the folder of the data set, or its parent folder.

    Returns:
      the folder of the data set, or None if it is not found.
    """
    benchmark, root = BENCHMARKS[name], Path(path).expanduser()
    own = root.resolve().name in benchmark.folders or any(
        (root / mark).exists() for mark in benchmark.marks
    )
    candidates = [root / folder for folder in benchmark.folders] + [root] * own
    for folder in candidates if path else ():
        if folder.is_dir() and not _of_tfds(folder):
            return folder
    return None


def tfds_directory(name: str, path: str) -> str:
    """Returns the TFDS data directory, given this directory or the folder of a data set in it."""
    folder = Path(path).expanduser()
    if path and ((folder / "dataset_info.json").is_file() or _of_tfds(folder)):
        for parent in (folder, *folder.parents)[:3]:
            if parent.name == re.split("[:/]", name)[0]:
                return str(parent.parent)
    return path


def open_benchmark(name: str, root: str, split: str) -> Source:
    """Opens a split of a data set of Table 1.

    Args:
      name: a key of `BENCHMARKS`.
      root: folder of the data set, its parent folder, or the TFDS data directory; empty: the
        default of TFDS.
      split: `train` or `test`.

    Raises:
      NotInstalled: the data set is not found; the message names the searched folders.
      InputError: the name is unknown, or the data set is incomplete.
    """
    if name not in BENCHMARKS:
        raise unknown("data set", name, BENCHMARKS)
    from singer_jax.io.files import check_local  # not imported in loader workers

    check_local("data.path", root)
    benchmark = BENCHMARKS[name]
    if benchmark.test_only and split == TRAIN:
        raise NoSplit(f"{name} has no training split")
    if folder := find_folder(name, root):
        try:
            source = benchmark.read(folder, split)
        except InputError:
            raise
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise InputError(f"{folder} contains a damaged list or file: {error}") from error
        if not len(source):
            raise InputError(f"{folder} has no images of the {split} split")
        return source
    candidates = [Path(root).expanduser() / folder for folder in benchmark.folders] if root else []
    looked = f"no folder {' or '.join(map(str, candidates))}" if candidates else "no data.path"
    if benchmark.tfds:
        try:
            return TfdsSource(benchmark.tfds, tfds_directory(benchmark.tfds, root), split)
        except InputError as error:
            raise NotInstalled(f"{name}: {looked}, and {error}") from error
    raise NotInstalled(f"{name}: {looked} (docs/data.md)")
