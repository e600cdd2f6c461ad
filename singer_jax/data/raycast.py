"""Ray casting of convex bodies on a ground in sunlight: colour, surface and depth images.

Lengths are in metres and y points up. The camera is at (0, height, 0) and looks along z, tilted
down by its pitch. View directions have length 1 along the optical axis, so the distance along a ray
is the depth that a depth camera measures. It is accurate to about 1e-4 (float32) except where a ray
grazes a surface.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, UInt8

GROUND, SKY = 0, 1  # values in the surface image; each body has its own value


class Shape(NamedTuple):
    """A convex body: the points on the inner side of all its surfaces.

    Attributes:
      normals: normals of the planes, normal . p <= 1.
      quadric: (a, b, c): x^2 + z^2 + a y^2 + b y + c <= 0; None: no quadric.
    """

    normals: Float[np.ndarray, "planes 3"]
    quadric: tuple[float, float, float] | None = None


_TOP, _BOTTOM = np.float32([[0, 1, 0]]), np.float32([[0, -1, 0]])
_SIDES = np.float32([[1, 0, 0], [-1, 0, 0], [0, 0, 1], [0, 0, -1]])
# Each shape fills [-1, 1]^3 and stands on its lower side.
SHAPES = {
    "ball": Shape(_TOP[:0], (1.0, 0.0, -1.0)),
    "cylinder": Shape(np.concatenate([_TOP, _BOTTOM]), (0.0, 0.0, -1.0)),
    "cone": Shape(np.concatenate([_TOP, _BOTTOM]), (-0.25, 0.5, -0.25)),
    "box": Shape(np.concatenate([_TOP, _BOTTOM, _SIDES])),
    "pyramid": Shape(np.concatenate([_BOTTOM, 2 * _SIDES + _TOP])),
}


class Texture(NamedTuple):
    """Two colours, and waves that blend them.

    Attributes:
      colours: red, green, blue in 0..1.
      waves: wave vectors, in radians per unit of length.
      product: True to multiply the waves (checks), False to add them (stripes, blotches).
      sharpness: 1 for soft transitions; larger values give sharper edges.
    """

    colours: Float[np.ndarray, "2 3"]
    waves: Float[np.ndarray, "waves 3"]
    product: bool
    sharpness: float


class Body(NamedTuple):
    """A shape at a position in the scene.

    Attributes:
      shape: a key of `SHAPES`.
      surface: value in the surface image, above `SKY`.
      centre, half: centre and half sizes of its box before the rotation.
      yaw: rotation about the vertical axis, in radians.
      texture: texture in the body's coordinates.
    """

    shape: str
    surface: int
    centre: tuple[float, float, float]
    half: tuple[float, float, float]
    yaw: float
    texture: Texture

    def inward(self, vectors: Float[np.ndarray, "3 ..."]) -> Float[np.ndarray, "3 ..."]:
        """Returns world vectors in the body's coordinates, in which it fills [-1, 1]^3."""
        (x, y, z), (wide, high, deep) = vectors, self.half
        cos, sin = math.cos(self.yaw), math.sin(self.yaw)
        return np.stack([(cos * x - sin * z) / wide, y / high, (sin * x + cos * z) / deep])

    def outward(self, own: Float[np.ndarray, "3 ..."]) -> Float[np.ndarray, "3 ..."]:
        """Returns vectors of the body's coordinates in the world; the inverse of `inward`."""
        x, y, z = (part * half for part, half in zip(own, self.half, strict=True))
        cos, sin = math.cos(self.yaw), math.sin(self.yaw)
        return np.stack([cos * x + sin * z, y, cos * z - sin * x])

    def normals(self, own: Float[np.ndarray, "3 n"]) -> Float[np.ndarray, "3 n"]:
        """Returns the unit normals in the world for gradients in the body's coordinates."""
        found = self.outward(own / np.square(self.half)[:, None].astype(np.float32))
        return found / np.sqrt((found * found).sum(axis=0))


class Scene(NamedTuple):
    """A scene and its camera.

    Attributes:
      height: height of the camera above the ground.
      pitch: downward tilt of the camera in radians.
      spread: half the image width at a depth of 1.
      bodies: bodies on the ground.
      ground: texture of the ground.
      sky: texture of the sky: the colours of horizon and clouds, and the waves of the clouds.
      sun: unit vector towards the sun.
    """

    height: float
    pitch: float
    spread: float
    bodies: list[Body]
    ground: Texture
    sky: Texture
    sun: Float[np.ndarray, " 3"]


class Picture(NamedTuple):
    """The rendered image of a scene.

    Attributes:
      image: RGB pixels.
      surface: surface at each pixel's centre: `GROUND`, `SKY` or the value of a body.
      depth: metres along the optical axis; infinite for the sky.
    """

    image: UInt8[np.ndarray, "size size 3"]
    surface: UInt8[np.ndarray, "size size"]
    depth: Float[np.ndarray, "size size"]


class _Canvas(NamedTuple):
    """The view direction of each pixel, and the nearest surface found so far."""

    view: Float[np.ndarray, "3 size size"]
    colour: Float[np.ndarray, "3 size size"]
    normal: Float[np.ndarray, "3 size size"]
    surface: UInt8[np.ndarray, "size size"]
    depth: Float[np.ndarray, "size size"]


def render(scene: Scene, size: int) -> Picture:
    """Renders a scene as an image that is `size` pixels wide and high."""
    # Rays that miss a body or hit the sky give inf or NaN, for which all comparisons are false.
    with np.errstate(divide="ignore", invalid="ignore"):
        canvas = _empty(scene, size)
        for body in scene.bodies:
            _draw(body, scene, canvas)
        light = _light(scene, canvas)
    image = ((canvas.colour * light).clip(0, 1) * 255).astype(np.uint8)
    return Picture(np.ascontiguousarray(image.transpose(1, 2, 0)), *canvas[3:])


@functools.cache
def _grid(size: int) -> Float[np.ndarray, "2 size size"]:
    """Returns the coordinates of the pixel centres in -1..1, to the right and up."""
    right = (np.arange(size, dtype=np.float32) + 0.5) * (2 / size) - 1
    return np.stack(np.broadcast_arrays(right, -right[:, None]))


def _empty(scene: Scene, size: int) -> _Canvas:
    """Returns a canvas with ground and sky."""
    x, y = _grid(size) * np.float32(scene.spread)
    cos, sin = math.cos(scene.pitch), math.sin(scene.pitch)
    view = np.stack([x, cos * y - sin, cos + sin * y])
    colour, normal = np.empty_like(view), np.zeros_like(view)
    normal[1] = 1
    horizon = np.count_nonzero(view[1, :, 0] >= 0)  # rows; the camera has no roll
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
    # Texture finer than a pixel, whose length on the ground grows with the depth, is averaged out.
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
    """Returns where rays enter and leave a body in multiples of `way`, and the entered plane.

    The plane is -1 where a ray enters through the quadric. A ray misses if it enters after it
    leaves; a ray that misses the quadric gives NaN.
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
        if a < 0:  # a ray steeper than the cone's side also meets the mirrored cone
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
    """Draws a body over the surfaces behind it."""
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
    """Returns the rows and columns outside of which a body is not visible."""
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
    """Returns the brightness of each pixel's surface: light from the sky and direct sunlight."""
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
    """Returns the indices of the points that a body hides from the sun."""
    between = np.float32(body.centre)[:, None] - points
    along = np.einsum("c,cn->n", sun, between)
    reach = math.hypot(*body.half)
    missed = np.einsum("cn,cn->n", between, between) - along * along
    close = np.flatnonzero((missed < reach * reach) & (along > -reach))
    way = np.broadcast_to(body.inward(sun[:, None]), (3, len(close)))
    near, far, _ = cast(SHAPES[body.shape], body.inward(-between[:, close]), way)
    return close[(near < far) & (far > 1e-3)]  # not the body's own surface
