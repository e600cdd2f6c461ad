"""Job `check_data`: counts the images of data sets, lists unreadable ones, draws contact sheets."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterable
from pathlib import Path

from etils import epath
from tqdm import tqdm

from singer_jax.data.benchmarks import BENCHMARKS, NotInstalled
from singer_jax.data.checking import unreadable_images
from singer_jax.data.contact_sheet import contact_sheet
from singer_jax.data.images import UnreadableImage
from singer_jax.data.listing import few
from singer_jax.data.loader import worker_count
from singer_jax.data.registry import DataSettings, make_source, where
from singer_jax.data.scenes import LABELS
from singer_jax.data.sources import TEST, TRAIN, NoSplit, Source
from singer_jax.errors import InputError, RunError
from singer_jax.io.files import make_workdir, replacing, write_text
from singer_jax.runs.lock import holding
from singer_jax.settings.ranges import COUNT, Flag, OneOf
from singer_jax.settings.settings import Settings, section, setting

# Number of images in each official split.
EXPECTED = {
    "imagenet2012": {TRAIN: 1281167, TEST: 50000},
    "imagenet_v2": {TEST: 10000},
    "imagenet_r": {TEST: 30000},
    "ade20k": {TRAIN: 20210, TEST: 2000},
    "nyud": {TRAIN: 795, TEST: 654},
    "inat19": {TRAIN: 265213, TEST: 3030},
    "aircraft": {TRAIN: 3334, TEST: 3333},
    "pet": {TRAIN: 3680, TEST: 3669},
    "food": {TRAIN: 75750, TEST: 25250},
    "flowers": {TRAIN: 1020, TEST: 1020},
}


_FEW = 1000  # number of images that one process decodes faster than a worker starts


@dataclasses.dataclass(frozen=True)
class CheckDataSettings(Settings):
    """Settings of the job `check_data`."""

    job: str = setting("check_data", OneOf(("check_data",)), "Name of the command.")
    data: DataSettings = section(DataSettings(source="table1"))
    images: int = setting(16, COUNT, "Number of images of each split on its contact sheet.")
    decode: bool = setting(
        True, Flag(), "Decodes every image and lists the unreadable ones. False: only counts."
    )


def check_data(settings: CheckDataSettings, workdir: epath.Path) -> None:
    """Prints a line for each split and for each unreadable image.

    Writes a contact sheet, SOURCE_SPLIT.png, of each split. For a split with unreadable images, it
    also writes SOURCE_SPLIT_unreadable.txt.

    Args:
      settings: settings of the job.
      workdir: folder for these files.

    Raises:
      InputError: no data set was found, or one is incomplete.
      RunError: some images cannot be read.
    """
    data = settings.data
    names = {"table1": BENCHMARKS, "scenes": LABELS}.get(data.source, (data.source,))
    make_workdir(workdir)
    with holding(workdir):
        _check_all(data, names, settings, workdir)


def _check_all(
    data: DataSettings, names: Iterable[str], settings: CheckDataSettings, workdir: epath.Path
) -> None:
    found = unreadable = 0
    wrong, without = [], []
    for name in names:
        benchmark = BENCHMARKS.get(name)
        for split in (TRAIN, TEST):
            if benchmark and benchmark.test_only and split == TRAIN:
                continue
            try:
                source = make_source(name, data.path, split, data.scenes)
            except NotInstalled as error:
                print(f"{name}: not installed: {error}")
                break
            except NoSplit as error:
                only = "none (needed by `evaluate` only)"
                print(f"{name} {split}: {only}" if split == TEST else f"{name}: {error}")
                continue
            except InputError as error:
                wrong.append(f"{name} {split}: {error}")
                continue
            found += 1
            print(_line(name, split, source))
            file = workdir / f"{Path(name).name or 'folder'}_{split}"
            if settings.decode:
                workers = worker_count(data.workers) if len(source) > _FEW else 0
                bad = _list_unreadable(source, workers, file)
                unreadable += bad
                if bad == len(source):
                    continue
            sheet = file.parent / f"{file.name}.png"
            try:
                picture = contact_sheet(source, settings.images)
            except UnreadableImage as error:
                print(f"no contact sheet: {error}")
                without.append(f"{name} {split}")
                continue
            except InputError as error:
                wrong.append(f"{name} {split}: {error}")
                continue
            with replacing(sheet) as local:
                picture.save(local)
            print(f"contact sheet: {sheet}")
    if wrong:
        raise InputError("; ".join(wrong))
    if not found:
        raise InputError("data.path: no data set found; see docs/data.md for the expected folders")
    if unreadable:
        raise RunError(f"{unreadable:,} images cannot be read; {workdir} has lists of them")
    if without:
        raise RunError(f"no image for the contact sheet can be read: {few(without)}")


def _list_unreadable(source: Source, workers: int, file: epath.Path) -> int:
    """Prints and writes the unreadable images with the reasons; returns their number."""
    lines = []
    with tqdm(total=len(source), unit="image", dynamic_ncols=True, mininterval=_often()) as bar:
        for batch in unreadable_images(source, workers):
            for index, reason in batch:
                if reason:
                    lines.append(f"{source.describe(index)}: {reason}")
                    bar.write(f"unreadable: {lines[-1]}")
            bar.update(len(batch))
    listed = file.parent / f"{file.name}_unreadable.txt"
    if lines:
        write_text(listed, "\n".join(lines) + "\n")
    elif listed.exists():
        listed.unlink()
    return len(lines)


def _often() -> float:
    return 0.5 if sys.stderr.isatty() else 30  # seconds between updates of the bar


def _line(name: str, split: str, source: Source) -> str:
    expected = EXPECTED.get(name, {}).get(split)
    line = f"{name} {split}: {len(source):,} images"
    if expected is not None and expected != len(source):
        line += f" (the official split has {expected:,})"
    if _is_dense(source):
        line += ", a label for each pixel"
    else:
        line += f", {source.num_classes:,} classes" if source.num_classes else ", no labels"
    return f"{line}{where(source)}"


def _is_dense(source: Source) -> bool:
    try:
        return not isinstance(source[0].label, int)
    except UnreadableImage:  # _list_unreadable reports it
        return False
