"""Sources by name, and what a user says of his images."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from singer_jax.data.benchmarks import BENCHMARKS, open_benchmark
from singer_jax.data.records import MANIFEST, RecordSource
from singer_jax.data.scenes import LABELS, SceneSettings, ScenesSource
from singer_jax.data.shard_files import find_shards
from singer_jax.data.sources import DigitsSource, FolderSource, Source, TfdsSource
from singer_jax.data.tars import TarSource
from singer_jax.errors import InputError
from singer_jax.io.files import check_local
from singer_jax.settings.ranges import NAME, SHARE, SIDE, TEXT, Each, Flag, OneOf, Range, optional
from singer_jax.settings.settings import Settings, section, setting

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
    path: str = setting("", TEXT, "the folder; of TFDS its data directory")
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


def open_source(data: DataSettings, split: str) -> Source:
    """The source that a user asks for; raises as `make_source`."""
    return make_source(data.source, data.path, split, data.scenes)


def make_source(
    name: str, path: str, split: str, scenes: SceneSettings = SceneSettings()
) -> Source:
    """The source of a name.

    Args:
      name: `digits`; a key of `scenes.LABELS`; `folder`, or itself the path of a folder; a data set
        of `benchmarks`; else a TFDS name.
      path: the folder; for TFDS the data directory, or a folder with the set's own layout
        (`train/` and `val/` with class folders), or one that holds the official archives' folders.
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
    if path and ((Path(path) / "train").is_dir() or (Path(path) / MANIFEST).is_file()):
        return open_path(path, split, exif=False)
    if name in BENCHMARKS:
        return open_benchmark(name, path, split)
    return TfdsSource(name, path, split, SOURCES)


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
    except InputError:
        if not root.exists():
            raise
        if find_shards(root, ".tar"):
            return TarSource(root, split)
        if find_shards(root, ".parquet"):
            raise InputError(
                f"data: {root} holds Parquet shards, which are read in order only; turn them into "
                "records: --config=configs/prepare.py (docs/data.md)"
            ) from None
        raise
