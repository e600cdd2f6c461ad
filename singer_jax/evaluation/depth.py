"""The probe of depth: metres of each pixel, from [patch token; class token]."""

from __future__ import annotations

import dataclasses
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
    apply_head,
    by_image,
    log_likelihood,
    mean_over,
    patch_grid,
    pooled,
    upsample,
)
from singer_jax.models.architecture import Architecture
from singer_jax.models.vit import VisionTransformer

TEMPERATURES = (0.03, 0.6)


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
            likelihood = log_likelihood(upsample(logits, depth.shape), target)
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
        return mean_over(counts[name], counts["pixels"], "pixel with a valid depth")

    return {
        "rmse": mean("squared") ** 0.5,
        "mae": mean("absolute"),
        "abs_rel": mean("relative"),
        "delta1": mean("delta1"),
        "delta2": mean("delta2"),
        "delta3": mean("delta3"),
    }
