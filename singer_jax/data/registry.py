"""Sources by name, and what a user says of his images."""

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

# Named in messages; any other TFDS name is read too.
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
    """Which images."""

    source: str = setting(
        "imagenet2012",
        NAME,
        "`digits`, `scenes`, `folder` (or its path), a data set of docs/data.md or a TFDS name",
    )
    path: str = setting(
        "", TEXT, "the data set's own folder, or the folder that holds it (of TFDS: data directory)"
    )
    workers: int | None = setting(
        None,
        optional(Range(0, 1024, whole=True)),
        "decoding processes; None: one a spare core; 0: a thread",
    )
    normalisation: str = setting(
        "model",
        OneOf(("model", "imagenet")),
        "mean and deviation of each model's own, or ImageNet's for all (official code)",
    )
    scenes: SceneSettings = section(SceneSettings())


@dataclasses.dataclass(frozen=True)
class SizedDataSettings(DataSettings):
    """Which images, at which size."""

    image_size: int | None = setting(
        None, optional(SIDE), "side of the models' input; None: each one's own", "pixels"
    )


@dataclasses.dataclass(frozen=True)
class TrainingDataSettings(SizedDataSettings):
    """Which images, and how they are cropped for training."""

    crop_area: tuple[float, float] = setting(
        (0.08, 1.0),
        Each(Range(0, 1, low_open=True), length=2, ascending=True),
        "smallest and largest share of an image's area that a crop covers",
    )
    crop_ratio: tuple[float, float] = setting(
        (3 / 4, 4 / 3),
        Each(Range(0, 100, low_open=True), length=2, ascending=True),
        "smallest and largest width of a crop over its height",
    )
    flip: float = setting(0.5, SHARE, "probability that a crop is mirrored")
    decode: str = setting(
        "fast",
        OneOf(("fast", "exact")),
        "JPEGs by simplejpeg and OpenCV, or by Pillow as torchvision",
    )
    fail_on_unreadable: bool = setting(False, Flag(), "an unreadable image stops the run")
    max_unreadable: float = setting(
        0.01, SHARE, "share of unreadable images above which a run stops; never for fewer than 20"
    )


def open_source(data: DataSettings, split: str) -> Source:
    """The source that a user asks for, which is logged; raises as `make_source`."""
    return announced(make_source(data.source, data.path, split, data.scenes), split)


def announced(source: Source, split: str) -> Source:
    """Logs what a source consists of, and returns it."""
    _LOG.info("data %s: %s", split, summary(source))
    return source


def summary(source: Source) -> str:
    """Says how many images a source has, of how many classes, what was left out, and where."""
    text = f"{len(source):,} images"
    if source.num_classes:
        text += f" in {source.num_classes:,} classes"
    elif isinstance(source, FolderSource):
        text += " without labels"
    return text + where(source)


def where(source: Source) -> str:
    """Says which files a source leaves out, and its folder, as the end of a line."""
    left_out, root = getattr(source, "left_out", ""), getattr(source, "root", None)
    text = f" ({left_out})" if left_out else ""
    return f"{text}, {shown(str(root))}" if root else text


def make_source(
    name: str, path: str, split: str, scenes: SceneSettings = SceneSettings()
) -> Source:
    """The source of a name.

    Args:
      name: `digits`; a key of `scenes.LABELS`; `folder`, or itself the path of a folder; a data set
        of `benchmarks`; else a TFDS name.
      path: the set's own folder, in its official layout or with `train/` and `val/` of class
        folders; or the folder that holds it; or TFDS's data directory.
      split: `train` or `test`.
      scenes: how many generated pictures, how large.

    Raises:
      InputError: unknown name, missing or empty folder, data that is not prepared.
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
        except InputError as error:  # the user gave no data.path
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
    """Returns whether a folder with `train/` is read as class folders, whatever the set's name."""
    if name not in BENCHMARKS or name == "imagenet2012":
        return True
    return not (BENCHMARKS[name].test_only or find_folder(name, path))


def open_path(path: str, split: str, exif: bool = True) -> Source:
    """Returns what lies at a path: prepared records, a folder of images, or tar files.

    Args:
      path: a folder, or a tar file.
      split: `train` or `test`.
      exif: whether a folder's images are turned as their EXIF orientation says.

    Raises:
      InputError: nothing that can be read there, or Parquet shards, which must be prepared.
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
