"""Casts the rays of a camera at convex bodies on a ground, in the sun: colour, surface and depth.

Lengths are metres; y points up; the camera stands at (0, height, 0), looks along z and down by its
pitch. Directions of view have length 1 along the optical axis, so that how far a ray goes is the
depth of what it meets, as a depth camera measures it, to about 1e-4 (float32) unless it grazes.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, UInt8

GROUND, SKY = 0, 1  # as a picture names them; a body says its own name


class Shape(NamedTuple):
    """The convex body of the points on the inner side of each of its surfaces.

    Attributes:
      normals: of its planes: normal . p <= 1.
      quadric: (a, b, c): x^2 + z^2 + a y^2 + b y + c <= 0; None: there is none.
    """

    normals: Float[np.ndarray, "planes 3"]
    quadric: tuple[float, float, float] | None = None


_TOP, _BOTTOM = np.float32([[0, 1, 0]]), np.float32([[0, -1, 0]])
_SIDES = np.float32([[1, 0, 0], [-1, 0, 0], [0, 0, 1], [0, 0, -1]])
# Each fills [-1, 1]^3 and stands on its lower side.
SHAPES = {
    "ball": Shape(_TOP[:0], (1.0, 0.0, -1.0)),
    "cylinder": Shape(np.concatenate([_TOP, _BOTTOM]), (0.0, 0.0, -1.0)),
    "cone": Shape(np.concatenate([_TOP, _BOTTOM]), (-0.25, 0.5, -0.25)),
    "box": Shape(np.concatenate([_TOP, _BOTTOM, _SIDES])),
    "pyramid": Shape(np.concatenate([_BOTTOM, 2 * _SIDES + _TOP])),
}


class Texture(NamedTuple):
    """Two colours, and the waves that choose between them.

    Attributes:
      colours: red, green, blue in 0..1.
      waves: of each its direction, as long as its radians a unit of length.
      product: whether the waves are multiplied (checks) or added (stripes, blotches).
      sharpness: 1: as soft as the wave; more: with sharper edges.
    """

    colours: Float[np.ndarray, "2 3"]
    waves: Float[np.ndarray, "waves 3"]
    product: bool
    sharpness: float


class Body(NamedTuple):
    """A shape somewhere.

    Attributes:
      shape: a key of `SHAPES`.
      surface: how a picture names it; above `SKY`.
      centre, half: of its box, before it is turned.
      yaw: how it is turned, in radians about the vertical.
      texture: in its own coordinates.
    """

    shape: str
    surface: int
    centre: tuple[float, float, float]
    half: tuple[float, float, float]
    yaw: float
    texture: Texture

    def inward(self, vectors: Float[np.ndarray, "3 ..."]) -> Float[np.ndarray, "3 ..."]:
        """Vectors of the world in its own coordinates, in which it fills [-1, 1]^3."""
        (x, y, z), (wide, high, deep) = vectors, self.half
        cos, sin = math.cos(self.yaw), math.sin(self.yaw)
        return np.stack([(cos * x - sin * z) / wide, y / high, (sin * x + cos * z) / deep])

    def outward(self, own: Float[np.ndarray, "3 ..."]) -> Float[np.ndarray, "3 ..."]:
        """The inverse of `inward`."""
        x, y, z = (part * half for part, half in zip(own, self.half, strict=True))
        cos, sin = math.cos(self.yaw), math.sin(self.yaw)
        return np.stack([cos * x + sin * z, y, cos * z - sin * x])

    def normals(self, own: Float[np.ndarray, "3 n"]) -> Float[np.ndarray, "3 n"]:
        """Unit normals in the world, of gradients in its own coordinates."""
        found = self.outward(own / np.square(self.half)[:, None].astype(np.float32))
        return found / np.sqrt((found * found).sum(axis=0))


class Scene(NamedTuple):
    """What there is to see, and from where.

    Attributes:
      height: of the camera above the ground.
      pitch: radians that it looks down.
      spread: half the picture's width at a depth of 1.
      bodies: on the ground.
      ground: its texture.
      sky: its colours, at the horizon and in the clouds, and these.
      sun: unit vector towards it.
    """

    height: float
    pitch: float
    spread: float
    bodies: list[Body]
    ground: Texture
    sky: Texture
    sun: Float[np.ndarray, " 3"]


class Picture(NamedTuple):
    """A scene as the camera sees it.

    Attributes:
      image: the picture.
      surface: what each pixel's centre shows: `GROUND`, `SKY` or a body's.
      depth: metres along the optical axis; infinite for the sky.
    """

    image: UInt8[np.ndarray, "size size 3"]
    surface: UInt8[np.ndarray, "size size"]
    depth: Float[np.ndarray, "size size"]


class _Canvas(NamedTuple):
    """Of each pixel: where it looks, and what of the nearest thing there is known."""

    view: Float[np.ndarray, "3 size size"]
    colour: Float[np.ndarray, "3 size size"]
    normal: Float[np.ndarray, "3 size size"]
    surface: UInt8[np.ndarray, "size size"]
    depth: Float[np.ndarray, "size size"]


def render(scene: Scene, size: int) -> Picture:
    """The picture of a scene, `size` pixels wide and high."""
    # Rays that miss, or look at the sky, come out infinite or as NaN, which no comparison takes.
    with np.errstate(divide="ignore", invalid="ignore"):
        canvas = _empty(scene, size)
        for body in scene.bodies:
            _draw(body, scene, canvas)
        light = _light(scene, canvas)
    image = ((canvas.colour * light).clip(0, 1) * 255).astype(np.uint8)
    return Picture(np.ascontiguousarray(image.transpose(1, 2, 0)), *canvas[3:])


@functools.cache
def _grid(size: int) -> Float[np.ndarray, "2 size size"]:
    """Where the pixels' centres are in -1..1, to the right and up."""
    right = (np.arange(size, dtype=np.float32) + 0.5) * (2 / size) - 1
    return np.stack(np.broadcast_arrays(right, -right[:, None]))


def _empty(scene: Scene, size: int) -> _Canvas:
    """Ground and sky."""
    x, y = _grid(size) * np.float32(scene.spread)
    cos, sin = math.cos(scene.pitch), math.sin(scene.pitch)
    view = np.stack([x, cos * y - sin, cos + sin * y])
    colour, normal = np.empty_like(view), np.zeros_like(view)
    normal[1] = 1
    horizon = np.count_nonzero(view[1, :, 0] >= 0)  # rows: the camera is not tilted
    surface = np.full((size, size), GROUND, np.uint8)
    surface[:horizon] = SKY
    depth = np.full((size, size), np.inf, np.float32)

    sky = view[:, :horizon]
    haze = scene.sky.colours[0].reshape(3, 1, 1)
    clouds = _paint(scene.sky, sky / (sky[1] + 0.2))
    elevation = sky[1] / np.sqrt((sky * sky).sum(axis=0))
    colour[:, :horizon] = haze + (clouds - haze) * (3 * elevation).clip(0, 1)

    ground = view[:, horizon:]
    far = depth[horizon:] = scene.height / -ground[1]
    # What is finer than a pixel, whose length on the ground grows so with the depth, is even.
    length = far * far * np.float32(2 * scene.spread / size / scene.height)
    contrast = 1 / (1 + (length * np.abs(scene.ground.waves).max()) ** 2)
    near = _paint(scene.ground, ground * far, contrast)
    colour[:, horizon:] = haze + (near - haze) * np.exp(far / -60)
    return _Canvas(view, colour, normal, surface, depth)


def _paint(
    texture: Texture,
    points: Float[np.ndarray, "3 ..."],
    contrast: Float[np.ndarray, "..."] | float = 1.0,
) -> Float[np.ndarray, "3 ..."]:
    waves = np.sin(np.einsum("wc,c...->w...", texture.waves, points))
    total = waves.prod(axis=0) if texture.product else waves.sum(axis=0)
    share = 0.5 + 0.5 * contrast * (texture.sharpness * total).clip(-1, 1)
    first, second = texture.colours.reshape(2, 3, *[1] * share.ndim)
    return second + (first - second) * share


def cast(
    shape: Shape, start: Float[np.ndarray, "3 ..."], way: Float[np.ndarray, "3 n"]
) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"], Int[np.ndarray, " n"]]:
    """Where rays enter and leave a body, in multiples of `way`, and by which plane (-1: none).

    A ray that would enter after it leaves misses; NaN where it misses a quadric.
    """
    near, far = np.float32(-np.inf), np.float32(np.inf)
    by = np.full(way.shape[1], -1)
    if shape.quadric:
        a, b, c = shape.quadric
        weights = np.float32([1, a, 1])
        square = np.einsum("c,cn,cn->n", weights, way, way)
        half = np.einsum("c,cn,cn->n", weights, way, start) + b / 2 * way[1]
        rest = np.einsum("c,cn,cn->n", weights, start, start) + b * start[1] + c
        root = np.sqrt(half * half - square * rest)
        near, far = (-half - root) / square, (-half + root) / square
        if a < 0:  # a ray steeper than the cone's side leaves its mirror image, or goes into it
            steep = square < 0
            near[steep & (way[1] > 0)] = -np.inf
            far[steep & (way[1] < 0)] = np.inf
    if len(shape.normals):
        speed = np.einsum("pc,cn->pn", shape.normals, way)
        at = (1 - np.einsum("pc,cn->pn", shape.normals, start)) / speed
        enters = np.where(speed < 0, at, -np.inf)
        entry = enters.max(axis=0)
        by = np.where(entry > near, enters.argmax(axis=0), by)
        near = np.maximum(near, entry)
        far = np.minimum(far, np.where(speed > 0, at, np.inf).min(axis=0))
    return near, far, by


def _draw(body: Body, scene: Scene, canvas: _Canvas) -> None:
    """Draws a body over what is farther."""
    window = _window(body, scene, len(canvas.depth))
    view, colour, normal = (part[:, *window] for part in canvas[:3])
    surface, depth = (part[window] for part in canvas[3:])
    shape = SHAPES[body.shape]
    eye = np.float32([0, scene.height, 0]) - np.float32(body.centre)
    start, way = body.inward(eye[:, None]), body.inward(view.reshape(3, -1))
    near, far, by = cast(shape, start, way)
    hit = (near < far) & (near > 0) & (near < depth.ravel())
    near, by = near[hit], by[hit]
    points = start + way[:, hit] * near
    slope = points
    if shape.quadric:
        a, b, _ = shape.quadric
        slope = points * np.float32([[1], [a], [1]]) + np.float32([[0], [b / 2], [0]])
    if len(shape.normals):
        slope = np.where(by < 0, slope, shape.normals[by].T)
    inside = hit.reshape(depth.shape)
    colour[:, inside] = _paint(body.texture, points)
    normal[:, inside] = body.normals(slope)
    surface[inside] = body.surface
    depth[inside] = near


def _window(body: Body, scene: Scene, size: int) -> tuple[slice, slice]:
    """Rows and columns outside which a body is not seen."""
    corners = np.stack(np.meshgrid(*[(-1.0, 1.0)] * 3)).reshape(3, -1)
    eye = np.array([0, scene.height, 0])
    x, y, z = body.outward(corners) + (np.array(body.centre) - eye)[:, None]
    cos, sin = math.cos(scene.pitch), math.sin(scene.pitch)
    ahead = cos * z - sin * y
    if ahead.min() <= 0.1:
        return slice(None), slice(None)
    places = (np.stack([-cos * y - sin * z, x]) / (ahead * scene.spread) + 1) * (size / 2)
    ends = np.stack([places.min(axis=1), places.max(axis=1) + 1]).clip(0, size).astype(int)
    rows, columns = (slice(*of_axis) for of_axis in ends.T.tolist())
    return rows, columns


def _light(scene: Scene, canvas: _Canvas) -> Float[np.ndarray, "size size"]:
    """How bright each pixel's surface is: from the sky, and from the sun where it shines."""
    solid = canvas.surface != SKY
    top = int(solid.any(axis=1).argmax())
    points = (canvas.view * canvas.depth)[:, top:].reshape(3, -1)
    points[1] += scene.height
    normal = canvas.normal[:, top:].reshape(3, -1)
    sun = np.einsum("c,cn->n", scene.sun, normal).clip(0)
    for body in scene.bodies:
        sun[_shaded(body, points, scene.sun)] = 0
    light = (0.42 + 0.1 * normal[1] + 0.55 * sun).reshape(solid[top:].shape)
    return np.where(solid, np.pad(light, ((top, 0), (0, 0))), 1)


def _shaded(
    body: Body, points: Float[np.ndarray, "3 n"], sun: Float[np.ndarray, " 3"]
) -> Int[np.ndarray, " shaded"]:
    """Which points a body hides from the sun."""
    between = np.float32(body.centre)[:, None] - points
    along = np.einsum("c,cn->n", sun, between)
    reach = math.hypot(*body.half)
    missed = np.einsum("cn,cn->n", between, between) - along * along
    close = np.flatnonzero((missed < reach * reach) & (along > -reach))
    way = np.broadcast_to(body.inward(sun[:, None]), (3, len(close)))
    near, far, _ = cast(SHAPES[body.shape], body.inward(-between[:, close]), way)
    return close[(near < far) & (far > 1e-3)]  # not the body's own surface
