"""The space in which student and teacher tokens are compared, and the loss.

Published methods rarely distil the raw residual stream. LightlyTrain, Proteus (ICLR 2025), UNIC
(ECCV 2024) and DUNE (CVPR 2025) take the teacher's tokens after its final norm. The first two match
them unchanged; UNIC and DUNE standardise them, as PHI-S (ICLR 2025) does to balance teachers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from singer_jax.methods.base import FrozenVariable, Method, ModelFeatures
from singer_jax.methods.losses import LOSSES
from singer_jax.methods.norms import clip_norms, unit
from singer_jax.methods.tokens import TokenMatch
from singer_jax.settings.ranges import OneOf, Range
from singer_jax.settings.settings import Settings, setting

SPACES = ("residual", "final_norm", "l2", "standardised")

# Number of batches that `standardised` measures; with 512 images each, ten million patches.
MEASURED_BATCHES = 100


@dataclasses.dataclass(frozen=True)
class SpaceSettings(Settings):
    """Settings of the space in which tokens are compared."""

    target_space: str = setting(
        "residual",
        OneOf(SPACES),
        "Space of the teacher's features that the student predicts (`methods.match.Comparison`).",
    )


@dataclasses.dataclass(frozen=True)
class LossSettings(Settings):
    """Settings of the loss between prediction and target."""

    loss: str = setting(
        "mse",
        OneOf(tuple(LOSSES)),
        "Loss between the student's prediction and the teacher's feature (`methods.losses`).",
    )


@dataclasses.dataclass(frozen=True)
class MatchSettings(SpaceSettings, LossSettings):
    """Settings of the comparison of predicted tokens with the teacher's."""

    norm_clip_quantile: float = setting(
        1.0,
        Range(0, 1, low_open=True),
        "Quantile of an image's patch norms in the teacher to which larger norms are clipped. "
        "1: no clipping.",
    )

    @property
    def shortens(self) -> bool:
        """True if the target's patches have no excess length, whatever the teacher's have."""
        return self.norm_clip_quantile < 1 or self.target_space in ("final_norm", "l2")


class Statistics(nnx.Module):
    """Mean and variance of each channel of the teacher's tokens over the first batches.

    There is one row for each prefix token and one for all patches, as in DUNE, because class tokens
    and patches have different distributions.

    Attributes:
      batches: Number of measured batches, up to `MEASURED_BATCHES`.
      mean, variance: Statistics of shape [prefix + 1, dim].
    """

    def __init__(self, num_prefix_tokens: int, dim: int) -> None:
        self.batches = FrozenVariable(jnp.zeros(()))
        self.mean = FrozenVariable(jnp.zeros((num_prefix_tokens + 1, dim)))
        self.variance = FrozenVariable(jnp.ones((num_prefix_tokens + 1, dim)))

    def observe(self, tokens: Float[Array, "batch tokens dim"]) -> dict[str, Array]:
        """Returns the means of the difference from `mean` and of its square for `absorb`."""
        difference = tokens.astype(jnp.float32) - self._of_each(self.mean[...], tokens)
        return {
            "difference": self._rows(difference),
            "square": self._rows(jnp.square(difference)),
        }

    def absorb(self, means: dict[str, Array]) -> None:
        """Updates the statistics with the result of `observe` during the first batches."""
        first = self.batches[...] < MEASURED_BATCHES
        share = jnp.where(first, 1 / (self.batches[...] + 1), 0.0)
        moved = share * means["difference"]
        around_the_old = (1 - share) * self.variance[...] + share * means["square"]
        self.mean[...] += moved
        self.variance[...] = around_the_old - jnp.square(moved)
        self.batches[...] += jnp.where(first, 1.0, 0.0)

    def standardise(
        self, tokens: Float[Array, "batch tokens dim"]
    ) -> Float[Array, "batch tokens dim"]:
        """Returns (x - mean) / deviation.

        The deviation is at least a thousandth of the root mean square, because float32 cannot
        distinguish smaller ones from rounding.
        """
        mean, variance = self.mean[...], self.variance[...]
        least = 1e-6 * (variance + jnp.square(mean)) + jnp.finfo(jnp.float32).tiny
        deviation = jnp.sqrt(jnp.maximum(variance, least))
        difference = tokens.astype(jnp.float32) - self._of_each(mean, tokens)
        return difference / self._of_each(deviation, tokens)

    def _of_each(self, rows: Float[Array, "rows dim"], tokens: Array) -> Float[Array, "tokens dim"]:
        return rows[jnp.minimum(jnp.arange(tokens.shape[1]), len(rows) - 1)]

    def _rows(self, tokens: Float[Array, "batch tokens dim"]) -> Float[Array, "rows dim"]:
        prefix, patches = jnp.split(tokens, [len(self.mean[...]) - 1], axis=1)
        return jnp.concatenate([prefix.mean(0), patches.mean((0, 1))[None]])


class Comparison(nnx.Module):
    """Compares predicted tokens with the teacher's.

    The teacher's patches may first be clipped (`norms.clip_norms`). The target is then one of

      residual: the tokens of the residual stream after the block;
      final_norm: the tokens after the teacher's final norm with its scale and bias, for any block
        (DINOv2's `get_intermediate_layers` does the same). Clipping has no effect;
      l2: the tokens divided by their norms; the predicted tokens are divided, too. Their mean
        squared error is 2 (1 - cos) / dim. Clipping has no effect;
      standardised: the tokens standardised with the `Statistics` of the first batches, including
        the current one. In a custom loop, call `method.absorb(method.observe(teacher))` before each
        loss.

    The prediction is the adapter's output for the student's residual stream and is transformed only
    by `l2`, as in UNIC and DUNE. The student's own final norm (after which LightlyTrain and Proteus
    start) is not on the distilled path.

    Args:
      settings: Settings of the space, the loss and the clipping.
      tokens: The compared tokens.
      layers: The distilled blocks of the teacher.
    """

    def __init__(self, settings: MatchSettings, tokens: TokenMatch, layers: Sequence[int]) -> None:
        self.settings = settings
        self.tokens = tokens
        self.statistics = nnx.Dict()
        if settings.target_space == "standardised":
            for layer in layers:
                self.statistics[str(layer)] = Statistics(
                    tokens.num_prefix_tokens, tokens.teacher.embed_dim
                )

    def __call__(
        self,
        predicted: Float[Array, "batch matched dim"],
        teacher: ModelFeatures,
        layer: int,
        features: Float[Array, "batch tokens dim"] | None = None,
    ) -> Float[Array, ""]:
        """Returns the loss of a prediction; the other arguments are those of `target`."""
        target = self.target(teacher, layer, features)
        return LOSSES[self.settings.loss](self.prediction(predicted), target)

    def target(
        self,
        teacher: ModelFeatures,
        layer: int,
        features: Float[Array, "batch tokens dim"] | None = None,
    ) -> Float[Array, "batch matched dim"]:
        """Returns the teacher's tokens in the target space.

        Args:
          teacher: The teacher and its features of the batch.
          layer: The distilled block of the teacher.
          features: Features that replace the teacher's own, for example refined ones.
        """
        tokens = self._clipped(teacher.features[layer] if features is None else features)
        match self.settings.target_space:
            case "final_norm":
                return teacher.model.norm(tokens)
            case "l2":
                return unit(tokens)
            case "standardised":
                return self.statistics[str(layer)].standardise(tokens)
        return tokens

    def prediction(
        self, predicted: Float[Array, "batch matched dim"]
    ) -> Float[Array, "batch matched dim"]:
        """Returns the predicted tokens in the target space."""
        return unit(predicted) if self.settings.target_space == "l2" else predicted

    def observe(self, teacher: ModelFeatures) -> dict[str, Any]:
        """Implements `Method.observe`."""
        return {
            layer: statistics.observe(self._clipped(teacher.features[int(layer)]))
            for layer, statistics in self.statistics.items()
        }

    def absorb(self, means: dict[str, Any]) -> None:
        """Implements `Method.absorb`."""
        for layer, statistics in self.statistics.items():
            statistics.absorb(means[layer])

    def _clipped(
        self, features: Float[Array, "batch tokens dim"]
    ) -> Float[Array, "batch matched dim"]:
        tokens = self.tokens.of_teacher(features)
        if self.settings.norm_clip_quantile == 1:
            return tokens
        prefix, patches = jnp.split(tokens, [self.tokens.num_prefix_tokens], axis=1)
        clipped = clip_norms(patches, self.settings.norm_clip_quantile)
        return jnp.concatenate([prefix.astype(clipped.dtype), clipped], axis=1)


class TokenMethod(Method):
    """A method that compares tokens.

    Attributes:
      compare: The comparison; None for a subclass that compares tokens itself.
    """

    compare: Comparison | None = None

    def observe(self, teacher: ModelFeatures | None) -> dict[str, Any]:
        """Returns the statistics for the space `standardised`; empty for other spaces."""
        return self.compare.observe(teacher) if self.compare else {}

    def absorb(self, means: dict[str, Any]) -> None:
        """Updates the statistics with the result of `observe`."""
        if self.compare:
            self.compare.absorb(means)
