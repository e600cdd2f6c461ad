"""A contact sheet: some examples of a source in one image."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from PIL import Image

from singer_jax.data.dense import DepthTransform, SegmentationTransform
from singer_jax.data.images import EvalTransform, UnreadableImage, open_image
from singer_jax.data.sources import Source
from singer_jax.errors import InputError

_SIDE = 128


def contact_sheet(source: Source, count: int) -> Image.Image:
    """Returns evenly spaced images of a source; a mask or depth map is shown below its image.

    Unreadable images are skipped.

    Raises:
      UnreadableImage: no image can be read.
      InputError: a label is invalid.
    """
    cells = []
    for index in np.linspace(0, len(source) - 1, min(count, len(source))).astype(int):
        try:
            record = source[int(index)]
            cells.append(_cell(open_image(record.image, source.exif), record.label))
        except UnreadableImage:
            continue
        except InputError as error:
            raise InputError(f"{source.describe(int(index))}: {error}") from error
    if not cells:
        raise UnreadableImage(f"no image can be read; first: {source.describe(0)}")
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
    if isinstance(label, np.ndarray) and label.dtype.kind == "f":
        pixels, metres = DepthTransform(_SIDE, train=False)(image, label, rng)
        grey = (metres.clip(0, 10) * 25.5).astype(np.uint8)
        below = np.repeat(grey[..., None], 3, axis=-1)
    else:
        pixels, classes = SegmentationTransform(_SIDE, train=False)(image, label, rng)
        palette = np.random.default_rng(1).integers(0, 256, (151, 3), dtype=np.uint8)
        palette[0] = 0
        below = palette[classes + 1]
    return np.concatenate([pixels, below])
