"""Joint transforms of images and per-pixel labels: segmentation masks and depth maps."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import ClassVar

import numpy as np
from PIL import Image, ImageEnhance

from singer_jax.data.images import decode, open_image, random_crop, to_rgb
from singer_jax.errors import InputError

ADE20K_CLASSES = 150
ADE20K_MEAN = (0.48897059, 0.46548275, 0.4294)
ADE20K_STD = (0.22861765, 0.22948039, 0.24054667)
# Values of the official loader; the last one differs from ImageNet's.
NYUD_MEAN = (0.485, 0.425, 0.385)
_ADE20K_SCALE, _ADE20K_RATIO = (0.7, 1.0), (3 / 4, 4 / 3)
_NYUD_CROP = 0.8
# The sensor of NYUd reaches 10 m; a value above this limit is in another unit.
_FARTHEST_METRES = 100.0


@dataclasses.dataclass(frozen=True)
class ColorJitter:
    """Random changes of brightness, contrast, saturation and hue, in random order.

    Attributes:
      probability: probability that an image is changed at all.
      brightness, contrast, saturation: largest deviation of the factors from 1.
      hue: largest shift, as a fraction of the colour circle.
    """

    probability: float = 0.7
    brightness: float = 0.2
    contrast: float = 0.2
    saturation: float = 0.1
    hue: float = 0.05

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        if rng.random() >= self.probability:
            return image
        enhancers = (
            (ImageEnhance.Brightness, self.brightness),
            (ImageEnhance.Contrast, self.contrast),
            (ImageEnhance.Color, self.saturation),
        )
        for which in rng.permutation(4):
            if which < 3:
                enhancer, extent = enhancers[which]
                image = enhancer(image).enhance(1 + rng.uniform(-extent, extent))
            else:
                image = _shift_hue(image, rng.uniform(-self.hue, self.hue))
        return image


def _shift_hue(image: Image.Image, by: float) -> Image.Image:
    hsv = np.array(image.convert("HSV"))
    hsv[..., 0] += np.uint8(round(by * 255) % 256)
    return Image.fromarray(hsv, "HSV").convert("RGB")


@dataclasses.dataclass(frozen=True)
class SegmentationTransform:
    """Transform of ADE20K: random crop, flip and jitter in training, resize to a square in testing.

    Attributes:
      size: side of image and mask in pixels.
      train: True to crop, flip and jitter at random.
      jitter: colour jitter of training images.
    """

    size: int
    train: bool
    jitter: ColorJitter = ColorJitter()

    takes_label: ClassVar[bool] = True

    def __call__(
        self, image: Image.Image, label: bytes | Path, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns uint8 pixels [size, size, 3] and int16 labels [size, size] (mask - 1; ignore -1).

        Raises:
          InputError: mask and image differ in size, or the mask has values outside 0..150.
        """
        mask = decode(open_image(label))
        if mask.size != image.size:
            raise InputError(f"the mask has {mask.size} pixels, the image {image.size}")
        values = np.asarray(mask)
        if values.ndim != 2 or values.max(initial=0) > ADE20K_CLASSES:
            raise InputError(
                f"the mask holds labels up to {values.max(initial=0)} in {values.ndim} dimensions, "
                f"expected one channel of 0 (ignored) to {ADE20K_CLASSES}; it is not an annotation "
                "of ADEChallengeData2016"
            )
        mask = Image.fromarray(values.astype(np.uint8))
        box = (0, 0, *image.size)
        if self.train:
            left, top, width, height = random_crop(image.size, _ADE20K_SCALE, _ADE20K_RATIO, rng)
            box = (left, top, left + width, top + height)
        size = (self.size, self.size)
        image = to_rgb(image).resize(size, Image.Resampling.BILINEAR, box)
        mask = mask.crop(box).resize(size, Image.Resampling.NEAREST)
        flip = self.train and rng.random() < 0.5
        if self.train:
            image = self.jitter(image, rng)
        pixels, labels = np.asarray(image), np.asarray(mask, np.int16) - 1
        return (pixels[:, ::-1], labels[:, ::-1]) if flip else (pixels, labels)


@dataclasses.dataclass(frozen=True)
class DepthTransform:
    """Transform of NYUd v2: the centre square; training crops 0.8 of it, flips and jitters.

    Attributes:
      size: side of image and depth map in pixels.
      train: True to crop, flip and jitter at random.
      jitter: colour jitter of training images.
    """

    size: int
    train: bool
    jitter: ColorJitter = ColorJitter()

    takes_label: ClassVar[bool] = True

    def __call__(
        self, image: Image.Image, label: np.ndarray, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns uint8 pixels [size, size, 3] and float32 metres [size, size]; 0 is unknown.

        Raises:
          InputError: depth map and image differ in size, or depths are not in metres.
        """
        if label.shape != image.size[::-1]:
            raise InputError(f"the depth map is {label.shape}, the image {image.size[::-1]}")
        if not 0 <= np.nanmin(label) <= np.nanmax(label) <= _FARTHEST_METRES:
            raise InputError(
                f"depths run from {np.nanmin(label):g} to {np.nanmax(label):g}; expected metres "
                "from 0 to 10, these look like millimetres or another unit"
            )
        side = min(image.size)
        left, top = ((extent - side) // 2 for extent in image.size)
        if self.train:
            inner = round(_NYUD_CROP * side)
            left += int(rng.integers(side - inner + 1))
            top += int(rng.integers(side - inner + 1))
            side = inner
        box, size = (left, top, left + side, top + side), (self.size, self.size)
        image = to_rgb(image).resize(size, Image.Resampling.BILINEAR, box)
        # Nearest neighbour: interpolation between a depth and 0 (unknown) gives wrong depths.
        depth = Image.fromarray(np.asarray(label, np.float32)).crop(box)
        depth = depth.resize(size, Image.Resampling.NEAREST)
        flip = self.train and rng.random() < 0.5
        if self.train:
            image = self.jitter(image, rng)
        pixels, metres = np.asarray(image), np.asarray(depth, np.float32)
        return (pixels[:, ::-1], metres[:, ::-1]) if flip else (pixels, metres)
