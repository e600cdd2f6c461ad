"""Generated images with exact class, mask and depth: the source `scenes`.

An image shows one large body, whose shape and pattern define the class, and up to five smaller
bodies on a patterned ground. Colours, light, camera and positions are independent of the class.
Image i of a split depends on the split and i only, not on the number or size of the images.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
from typing import Any

import numpy as np
from jaxtyping import Float

from singer_jax.data.raycast import SHAPES, Body, Scene, Texture, render
from singer_jax.data.sources import TRAIN, Record
from singer_jax.settings.ranges import COUNT, Range
from singer_jax.settings.settings import Settings, setting

# Incremented whenever an image changes, so that no run is resumed on other images.
VERSION = 1

PATTERNS = ("striped", "checked")
CLASSES = tuple(f"{pattern} {shape}" for shape in SHAPES for pattern in PATTERNS)
SURFACES = ("ground", "sky", *CLASSES)
"""Surfaces that a pixel can show."""

# A split of at most this many pixels is drawn once per process and kept: 4,000 images of 64 x 64.
_KEPT_PIXELS = 2**24

# Metres; more distant surfaces have no depth, as with the sensor of NYUd.
FARTHEST = 10.0


@dataclasses.dataclass(frozen=True)
class SceneSettings(Settings):
    """Settings of the generated data set `scenes`."""

    size: int = setting(
        64, Range(8, 2**12, whole=True), "Side length of a generated image.", "pixels"
    )
    train: int = setting(10000, COUNT, "Number of training images.")
    test: int = setting(
        2000, COUNT, "Number of test images, which are disjoint from the training images."
    )


# Sources of the same images with different labels, and their numbers of classes.
LABELS = {"scenes": len(CLASSES), "scenes_masks": len(SURFACES), "scenes_depth": 0}


class ScenesSource:
    """Generated images with their class, mask or depth map.

    A mask holds the index in `SURFACES` + 1 (0, which is ignored, does not occur). A depth map
    holds metres along the optical axis, and 0 for the sky and beyond `FARTHEST`.

    Args:
      name: a key of `LABELS`, which selects the kind of label.
      split: `train` or `test`.
      settings: number and size of the images.
    """

    exif = False

    def __init__(self, name: str, split: str, settings: SceneSettings) -> None:
        self.name, self.split, self.settings = name, split, settings
        self.num_classes = LABELS[name]
        self._drawn = _drawn(name, split, settings)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_drawn": {}}  # each process draws its own images

    def __len__(self) -> int:
        return self.settings.train if self.split == TRAIN else self.settings.test

    def __getitem__(self, index: int) -> Record:
        if index in self._drawn:
            return self._drawn[index]
        record = self._draw(index)
        if len(self) * self.settings.size**2 <= _KEPT_PIXELS:
            self._drawn[index] = record
        return record

    def _draw(self, index: int) -> Record:
        picture = render(compose(self.split, index), self.settings.size)
        if self.name == "scenes":
            return Record(picture.image, label_of(index))
        if self.name == "scenes_masks":
            return Record(picture.image, picture.surface + np.uint8(1))
        depth = picture.depth
        return Record(picture.image, np.where(depth < FARTHEST, depth, np.float32(0)))

    def describe(self, index: int) -> str:
        return f"{self.name} {self.split} picture {index}"

    def fingerprint(self) -> str:
        described = (VERSION, self.name, self.split, len(self), self.settings.size)
        return hashlib.sha256(repr(described).encode()).hexdigest()


@functools.lru_cache(maxsize=4)
def _drawn(name: str, split: str, settings: SceneSettings) -> dict[int, Record]:
    """Returns a cache of images by index, which later runs in the same process share."""
    return {}


def label_of(index: int) -> int:
    """Returns the class of an image; classes are balanced, and no fixed stride selects only one."""
    return (index + index // 10 * 7) % len(CLASSES)


def compose(split: str, index: int) -> Scene:
    """Returns the scene of an image; its first body defines the class."""
    rng = np.random.default_rng([VERSION, split == TRAIN, index])
    spread, height = rng.uniform(0.42, 0.62), rng.uniform(0.7, 2.2)
    place = rng.uniform((-0.25, 2), (0.25, 5))
    main = _body(rng, label_of(index), place, rng.uniform(0.3, 0.5), spread)
    bodies = [main]
    for _ in range(rng.integers(1, 6)):
        place = rng.uniform((-0.95, 1.8), (0.95, 8.5))
        other = int(rng.integers(len(CLASSES)))
        body = _body(rng, other, place, rng.uniform(0.06, 0.16), spread)
        if all(_apart(body, one) for one in bodies):
            bodies.append(body)
    below = math.atan2(height - main.centre[1], main.centre[2])
    pitch = below + math.atan(rng.uniform(-0.25, 0.25) * spread)
    return Scene(height, pitch, spread, bodies, _ground(rng), _sky(rng), _sun(rng))


def _body(
    rng: np.random.Generator,
    label: int,
    place: Float[np.ndarray, "2"],
    share: float,
    spread: float,
) -> Body:
    """Returns a body of a class.

    Args:
      rng: generator of its proportions and appearance.
      label: the class.
      place: horizontal offset from the image centre, in -1..1, and depth in the scene.
      share: approximate fraction of the image height that the body fills.
      spread: spread of the camera.
    """
    pattern, shape = CLASSES[label].split()
    high = share * spread * place[1]
    wide, deep = high * (rng.uniform(0.7, 1.05, 2) if shape != "ball" else np.ones(2))
    colour = rng.uniform(0.05, 0.95, 3)
    colours = np.float32([colour, (colour + 0.5) % 1])
    if pattern == "striped":
        texture = Texture(colours, _waves(rng, 1, 5.3, 7.5), False, 4.0)
    else:  # avoids waves near zero over a whole face of a box, which would be grey
        waves = np.diag(rng.uniform(3.9, 5.5, 3)).astype(np.float32)
        texture = Texture(colours, waves, True, 4.0)
    centre = (place[0] * spread * place[1], high, place[1])
    yaw = rng.uniform(0, 2 * math.pi)
    return Body(shape, SURFACES.index(CLASSES[label]), centre, (wide, high, deep), yaw, texture)


def _apart(one: Body, other: Body) -> bool:
    between = math.dist(one.centre[::2], other.centre[::2])
    return between > math.hypot(*one.half[::2]) + math.hypot(*other.half[::2])


def _waves(
    rng: np.random.Generator, count: int, low: float, high: float, flat: bool = False
) -> Float[np.ndarray, "count 3"]:
    directions = rng.standard_normal((count, 3)) * (1, not flat, 1)
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    return (directions * rng.uniform(low, high, (count, 1))).astype(np.float32)


def _ground(rng: np.random.Generator) -> Texture:
    """Returns a texture of tiles, planks or blotches, with duller colours than the bodies."""
    colour = rng.uniform(0.25, 0.75) + rng.uniform(-0.15, 0.15, 3)
    colours = np.float32([colour, colour * rng.uniform(0.45, 0.8)])
    kind = ("tiles", "planks", "blotches")[rng.integers(3)]
    waves = _waves(rng, 4 if kind == "blotches" else 1, 4, 9, flat=True)
    if kind == "tiles":
        across = waves[:, ::-1] * np.float32([1, 1, -1])
        return Texture(colours, np.concatenate([waves, across]), True, 4.0)
    return Texture(colours, waves, False, 4.0 if kind == "planks" else 1.5)


def _sky(rng: np.random.Generator) -> Texture:
    horizon = rng.uniform(0.7, 0.95) + rng.uniform(-0.05, 0.05, 3)
    above = horizon * rng.uniform((0.25, 0.45, 0.75), (0.75, 0.85, 1.05))
    return Texture(np.float32([horizon, above]), _waves(rng, 3, 0.5, 2.5), False, 1.0)


def _sun(rng: np.random.Generator) -> Float[np.ndarray, "3"]:
    rise, turn = rng.uniform(0.4, 1.1), rng.uniform(0, 2 * math.pi)
    flat = math.cos(rise)
    return np.float32([flat * math.cos(turn), math.sin(rise), flat * math.sin(turn)])
