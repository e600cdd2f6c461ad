"""All that a study measures of a teacher and its students, on generated scenes."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt8

from singer_jax.data.dense import DepthTransform, SegmentationTransform
from singer_jax.data.images import open_image
from singer_jax.data.registry import DataSettings, open_source
from singer_jax.data.scenes import LABELS
from singer_jax.evaluation import artifacts, linear
from singer_jax.evaluation.backbone import Backbone, Examples
from singer_jax.evaluation.knn import knn_top1
from singer_jax.evaluation.patches import cosine_to_teacher, linear_map, norm_ratio
from singer_jax.methods import nullspace
from singer_jax.methods.norms import clip_norms
from singer_jax.methods.singer import Refiner
from singer_jax.models.network import Network
from singer_jax.models.params import Params
from singer_jax.models.planted import marked_patches

_AT_ONCE = 250  # images through a model
_MAPPED = 500  # images that the linear map to the teacher's features is fitted on

Tokens = dict[int, Float[np.ndarray, "images tokens dim"]]


@dataclasses.dataclass(frozen=True)
class Scenes:
    """A split in memory.

    Attributes:
      pixels: [images, size, size, 3].
      classes: of each image.
      masks, depth: [images, size, size]; a surface from 0, and metres, 0 where there is no depth.
    """

    pixels: UInt8[np.ndarray, "images size size 3"]
    classes: Int[np.ndarray, " images"]
    masks: Int[np.ndarray, "images size size"]
    depth: Float[np.ndarray, "images size size"]

    @classmethod
    def draw(cls, data: DataSettings, size: int, split: str, count: int | None = None) -> Scenes:
        """The first pictures of a split, or all of them, at a size in pixels."""
        of = {name: open_source(dataclasses.replace(data, source=name), split) for name in LABELS}
        transforms = {
            "scenes_masks": SegmentationTransform(size, train=False),
            "scenes_depth": DepthTransform(size, train=False),
        }
        rng = np.random.default_rng(0)  # draws nothing: both are of testing
        found: dict[str, list[np.ndarray]] = {name: [] for name in ("pixels", *LABELS)}
        for index in range(len(of["scenes"]) if count is None else count):
            found["scenes"].append(of["scenes"][index].label)
            for name, transform in transforms.items():
                record = of[name][index]
                pixels, label = transform(open_image(record.image), record.label, rng)
                found[name].append(label)
            found["pixels"].append(pixels)
        arrays = {name: np.stack(values) for name, values in found.items()}
        return cls(
            arrays["pixels"], arrays["scenes"], arrays["scenes_masks"], arrays["scenes_depth"]
        )

    def by_patch(self, values: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
        """Pixels' values as [images, patches, pixels of a patch]."""
        count, side = len(values), values.shape[1] // grid[0]
        parts = values.reshape(count, grid[0], side, grid[1], side).swapaxes(2, 3)
        return parts.reshape(count, grid[0] * grid[1], side * side)


class SceneMeasures:
    """Of students of one teacher.

    Dense tasks leave out the patches that the teacher marks, in training and testing: where marks
    follow the image, an artifact that a student kept would tell it what is there.

    Args:
      teacher: as its students saw it.
      train: what probes are fitted on.
      test: what is measured.
      layers: the distilled blocks; planted vectors are added after the first.
    """

    def __init__(
        self, teacher: Backbone, train: Scenes, test: Scenes, layers: Sequence[int]
    ) -> None:
        self.teacher, self.train, self.test, self.layers = teacher, train, test, tuple(layers)
        self.prefix = teacher.arch.num_prefix_tokens
        reads = sorted({*layers, layers[0] + 1})
        self.features = tokens_of(teacher, test, reads)
        self.marked = marked(teacher, test)
        last = layers[-1]
        self.vector = np.zeros(teacher.arch.embed_dim, np.float32)
        if teacher.arch.planted:
            self.vector = np.asarray(teacher.params["planted"]["vector"])
        mapped = dataclasses.replace(
            train, **{f.name: getattr(train, f.name)[:_MAPPED] for f in dataclasses.fields(train)}
        )
        self.mapped = mapped
        self.clean = self._without(self.features[last][:, self.prefix :], self.marked)
        fitted = tokens_of(teacher, mapped, [last])[last][:, self.prefix :]
        self.clean_fitted = self._without(fitted, marked(teacher, mapped))

    def of_teacher(self) -> dict[str, float]:
        """What the teacher itself scores, and what was planted in it."""
        found = self._scores(self.teacher)
        first = self.layers[0]
        found["norm_ratio_first"] = norm_ratio(self.features[first][:, self.prefix :])
        if self.teacher.arch.planted:
            model = self.teacher.network.merge(self.teacher.params)
            space = nullspace.of_layer(model, first, "mlp")
            tau = nullspace.threshold_value(space, "quantile", 0.5)
            projection = np.asarray(nullspace.projector(space, tau, 1))
            found["planted_in_null_space"] = artifacts.energy_within(self.vector, projection)
            found["planted_length"] = float(np.linalg.norm(self.vector))
        return found

    def of_student(self, student: Backbone) -> dict[str, float]:
        """Its scores and its likeness to the teacher without what was planted."""
        found = self._scores(student)
        last = student.arch.depth - 1
        fitted, own = (
            tokens_of(student, scenes, [last])[last][:, student.arch.num_prefix_tokens :]
            for scenes in (self.mapped, self.test)
        )
        cosine = cosine_to_teacher(own, self.clean, linear_map(fitted, self.clean_fitted))
        return found | {
            "cosine_to_clean": float(cosine.mean()),
            "cosine_to_clean_marked": float(cosine[self.marked].mean())
            if self.marked.any()
            else None,
        }

    def of_target(self, cleaned: Float[np.ndarray, "images tokens dim"]) -> dict[str, float]:
        """What a method or cleaner made of the first distilled layer's features.

        Args:
          cleaned: in the place of the teacher's own.
        """
        first = self.layers[0]
        before, after = (x[:, self.prefix :] for x in (self.features[first], cleaned))
        found = {"target_norm_ratio": norm_ratio(after)}
        if self.marked.any():
            found["removed_share"] = artifacts.removed_share(
                before, after, self.vector, self.marked
            )
        seen = [
            np.concatenate(
                [
                    np.asarray(
                        _next_block(
                            self.teacher.network, first, self.teacher.params, x[i : i + _AT_ONCE]
                        )
                    )
                    for i in range(0, len(x), _AT_ONCE)
                ]
            )
            for x in (self.features[first], cleaned)
        ]
        return found | {"next_block_changed": artifacts.relative_change(*seen)}

    def refined(self, refiner: Refiner) -> Float[np.ndarray, "images tokens dim"]:
        """The first distilled layer's features with a refiner's update."""
        features = self.features[self.layers[0]]
        update = np.asarray(refiner.update(jnp.asarray(features[:, self.prefix :])))
        return features + np.pad(update, ((0, 0), (self.prefix, 0), (0, 0)))

    def clipped(self, quantile: float) -> Float[np.ndarray, "images tokens dim"]:
        """The first distilled layer's features with clipped patches."""
        features = self.features[self.layers[0]]
        patches = clip_norms(jnp.asarray(features[:, self.prefix :]), quantile)
        return np.concatenate([features[:, : self.prefix], np.asarray(patches)], axis=1)

    def _scores(self, backbone: Backbone) -> dict[str, float]:
        last, prefix = backbone.arch.depth - 1, backbone.arch.num_prefix_tokens
        train, test = (tokens_of(backbone, one, [last])[last] for one in (self.train, self.test))
        classes = int(self.train.classes.max()) + 1
        surfaces = int(self.train.masks.max()) + 1
        labels = self.train.classes, self.test.classes
        near = [Examples(x[:, 0], y) for x, y in zip((train, test), labels, strict=True)]
        patches = [x[:, prefix:] for x in (train, test)]
        left_out = [marked(self.teacher, one) for one in (self.train, self.test)]
        grid = backbone.arch.grid
        masks, depth = (
            [one.by_patch(getattr(one, name), grid) for one in (self.train, self.test)]
            for name in ("masks", "depth")
        )
        return {
            "linear_top1": linear.top1(train[:, 0], labels[0], test[:, 0], labels[1], classes),
            "knn_top1": 100 * knn_top1(*near, classes=classes),
            "miou": linear.mean_iou(
                patches[0], masks[0], patches[1], masks[1], surfaces, *left_out
            ),
            "depth_rmse": linear.depth_rmse(patches[0], depth[0], patches[1], depth[1], *left_out),
            "norm_ratio": norm_ratio(patches[1]),
        }

    def _without(
        self, patches: np.ndarray, marks: Bool[np.ndarray, "images patches"]
    ) -> np.ndarray:
        return patches - marks[..., None] * self.vector


def tokens_of(backbone: Backbone, scenes: Scenes, layers: Sequence[int]) -> Tokens:
    """All tokens after some blocks."""
    found: dict[int, list[np.ndarray]] = {layer: [] for layer in layers}
    for start in range(0, len(scenes.pixels), _AT_ONCE):
        pixels = scenes.pixels[start : start + _AT_ONCE]
        of_batch = _features(backbone.network, tuple(layers), backbone.params, pixels)
        for layer, value in of_batch.items():
            found[layer].append(np.asarray(value))
    return {layer: np.concatenate(values) for layer, values in found.items()}


def marked(backbone: Backbone, scenes: Scenes) -> Bool[np.ndarray, "images patches"]:
    """The patches to which a model's vector is added; none where nothing is planted."""
    spec = backbone.network.spec
    if not spec.arch.planted:
        return np.zeros((len(scenes.pixels), spec.arch.num_patches), bool)
    find = jax.jit(lambda pixels: marked_patches(spec.prepare(pixels), spec.arch))
    parts = range(0, len(scenes.pixels), _AT_ONCE)
    return np.concatenate([np.asarray(find(scenes.pixels[i : i + _AT_ONCE])) for i in parts])


@functools.partial(jax.jit, static_argnums=(0, 1))
def _features(
    network: Network, layers: tuple[int, ...], params: Params, pixels: Array
) -> dict[int, Float[Array, "images tokens dim"]]:
    features = network.merge(params).features(network.spec.prepare(pixels), max(layers) + 1)
    return {layer: features[layer] for layer in layers}


@functools.partial(jax.jit, static_argnums=(0, 1))
def _next_block(
    network: Network, layer: int, params: Params, features: Float[Array, "images tokens dim"]
) -> Float[Array, "images tokens dim"]:
    return network.merge(params).apply_block(layer + 1, features)
