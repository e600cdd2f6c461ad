"""Job `prepare`: turns images into ArrayRecord shards, which support random access."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath
from tqdm.auto import tqdm

from singer_jax.data import records
from singer_jax.data.imagenet import is_imagenet
from singer_jax.data.images import UnreadableImage
from singer_jax.data.loader import worker_count
from singer_jax.data.parquet import ParquetSource
from singer_jax.data.records import FORMAT, MANIFEST, Shard
from singer_jax.data.registry import DataSettings, make_source
from singer_jax.data.shard_files import find_shards
from singer_jax.data.sources import TEST, TRAIN, NoSplit, Record, Source, check_same_classes
from singer_jax.errors import InputError, Stopped, shown
from singer_jax.io import limits
from singer_jax.io.files import check_local, make_workdir, write_text
from singer_jax.platform import signals
from singer_jax.runs.lock import holding
from singer_jax.runs.metrics import LOG
from singer_jax.settings.ranges import OneOf, Text, optional
from singer_jax.settings.settings import Settings, section, setting

_IMAGES = 4096  # images per shard
_NAMED = 10  # number of unreadable images that are logged
_PROGRESS = "records.progress.jsonl"


@dataclasses.dataclass(frozen=True)
class PrepareSettings(Settings):
    """Settings of the job `prepare`."""

    job: str = setting("prepare", OneOf(("prepare",)), "Name of the command.")
    data: DataSettings = section(DataSettings(source="folder"))
    image: str | None = setting(
        None, optional(Text()), "Column of images in Parquet shards. None: the only such column."
    )
    label: str | None = setting(
        None,
        optional(Text()),
        "Column of class numbers in Parquet shards. None: the only such column.",
    )


def prepare(settings: PrepareSettings, workdir: epath.Path) -> None:
    """Writes the records of both splits, and then their manifest.

    Args:
      settings: settings of the job.
      workdir: folder for the records.

    Raises:
      InputError: there is nothing to read, labels are not classes, or the folder holds records of
        other images.
      RunError: the disk is full or fails.
      Stopped: a stop was requested; the same command resumes.
    """
    check_local("--workdir", os.fspath(workdir))
    sources = _open(settings)
    given = settings.data.path if settings.data.source == "folder" else settings.data.source
    if Path(given).expanduser().resolve() == Path(workdir).resolve():
        raise InputError(f"--workdir: {workdir} holds the images; give another folder for records")
    classes = {source.num_classes for source in sources.values()}
    if len(classes) > 1:
        raise InputError(f"data: the splits have different numbers of classes, {sorted(classes)}")
    if len(sources) == 2:
        check_same_classes(sources[TRAIN], sources[TEST])
    make_workdir(workdir)
    with holding(workdir), signals.deferred():
        _prepare(sources, Path(workdir), max(1, worker_count(settings.data.workers)))


def _open(settings: PrepareSettings) -> dict[str, Source]:
    """Returns the available splits."""
    data = settings.data
    root = Path(data.path if data.source == "folder" else data.source).expanduser()
    parquet = root.exists() and bool(find_shards(root, ".parquet"))
    found: dict[str, Source] = {}
    missing = None
    for split in (TRAIN, TEST):
        try:
            if parquet:
                found[split] = ParquetSource(root, split, settings.image, settings.label)
            else:
                found[split] = make_source(data.source, data.path, split, data.scenes)
        except NoSplit as error:
            missing = error
    if not found:
        raise missing
    for split, source in found.items():
        record = _first_readable(source)
        if not isinstance(record.image, bytes | Path) or not isinstance(record.label, int):
            raise InputError(
                f"data.source: {data.source} ({split}) has no image files with classes"
            )
    return found


def _first_readable(source: Source) -> Record:
    """Returns the first record that can be read; raises `InputError` where there is none."""
    for index in range(len(source)):
        with contextlib.suppress(UnreadableImage):
            return source[index]
    raise InputError(f"none of {len(source):,} images can be read, such as {source.describe(0)}")


@dataclasses.dataclass(frozen=True)
class _Part:
    """Shard to write."""

    split: str
    file: str
    indices: range


def _parts(split: str, count: int) -> list[_Part]:
    """Returns the shards of a split, with about equal numbers of images."""
    number = -(-count // _IMAGES)
    ends = np.linspace(0, count, number + 1).astype(int).tolist()
    return [
        _Part(split, f"{split}-{i:05}-of-{number:05}.array_record", range(start, end))
        for i, (start, end) in enumerate(itertools.pairwise(ends))
    ]


def _prepare(sources: dict[str, Source], folder: Path, threads: int) -> None:
    first = next(iter(sources.values()))
    names = getattr(first, "class_names", ())
    about = {
        "format": FORMAT,
        "classes": first.num_classes,
        "class_names": list(names),
        "exif": first.exif and not is_imagenet(names),
        "fingerprints": {split: source.fingerprint() for split, source in sources.items()},
    }
    parts = [part for split, source in sources.items() for part in _parts(split, len(source))]
    done = _done(folder, about)
    progress = folder / _PROGRESS
    if not progress.exists() and not (folder / MANIFEST).exists():
        progress.write_text(json.dumps(about) + "\n")
    unreadable: list[str] = []
    finished: dict[str, Shard] = {}
    with (
        _bar(sum(len(part.indices) for part in parts)) as bar,
        ThreadPoolExecutor(threads) as pool,
    ):

        def make(part: _Part) -> Shard | None:
            return _make(part, folder, sources[part.split], done.get(part.file), bar, unreadable)

        futures = {pool.submit(make, part): part for part in parts}
        try:
            for future in as_completed(futures):
                shard = future.result()
                if shard is None:
                    continue
                finished[shard.file] = shard
                if done.get(shard.file) != shard:
                    with progress.open("a") as file:
                        file.write(json.dumps(dataclasses.asdict(shard)) + "\n")
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
    if len(finished) < len(parts):
        raise Stopped(
            f"stopped with {len(finished)} of {len(parts)} shards done; the same command resumes"
        )
    splits = {
        split: [dataclasses.asdict(finished[part.file]) for part in parts if part.split == split]
        for split in sources
    }
    write_text(
        epath.Path(folder / MANIFEST), json.dumps(about | {"splits": splits}, indent=1) + "\n"
    )
    progress.unlink(missing_ok=True)
    for split, source in sources.items():
        print(f"{split}: {len(source):,} images, {source.num_classes or 'no'} classes")
    if unreadable:
        print(f"unreadable images: {len(unreadable):,} (training replaces them by others)")
    print(f"read them with --config.data.source={folder}")


@contextlib.contextmanager
def _bar(images: int) -> Iterator[tqdm]:
    interval = (
        0.5 if sys.stderr.isatty() else 30
    )  # seconds between updates; fewer lines in a log file
    with tqdm(total=images, unit="image", dynamic_ncols=True, mininterval=interval) as bar:
        signals.bar_is_shown.set()
        try:
            yield bar
        finally:
            signals.bar_is_shown.clear()


def _done(folder: Path, about: dict[str, Any]) -> dict[str, Shard]:
    """Returns the shards that an earlier start has written, by file name.

    Raises:
      InputError: the shards belong to other images, or their list is corrupt.
    """
    manifest, progress = folder / MANIFEST, folder / _PROGRESS
    try:
        if manifest.exists():
            content = limits.read_object(manifest)
            entries = [entry for shards in content.pop("splits", {}).values() for entry in shards]
        elif progress.exists():
            lines = limits.read_text(progress).splitlines()
            # The last line may be incomplete, if the process was killed while it wrote.
            content, *entries = [json.loads(line) for line in lines if line.endswith("}")]
        else:
            return {}
        shards = [records.read_shard(manifest, entry) for entry in entries]
    except (AttributeError, TypeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{folder}: its list of records is corrupt; remove it: {error}") from error
    if content != about:
        raise InputError(f"--workdir: {folder} holds records of other images; give another folder")
    return {shard.file: shard for shard in shards}


def _make(
    part: _Part,
    folder: Path,
    source: Source,
    done: Shard | None,
    bar: tqdm,
    unreadable: list[str],
) -> Shard | None:
    """Writes a shard unless it exists with the right checksum; returns None on a stop request."""
    path = folder / part.file
    if signals.requested():
        return None
    if done is not None and path.exists():
        if records.sha256_of(path) == done.sha256:
            bar.update(len(part.indices))
            return done
        LOG.warning("%s is corrupt and is written again", path)

    def tell(index: int, reason: str) -> None:
        unreadable.append(source.describe(index))
        if len(unreadable) <= _NAMED:
            LOG.warning("unreadable image %s: %s", unreadable[-1], shown(reason))

    reported = part.indices.start
    for index in records.write_shard(path, source, part.indices, tell):
        if (index + 1 - reported) >= 32 or index + 1 == part.indices.stop:
            bar.update(index + 1 - reported)
            reported = index + 1
            if signals.requested() and reported < part.indices.stop:
                return None
    return Shard(part.file, len(part.indices), path.stat().st_size, records.sha256_of(path))
