"""The job `check_data`: what is installed, what is in it, and what it looks like."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path

from etils import epath

from singer_jax.data.benchmarks import BENCHMARKS, NotInstalled, open_benchmark
from singer_jax.data.contact_sheet import contact_sheet
from singer_jax.data.registry import DataSettings, open_source
from singer_jax.data.scenes import LABELS
from singer_jax.data.sources import TEST, TRAIN, Source
from singer_jax.errors import InputError
from singer_jax.io.files import make_workdir, replacing
from singer_jax.runs.lock import holding
from singer_jax.settings.ranges import COUNT, OneOf
from singer_jax.settings.settings import Settings, section, setting

# Examples of each split that the papers of the data sets and SPEC's table state.
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


@dataclasses.dataclass(frozen=True)
class CheckDataSettings(Settings):
    """Which data."""

    job: str = setting("check_data", OneOf(("check_data",)), "the command")
    data: DataSettings = section(DataSettings(source="table1"))
    images: int = setting(16, COUNT, "of each split on its contact sheet")


def check_data(settings: CheckDataSettings, workdir: epath.Path) -> None:
    """Prints a line a split and writes a contact sheet, SOURCE_SPLIT.png, of each.

    Args:
      settings: which data.
      workdir: for the sheets.

    Raises:
      InputError: nothing there, or a data set that is there in part.
    """
    data = settings.data
    names = {"table1": BENCHMARKS, "scenes": LABELS}.get(data.source, (data.source,))
    make_workdir(workdir)
    with holding(workdir):
        _check_all(data, names, settings.images, workdir)


def _check_all(data: DataSettings, names: Iterable[str], images: int, workdir: epath.Path) -> None:
    found, wrong = 0, []
    for name in names:
        benchmark = BENCHMARKS.get(name)
        for split in (TRAIN, TEST):
            if benchmark and benchmark.test_only and split == TRAIN:
                continue
            try:
                source = (
                    open_benchmark(name, data.path, split)
                    if benchmark
                    else open_source(dataclasses.replace(data, source=name), split)
                )
            except NotInstalled as error:
                print(f"{name}: not installed: {error}")
                break
            except InputError as error:
                wrong.append(f"{name} {split}: {error}")
                continue
            found += 1
            label = Path(name).name
            sheet = workdir / f"{label}_{split}.png"
            with replacing(sheet) as file:
                contact_sheet(source, images).save(file)
            print(_line(label, split, source, sheet))
    if wrong:
        raise InputError("; ".join(wrong))
    if not found:
        raise InputError("data.path: no data set found (docs/data.md)")


def _line(name: str, split: str, source: Source, sheet: epath.Path) -> str:
    expected = EXPECTED.get(name, {}).get(split)
    line = f"{name} {split}: {len(source):,} images"
    if expected is not None and expected != len(source):
        line += f" (the official split has {expected:,})"
    if isinstance(source[0].label, int):
        line += f", {source.num_classes} classes" if source.num_classes else ", no labels"
    else:
        line += ", a label for each pixel"
    return f"{line}; {sheet}"
