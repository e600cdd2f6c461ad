"""The probe of segmentation: one class a pixel, from the patch tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from singer_jax.evaluation.heads import (
    Counts,
    Head,
    Losses,
    apply_head,
    by_image,
    log_likelihood,
    mean_over,
    patch_grid,
    upsample,
)
from singer_jax.models.architecture import Architecture
from singer_jax.models.vit import VisionTransformer


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
            likelihood = log_likelihood(upsample(logits, labels.shape), jnp.where(known, labels, 0))
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
        accuracy = mean_over(hit.sum(), confusion.sum(), "labelled pixel")
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
