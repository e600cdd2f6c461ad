"""Registry of image sources by name, and the data settings."""

from __future__ import annotations

import dataclasses
import logging
import os
from pathlib import Path

from singer_jax.data.benchmarks import (
    BENCHMARKS,
    find_folder,
    open_benchmark,
    tfds_directory,
)
from singer_jax.data.listing import list_images
from singer_jax.data.records import MANIFEST, RecordSource
from singer_jax.data.scenes import LABELS, SceneSettings, ScenesSource
from singer_jax.data.shard_files import by_split, find_shards
from singer_jax.data.sources import TRAIN, DigitsSource, FolderSource, NoSplit, Source, TfdsSource
from singer_jax.data.tars import TarSource
from singer_jax.errors import InputError, shown
from singer_jax.io.files import check_local
from singer_jax.settings.ranges import NAME, SHARE, SIDE, TEXT, Each, Flag, OneOf, Range, optional
from singer_jax.settings.settings import Settings, section, setting

_LOG = logging.getLogger("singer_jax")

# Names shown in error messages; any other TFDS name can be read too.
SOURCES = (
    "digits",
    *LABELS,
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


@dataclasses.dataclass(frozen=True)
class DataSettings(Settings):
    """Settings that select a data set."""

    source: str = setting(
        "imagenet2012",
        NAME,
        "Name of the data set: `digits`, `scenes`, `folder` (or the path of a folder), a data set "
        "of docs/data.md or a TFDS name.",
    )
    path: str = setting(
        "",
        TEXT,
        "Folder of the data set, or its parent. For a TFDS data set: the TFDS data directory.",
    )
    workers: int | None = setting(
        None,
        optional(Range(0, 1024, whole=True)),
        "Number of decoding processes. None: all cores but one. 0: decode in a thread.",
    )
    normalisation: str = setting(
        "model",
        OneOf(("model", "imagenet")),
        "Input mean and deviation: each model's own, or ImageNet's for all (official code).",
    )
    scenes: SceneSettings = section(SceneSettings())


@dataclasses.dataclass(frozen=True)
class SizedDataSettings(DataSettings):
    """Settings that select a data set and the input size."""

    image_size: int | None = setting(
        None, optional(SIDE), "Side length of the model input. None: each model's own.", "pixels"
    )


@dataclasses.dataclass(frozen=True)
class TrainingDataSettings(SizedDataSettings):
    """Settings that select a data set and its training augmentation."""

    crop_area: tuple[float, float] = setting(
        (0.08, 1.0),
        Each(Range(0, 1, low_open=True), length=2, ascending=True),
        "Smallest and largest fraction of the image area that a random crop covers.",
    )
    crop_ratio: tuple[float, float] = setting(
        (3 / 4, 4 / 3),
        Each(Range(0, 100, low_open=True), length=2, ascending=True),
        "Smallest and largest aspect ratio (width / height) of a random crop.",
    )
    flip: float = setting(0.5, SHARE, "Probability of a horizontal flip.")
    decode: str = setting(
        "fast",
        OneOf(("fast", "exact")),
        "JPEG decoder: simplejpeg and OpenCV (`fast`), or Pillow as in torchvision (`exact`).",
    )
    fail_on_unreadable: bool = setting(False, Flag(), "Stop the run at the first unreadable image.")
    max_unreadable: float = setting(
        0.01,
        SHARE,
        "Largest fraction of unreadable images before the run stops. Fewer than 20 never stop it.",
    )


def open_source(data: DataSettings, split: str) -> Source:
    """Opens and logs the source that the settings select; raises the errors of `make_source`."""
    return announced(make_source(data.source, data.path, split, data.scenes), split)


def announced(source: Source, split: str) -> Source:
    """Logs the summary of a source, and returns the source."""
    _LOG.info("data %s: %s", split, summary(source))
    return source


def summary(source: Source) -> str:
    """Returns a line with a source's number of images and classes, its skipped files and folder."""
    text = f"{len(source):,} images"
    if source.num_classes:
        text += f" in {source.num_classes:,} classes"
    elif isinstance(source, FolderSource):
        text += " without labels"
    return text + where(source)


def where(source: Source) -> str:
    """Returns the skipped files and the folder of a source, as the end of a line."""
    left_out, root = getattr(source, "left_out", ""), getattr(source, "root", None)
    text = f" ({left_out})" if left_out else ""
    return f"{text}, {shown(str(root))}" if root else text


def make_source(
    name: str, path: str, split: str, scenes: SceneSettings = SceneSettings()
) -> Source:
    """Returns the source with a name.

    Args:
      name: `digits`, a key of `scenes.LABELS`, `folder`, the path of a folder, a data set of
        `benchmarks`, or a TFDS name.
      path: folder of the data set, in its official layout or with `train/` and `val/` of class
        folders; or its parent folder; or the TFDS data directory.
      split: `train` or `test`.
      scenes: settings of generated images.

    Raises:
      InputError: the name is unknown, the folder is missing or empty, or the data set is not
        prepared.
    """
    check_local("data.source", name)
    check_local("data.path", path)
    if name == "digits":
        return DigitsSource(split)
    if name in LABELS:
        return ScenesSource(name, split, scenes)
    if os.sep in name or Path(name).is_dir():
        try:
            return open_path(name, split)
        except InputError as error:  # data.path is not set
            raise type(error)(str(error).replace("data.path:", "data.source:", 1)) from error
    if name == "folder":
        if not path:
            raise InputError("data.path: empty; give the folder of images")
        return open_path(path, split)
    if path and (Path(path).expanduser() / MANIFEST).is_file():
        return open_path(path, split, exif=False)
    if path and (Path(path).expanduser() / "train").is_dir() and _is_folders(name, path):
        return open_path(path, split, exif=False)
    if name in BENCHMARKS:
        return open_benchmark(name, path, split)
    return TfdsSource(name, tfds_directory(name, path), split, SOURCES)


def _is_folders(name: str, path: str) -> bool:
    """Returns whether a folder has `train/` and is read as class folders, for any data set name."""
    if name not in BENCHMARKS or name == "imagenet2012":
        return True
    return not (BENCHMARKS[name].test_only or find_folder(name, path))


def open_path(path: str, split: str, exif: bool = True) -> Source:
    """Opens the data at a path: prepared records, a folder of images, or tar files.

    Args:
      path: a folder, or a tar file.
      split: `train` or `test`.
      exif: True to apply the EXIF orientation of a folder's images.

    Raises:
      InputError: there is nothing to read, or there are Parquet shards, which must be prepared.
    """
    root = Path(path).expanduser()
    if (root / MANIFEST).is_file():
        return RecordSource(root, split)
    try:
        return FolderSource(path, split, exif)
    except InputError as error:
        if not root.exists():
            raise
        if root.is_dir() and list_images(root).images:  # in any split
            _check_not_in_shards(root, split, error)
            raise
        if find_shards(root, ".tar"):
            return TarSource(root, split)
        if find_shards(root, ".parquet"):
            raise InputError(
                f"data: {root} holds Parquet shards, which are read in order only; turn them into "
                "records: --config=configs/prepare.py (docs/data.md)"
            ) from None
        raise


def _check_not_in_shards(root: Path, split: str, error: InputError) -> None:
    """Raises `InputError` where a folder of images holds one of its splits in large files.

    Two kinds of sources number their classes by different rules.
    """
    if split == TRAIN or isinstance(error, NoSplit):
        for suffix in (".tar", ".parquet"):
            for file in by_split(root, suffix).get(split, ())[:1]:
                raise InputError(
                    f"data.path: {shown(str(root))} holds images in folders, but its {split} split "
                    f"in {shown(file.name)}; unpack it, or move it away"
                ) from error
