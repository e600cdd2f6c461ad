"""Segmentation probe: one class per pixel, predicted from the patch tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Num

from singer_jax.evaluation.heads import (
    Counts,
    Head,
    Losses,
    mean_over,
    patch_grid,
    pixel_counts,
    pixel_losses,
)
from singer_jax.models.architecture import Architecture
from singer_jax.models.vit import VisionTransformer


@dataclasses.dataclass(frozen=True)
class Segmentation:
    """Semantic segmentation from patch tokens.

    Attributes:
      classes: number of labels 0, 1, ...
      ignore: label of pixels that are excluded from loss and metrics.
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
        def classes_of(labels: Array) -> tuple[Array, Array]:
            known = labels != self.ignore
            return jnp.where(known, labels, 0), known

        return pixel_losses(head, features, labels, valid, classes_of)

    def count(
        self,
        head: Head,
        features: Float[Array, "batch rows columns dim"],
        labels: Int[Array, "batch height width"],
        valid: Bool[Array, " batch"],
    ) -> Counts:
        def counts_of(logits: Array, labels: Array, valid: Array) -> Counts:
            finite = jnp.all(jnp.isfinite(logits), axis=-1)
            predicted = jnp.where(finite, jnp.argmax(logits, axis=-1), self.classes)
            known = valid & (labels != self.ignore)
            return {"confusion": confusion_matrix(predicted, labels, known, self.classes)}

        return pixel_counts(head, features, labels, valid, counts_of)

    def metrics(self, counts: Mapping[str, np.ndarray]) -> dict[str, float]:
        """Returns `miou` (see `mean_iou`) and `accuracy`, in percent."""
        confusion = counts["confusion"]
        accuracy = mean_over(np.diag(confusion).sum(), confusion.sum(), "labelled pixel")
        return {"miou": 100 * mean_iou(confusion), "accuracy": 100 * accuracy}


def confusion_matrix(
    predicted: Int[Array, "*axes"],
    labels: Int[Array, "*axes"],
    known: Bool[Array, "*axes"],
    classes: int,
) -> Int[Array, "truth predicted"]:
    """Counts the predictions of each class for each true class, where `known` is True.

    The last column, `predicted == classes`, counts the pixels without a prediction.
    """
    columns = classes + 1
    index = jnp.where(known, labels * columns + predicted, 0)
    counts = jnp.zeros(classes * columns, jnp.int32).at[index.ravel()].add(known.ravel())
    return counts.reshape(classes, columns)


def mean_iou(confusion: Num[np.ndarray, "truth predicted"]) -> float:
    """Returns the mean intersection over union of the classes, between 0 and 1.

    Classes that occur neither in the predictions nor in the truth are left out of the mean.

    Args:
      confusion: number of pixels; rows are true classes, columns are predicted classes. Further
        columns count pixels without a prediction.
    """
    hit, classes = np.diag(confusion), len(confusion)
    union = confusion.sum(0)[:classes] + confusion.sum(1) - hit
    occurs = union > 0
    return float(np.mean(hit[occurs] / union[occurs]))
