"""Images in uncompressed tar files, read in place: WebDataset shards, ImageNet's archives.

Each file is scanned once; the positions of its images are kept in the user's cache. Names in an
archive are never used as paths.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from singer_jax.data import formats
from singer_jax.data.imagenet import imagenet_wnids, is_imagenet, validation_wnids
from singer_jax.data.images import LARGEST_FILE, UnreadableImage
from singer_jax.data.shard_files import by_split, of_split
from singer_jax.data.sources import TRAIN, Record, check_classes
from singer_jax.errors import InputError, shown
from singer_jax.io import limits
from singer_jax.io.files import cache_folder

_LOG = logging.getLogger("singer_jax")
_LARGEST_READ = 2**20  # bytes of a header: names and attributes before a member
_LARGEST_LABEL = 2**20  # bytes of a .cls or .json member
_MOST_MEMBERS = 2**27
_LONGEST_NAME = 1024  # characters
_VALIDATION = re.compile(r"ILSVRC2012_val_(\d{8})\.JPEG")
_SPLIT_FOLDERS = {"train", "val", "validation", "test"}
NO_LABEL = -1
_VERSION = 1  # version of the lists in the cache


class Members(NamedTuple):
    """The images of one tar file, in the order of the file.

    Attributes:
      names: names of the members as bytes; names in a nested archive follow its name and a slash.
      offsets, sizes: positions and sizes of the images in bytes.
      labels: classes from `.cls` or `.json` members; -1: no label.
    """

    names: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray
    labels: np.ndarray


class TarSource:
    """A split of a data set in tar files.

    Labels come from `.cls` or `.json` members (WebDataset). Otherwise the classes are the first
    folders in the archives, or the nested archives (ImageNet's training images). They are sorted by
    name, or in ImageNet's order if all are WordNet ids of ImageNet. ImageNet's validation images
    are labelled by their numbers.

    Args:
      root: a tar file, or a folder of them.
      split: `train` or `test`.

    Raises:
      InputError: no tar file, a damaged or compressed one, or labels for some images only.
      NoSplit: no file name contains the name of the split.
    """

    def __init__(self, root: Path, split: str) -> None:
        root = root.expanduser()
        files = by_split(root, ".tar")
        chosen = of_split(files, root, split)
        both = {name: [list_members(file) for file in group] for name, group in files.items()}
        listed = both[split]
        self.files = chosen
        self.shard = np.repeat(np.arange(len(chosen)), [len(one.names) for one in listed])
        columns = [np.concatenate(column) for column in zip(*listed, strict=True)]
        self.names, self.offsets, self.sizes, _ = columns
        if not len(self.names):
            raise InputError(f"data: the tar files of {root} contain no images")
        self.labels, self.class_names, self.num_classes = _labels(root, both, split)
        # torchvision and other readers of ImageNet ignore the EXIF orientation.
        self.exif = not is_imagenet(self.class_names)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Record:
        size = int(self.sizes[index])
        if excess := limits.excess(size, LARGEST_FILE, "bytes"):
            raise UnreadableImage(excess)
        try:
            with self.files[self.shard[index]].open("rb", buffering=0) as file:
                image = os.pread(file.fileno(), size, int(self.offsets[index]))
        except OSError as error:
            raise UnreadableImage(error.strerror or str(error)) from error
        if len(image) < size:
            raise UnreadableImage("the tar file ends inside the image")
        return Record(image, int(self.labels[index]))

    def name(self, index: int) -> bytes:
        """Returns the name of an image in its archive."""
        return bytes(self.names[index])

    def describe(self, index: int) -> str:
        return shown(f"{self.files[self.shard[index]]}: {os.fsdecode(self.name(index))}")

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for part in (self.names, self.sizes, self.labels):
            digest.update(part.tobytes())
        return digest.hexdigest()


def _labels(
    root: Path, both: dict[str, list[Members]], split: str
) -> tuple[np.ndarray, tuple[str, ...], int]:
    """Returns the labels of a split, the class names if known, and the number of classes."""
    numbers = {
        name: np.concatenate([one.labels for one in listed]) for name, listed in both.items()
    }
    if any((labels != NO_LABEL).any() for labels in numbers.values()):
        for one in both[split]:
            for index in np.flatnonzero(one.labels == NO_LABEL)[:1]:
                name = shown(os.fsdecode(bytes(one.names[index])))
                raise InputError(f"{root}: {name} has no label (.cls or .json), but others do")
        classes = int(max(labels.max(initial=0) for labels in numbers.values())) + 1
        check_classes(root, classes)
        return numbers[split].astype(np.int32), (), classes
    classes_of = {name: _classes(listed) for name, listed in both.items()}
    found = classes_of[split]
    trained = set(classes_of.get(TRAIN, found))
    if None in {*trained, *found} or len(trained) < 2:
        flat = found.count(None)
        if flat and len(trained - {None}) > 1:
            _LOG.warning(
                "%s: no labels, since %d of %d images of %s lie in no class folder",
                *(root, flat, len(found), split),
            )
        return np.full(len(found), NO_LABEL, np.int32), (), 0
    if trained <= _SPLIT_FOLDERS:
        raise InputError(f"{root}: the tar file contains {', '.join(sorted(trained))}; unpack it")
    wnids = imagenet_wnids()
    names = tuple(wnids if trained <= set(wnids) else sorted(trained))
    check_classes(root, len(names))
    index = {name: number for number, name in enumerate(names)}
    for name in found:
        if name not in index:
            raise InputError(
                f"{root}: {shown(str(name))} of {split} is not a class of the training split"
            )
    return np.array([index[name] for name in found], np.int32), names, len(names)


def _classes(listed: list[Members]) -> list[str | None]:
    """Returns the class name of each image of a split; None: the image is in no folder.

    The class is the first folder below the folders that all images share. For ImageNet's validation
    images it is the WordNet id that belongs to the image's number.
    """
    paths = [os.fsdecode(bytes(name)).split("/") for one in listed for name in one.names]
    matched = [_VALIDATION.fullmatch(path[-1]) for path in paths]
    if all(matched):
        truth = validation_wnids()
        numbers = [int(match[1]) for match in matched]
        return [truth[n - 1] if 1 <= n <= len(truth) else None for n in numbers]
    folders = [path[:-1] for path in paths]
    first, last = min(folders, default=[]), max(folders, default=[])
    differs = [own != other for own, other in zip(first, last, strict=False)]
    shared = differs.index(True) if any(differs) else len(differs)
    return [folder[shared] if len(folder) > shared else None for folder in folders]


def list_members(file: Path) -> Members:
    """Returns the images of a tar file, from the cache if the file has not changed.

    Raises:
      InputError: the file is damaged or compressed, or exceeds a limit.
    """
    status = file.stat()
    identity = f"{_VERSION} {file.resolve()} {status.st_size} {status.st_mtime_ns}"
    cache = cache_folder()
    if cache is None:
        return scan(file, status.st_size)
    cached = cache / "tars" / f"{hashlib.sha256(identity.encode()).hexdigest()[:32]}.npz"
    with contextlib.suppress(OSError, InputError, TypeError, KeyError):
        return _checked(Members(**limits.read_arrays(cached)), status.st_size)
    members = scan(file, status.st_size)
    with contextlib.suppress(OSError):  # without a writable cache, the next run scans again
        cached.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=cached.parent, suffix=".npz", delete=False) as partial:
            np.savez(partial, **members._asdict())
        os.replace(partial.name, cached)
    return members


def _checked(members: Members, size: int) -> Members:
    """Returns a list from the cache; raises `KeyError` if it cannot belong to the file."""
    lengths = {len(part) for part in members}
    kinds = "".join(part.dtype.kind for part in members)
    if len(lengths) != 1 or kinds != "Siii":
        raise KeyError("damaged")
    if (members.offsets < 0).any() or (members.sizes < 0).any():
        raise KeyError("damaged")
    if (members.offsets + members.sizes).max(initial=0) > size:
        raise KeyError("damaged")
    return members


class _Window:
    """A file-like view of a part of a file, of which only headers are read.

    Raises:
      InputError: a read requests more bytes than a header may have.
    """

    def __init__(self, file: Any, start: int, size: int) -> None:
        self.file, self.start, self.size, self.position = file, start, size, 0

    def tell(self) -> int:
        return self.position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self.position}.get(whence, self.size)
        return self.position

    def read(self, count: int = -1) -> bytes:
        count = self.size - self.position if count < 0 else count
        limits.check("tar header", count, _LARGEST_READ, "bytes")
        count = max(0, min(count, self.size - self.position))
        content = os.pread(self.file.fileno(), count, self.start + self.position)
        self.position += len(content)
        return content


def scan(file: Path, size: int) -> Members:
    """Returns the images of a tar file of `size` bytes; shows a progress bar for large files.

    Raises:
      InputError: the file is damaged or compressed, or exceeds a limit.
    """
    from tqdm.auto import tqdm

    rows: list[_Image] = []
    with (
        file.open("rb", buffering=0) as opened,
        tqdm(total=size, unit="B", unit_scale=True, delay=2, disable=None, desc=file.name) as bar,
    ):
        try:
            for image in _images(_Window(opened, 0, size)):
                rows.append(image)
                limits.check(file, len(rows), _MOST_MEMBERS, "images")
                bar.update(image.offset - bar.n)
        except InputError as error:
            raise InputError(f"{file}: {error}") from error
        except _DAMAGE as error:
            packed = os.pread(opened.fileno(), 6, 0).startswith(_PACKED)
            reason = (
                "compressed; decompress it first" if packed else f"not a complete tar file: {error}"
            )
            raise InputError(f"{file}: {reason}") from error
    names, *numbers = zip(*rows, strict=True) if rows else ((), (), (), ())
    return Members(
        np.array(names, None if names else "S1"), *(np.array(x, np.int64) for x in numbers)
    )


# Exceptions of Python's tar reader for a damaged file.
_DAMAGE = (tarfile.TarError, ValueError, OSError, LookupError, OverflowError, RecursionError)
_PACKED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")


class _Image(NamedTuple):
    """A row of `Members`."""

    name: bytes
    offset: int
    size: int
    label: int = NO_LABEL


def _images(window: _Window, within: str = "") -> Iterator[_Image]:
    """Yields the images of an archive and of its nested archives.

    Members with the same key, the path up to the first dot of the file name, are adjacent
    (WebDataset). The label of a key applies to its first image, and its other images are dropped;
    without a label, each image is yielded.
    """
    key, images, label = None, [], NO_LABEL
    with tarfile.open(fileobj=window, mode="r:") as archive:
        while (member := archive.next()) is not None:
            archive.members = []  # tarfile would keep all members in memory
            start = member.offset_data
            if member.size < 0 or start + member.size > window.size:
                raise ValueError(f"{member.name[:100]!a} extends past the end of the file")
            folder, _, file = member.name.removeprefix("./").rpartition("/")
            if not member.isreg() or member.issparse() or file.startswith("."):
                continue
            if len(member.name) > _LONGEST_NAME:
                raise ValueError("a member's name is too long")
            suffix = os.path.splitext(file)[1].lower()
            if suffix == ".tar" and not within:
                inner = _Window(window.file, window.start + start, member.size)
                yield from _images(inner, f"{within}{member.name[: -len(suffix)]}/")
                continue
            if (own := (folder, file.partition(".")[0])) != key:
                yield from _labelled(images, label)
                key, images, label = own, [], NO_LABEL
            if formats.is_image(file):
                name = os.fsencode(f"{within}{member.name.removeprefix('./')}")
                images.append(_Image(name, window.start + start, member.size))
            elif suffix == ".cls" or (suffix == ".json" and label == NO_LABEL):
                limits.check(member.name[:100], member.size, _LARGEST_LABEL, "bytes")
                content = os.pread(window.file.fileno(), member.size, window.start + start)
                label = _label(content, suffix, member.name)
        yield from _labelled(images, label)


def _labelled(images: list[_Image], label: int) -> list[_Image]:
    """Returns the images of one key; with a label only the first (`x.jpg`, not `x.depth.jpg`)."""
    if label == NO_LABEL or not images:
        return images
    first = min(images, key=lambda image: image.name.rpartition(b"/")[2].count(b"."))
    return [first._replace(label=label)]


def _label(content: bytes, suffix: str, name: str) -> int:
    """Returns the class in a `.cls` or `.json` member; -1: a JSON object without a class."""
    try:
        label: Any = int(content) if suffix == ".cls" else json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name[:100]!a} does not hold a class number") from error
    if isinstance(label, dict):
        label = label.get("label", label.get("cls", NO_LABEL))
    if suffix == ".json" and type(label) is not int:
        return NO_LABEL
    if not NO_LABEL <= label < 2**31:
        raise ValueError(f"{name[:100]!a}: {label} is not a class number")
    return label
