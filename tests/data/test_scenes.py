"""Generated images: class, mask and depth agree with the geometry."""

import dataclasses
import hashlib
import pickle
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest

from singer_jax.data.dense import DepthTransform, SegmentationTransform
from singer_jax.data.images import open_image
from singer_jax.data.raycast import GROUND, SHAPES, SKY, Body, Scene, cast, render
from singer_jax.data.registry import make_source
from singer_jax.data.scenes import (
    CLASSES,
    FARTHEST,
    LABELS,
    SURFACES,
    VERSION,
    SceneSettings,
    compose,
)
from singer_jax.data.sources import TEST, TRAIN

FEW = SceneSettings(size=32, train=300, test=300)

# Signed, negative inside, of points in a body's own coordinates.
INSIDE = {
    "ball": lambda x, y, z: np.sqrt(x * x + y * y + z * z) - 1,
    "cylinder": lambda x, y, z: np.maximum(np.hypot(x, z) - 1, abs(y) - 1),
    "cone": lambda x, y, z: np.maximum(np.hypot(x, z) - (1 - y) / 2, -1 - y),
    "box": lambda x, y, z: np.maximum(np.maximum(abs(x), abs(z)), abs(y)) - 1,
    "pyramid": lambda x, y, z: np.maximum(np.maximum(abs(x), abs(z)) - (1 - y) / 2, -1 - y),
}


def in_body(body: Body, points: np.ndarray) -> np.ndarray:
    """Returns the signed function of world points [..., 3] in float64."""
    cos, sin = np.cos(body.yaw), np.sin(body.yaw)
    turn = np.array([[cos, 0, -sin], [0, 1, 0], [sin, 0, cos]])
    own = (points - np.array(body.centre)) @ turn.T / np.array(body.half)
    return INSIDE[body.shape](*np.moveaxis(own, -1, 0))


def rays(scene: Scene, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the camera position and the view directions [size, size, 3] in float64."""
    steps = (np.arange(size) + 0.5) / size * 2 - 1
    x, y = np.meshgrid(steps * scene.spread, -steps * scene.spread)
    axis = np.array([0, -np.sin(scene.pitch), np.cos(scene.pitch)])
    up = np.array([0, np.cos(scene.pitch), np.sin(scene.pitch)])
    right = np.array([1, 0, 0])
    return np.array([0, scene.height, 0]), axis + x[..., None] * right + y[..., None] * up


def digests(first: int, last: int) -> list[str]:
    found = []
    for name in LABELS:
        for split in (TRAIN, TEST):
            source = pickle.loads(pickle.dumps(make_source(name, "", split, FEW)))
            for index in range(first, last):
                image, label = source[index]
                content = image.tobytes() + np.asarray(label).tobytes()
                found.append(hashlib.sha256(content).hexdigest())
    return found


def test_a_picture_follows_from_split_and_index_in_any_process():
    here = digests(3, 6)
    assert len(set(here)) == len(here)
    code = (
        "import sys, singer_jax.data.scenes; assert 'jax' not in sys.modules;"  # as in a worker
        "from tests.data.test_scenes import digests; print(*digests(3, 6))"
    )
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert there.stdout.split() == here
    more = make_source("scenes", "", TRAIN, SceneSettings(size=32, train=5000))
    np.testing.assert_array_equal(more[7].image, make_source("scenes", "", TRAIN, FEW)[7].image)


@pytest.mark.parametrize("index", range(10))
def test_each_pixel_shows_the_nearest_surface_at_its_depth(index):
    """Checked by marching along the rays in float64, with an image of each class."""
    scene, size = compose(TEST, index), 24
    picture = render(scene, size)
    eye, view = rays(scene, size)
    depth, solid = picture.depth.astype(float), picture.surface != SKY
    assert np.isinf(depth[~solid]).all() and (depth > 0).all()
    ground = picture.surface == GROUND
    np.testing.assert_allclose(depth[ground], scene.height / -view[ground][:, 1], rtol=1e-4)
    reached = eye + view * np.where(solid, depth, 50)[..., None]
    for surface in set(picture.surface[~ground & solid]):
        bodies = [body for body in scene.bodies if body.surface == surface]
        off = np.min([abs(in_body(body, reached)) for body in bodies], axis=0)
        # In half-sizes; a grazing ray moves by the root of float32's rounding.
        assert off[picture.surface == surface].max() < 1e-3
    for share in np.linspace(0.02, 0.995, 150):
        between = eye + (reached - eye) * share
        assert between[..., 1].min() > -1e-4
        for body in scene.bodies:
            assert in_body(body, between).min() > -1e-3
    backwards = render(scene._replace(bodies=scene.bodies[::-1]), size)
    for one, other in zip(picture, backwards, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_ray_is_inside_a_body_from_where_it_enters_to_where_it_leaves(shape):
    rng = np.random.default_rng(0)
    start, way = rng.uniform(-2, 2, (2, 3, 2000))
    with np.errstate(all="ignore"):
        near, far, _ = cast(SHAPES[shape], start, way)

    def inside(at: np.ndarray) -> np.ndarray:
        return INSIDE[shape](*(start + way * at))

    met = near < far
    assert 200 < met.sum() < 1800
    for share, sign in ((-0.01, 1), (0.01, -1), (0.5, -1), (0.99, -1), (1.01, 1)):
        assert (sign * inside(near + (far - near) * share)[met] > -1e-6).all()
    walked = np.min([inside(at) for at in np.linspace(-30, 30, 3000)], axis=0)
    assert (walked[~met] > -1e-6).all()


def test_the_depth_of_a_ball_is_the_ray_s_first_meeting_with_it():
    scene, size = compose(TRAIN, 0), 48
    ball = scene.bodies[0]
    picture = render(scene._replace(bodies=[ball]), size)
    eye, view = rays(scene, size)
    offset, radius = eye - np.array(ball.centre), ball.half[0]
    square, half = (view * view).sum(-1), view @ offset
    found = half * half - square * (offset @ offset - radius**2)
    nearest = (-half - np.sqrt(found, where=found > 0, out=np.zeros_like(found))) / square
    shown = picture.surface == ball.surface
    clear = abs(found) > 1e-4  # on the outline rounding decides
    np.testing.assert_array_equal(shown[clear], found[clear] > 0)
    assert 100 < shown.sum() < size * size
    np.testing.assert_allclose(picture.depth[shown & clear], nearest[shown & clear], atol=1e-4)


def test_a_shadow_lies_where_a_body_hides_the_sun():
    scene, size = compose(TEST, 23), 48
    white = scene.ground._replace(colours=np.ones((2, 3), np.float32))
    scene = scene._replace(ground=white, sky=scene.sky._replace(colours=white.colours))
    picture = render(scene, size)
    ground = picture.surface == GROUND
    eye, view = rays(scene, size)
    points = (eye + view * picture.depth[..., None])[ground]
    towards = points + np.linspace(0.01, 8, 800)[:, None, None] * scene.sun
    clear = np.min([in_body(body, towards).min(axis=0) for body in scene.bodies], axis=0)
    brightness = picture.image[ground].mean(axis=-1)
    assert (clear < -0.02).sum() > 20
    assert brightness[clear < -0.02].max() + 20 < brightness[clear > 0.02].min()


def sources(split: str) -> list:
    """Returns the sources of the three kinds of labels."""
    return [make_source(name, "", split, FEW) for name in LABELS]


def test_the_class_is_that_of_the_largest_body_and_each_comes_as_often():
    records = [[source[index] for source in sources(TRAIN)] for index in range(100)]
    labels = [classified.label for classified, _, _ in records]
    assert [labels.count(label) for label in range(len(CLASSES))] == [10] * 10
    assert set(labels[::10]) == set(range(10))  # also of those that are chosen evenly
    shares = np.zeros((100, len(SURFACES)))
    for row, label, (classified, masked, measured) in zip(shares, labels, records, strict=True):
        np.testing.assert_array_equal(classified.image, masked.image)
        np.testing.assert_array_equal(classified.image, measured.image)
        mask, depth = masked.label, measured.label
        row[:] = np.bincount(mask.ravel() - 1, minlength=len(SURFACES)) / mask.size
        main = SURFACES.index(CLASSES[label])
        assert row[SKY + 1 :].argmax() == main - (SKY + 1) and row[main] > 0.03
        assert depth.min() >= 0 and depth.max() < FARTHEST
        assert (depth[mask == SKY + 1] == 0).all() and (depth[mask > SKY + 1] > 1).all()
    ground, sky, *bodies = shares.mean(axis=0)
    assert 0.4 < ground < 0.7 and 0.15 < sky < 0.45 and min(bodies) > 0.005


def edges(image: np.ndarray) -> np.ndarray:
    """Returns the strength of edges in eight directions for 8 x 8 parts of an image."""
    down, across = np.gradient(image.mean(axis=-1))
    direction = np.floor(np.arctan2(down, across) % np.pi / np.pi * 8) % 8
    strength = (direction == np.arange(8)[:, None, None]) * np.hypot(down, across)
    part = len(image) // 8
    return np.log1p(strength.reshape(8, 8, part, 8, part).mean(axis=(2, 4))).ravel()


def linear_top1(feature: Callable[[np.ndarray], np.ndarray]) -> float:
    """Returns the top-1 of ridge regression, with 300 images each; chance is 0.1 +- 0.02."""
    found = []
    for split in (TRAIN, TEST):
        source = make_source("scenes", "", split, FEW)
        records = [source[index] for index in range(300)]
        found.append(np.stack([feature(record.image) for record in records]))
        found.append(np.array([record.label for record in records]))
    train, labels, test, truth = found
    centre, scale = train.mean(axis=0), train.std(axis=0) + 1e-6
    train, test = (train - centre) / scale, (test - centre) / scale
    wanted = np.eye(len(CLASSES))[labels] - 1 / len(CLASSES)
    square = train.T @ train + len(train) * np.eye(train.shape[1])
    return np.mean((test @ np.linalg.solve(square, train.T @ wanted)).argmax(axis=1) == truth)


def test_edges_tell_the_class_and_mean_colours_do_not():
    assert linear_top1(edges) > 0.18
    assert linear_top1(lambda image: image.mean(axis=(0, 1))) < 0.16


def test_dense_transforms_take_its_labels():
    rng = np.random.default_rng(0)
    _, masked, measured = (source[4] for source in sources(TEST))
    image = open_image(masked.image)
    pixels, classes = SegmentationTransform(32, train=False)(image, masked.label, rng)
    np.testing.assert_array_equal(pixels, masked.image)
    np.testing.assert_array_equal(classes, masked.label.astype(int) - 1)
    _, metres = DepthTransform(32, train=False)(image, measured.label, rng)
    np.testing.assert_array_equal(metres, measured.label)


def test_other_pictures_have_another_fingerprint(monkeypatch):
    settings = [FEW] + [dataclasses.replace(FEW, **{key: 99}) for key in ("size", "train", "test")]
    found = [
        make_source(name, "", split, one).fingerprint()
        for name in LABELS
        for split in (TRAIN, TEST)
        for one in settings
    ]
    # In each split the number of pictures of the other one says nothing.
    assert len(set(found)) == len(found) - 2 * len(LABELS)
    monkeypatch.setattr("singer_jax.data.scenes.VERSION", VERSION + 1)
    assert make_source("scenes", "", TRAIN, FEW).fingerprint() not in found


def test_the_pictures_are_those_of_their_version():
    """With new numbers here, increment `scenes.VERSION`; otherwise runs resume on other images."""
    source = make_source("scenes", "", TEST, FEW)
    halves = [source[index].image.reshape(2, 16, 32, 3).mean(axis=(1, 2)) for index in (0, 5)]
    # Upper and lower half, red, green, blue; rounding differs by less between processors.
    expected = [
        [[157.4, 141.2, 168.6], [127.2, 97.9, 128.9]],
        [[130.2, 127.6, 136.4], [64.3, 64.0, 68.8]],
    ]
    np.testing.assert_allclose(halves, expected, atol=0.5)
    assert VERSION == 1
