"""Measures of a study for a teacher and its students."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Num, UInt8

from singer_jax.data.dense import DepthTransform, SegmentationTransform
from singer_jax.data.images import EvalTransform, open_image
from singer_jax.data.registry import DataSettings, open_source
from singer_jax.data.scenes import label_of
from singer_jax.data.sources import evenly
from singer_jax.evaluation import artifacts, linear
from singer_jax.evaluation.backbone import Backbone, Examples
from singer_jax.evaluation.knn import knn_top1
from singer_jax.evaluation.patches import cosine_to_teacher, linear_map, norm_ratio
from singer_jax.methods import nullspace
from singer_jax.methods.norms import clip_norms
from singer_jax.methods.singer import Refiner
from singer_jax.models.network import Network
from singer_jax.models.params import Params
from singer_jax.models.synthetic_outlier import marked_patches

_AT_ONCE = 250  # images per pass through a model
_MAPPED = 500  # number of images to fit the linear map to the teacher's features

Tokens = dict[int, Float[np.ndarray, "images tokens dim"]]


@dataclasses.dataclass(frozen=True)
class LabelledImages:
    """Images of a split in memory, with their labels.

    Attributes:
      pixels: images [images, size, size, 3].
      classes: class of each image.
      masks: class of each pixel, from 0, [images, size, size]; None if the source has none.
      depth: depth of each pixel in metres, 0 if there is none, [images, size, size]; None if the
        source has none.
    """

    pixels: UInt8[np.ndarray, "images size size 3"]
    classes: Int[np.ndarray, " images"]
    masks: Int[np.ndarray, "images size size"] | None = None
    depth: Float[np.ndarray, "images size size"] | None = None

    @classmethod
    def read(
        cls, data: DataSettings, size: int, split: str, count: int | None = None
    ) -> LabelledImages:
        """Returns images of a split at a size in pixels.

        Generated scenes also have masks and depth.

        Args:
          data: settings of the source.
          size: side of the images in pixels.
          split: `train` or `test`.
          count: number of images; None: all. They are the first scenes, or evenly spaced images of
            another source in random order, because a folder is sorted by class.
        """
        if data.source == "scenes":
            return cls._draw(data, size, split, count)
        source = open_source(data, split)
        if count is not None:
            source = evenly(source, count)
        order = np.random.default_rng(0).permutation(len(source))
        records = [source[int(index)] for index in order]
        transform = EvalTransform(size)
        pixels = np.stack([transform(open_image(one.image)) for one in records])
        return cls(pixels, np.array([one.label for one in records]))

    @classmethod
    def _draw(cls, data: DataSettings, size: int, split: str, count: int | None) -> LabelledImages:
        transforms = {
            "scenes_masks": SegmentationTransform(size, train=False),
            "scenes_depth": DepthTransform(size, train=False),
        }
        rng = np.random.default_rng(0)  # unused: both transforms are deterministic
        found: dict[str, list[np.ndarray]] = {}
        for name, transform in transforms.items():
            source = open_source(dataclasses.replace(data, source=name), split)
            records = (source[index] for index in range(len(source) if count is None else count))
            pairs = [transform(open_image(one.image), one.label, rng) for one in records]
            found["pixels"], found[name] = ([*values] for values in zip(*pairs, strict=True))
        arrays = {name: np.stack(values) for name, values in found.items()}
        classes = np.array([label_of(index) for index in range(len(arrays["pixels"]))])
        return cls(arrays["pixels"], classes, arrays["scenes_masks"], arrays["scenes_depth"])


class StudyMeasures:
    """Measures of the students of one teacher.

    Images without masks have no dense tasks. Dense tasks exclude the patches in which the teacher
    has an artifact, in training and testing. If artifacts depend on the image, those that a student
    kept would reveal the label.

    Args:
      teacher: teacher as its students saw it.
      train: images to fit probes on.
      test: images to evaluate on.
      layers: distilled blocks; a synthetic outlier is added after the first of them.
    """

    def __init__(
        self, teacher: Backbone, train: LabelledImages, test: LabelledImages, layers: Sequence[int]
    ) -> None:
        self.teacher, self.train, self.test = teacher, train, test
        self.first, self.last = layers[0], layers[-1]
        self.prefix = teacher.arch.num_prefix_tokens
        self.train_marked, self.marked = marked(teacher, train), marked(teacher, test)
        self.vector = np.zeros(teacher.arch.embed_dim, np.float32)
        if teacher.arch.synthetic_outlier:
            self.vector = np.asarray(teacher.params["planted"]["vector"])
        self.features = tokens_of(teacher, test, sorted({self.first, self.last}))
        self.train_tokens = tokens_of(teacher, train, [self.last])[self.last]
        of_test, of_train = self.features[self.last], self.train_tokens[:_MAPPED]
        if teacher.arch.synthetic_outlier:
            clean = _without_outlier(teacher)
            of_test, of_train = (
                tokens_of(clean, images, [self.last], count)[self.last]
                for images, count in ((test, None), (train, _MAPPED))
            )
        self.clean, self.clean_fitted = (x[:, self.prefix :] for x in (of_test, of_train))

    def of_teacher(self) -> dict[str, float]:
        """Returns the scores of the teacher, and measures of its synthetic outlier."""
        found = self._scores(self.teacher, self.train_tokens, self.features[self.last])
        found["norm_ratio_first"] = norm_ratio(self.features[self.first][:, self.prefix :])
        if self.teacher.arch.synthetic_outlier:
            model = self.teacher.network.merge(self.teacher.params)
            space = nullspace.of_layer(model, self.first, "mlp")
            usual = nullspace.NullSpaceSettings()
            tau = nullspace.threshold_value(space, usual.threshold_type, usual.threshold)
            projection = np.asarray(nullspace.projector(space, tau, 1))
            found["outlier_in_null_space"] = artifacts.energy_within(self.vector, projection)
            found["outlier_length"] = float(np.linalg.norm(self.vector))
        return found

    def of_student(self, student: Backbone) -> dict[str, float]:
        """Returns the scores of a student, and its similarity to the artifact-free teacher."""
        last, prefix = student.arch.depth - 1, student.arch.num_prefix_tokens
        train, test = (tokens_of(student, one, [last])[last] for one in (self.train, self.test))
        mapping = linear_map(train[:_MAPPED, prefix:], self.clean_fitted)
        cosine = cosine_to_teacher(test[:, prefix:], self.clean, mapping)
        found = {"cosine_to_clean": float(cosine.mean())}
        if self.marked.any():
            found["cosine_to_clean_marked"] = float(cosine[self.marked].mean())
            found["cosine_to_clean_others"] = float(cosine[~self.marked].mean())
        return self._scores(student, train, test) | found

    def of_target(self, cleaned: Float[np.ndarray, "images tokens dim"]) -> dict[str, float]:
        """Returns measures of a distillation target: the refined or cleaned first distilled block.

        `outlier_medians` is the mean norm of the marked patches in median norms. The effect on the
        next block is the change of the block's update to the residual stream.

        Args:
          cleaned: target features, in place of the teacher's own.
        """
        own = self.features[self.first]
        after = cleaned[:, self.prefix :]
        found = {"target_norm_ratio": norm_ratio(after)}
        if self.marked.any():
            found["removed_share"] = self.removed_share(cleaned)
            norms = np.linalg.norm(after, axis=-1)
            found["outlier_medians"] = float(norms[self.marked].mean() / np.median(norms))
        seen = (self._next_block(x) for x in (own, cleaned))
        return found | {"next_block_changed": artifacts.relative_change(*seen)}

    def removed_share(self, cleaned: Float[np.ndarray, "images tokens dim"]) -> float | None:
        """Returns the share of the outlier's energy that a target lacks; None without outlier."""
        if not self.marked.any():
            return None
        own = self.features[self.first]
        before, after = (x[:, self.prefix :] for x in (own, cleaned))
        return artifacts.removed_share(before, after, self.vector, self.marked)

    def refined(self, refiner: Refiner) -> Float[np.ndarray, "images tokens dim"]:
        """Returns the first distilled block's features with a refiner's update."""
        features = self.features[self.first]
        update = np.asarray(refiner.update(jnp.asarray(features[:, self.prefix :])))
        return features + np.pad(update, ((0, 0), (self.prefix, 0), (0, 0)))

    def clipped(self, quantile: float) -> Float[np.ndarray, "images tokens dim"]:
        """Returns the first distilled block's features with clipped patch norms."""
        features = self.features[self.first]
        patches = clip_norms(jnp.asarray(features[:, self.prefix :]), quantile)
        return np.concatenate([features[:, : self.prefix], np.asarray(patches)], axis=1)

    def _next_block(
        self, features: Float[np.ndarray, "images tokens dim"]
    ) -> Float[np.ndarray, "images tokens dim"]:
        network, params = self.teacher.network, self.teacher.params
        found = [_next_block(network, self.first, params, part) for part in _parts(features)]
        return np.concatenate([np.asarray(part) for part in found]) - features

    def _scores(self, backbone: Backbone, train: np.ndarray, test: np.ndarray) -> dict[str, float]:
        """Returns the scores of a model from all tokens of its last block."""
        prefix = backbone.arch.num_prefix_tokens
        labels, tested = self.train.classes, self.test.classes
        classes = int(labels.max()) + 1
        near = Examples(train[:, 0], labels), Examples(test[:, 0], tested)
        left_out = self.train_marked, self.marked

        def dense(name: str) -> tuple[np.ndarray, ...]:
            of_train, of_test = (
                _by_patch(getattr(one, name), backbone.arch.grid) for one in (self.train, self.test)
            )
            return train[:, prefix:], of_train, test[:, prefix:], of_test

        found = {
            "linear_top1": linear.top1(train[:, 0], labels, test[:, 0], tested, classes),
            "knn_top1": 100 * knn_top1(*near, classes=classes),
        }
        if self.train.masks is not None:
            surfaces = int(self.train.masks.max()) + 1
            found["miou"] = linear.mean_iou(*dense("masks"), surfaces, *left_out)
            found["depth_rmse"] = linear.depth_rmse(*dense("depth"), *left_out)
        return found | {"norm_ratio": norm_ratio(test[:, prefix:])}


def tokens_of(
    backbone: Backbone, images: LabelledImages, layers: Sequence[int], count: int | None = None
) -> Tokens:
    """Returns all tokens after some blocks, for the first `count` images or for all."""
    found: dict[int, list[np.ndarray]] = {layer: [] for layer in layers}
    for pixels in _parts(images.pixels[:count]):
        of_part = _features(backbone.network, tuple(layers), backbone.params, pixels)
        for layer, value in of_part.items():
            found[layer].append(np.asarray(value))
    return {layer: np.concatenate(values) for layer, values in found.items()}


def _without_outlier(backbone: Backbone) -> Backbone:
    """Returns the backbone with its synthetic outlier set to zero."""
    params = dict(backbone.params)
    if "planted" in params:
        params["planted"] = jax.tree.map(jnp.zeros_like, params["planted"])
    return dataclasses.replace(backbone, params=params)


def marked(backbone: Backbone, images: LabelledImages) -> Bool[np.ndarray, "images patches"]:
    """Returns a mask of the patches with the synthetic outlier; all False if the model has none."""
    spec = backbone.network.spec
    if not spec.arch.synthetic_outlier:
        return np.zeros((len(images.pixels), spec.arch.num_patches), bool)
    find = jax.jit(lambda pixels: marked_patches(spec.prepare(pixels), spec.arch))
    return np.concatenate([np.asarray(find(pixels)) for pixels in _parts(images.pixels)])


def _by_patch(
    values: Num[np.ndarray, "images size size"], grid: tuple[int, int]
) -> Num[np.ndarray, "images patches pixels"]:
    count, side = len(values), values.shape[1] // grid[0]
    parts = values.reshape(count, grid[0], side, grid[1], side).swapaxes(2, 3)
    return parts.reshape(count, grid[0] * grid[1], side * side)


def _parts(images: np.ndarray) -> list[np.ndarray]:
    return np.split(images, range(_AT_ONCE, len(images), _AT_ONCE))


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
