"""Depth probe: metres per pixel, predicted from [patch token; class token]."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.lax import Precision
from jaxtyping import Array, Bool, Float

from singer_jax.evaluation.heads import (
    Counts,
    Head,
    Losses,
    mean_over,
    patch_grid,
    pixel_counts,
    pixel_losses,
    pooled,
)
from singer_jax.models.architecture import Architecture
from singer_jax.models.vit import VisionTransformer

TEMPERATURES = (0.03, 0.6)


@dataclasses.dataclass(frozen=True)
class Depth:
    """Depth estimation as the expectation over bins, from [patch token; class token].

    Attributes:
      bins: number of bins from 0 to `max_depth`, both included.
      max_depth: largest depth, in metres.
      ignore_missing: excludes pixels without depth (0) from the loss; the official code trains them
        as the first bin.
      drop_saturated: excludes pixels with a prediction of exactly 0 or `max_depth` from the
        metrics, as the official code does.
    """

    bins: int = 256
    max_depth: float = 10.0
    ignore_missing: bool = True
    drop_saturated: bool = False

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
        def bins_of(depth: Array) -> tuple[Array, Array]:
            share = jnp.clip(depth / self.max_depth, 0, 1)
            known = depth > 0 if self.ignore_missing else jnp.ones_like(depth, bool)
            return jnp.round(share * (self.bins - 1)).astype(jnp.int32), known

        return pixel_losses(head, features, labels, valid, bins_of)

    def depth(
        self, logits: Float[Array, "height width bins"], temperature: float
    ) -> Float[Array, "height width"]:
        """Returns metres from full-size logits."""
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
        def counts_of(logits: Array, truth: Array, valid: Array) -> Counts:
            found = {}
            for temperature in TEMPERATURES:
                predicted = self.depth(logits, temperature)
                counts = depth_counts(predicted, truth, valid, self.max_depth, self.drop_saturated)
                found |= {f"{name}_{temperature}": value for name, value in counts.items()}
            return found

        return pixel_counts(head, features, labels, valid, counts_of)

    def metrics(self, counts: Mapping[str, np.ndarray]) -> dict[str, float]:
        """Returns `depth_metrics` at T = 0.03, and again with the suffix `_t0.6` at T = 0.6."""
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
    drop_saturated: bool = False,
) -> Counts:
    """Sums errors over the valid pixels with 0 < truth < max_depth.

    A non-finite prediction counts as the limit, 0 or `max_depth`, that is farther from the truth,
    so that no finite prediction has a larger error.

    Args:
      predicted: predicted depth, in metres.
      truth: true depth, in metres.
      valid: True for the pixels that may count.
      max_depth: largest depth, in metres.
      drop_saturated: excludes pixels with a prediction of exactly 0 or `max_depth`.
    """
    known = valid & (truth > 0) & (truth < max_depth)
    finite = jnp.isfinite(predicted)
    inside = ~finite | ((predicted > 0) & (predicted < max_depth))
    counted = known & inside if drop_saturated else known
    farther = jnp.where(truth > max_depth / 2, 0.0, max_depth)
    truth = jnp.where(counted, truth, 1.0)
    predicted = jnp.where(counted, jnp.where(finite, predicted, farther), 1.0)
    error = predicted - truth
    ratio = jnp.maximum(predicted / truth, truth / predicted)
    return {
        "known": jnp.sum(known),
        "pixels": jnp.sum(counted),
        "squared": jnp.sum(jnp.square(error)),
        "absolute": jnp.sum(jnp.abs(error)),
        "relative": jnp.sum(jnp.abs(error) / truth),
    } | {f"delta{n}": jnp.sum(counted & finite & (ratio < 1.25**n)) for n in (1, 2, 3)}


def depth_metrics(counts: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Returns `rmse` and `mae` in metres, `abs_rel`, and the shares `delta1`, `delta2`, `delta3`.

    The metrics are NaN if `drop_saturated` excluded every pixel.

    Raises:
      RunError: no pixel has a valid depth.
    """
    mean_over(counts["known"], counts["known"], "pixel with a valid depth")

    def mean(name: str) -> float:
        return float(counts[name]) / float(counts["pixels"]) if counts["pixels"] else math.nan

    return {
        "rmse": mean("squared") ** 0.5,
        "mae": mean("absolute"),
        "abs_rel": mean("relative"),
        "delta1": mean("delta1"),
        "delta2": mean("delta2"),
        "delta3": mean("delta3"),
    }
