"""The job `check_data`: what is installed, what is in it, and what it looks like."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath
from PIL import Image

from singer_jax.data.benchmarks import BENCHMARKS, NotInstalled, open_benchmark
from singer_jax.data.dense import DepthTransform, SegmentationTransform
from singer_jax.data.images import EvalTransform, UnreadableImage, open_image
from singer_jax.data.sources import TEST, TRAIN, Source, make_source
from singer_jax.errors import InputError
from singer_jax.files import make_workdir, replacing

_SIDE = 128

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


def check_data(config: Any, workdir: epath.Path) -> None:
    """Prints a line a split and writes a contact sheet, SOURCE_SPLIT.png, of each.

    Args:
      config: as `singer_jax.config.check_data` describes it.
      workdir: for the sheets.

    Raises:
      InputError: nothing there, or a data set that is there in part.
    """
    data = config.data
    names = tuple(BENCHMARKS) if data.source == "table1" else (data.source,)
    make_workdir(workdir)
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
                    else make_source(name, data.path, split)
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
                contact_sheet(source, config.images).save(file)
            print(_line(label, split, source, sheet))
    if wrong:
        raise InputError("; ".join(wrong))
    if not found:
        raise InputError('data.path: no data set found (README, "Data")')


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


def contact_sheet(source: Source, count: int) -> Image.Image:
    """Images at even distances, each under its label where labels are pictures.

    Raises:
      InputError: an image or a label that cannot be read.
    """
    cells = []
    for index in np.linspace(0, len(source) - 1, min(count, len(source))).astype(int):
        record = source[int(index)]
        try:
            cells.append(_cell(open_image(record.image, source.exif), record.label))
        except (UnreadableImage, InputError) as error:
            raise InputError(f"{source.describe(int(index))}: {error}") from error
    columns = math.ceil(math.sqrt(len(cells)))
    rows = math.ceil(len(cells) / columns)
    height, width, _ = cells[0].shape
    sheet = np.zeros((rows * height, columns * width, 3), np.uint8)
    for number, cell in enumerate(cells):
        top, left = number // columns * height, number % columns * width
        sheet[top : top + height, left : left + width] = cell
    return Image.fromarray(sheet)


def _cell(image: Image.Image, label: Any) -> np.ndarray:
    if isinstance(label, int):
        return EvalTransform(_SIDE)(image)
    rng = np.random.default_rng(0)
    if isinstance(label, np.ndarray):
        pixels, metres = DepthTransform(_SIDE, train=False)(image, label, rng)
        grey = (metres.clip(0, 10) * 25.5).astype(np.uint8)
        below = np.repeat(grey[..., None], 3, axis=-1)
    else:
        pixels, classes = SegmentationTransform(_SIDE, train=False)(image, label, rng)
        palette = np.random.default_rng(1).integers(0, 256, (151, 3), dtype=np.uint8)
        palette[0] = 0
        below = palette[classes + 1]
    return np.concatenate([pixels, below])
