"""Classification probe: one class per image, predicted from one token."""

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
    log_likelihood,
    mean_over,
)
from singer_jax.models.architecture import Architecture
from singer_jax.models.vit import VisionTransformer


@dataclasses.dataclass(frozen=True)
class Classification:
    """Classification of images.

    Attributes:
      classes: number of labels.
      token: input of the head. `cls`: the raw class token; `avg`: the mean of the raw patch tokens;
        `pooled`: the input of the model's own head.
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
        likelihood = log_likelihood(apply_head(head, features), labels)
        return -jnp.sum(jnp.where(valid, likelihood, 0.0)), jnp.sum(valid)

    def count(
        self,
        head: Head,
        features: Float[Array, "batch dim"],
        labels: Int[Array, " batch"],
        valid: Bool[Array, " batch"],
    ) -> Counts:
        logits = apply_head(head, features)
        return {
            "images": jnp.sum(valid),
            "top1": jnp.sum(jnp.where(valid, in_top_k(logits, labels, 1), 0.0)),
            "top5": jnp.sum(jnp.where(valid, in_top_k(logits, labels, 5), 0.0)),
            "loss": -jnp.sum(jnp.where(valid, log_likelihood(logits, labels), 0.0)),
        }

    def metrics(self, counts: Mapping[str, np.ndarray]) -> dict[str, float]:
        """Returns `top1` and `top5` in percent, and `loss`."""
        top1, top5, loss = (
            mean_over(counts[name], counts["images"], "image") for name in ("top1", "top5", "loss")
        )
        return {"top1": 100 * top1, "top5": 100 * top5, "loss": loss}


def in_top_k(
    logits: Float[Array, "batch classes"], labels: Int[Array, " batch"], k: int
) -> Float[Array, " batch"]:
    """Returns the probability that each label is among the `k` largest logits.

    It is 0 or 1 if no other logit equals that of the label. Ties are broken at random, so that
    constant logits score `k` / `classes`. Logits that are not all finite score 0.
    """
    own = jnp.take_along_axis(logits, labels[:, None], axis=1)
    above, equal = (jnp.sum(of, axis=1) for of in (logits > own, logits == own))
    probability = jnp.clip((k - above) / jnp.maximum(equal, 1), 0.0, 1.0)
    return jnp.where(jnp.all(jnp.isfinite(logits), axis=1), probability, 0.0)
