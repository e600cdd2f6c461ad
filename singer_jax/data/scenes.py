"""Generated pictures whose class, mask and depth are known exactly: the source `scenes`.

A picture shows one large body, whose shape and pattern are its class, and up to five smaller ones
on a patterned ground. Colours, light, camera and places say nothing about the class. Picture i of a
split follows from the split and i, whatever the number and size of the pictures.
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

# Raised with every change of a picture: a run is not continued on other ones.
VERSION = 1

PATTERNS = ("striped", "checked")
CLASSES = tuple(f"{pattern} {shape}" for shape in SHAPES for pattern in PATTERNS)
SURFACES = ("ground", "sky", *CLASSES)
"""What a pixel can show."""

# A split of at most so many pixels is drawn once in a process and kept: 4,000 pictures of 64 x 64.
_KEPT_PIXELS = 2**24

# Metres; what is farther has no depth, as for the sensor of NYUd.
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


# The labels of the same pictures: a source each, and how many classes it has.
LABELS = {"scenes": len(CLASSES), "scenes_masks": len(SURFACES), "scenes_depth": 0}


class ScenesSource:
    """Generated pictures with their class, mask or depth map.

    A mask holds the place in `SURFACES` + 1 (0, which is ignored, does not occur). A depth map
    holds metres along the optical axis, and 0 for the sky and beyond `FARTHEST`.

    Args:
      name: which label: a key of `LABELS`.
      split: `train` or `test`.
      settings: how many, how large.
    """

    exif = False

    def __init__(self, name: str, split: str, settings: SceneSettings) -> None:
        self.name, self.split, self.settings = name, split, settings
        self.num_classes = LABELS[name]
        self._drawn = _drawn(name, split, settings)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_drawn": {}}  # each process draws for itself

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
    """Pictures that are kept, by index: those of one run, and of the next in the same process."""
    return {}


def label_of(index: int) -> int:
    """The class of a picture: of ten in a row each one's, and no distance keeps to one."""
    return (index + index // 10 * 7) % len(CLASSES)


def compose(split: str, index: int) -> Scene:
    """The scene of a picture; its first body is the one that the picture is of."""
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
    """A body of a class.

    Args:
      rng: of its proportions and looks.
      label: the class.
      place: how far to the right of the picture's middle, in -1..1, and how deep in the scene.
      share: of the picture's height that it fills, about.
      spread: the camera's.
    """
    pattern, shape = CLASSES[label].split()
    high = share * spread * place[1]
    wide, deep = high * (rng.uniform(0.7, 1.05, 2) if shape != "ball" else np.ones(2))
    colour = rng.uniform(0.05, 0.95, 3)
    colours = np.float32([colour, (colour + 0.5) % 1])
    if pattern == "striped":
        texture = Texture(colours, _waves(rng, 1, 5.3, 7.5), False, 4.0)
    else:  # the waves are not near zero on a whole face of a box, which would be grey
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
    """Tiles, planks or blotches, in duller colours than the bodies'."""
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
