"""SiNGER: the student learns the teacher's features after a refinement inside a null space.

"SiNGER: A Clearer Voice Distills Vision Transformers Further", ICLR 2026, section 3.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from singer_jax.errors import InputError
from singer_jax.methods import calibration, nullspace, removal
from singer_jax.methods.base import (
    Batch,
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
    image_medians,
    is_ordinary,
    is_outlier,
    outlier_threshold,
    token_norms,
)
from singer_jax.methods.nullspace import NullSpaceSettings
from singer_jax.methods.refiner import Refiner, refine
from singer_jax.methods.tokens import match_tokens
from singer_jax.models.architecture import Architecture
from singer_jax.models.vit import VisionTransformer
from singer_jax.settings.ranges import BETWEEN, COUNT, NOT_NEGATIVE, OneOf
from singer_jax.settings.settings import Settings, section, setting

# Relative depths of the published distilled layers except the last: block 17 of 24.
DEPTHS = (0.75,)

# A run warns if the subspace holds less than this share of the outliers' energy.
SMALL_SHARE = 0.2


def _remedy(settings: NullSpaceSettings) -> str:
    """Returns the change of the settings that makes the subspace larger."""
    if settings.threshold_type == "energy":
        more = " or raise method.rank" if settings.weight_matrix == "calibrated" else ""
        return f"lower method.nullspace.threshold{more}"
    if settings.weight_matrix == "calibrated":
        return "raise method.rank or method.nullspace.ridge"
    return "raise method.nullspace.threshold or take method.nullspace.mode=soft"


@dataclasses.dataclass(frozen=True)
class SingerWeights(Settings):
    """Weights of SiNGER's loss terms (paper equation 8)."""

    kd: float = setting(1.0, NOT_NEGATIVE, "Weight of the distillation loss.")
    outlier: float = setting(
        0.01, NOT_NEGATIVE, "Weight of the outlier loss, which penalises large norms."
    )
    info: float = setting(
        1.0,
        NOT_NEGATIVE,
        "Weight of the information loss, which keeps the next block's output.",
    )


@dataclasses.dataclass(frozen=True)
class SingerSettings(LayerSettings):
    """Settings of SiNGER."""

    rank: int = setting(64, COUNT, "Rank of the refiner, at most the teacher's width.")
    outlier_quantile: float = setting(
        0.97, BETWEEN, "Quantile of an image's patch norms above which a patch is an outlier."
    )
    loss_scale: str = setting(
        "absolute",
        OneOf(("absolute", "relative")),
        "Scale of the outlier and information losses. `absolute`: squares of the teacher's "
        "features, as published. `relative`: norms are divided by the image's median patch norm, "
        "and the information loss by the mean square of what the next block adds, so that the "
        "weights do not depend on the teacher's scale. `relative` needs a larger "
        "`loss_weights.outlier`, since the default is the published one of `absolute`.",
    )
    match: MatchSettings = section(MatchSettings(norm_clip_quantile=0.9))
    loss_weights: SingerWeights = section(SingerWeights())
    nullspace: NullSpaceSettings = section(NullSpaceSettings())


def relative_info_loss(
    seen: Float[Array, "batch tokens dim"],
    following: Float[Array, "batch tokens dim"],
    features: Float[Array, "batch tokens dim"],
) -> Float[Array, ""]:
    """Returns the information loss relative to what the next block adds, averaged over the images.

    It is each image's mean squared error of `seen`, divided by the mean square of the difference
    between the teacher's next features `following` and its `features`. Because the average is taken
    over ratios of images, micro-batches do not change it.
    """
    wide = following.astype(jnp.float32)
    changed = jnp.mean(jnp.square(seen.astype(jnp.float32) - wide), axis=(1, 2))
    added = jnp.mean(jnp.square(wide - features.astype(jnp.float32)), axis=(1, 2))
    # A block that adds nothing would make any change infinitely large.
    smallest = 1e-6 * jnp.mean(jnp.square(wide), axis=(1, 2)) + jnp.finfo(jnp.float32).tiny
    added = jnp.maximum(jax.lax.stop_gradient(added), jax.lax.stop_gradient(smallest))
    return jnp.mean(changed / added)


def outlier_loss(norms: Float[Array, "batch patches"], quantile: float) -> Float[Array, ""]:
    """Returns the batch's mean squared excess of outlier norms, 0 without any (paper 3.2)."""
    threshold = outlier_threshold(norms, quantile)
    outlier = norms > threshold
    excess = jnp.where(outlier, norms - threshold, 0.0)
    return jnp.sum(jnp.square(excess)) / jnp.maximum(jnp.sum(outlier), 1)


class Singer(TokenMethod):
    """SiNGER with `project`, `soft`, `init` or `random` refiners.

    The refined features are transformed to the space of `match`, and gradients flow through the
    transform to the refiner. The outlier and information losses use the residual stream. The
    statistics of the space `standardised` are those of the teacher's own features. A `calibrated`
    null space requires `measured`.
    """

    Settings = SingerSettings

    @classmethod
    def needs(cls, settings: SingerSettings) -> MethodRequirements:
        """Returns the requirements; measurements are needed by the settings of `measured_for`."""
        return MethodRequirements(measured=bool(measured_for(settings)))

    @classmethod
    def measure(
        cls, teacher: ModelFeatures, settings: SingerSettings
    ) -> dict[str, calibration.OutlierStatistics]:
        """Returns the `calibration.OutlierStatistics` of each distilled layer."""
        arch = teacher.model.arch
        layers = teacher_layers(settings.layers, settings.include_last_layer, DEPTHS, arch)
        found = {}
        for layer in layers:
            patches = teacher.features[layer][:, arch.num_prefix_tokens :]
            outliers = is_outlier(token_norms(patches), settings.outlier_quantile)
            found[str(layer)] = calibration.outlier_statistics(patches, outliers)
            if settings.nullspace.init == "fitted":
                moments = calibration.moments(teacher, layer, settings.outlier_quantile)
                found[str(layer)] = found[str(layer)]._replace(moments=moments)
        return found

    def __init__(
        self,
        teacher: VisionTransformer,
        student: Architecture,
        settings: SingerSettings,
        rngs: nnx.Rngs,
        measured: Mapping[str, calibration.OutlierStatistics] | None = None,
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
        self.relative = settings.loss_scale == "relative"
        self.nullspace = settings.nullspace
        self.adapter = nnx.Dict()
        self.refiner = nnx.Dict()
        for layer, student_layer in zip(self.teacher_layers, self.student_layers, strict=True):
            seen = (measured or {}).get(str(layer))
            space = calibration.of_layer(teacher, layer, settings.nullspace, settings.rank, seen)
            refiner = Refiner(space, settings.rank, settings.nullspace, rngs)
            if settings.nullspace.init == "fitted":
                linear_map = calibration.linear_map(teacher, layer, settings.nullspace)
                refiner.fit(space, linear_map, seen.moments, settings.nullspace.decomposition)
            self.refiner[str(layer)] = refiner
            self.adapter[str(student_layer)] = linear_adapter(
                student.embed_dim, teacher.arch.embed_dim, rngs
            )

    @property
    def teacher_reads(self) -> tuple[int, ...]:
        """The distilled blocks, and the block after each for the information loss."""
        next_ones = {layer + 1 for layer in self.teacher_layers if layer < self.last}
        return tuple(sorted(next_ones | set(self.teacher_layers)))

    def loss(self, teacher: ModelFeatures | None, student: ModelFeatures, batch: Batch) -> Scalars:
        """Returns `kd`, `outlier` and `info` (paper equations 4 to 8), averaged over the layers."""
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
            norms = token_norms(patches)
            if self.relative:
                norms /= image_medians(features[:, prefix:])
            outlier += outlier_loss(norms, self.quantile)
            if layer < self.last:
                seen, following = teacher.next_block(layer, refined), teacher.features[layer + 1]
                info += (
                    relative_info_loss(seen, following, features)
                    if self.relative
                    else mean_squared_error(seen, following)
                )
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
        """Returns metrics of each distilled layer over all patches of the global batch.

        They are the `median` and `p99` (`batch_quantile`) of `teacher_norm` and `refined_norm`, in
        bfloat16 `rounding_over_update`, for a projected update `outlier_energy_share`, and the
        measures of `methods.removal`:

        - outlier_medians: Length of the outliers beside their image's mean patch.
        - left_at_best_medians: The part of it outside the subspace (mode `project`).
        - left_of_outlier_medians: Length of the refined outliers, their image's mean included.
        - clipped_medians: Norm to which `removal.CLIP_QUANTILE` would clip them.
        - next_block_change: Change of what the next block adds to ordinary patches by the refined
          features; for all layers but the last.
        - removal_change: The same for the removal of all that the subspace holds of the outliers'
          length beside their image's mean patch (mode `project`).
        """
        return {
            f"layer_{layer}/{name}": value
            for layer in self.teacher_layers
            for name, value in self._diagnose(layer, teacher).items()
        }

    def report(self, metrics: Mapping[str, float]) -> list[tuple[int, str]]:
        """Reports the null space of each layer, and what it can remove of the outliers."""
        lines = super().report(metrics)
        for layer in self.teacher_layers:
            start = f"layer_{layer}/"
            own = {
                key.removeprefix(start): value
                for key, value in metrics.items()
                if key.startswith(start)
            }
            lines += self._report(layer, own)
        return lines

    def _report(self, layer: int, metrics: Mapping[str, float]) -> list[tuple[int, str]]:
        """Returns the lines of one layer, from its metrics."""
        refiner, name = self.refiner[str(layer)], f"teacher layer {layer}"
        values, tau = np.asarray(refiner.singular_values[...]), float(refiner.threshold[...])
        count, share = int(refiner.null_dim[...]), metrics.get("outlier_energy_share")
        limit = self.nullspace.threshold
        extent = f"smallest {values[-1]:.3g}, largest {values[0]:.3g}"
        ran = nullspace.decomposition_on(refiner.platform, self.nullspace.decomposition)
        if hasattr(refiner, "left"):
            left = float(refiner.left[...])
            line = f"{name}: {count} of {len(values)} directions ({ran}) leave {left:.2f} medians"
            line += f" of an outlier of the first batches, limit {limit:g}"
            line += f", ridge {float(refiner.ridge[...]):g}" if hasattr(refiner, "ridge") else ""
        else:
            line = f"{name}: {count} of {len(values)} singular values below {tau:.3g} "
            line += f"({ran}, {extent})"
        line += f"; patch norms: median {metrics['teacher_norm_median']:.3g}, "
        line += f"99th percentile {metrics['teacher_norm_p99']:.3g}"
        if share is not None:
            line += f"; share of the outliers' energy inside the subspace {share:.2f}"
        if "left_at_best_medians" in metrics:
            line += (
                f"; left of an outlier at best: {metrics['left_at_best_medians']:.1f} medians of "
                f"{metrics['outlier_medians']:.1f}"
            )
        change = metrics.get("removal_change")
        if change is not None:
            line += (
                f"; removal changes what the next block adds to ordinary patches by {change:.1%}"
            )
        warnings = []
        if count == 0:
            warnings.append(
                f"{name} has no null space: no singular value lies below the threshold {tau:.3g} "
                f"({extent}); {_remedy(self.nullspace)}"
            )
        if hasattr(refiner, "left") and left > limit:
            warnings.append(
                f"{name}: no subspace leaves at most {limit:g} medians, {count} directions leave "
                f"{left:.2f}; raise method.nullspace.threshold or method.rank"
            )
        reached = hasattr(refiner, "left") and left <= limit
        if share is not None and share < SMALL_SHARE and not reached:
            warnings.append(
                f"{name}: the subspace holds only {share:.0%} of the outliers' energy, so "
                f"refinement can remove little: {_remedy(self.nullspace)}"
            )
        if change is not None and change > removal.LARGEST_CHANGE:
            instead = "the target is clipped already, so a smaller subspace is enough"
            if not self.compare.settings.shortens:
                instead = (
                    f"method.match.norm_clip_quantile={removal.CLIP_QUANTILE:g} leaves "
                    f"{metrics['clipped_medians']:.1f} medians in the target and changes no block, "
                    "nor does target_space=final_norm"
                )
            warnings.append(
                f"{name}: removal changes the next block by {change:.0%} (limit "
                f"{removal.LARGEST_CHANGE:.0%}); {instead}"
            )
        return [(logging.INFO, line), *((logging.WARNING, text) for text in warnings)]

    def _diagnose(self, layer: int, teacher: ModelFeatures) -> Scalars:
        refiner, prefix = self.refiner[str(layer)], teacher.model.arch.num_prefix_tokens
        features = teacher.features[layer]
        patches = features[:, prefix:]
        wide = patches.astype(jnp.float32)
        everything = refine(refiner, features, prefix)
        refined = everything[:, prefix:]
        norms = token_norms(wide)
        outliers, medians = is_outlier(norms, self.quantile), image_medians(wide)
        metrics = {}
        for when, values in (("teacher", norms), ("refined", token_norms(refined))):
            metrics[f"{when}_norm_median"] = batch_quantile(values, 0.5)
            metrics[f"{when}_norm_p99"] = batch_quantile(values, 0.99)
        if patches.dtype != jnp.float32:
            # The rounding error of the student's dtype, which leaves the null space.
            rounding = jnp.linalg.norm(refined - refined.astype(patches.dtype).astype(jnp.float32))
            size = jnp.linalg.norm(refiner.update(patches))
            metrics["rounding_over_update"] = jnp.where(size > 0, rounding / size, 0.0)
        deviations = nullspace.deviations(patches, outliers)
        metrics["outlier_medians"] = removal.length(deviations, outliers, medians)
        metrics["left_of_outlier_medians"] = removal.length(refined, outliers, medians)
        metrics["clipped_medians"] = removal.clipped_length(wide)
        replacements = {"next_block_change": everything}
        if refiner.projected:
            projection = refiner.projection[...]
            share = nullspace.energy_share(projection, patches, outliers)
            metrics["outlier_energy_share"] = share
            if self.nullspace.mode == "project":
                kept = jnp.sqrt(jnp.maximum(1 - share, 0))
                metrics["left_at_best_medians"] = kept * metrics["outlier_medians"]
                cleaned = removal.without_outliers(features, projection, outliers)
                replacements["removal_change"] = cleaned
        if layer < self.last:
            values = removal.next_block_changes(
                teacher, layer, tuple(replacements.values()), is_ordinary(norms, self.quantile)
            )
            metrics |= dict(zip(replacements, values, strict=True))
        return metrics


def check(
    teacher: Architecture, settings: SingerSettings, measured: Mapping[str, Array] | None
) -> None:
    """Checks that the settings fit the teacher and the measurements.

    Raises:
      InputError: The rank or the threshold is out of range, or measurements are missing.
    """
    if settings.rank > teacher.embed_dim:
        raise InputError(
            f"method.rank: {settings.rank} is not in 1..{teacher.embed_dim}, the teacher's width"
        )
    own = settings.nullspace
    nullspace.check_threshold(own.threshold_type, own.threshold, teacher.embed_dim)
    if own.init == "fitted" and own.mode != "project":
        raise InputError(f"method.nullspace.init: fitted needs mode project, not {own.mode}")
    if own.threshold_type == "energy" and own.mode != "project":
        raise InputError(
            f"method.nullspace.threshold_type: energy needs mode project, not {own.mode}"
        )
    if measured is None and measured_for(settings):
        raise InputError(
            f"method.nullspace.{measured_for(settings)} needs `measured`, the sum over a few "
            "batches of `Singer.measure(ModelFeatures.of(teacher, images), settings)`"
        )


def measured_for(settings: SingerSettings) -> str:
    """Returns the key and value that needs measurements, for messages; empty if none does."""
    own = settings.nullspace
    for key, value in (
        ("weight_matrix", "calibrated"),
        ("threshold_type", "energy"),
        ("init", "fitted"),
    ):
        if getattr(own, key) == value:
            return f"{key}: {value}"
    return ""
