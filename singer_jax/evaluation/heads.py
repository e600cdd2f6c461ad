"""What a linear probe predicts and how that is scored: classes, a class or a depth a pixel.

Each head is one linear map on frozen features, `{"kernel": [in, out], "bias": [out]}`. A task turns
the raw tokens of the last block into features, gives the loss of a head, and counts what its
metrics need, so that any batches of a split add up to the metrics of the whole split.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.lax import Precision
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, Num

from singer_jax.errors import RunError
from singer_jax.models.architecture import Architecture
from singer_jax.models.vit import VisionTransformer
from singer_jax.platform import parallel

Head = dict[str, jax.Array]
"""`kernel` [in, out] and `bias` [out]; a leading axis of rates while several train."""

Counts = dict[str, jax.Array]
"""What a batch adds to the metrics of a split."""

Losses = tuple[Float[Array, ""], Num[Array, ""]]
"""A sum of losses, and over how many images or pixels."""

TEMPERATURES = (0.03, 0.6)


class Task(Protocol):
    """A probe's features, loss and metrics.

    Attributes:
      score: the metric by which learning rates are compared; higher is better.
    """

    score: ClassVar[str]

    def head_shape(self, arch: Architecture) -> tuple[int, int]:
        """Inputs and outputs of the head."""

    def features(
        self, model: VisionTransformer, tokens: Float[Array, "batch tokens dim"]
    ) -> Float[Array, "batch ..."]:
        """What the head reads, from the raw tokens of the last block."""

    def losses(
        self, head: Head, features: Array, labels: Array, valid: Bool[Array, " batch"]
    ) -> Losses:
        """The sum over the valid images whose mean (`mean_loss`) is minimised."""

    def count(
        self, head: Head, features: Array, labels: Array, valid: Bool[Array, " batch"]
    ) -> Counts:
        """Sums over the valid images of a batch."""

    def metrics(self, counts: Mapping[str, np.ndarray]) -> dict[str, float]:
        """The metrics of a split from its summed counts."""


def apply_head(head: Head, features: Float[Array, "*axes in"]) -> Float[Array, "*axes out"]:
    """The linear map, at every position."""
    return features @ head["kernel"] + head["bias"]


def pooled(
    arch: Architecture, tokens: Float[Array, "batch tokens dim"]
) -> Float[Array, "batch dim"]:
    """The class token, or the mean of the patches where there is none."""
    return tokens[:, 0] if arch.class_token else tokens.mean(axis=1)


def patch_grid(
    arch: Architecture, tokens: Float[Array, "batch tokens dim"]
) -> Float[Array, "batch rows columns dim"]:
    """The patch tokens on their grid."""
    patches = tokens[:, arch.num_prefix_tokens :]
    return patches.reshape(tokens.shape[0], *arch.grid, tokens.shape[-1])


def upsample(
    logits: Float[Array, "rows columns out"], size: tuple[int, int]
) -> Float[Array, "height width out"]:
    """Bilinear interpolation at half-pixel positions, as PyTorch without aligned corners."""
    shape = (*size, logits.shape[-1])
    return jax.image.resize(logits, shape, "linear", antialias=False, precision=Precision.HIGHEST)


def by_image(function: Callable[..., Any], *arrays: Array) -> Any:
    """`function` of one image at a time: full-size logits of a whole batch would not fit.

    The images have to be those of one device (`over_devices`): of a batch that is split over
    several, every device would gather and work on all.
    """
    return jax.lax.map(jax.checkpoint(lambda xs: function(*xs)), arrays)


def over_devices(mesh: Mesh, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function(head, features, labels, valid)` of each device's part of a batch, summed up."""
    whole, part = (s.spec for s in (parallel.replicated(mesh), parallel.batch_sharding(mesh)))

    def of_part(*xs: Any) -> Any:
        return jax.lax.psum(function(*xs), mesh.axis_names)

    return jax.shard_map(of_part, mesh=mesh, in_specs=(whole, part, part, part), out_specs=whole)


def mean_loss(
    task: Task,
    head: Head,
    features: Array,
    labels: Array,
    valid: Bool[Array, " batch"] | None = None,
    mesh: Mesh | None = None,
) -> Float[Array, ""]:
    """The loss of a head: the mean over the images or pixels that count.

    Args:
      task: of the head.
      head, features, labels: of the batch.
      valid: which of its images are no padding; default: all.
      mesh: over whose devices the batch is split; default: it is not.
    """
    losses = over_devices(mesh, task.losses) if mesh else task.losses
    valid = jnp.ones(len(features), bool) if valid is None else valid
    total, count = losses(head, features, labels, valid)
    return total / jnp.maximum(count, 1)


def _log_likelihood(
    logits: Float[Array, "*axes out"], labels: Int[Array, "*axes"]
) -> Float[Array, "*axes"]:
    log_probabilities = jax.nn.log_softmax(logits.astype(jnp.float32))
    return jnp.take_along_axis(log_probabilities, labels[..., None], axis=-1)[..., 0]


def _mean(total: float, count: float, what: str) -> float:
    if not count:
        raise RunError(f"the test split holds no {what}, so there is nothing to score")
    return float(total) / float(count)


@dataclasses.dataclass(frozen=True)
class Classification:
    """One class an image.

    Attributes:
      classes: number of labels.
      token: `cls`: the raw class token; `avg`: the mean of the raw patches; `pooled`: what the
        model's own head reads.
    """

    classes: int
    token: str = "cls"

    score: ClassVar[str] = "top1"

    def head_shape(self, arch: Architecture) -> tuple[int, int]:
        return arch.embed_dim, self.classes

    def features(
        self, model: VisionTransformer, tokens: Float[Array, "batch tokens dim"]
    ) -> Float[Array, "batch dim"]:
        if self.token == "pooled":
            return model.pooled(tokens)
        prefix = model.arch.num_prefix_tokens
        return tokens[:, 0] if self.token == "cls" else tokens[:, prefix:].mean(axis=1)

    def losses(
        self,
        head: Head,
        features: Float[Array, "batch dim"],
        labels: Int[Array, " batch"],
        valid: Bool[Array, " batch"],
    ) -> Losses:
        likelihood = _log_likelihood(apply_head(head, features), labels)
        return -jnp.sum(jnp.where(valid, likelihood, 0.0)), jnp.sum(valid)

    def count(
        self,
        head: Head,
        features: Float[Array, "batch dim"],
        labels: Int[Array, " batch"],
        valid: Bool[Array, " batch"],
    ) -> Counts:
        logits = apply_head(head, features)
        own = jnp.take_along_axis(logits, labels[:, None], axis=1)
        above = jnp.sum(~(logits <= own), axis=1)  # ties count for the label, NaN does not
        return {
            "images": jnp.sum(valid),
            "top1": jnp.sum(valid & (above < 1)),
            "top5": jnp.sum(valid & (above < 5)),
            "loss": -jnp.sum(jnp.where(valid, _log_likelihood(logits, labels), 0.0)),
        }

    def metrics(self, counts: Mapping[str, np.ndarray]) -> dict[str, float]:
        """`top1` and `top5` in percent, `loss`."""
        top1, top5, loss = (
            _mean(counts[name], counts["images"], "image") for name in ("top1", "top5", "loss")
        )
        return {"top1": 100 * top1, "top5": 100 * top5, "loss": loss}


@dataclasses.dataclass(frozen=True)
class Segmentation:
    """One class a pixel, from patch tokens.

    Attributes:
      classes: number of labels 0, 1, ...
      ignore: label of pixels that count nowhere.
    """

    classes: int
    ignore: int = -1

    score: ClassVar[str] = "miou"

    def head_shape(self, arch: Architecture) -> tuple[int, int]:
        return arch.embed_dim, self.classes

    def features(
        self, model: VisionTransformer, tokens: Float[Array, "batch tokens dim"]
    ) -> Float[Array, "batch rows columns dim"]:
        return patch_grid(model.arch, tokens)

    def losses(
        self,
        head: Head,
        features: Float[Array, "batch rows columns dim"],
        labels: Int[Array, "batch height width"],
        valid: Bool[Array, " batch"],
    ) -> Losses:
        def of_image(logits: Array, labels: Array, valid: Array) -> tuple[Array, Array]:
            known = valid & (labels != self.ignore)
            likelihood = _log_likelihood(
                upsample(logits, labels.shape), jnp.where(known, labels, 0)
            )
            return jnp.sum(jnp.where(known, likelihood, 0.0)), jnp.sum(known)

        likelihood, known = by_image(of_image, apply_head(head, features), labels, valid)
        return -jnp.sum(likelihood), jnp.sum(known)

    def count(
        self,
        head: Head,
        features: Float[Array, "batch rows columns dim"],
        labels: Int[Array, "batch height width"],
        valid: Bool[Array, " batch"],
    ) -> Counts:
        def of_image(logits: Array, labels: Array, valid: Array) -> Array:
            predicted = jnp.argmax(upsample(logits, labels.shape), axis=-1)
            known = valid & (labels != self.ignore)
            return confusion_matrix(predicted, labels, known, self.classes)

        matrices = by_image(of_image, apply_head(head, features), labels, valid)
        return {"confusion": jnp.sum(matrices, axis=0)}

    def metrics(self, counts: Mapping[str, np.ndarray]) -> dict[str, float]:
        """`miou` over the classes that occur in prediction or truth, and `accuracy`, in percent."""
        confusion = counts["confusion"]
        hit, union = np.diag(confusion), confusion.sum(0) + confusion.sum(1) - np.diag(confusion)
        accuracy = _mean(hit.sum(), confusion.sum(), "labelled pixel")
        occurs = union > 0
        return {
            "miou": 100 * float(np.mean(hit[occurs] / union[occurs])),
            "accuracy": 100 * accuracy,
        }


def confusion_matrix(
    predicted: Int[Array, "*axes"],
    labels: Int[Array, "*axes"],
    known: Bool[Array, "*axes"],
    classes: int,
) -> Int[Array, "truth predicted"]:
    """How often each class was predicted for each, where `known`."""
    index = jnp.where(known, labels * classes + predicted, 0)
    counts = jnp.zeros(classes**2, jnp.int32).at[index.ravel()].add(known.ravel())
    return counts.reshape(classes, classes)


@dataclasses.dataclass(frozen=True)
class Depth:
    """One depth a pixel, as the expectation over bins, from [patch token; class token].

    Attributes:
      bins: from 0 to `max_depth`, both included.
      max_depth: in metres.
      ignore_missing: whether pixels without depth (0) are left out of the loss; the official code
        trains them as the first bin.
    """

    bins: int = 256
    max_depth: float = 10.0
    ignore_missing: bool = True

    score: ClassVar[str] = "minus_rmse"

    def head_shape(self, arch: Architecture) -> tuple[int, int]:
        return 2 * arch.embed_dim, self.bins

    def features(
        self, model: VisionTransformer, tokens: Float[Array, "batch tokens dim"]
    ) -> Float[Array, "batch rows columns 2*dim"]:
        grid = patch_grid(model.arch, tokens)
        summary = pooled(model.arch, tokens)[:, None, None]
        return jnp.concatenate([grid, jnp.broadcast_to(summary, grid.shape)], axis=-1)

    def losses(
        self,
        head: Head,
        features: Float[Array, "batch rows columns 2*dim"],
        labels: Float[Array, "batch height width"],
        valid: Bool[Array, " batch"],
    ) -> Losses:
        def of_image(logits: Array, depth: Array, valid: Array) -> tuple[Array, Array]:
            share = jnp.clip(depth / self.max_depth, 0, 1)
            target = jnp.round(share * (self.bins - 1)).astype(jnp.int32)
            known = valid & (depth > 0 if self.ignore_missing else jnp.ones_like(depth, bool))
            likelihood = _log_likelihood(upsample(logits, depth.shape), target)
            return jnp.sum(jnp.where(known, likelihood, 0.0)), jnp.sum(known)

        likelihood, known = by_image(of_image, apply_head(head, features), labels, valid)
        return -jnp.sum(likelihood), jnp.sum(known)

    def depth(
        self, logits: Float[Array, "height width bins"], temperature: float
    ) -> Float[Array, "height width"]:
        """Metres, from full-size logits."""
        probabilities = jax.nn.softmax(logits.astype(jnp.float32) / temperature)
        centres = jnp.linspace(0.0, self.max_depth, self.bins)
        return jnp.matmul(probabilities, centres, precision=Precision.HIGHEST)

    def count(
        self,
        head: Head,
        features: Float[Array, "batch rows columns 2*dim"],
        labels: Float[Array, "batch height width"],
        valid: Bool[Array, " batch"],
    ) -> Counts:
        def of_image(logits: Array, truth: Array, valid: Array) -> Counts:
            logits = upsample(logits, truth.shape)
            return {
                f"{name}_{temperature}": value
                for temperature in TEMPERATURES
                for name, value in depth_counts(
                    self.depth(logits, temperature), truth, valid, self.max_depth
                ).items()
            }

        counts = by_image(of_image, apply_head(head, features), labels, valid)
        return jax.tree.map(lambda x: jnp.sum(x, axis=0), counts)

    def metrics(self, counts: Mapping[str, np.ndarray]) -> dict[str, float]:
        """Those of `depth_metrics` at T = 0.03, and again with `_t0.6` at T = 0.6."""
        found = {}
        for temperature, suffix in zip(TEMPERATURES, ("", "_t0.6"), strict=True):
            of_temperature = {
                name.removesuffix(f"_{temperature}"): value
                for name, value in counts.items()
                if name.endswith(f"_{temperature}")
            }
            found |= {f"{k}{suffix}": v for k, v in depth_metrics(of_temperature).items()}
        return found | {"minus_rmse": -found["rmse"]}


def depth_counts(
    predicted: Float[Array, "*axes"],
    truth: Float[Array, "*axes"],
    valid: Bool[Array, "*axes"],
    max_depth: float,
) -> Counts:
    """Sums over the valid pixels with 0 < truth < max_depth and 0 < predicted < max_depth."""
    inside = valid & (truth > 0) & (truth < max_depth) & (predicted > 0) & (predicted < max_depth)
    truth, predicted = jnp.where(inside, truth, 1.0), jnp.where(inside, predicted, 1.0)
    error = predicted - truth
    ratio = jnp.maximum(predicted / truth, truth / predicted)
    return {
        "pixels": jnp.sum(inside),
        "squared": jnp.sum(jnp.square(error)),
        "absolute": jnp.sum(jnp.abs(error)),
        "relative": jnp.sum(jnp.abs(error) / truth),
    } | {f"delta{n}": jnp.sum(inside & (ratio < 1.25**n)) for n in (1, 2, 3)}


def depth_metrics(counts: Mapping[str, np.ndarray]) -> dict[str, float]:
    """`rmse` and `mae` in metres, `abs_rel`, and the shares `delta1`, `delta2`, `delta3`."""

    def mean(name: str) -> float:
        return _mean(counts[name], counts["pixels"], "pixel with a valid depth")

    return {
        "rmse": mean("squared") ** 0.5,
        "mae": mean("absolute"),
        "abs_rel": mean("relative"),
        "delta1": mean("delta1"),
        "delta2": mean("delta2"),
        "delta3": mean("delta3"),
    }
