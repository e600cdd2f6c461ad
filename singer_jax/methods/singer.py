"""SiNGER: the teacher's features, refined inside a null space, are what the student learns.

"SiNGER: A Clearer Voice Distills Vision Transformers Further", ICLR 2026, section 3.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.lax import Precision
from jaxtyping import Array, Float

from singer_jax.errors import InputError
from singer_jax.methods import calibration, nullspace
from singer_jax.methods.base import (
    Batch,
    FrozenVariable,
    LayerSettings,
    MethodRequirements,
    ModelFeatures,
    Scalars,
    distilled_layers,
    linear_adapter,
    teacher_layers,
)
from singer_jax.methods.losses import mean_squared_error
from singer_jax.methods.match import Comparison, MatchSettings, TokenMethod
from singer_jax.methods.norms import (
    batch_quantile,
    cosine_similarity_matrix,
    is_outlier,
    outlier_threshold,
    token_norms,
)
from singer_jax.methods.nullspace import NullSpaceSettings
from singer_jax.methods.tokens import match_tokens
from singer_jax.models.architecture import Architecture
from singer_jax.models.vit import VisionTransformer
from singer_jax.settings.ranges import BETWEEN, COUNT, NOT_NEGATIVE
from singer_jax.settings.settings import Settings, section, setting

# Of the published distilled layers, beside the last: block 17 of 24.
DEPTHS = (0.75,)

# Below this share of the outliers' energy in the subspace a run warns.
SMALL_SHARE = 0.2
_REMEDY = "method.nullspace.threshold or take method.nullspace.mode=soft"
_REMEDY_OF_CALIBRATED = "method.rank or method.nullspace.ridge"


@dataclasses.dataclass(frozen=True)
class SingerWeights(Settings):
    """Of the terms of the loss (paper equation 8)."""

    kd: float = setting(1.0, NOT_NEGATIVE, "of the distillation loss")
    outlier: float = setting(0.01, NOT_NEGATIVE, "of the outlier loss")
    info: float = setting(1.0, NOT_NEGATIVE, "of the information loss")


@dataclasses.dataclass(frozen=True)
class SingerSettings(LayerSettings):
    """Of SiNGER."""

    rank: int = setting(64, COUNT, "of the refiner, at most the teacher's width")
    outlier_quantile: float = setting(
        0.97, BETWEEN, "of an image's patch norms; patches above it are outliers"
    )
    match: MatchSettings = section(MatchSettings())
    loss_weights: SingerWeights = section(SingerWeights())
    nullspace: NullSpaceSettings = section(NullSpaceSettings())


class Refiner(nnx.Module):
    """A low-rank update of the patch tokens: F + F A B Q (paper section 3.1).

    Args:
      space: singular vectors and values of what reads the layer.
      rank: of the update.
      settings: how the null space is used.
      rngs: stream `params` for random directions.

    Attributes:
      down, up: A [dim, rank] and B [rank, dim].
      projection: Q [dim, dim] of `project` and `soft`; absent otherwise.
      singular_values, threshold, null_dim: [directions], tau, how many lie below, for reports.
    """

    def __init__(
        self, space: nullspace.NullSpace, rank: int, settings: NullSpaceSettings, rngs: nnx.Rngs
    ) -> None:
        tau = nullspace.threshold_value(space, settings.threshold_type, settings.threshold)
        self.singular_values = FrozenVariable(space.values)
        self.threshold = FrozenVariable(tau)
        self.null_dim = FrozenVariable(nullspace.null_dim(space, tau))
        self.projected = settings.mode in ("project", "soft")
        dim = space.vectors.shape[0]
        if self.projected:
            rows = space.vectors.T[::-1][:rank]
            soft = settings.mode == "soft"
            self.projection = FrozenVariable(
                nullspace.soft_filter(space, tau) if soft else nullspace.projector(space, tau, rank)
            )
        elif settings.mode == "init":
            rows = nullspace.directions(space, tau, rank, settings.direction_order, rngs.params())
        else:
            rows = nullspace.random_directions(rngs.params(), rank, dim)
        start = settings.init or ("identity" if self.projected else "official")
        identity = start == "identity"
        self.down = nnx.Param(rows.T)
        self.up = nnx.Param(jnp.zeros_like(rows) if identity else rows)

    def update(
        self, patches: Float[Array, "batch patches dim"]
    ) -> Float[Array, "batch patches dim"]:
        """F A B Q in float32, so that it stays in the null space up to float32 rounding."""
        up = self.up[...]
        if self.projected:
            up = jnp.matmul(up, self.projection[...], precision=Precision.HIGHEST)
        inner = patches.astype(jnp.float32) @ self.down[...]
        return jnp.matmul(inner, up, precision=Precision.HIGHEST)


def refine(
    refiner: Refiner, features: Float[Array, "batch tokens dim"], num_prefix_tokens: int
) -> Float[Array, "batch tokens dim"]:
    """F^: the features with refined patch tokens and untouched prefix tokens, in float32."""
    update = refiner.update(features[:, num_prefix_tokens:])
    update = jnp.pad(update, ((0, 0), (num_prefix_tokens, 0), (0, 0)))
    return features.astype(jnp.float32) + update


def outlier_loss(norms: Float[Array, "batch patches"], quantile: float) -> Float[Array, ""]:
    """Mean squared excess of the outlier norms over the batch, 0 without outliers (paper 3.2)."""
    threshold = outlier_threshold(norms, quantile)
    outlier = norms > threshold
    excess = jnp.where(outlier, norms - threshold, 0.0)
    return jnp.sum(jnp.square(excess)) / jnp.maximum(jnp.sum(outlier), 1)


class Singer(TokenMethod):
    """SiNGER with `project`, `soft`, `init` or `random` refiners.

    The refined features are what is compared in the space of `match`, and through it the gradient
    reaches the refiner; the outlier and info losses stay with the residual stream. The statistics
    of the space `standardised` are those of the teacher's own features. With the null space
    `calibrated` it needs `measured`.
    """

    Settings = SingerSettings

    @classmethod
    def needs(cls, settings: SingerSettings) -> MethodRequirements:
        """The teacher's outliers only for calibrated null spaces."""
        return MethodRequirements(measured=settings.nullspace.weight_matrix == "calibrated")

    @classmethod
    def measure(cls, teacher: ModelFeatures, settings: SingerSettings) -> dict[str, Array]:
        """By distilled layer `calibration.outlier_covariance`."""
        arch = teacher.model.arch
        layers = teacher_layers(settings.layers, settings.include_last_layer, DEPTHS, arch)
        patches = {layer: teacher.features[layer][:, arch.num_prefix_tokens :] for layer in layers}
        return {
            str(layer): calibration.outlier_covariance(
                own, is_outlier(token_norms(own), settings.outlier_quantile)
            )
            for layer, own in patches.items()
        }

    def __init__(
        self,
        teacher: VisionTransformer,
        student: Architecture,
        settings: SingerSettings,
        rngs: nnx.Rngs,
        measured: Mapping[str, Float[Array, "dim dim"]] | None = None,
    ) -> None:
        check(teacher.arch, settings, measured)
        self.teacher_layers, self.student_layers = distilled_layers(
            settings, DEPTHS, teacher.arch, student
        )
        self.tokens = match_tokens(student, teacher.arch, settings.interpolate_patch_grid)
        self.compare = Comparison(settings.match, self.tokens, self.teacher_layers)
        self.last = teacher.arch.depth - 1
        self.quantile = settings.outlier_quantile
        self.weights = settings.loss_weights
        self.calibrated = settings.nullspace.weight_matrix == "calibrated"
        self.adapter = nnx.Dict()
        self.refiner = nnx.Dict()
        for layer, student_layer in zip(self.teacher_layers, self.student_layers, strict=True):
            covariance = (measured or {}).get(str(layer))
            space = calibration.of_layer(
                teacher, layer, settings.nullspace, settings.rank, covariance
            )
            self.refiner[str(layer)] = Refiner(space, settings.rank, settings.nullspace, rngs)
            self.adapter[str(student_layer)] = linear_adapter(
                student.embed_dim, teacher.arch.embed_dim, rngs
            )

    @property
    def teacher_reads(self) -> tuple[int, ...]:
        """The distilled blocks, and the next of each for the info loss."""
        next_ones = {layer + 1 for layer in self.teacher_layers if layer < self.last}
        return tuple(sorted(next_ones | set(self.teacher_layers)))

    def loss(self, teacher: ModelFeatures | None, student: ModelFeatures, batch: Batch) -> Scalars:
        """KD, outlier and info terms (paper equations 4 to 8), each averaged over the layers."""
        prefix = teacher.model.arch.num_prefix_tokens
        kd = outlier = info = 0.0
        previous = None
        for layer, student_layer in zip(self.teacher_layers, self.student_layers, strict=True):
            features = teacher.features[layer]
            refined = refine(self.refiner[str(layer)], features, prefix)
            patches = refined[:, prefix:]

            matched = self.tokens.of_student(student.features[student_layer])
            predicted = self.adapter[str(student_layer)](matched)
            kd += self.compare(predicted, teacher, layer, refined)
            outlier += outlier_loss(token_norms(patches), self.quantile)
            if layer < self.last:
                seen = teacher.next_block(layer, refined)
                info += mean_squared_error(seen, teacher.features[layer + 1])
            else:
                reference = features[:, prefix:] if previous is None else previous
                info += mean_squared_error(
                    cosine_similarity_matrix(patches), cosine_similarity_matrix(reference)
                )
            previous = patches
        layers = len(self.teacher_layers)
        return {
            "kd": self.weights.kd * kd / layers,
            "outlier": self.weights.outlier * outlier / layers,
            "info": self.weights.info * info / layers,
        }

    def diagnose(self, teacher: ModelFeatures | None) -> Scalars:
        """Per distilled layer, over all patches of the global batch.

        `teacher_norm_` and `refined_norm_` `median` and `p99` (`batch_quantile`); in bfloat16
        `rounding_over_update`; of a projected update `outlier_energy_share`.
        """
        prefix = teacher.model.arch.num_prefix_tokens
        return {
            f"layer_{layer}/{name}": value
            for layer in self.teacher_layers
            for name, value in self._diagnose(
                self.refiner[str(layer)], teacher.features[layer][:, prefix:]
            ).items()
        }

    def report(self, metrics: Mapping[str, float]) -> list[tuple[int, str]]:
        """The null space of each layer and the share of the outliers' energy inside it."""
        lines = super().report(metrics)
        for layer in self.teacher_layers:
            refiner = self.refiner[str(layer)]
            values = np.asarray(refiner.singular_values[...])
            tau = float(refiner.threshold[...])
            count = int(refiner.null_dim[...])
            before = {n: metrics[f"layer_{layer}/teacher_norm_{n}"] for n in ("median", "p99")}
            line = (
                f"teacher layer {layer}: {count} of {len(values)} singular values below "
                f"{tau:.3g} (smallest {values[-1]:.3g}, largest {values[0]:.3g}); patch norms: "
                f"median {before['median']:.3g}, 99th percentile {before['p99']:.3g}"
            )
            share = metrics.get(f"layer_{layer}/outlier_energy_share")
            if share is not None:
                line += f"; share of the outliers' energy inside the subspace {share:.2f}"
            lines.append((logging.INFO, line))
            if count == 0:
                lines.append(
                    (
                        logging.WARNING,
                        f"teacher layer {layer} has no null space: no singular value lies below "
                        f"the threshold {tau:.3g}, the smallest is {values[-1]:.3g}; raise "
                        f"{_REMEDY}",
                    )
                )
            if share is not None and share < SMALL_SHARE:
                remedy = _REMEDY_OF_CALIBRATED if self.calibrated else _REMEDY
                lines.append(
                    (
                        logging.WARNING,
                        f"teacher layer {layer}: the subspace holds only {share:.0%} of the "
                        f"outliers' energy, so refinement can remove little: raise {remedy}",
                    )
                )
        return lines

    def _diagnose(self, refiner: Refiner, patches: Float[Array, "batch patches dim"]) -> Scalars:
        wide = patches.astype(jnp.float32)
        update = refiner.update(patches)
        refined = wide + update
        norms = token_norms(wide)
        metrics = {}
        for when, values in (("teacher", norms), ("refined", token_norms(refined))):
            metrics[f"{when}_norm_median"] = batch_quantile(values, 0.5)
            metrics[f"{when}_norm_p99"] = batch_quantile(values, 0.99)
        if patches.dtype != jnp.float32:
            # What the student's dtype adds to the update D, which itself stays in the null space.
            rounding = jnp.linalg.norm(refined - refined.astype(patches.dtype).astype(jnp.float32))
            size = jnp.linalg.norm(update)
            metrics["rounding_over_update"] = jnp.where(size > 0, rounding / size, 0.0)
        if refiner.projected:
            metrics["outlier_energy_share"] = nullspace.energy_share(
                refiner.projection[...], patches, is_outlier(norms, self.quantile)
            )
        return metrics


def check(
    teacher: Architecture, settings: SingerSettings, measured: Mapping[str, Array] | None
) -> None:
    """Raises `InputError` for settings that do not fit the teacher or what was measured of it."""
    if settings.rank > teacher.embed_dim:
        raise InputError(f"method.rank: {settings.rank} is not in 1..{teacher.embed_dim}")
    rule, threshold = settings.nullspace.threshold_type, settings.nullspace.threshold
    nullspace.check_threshold(rule, threshold, teacher.embed_dim)
    if settings.nullspace.weight_matrix == "calibrated" and measured is None:
        raise InputError(
            "method.nullspace.weight_matrix: calibrated needs `measured`, the sum over a few "
            "batches of `Singer.measure(teacher, settings)`"
        )
