"""In which space student and teacher tokens are compared, and by which loss.

What people distil with is rarely the raw residual stream: LightlyTrain, Proteus (ICLR 2025), UNIC
(ECCV 2024) and DUNE (CVPR 2025) take the teacher's tokens behind its last norm, the first two match
them as they are, UNIC and DUNE standardise them, as PHI-S (ICLR 2025) does to balance teachers.
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

# How many batches `standardised` measures: of 512 images each, ten million patches.
MEASURED_BATCHES = 100


@dataclasses.dataclass(frozen=True)
class SpaceSettings(Settings):
    """Of which tokens of the teacher's a student learns."""

    target_space: str = setting(
        "residual", OneOf(SPACES), "in which tokens are compared (`methods.match.Comparison`)"
    )


@dataclasses.dataclass(frozen=True)
class LossSettings(Settings):
    """By how much a prediction is wrong."""

    loss: str = setting("mse", OneOf(tuple(LOSSES)), "of a prediction (`methods.losses`)")


@dataclasses.dataclass(frozen=True)
class MatchSettings(SpaceSettings, LossSettings):
    """How predicted and teacher's tokens are compared."""

    norm_clip_quantile: float = setting(
        1.0,
        Range(0, 1, low_open=True),
        "quantile of an image's patch norms to which larger ones are scaled down in the teacher; "
        "1: they stay",
    )


class Statistics(nnx.Module):
    """Mean and deviation of each channel of the teacher's tokens over the first batches.

    One row for each prefix token and one for all patches, as in DUNE: class tokens are distributed
    otherwise than patches.

    Attributes:
      batches: how many were measured, up to `MEASURED_BATCHES`.
      mean, variance: [prefix + 1, dim].
    """

    def __init__(self, num_prefix_tokens: int, dim: int) -> None:
        self.batches = FrozenVariable(jnp.zeros(()))
        self.mean = FrozenVariable(jnp.zeros((num_prefix_tokens + 1, dim)))
        self.variance = FrozenVariable(jnp.ones((num_prefix_tokens + 1, dim)))

    def observe(self, tokens: Float[Array, "batch tokens dim"]) -> dict[str, Array]:
        """Of one batch, for `absorb`: means of the difference from `mean` and of its square."""
        difference = tokens.astype(jnp.float32) - self._of_each(self.mean[...], tokens)
        return {
            "difference": self._rows(difference),
            "square": self._rows(jnp.square(difference)),
        }

    def absorb(self, means: dict[str, Array]) -> None:
        """Takes in what `observe` gave, if it is of one of the first batches."""
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
        """(x - mean) / deviation, the latter at least a thousandth of the root mean square.

        Float32 tells no smaller one apart from rounding.
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

    The teacher's patches may first be clipped (`norms.clip_norms`). Then its tokens are taken

      residual: as the block leaves them in the residual stream;
      final_norm: behind the teacher's last norm, with its scale and bias, whatever their block
        (DINOv2's `get_intermediate_layers` does the same). It takes no notice of clipping;
      l2: divided by their norms, and so are the predicted ones. Their mean squared error is
        2 (1 - cos) / dim. It takes no notice of clipping either;
      standardised: as `Statistics` of the first batches say, this one included while they last. In
        a loop of one's own, `method.absorb(method.observe(teacher))` before each loss.

    Nothing but `l2` is done to the prediction, an adapter's of the student's residual stream, as in
    UNIC and DUNE; the student's own last norm (behind which LightlyTrain and Proteus start) is not
    on the distilled path.

    Args:
      settings: of the space, the loss and the clipping.
      tokens: which are compared.
      layers: of the teacher.
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
        """The loss of a prediction; the other arguments are those of `target`."""
        target = self.target(teacher, layer, features)
        return LOSSES[self.settings.loss](self.prediction(predicted), target)

    def target(
        self,
        teacher: ModelFeatures,
        layer: int,
        features: Float[Array, "batch tokens dim"] | None = None,
    ) -> Float[Array, "batch matched dim"]:
        """The teacher's tokens in the space.

        Args:
          teacher: of the batch.
          layer: of the teacher.
          features: in the place of the teacher's own, for example refined ones.
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
        """The predicted tokens in the space."""
        return unit(predicted) if self.settings.target_space == "l2" else predicted

    def observe(self, teacher: ModelFeatures) -> dict[str, Any]:
        """As `Method.observe`."""
        return {
            layer: statistics.observe(self._clipped(teacher.features[int(layer)]))
            for layer, statistics in self.statistics.items()
        }

    def absorb(self, means: dict[str, Any]) -> None:
        """As `Method.absorb`."""
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
      compare: how; None: of a subclass that has a way of its own.
    """

    compare: Comparison | None = None

    def observe(self, teacher: ModelFeatures | None) -> dict[str, Any]:
        """The statistics of the space `standardised`."""
        return self.compare.observe(teacher) if self.compare else {}

    def absorb(self, means: dict[str, Any]) -> None:
        """Takes in what `observe` gave."""
        if self.compare:
            self.compare.absorb(means)
