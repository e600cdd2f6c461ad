"""Linear heads on frozen features: functions and types that all tasks of a probe share.

A head is one linear map, `{"kernel": [in, out], "bias": [out]}`. A task (`classification`,
`segmentation`, `depth`) turns the raw tokens of the last block into features, gives the loss of a
head, and counts the inputs of its metrics. The counts of all batches of a split add up to the
metrics of the whole split.
"""

from __future__ import annotations

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
"""Sums over a batch, from which the metrics of a split are computed."""

Losses = tuple[Float[Array, ""], Num[Array, ""]]
"""The sum of the losses, and the number of images or pixels in it."""


class Task(Protocol):
    """Features, loss and metrics of a probe.

    Attributes:
      score: name of the metric by which learning rates are compared; higher is better.
    """

    score: ClassVar[str]

    def head_shape(self, arch: Architecture) -> tuple[int, int]:
        """Returns the number of inputs and of outputs of the head."""

    def features(
        self, model: VisionTransformer, tokens: Float[Array, "batch tokens dim"]
    ) -> Float[Array, "batch ..."]:
        """Returns the input of the head, from the raw tokens of the last block."""

    def losses(
        self, head: Head, features: Array, labels: Array, valid: Bool[Array, " batch"]
    ) -> Losses:
        """Returns the sum over the valid images whose mean (`mean_loss`) is minimised."""

    def count(
        self, head: Head, features: Array, labels: Array, valid: Bool[Array, " batch"]
    ) -> Counts:
        """Returns sums over the valid images of a batch."""

    def metrics(self, counts: Mapping[str, np.ndarray]) -> dict[str, float]:
        """Returns the metrics of a split from its summed counts."""


def apply_head(head: Head, features: Float[Array, "*axes in"]) -> Float[Array, "*axes out"]:
    """Applies the linear map at every position."""
    return features @ head["kernel"] + head["bias"]


def pooled(
    arch: Architecture, tokens: Float[Array, "batch tokens dim"]
) -> Float[Array, "batch dim"]:
    """Returns the class token, or the mean of the patches if the model has none."""
    return tokens[:, 0] if arch.class_token else tokens.mean(axis=1)


def patch_grid(
    arch: Architecture, tokens: Float[Array, "batch tokens dim"]
) -> Float[Array, "batch rows columns dim"]:
    """Returns the patch tokens on their grid."""
    patches = tokens[:, arch.num_prefix_tokens :]
    return patches.reshape(tokens.shape[0], *arch.grid, tokens.shape[-1])


def upsample(
    logits: Float[Array, "rows columns out"], size: tuple[int, int]
) -> Float[Array, "height width out"]:
    """Interpolates bilinearly at half-pixel positions, as PyTorch without aligned corners."""
    shape = (*size, logits.shape[-1])
    return jax.image.resize(logits, shape, "linear", antialias=False, precision=Precision.HIGHEST)


def by_image(function: Callable[..., Any], *arrays: Array) -> Any:
    """Applies `function` to one image at a time, because full-size logits of a batch would not fit.

    The images must be those of one device (`over_devices`). If a batch were split over several
    devices, every device would gather and process all of it.
    """
    return jax.lax.map(jax.checkpoint(lambda xs: function(*xs)), arrays)


def pixel_losses(
    head: Head,
    features: Float[Array, "batch rows columns in"],
    labels: Num[Array, "batch height width"],
    valid: Bool[Array, " batch"],
    target_of: Callable[[Array], tuple[Array, Array]],
) -> Losses:
    """Returns the summed cross-entropy of a head over the known pixels, and their number.

    Args:
      head: the head.
      features, labels: those of the batch.
      valid: True for the images that are not padding.
      target_of: returns the class of each pixel of an image, and True for the known pixels.
    """

    def of_image(logits: Array, labels: Array, valid: Array) -> tuple[Array, Array]:
        target, known = target_of(labels)
        likelihood = log_likelihood(upsample(logits, labels.shape), target)
        return jnp.sum(jnp.where(valid & known, likelihood, 0.0)), jnp.sum(valid & known)

    likelihood, known = by_image(of_image, apply_head(head, features), labels, valid)
    return -jnp.sum(likelihood), jnp.sum(known)


def pixel_counts(
    head: Head,
    features: Float[Array, "batch rows columns in"],
    labels: Num[Array, "batch height width"],
    valid: Bool[Array, " batch"],
    counts_of: Callable[[Array, Array, Array], Counts],
) -> Counts:
    """Returns the sums of `counts_of(full-size logits, labels, valid)` over the images."""

    def of_image(logits: Array, labels: Array, valid: Array) -> Counts:
        return counts_of(upsample(logits, labels.shape), labels, valid)

    counts = by_image(of_image, apply_head(head, features), labels, valid)
    return jax.tree.map(lambda x: jnp.sum(x, axis=0), counts)


def over_devices(mesh: Mesh, function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns `function(head, features, labels, valid)` that sums over the parts of all devices."""
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
    """Returns the loss of a head: the mean over the images or pixels that count.

    Args:
      task: the task of the head.
      head: the head.
      features, labels: those of the batch.
      valid: True for the images that are not padding; default: all of them.
      mesh: the devices over which the batch is split; default: it is not split.
    """
    losses = over_devices(mesh, task.losses) if mesh else task.losses
    valid = jnp.ones(len(features), bool) if valid is None else valid
    total, count = losses(head, features, labels, valid)
    return total / jnp.maximum(count, 1)


def log_likelihood(
    logits: Float[Array, "*axes out"], labels: Int[Array, "*axes"]
) -> Float[Array, "*axes"]:
    """Returns the logarithm of each label's probability, computed in float32."""
    log_probabilities = jax.nn.log_softmax(logits.astype(jnp.float32))
    return jnp.take_along_axis(log_probabilities, labels[..., None], axis=-1)[..., 0]


def mean_over(total: float, count: float, what: str) -> float:
    """Returns `total / count`.

    Raises:
      RunError: the count is 0, because the test split has no `what`.
    """
    if not count:
        raise RunError(f"the test split holds no {what}; nothing to score, check data.path")
    return float(total) / float(count)
