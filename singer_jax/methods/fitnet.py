"""FitNet for vision transformers: the student's tokens predict the teacher's.

"FitNets: Hints for Thin Deep Nets", ICLR 2015, as the SiNGER paper uses it for its baseline.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from flax import nnx

from singer_jax.methods.base import (
    Batch,
    LayerSettings,
    MethodRequirements,
    ModelFeatures,
    Scalars,
    distilled_layers,
    linear_adapters,
)
from singer_jax.methods.losses import cross_entropy
from singer_jax.methods.match import Comparison, MatchSettings, TokenMethod
from singer_jax.methods.tokens import match_tokens
from singer_jax.models.architecture import Architecture
from singer_jax.models.vit import VisionTransformer
from singer_jax.settings.ranges import NOT_NEGATIVE, optional
from singer_jax.settings.settings import Settings, section, setting


@dataclasses.dataclass(frozen=True)
class FitNetWeights(Settings):
    """Weights of FitNet's loss terms."""

    kd: float = setting(10.0, NOT_NEGATIVE, "Weight of the distillation loss.")
    ce: float | None = setting(
        None,
        optional(NOT_NEGATIVE),
        "Weight of the cross-entropy with the labels. None: the term is left out.",
    )


@dataclasses.dataclass(frozen=True)
class FitNetSettings(LayerSettings):
    """Settings of FitNet."""

    # 1 is FitNet as published. The default 0.9 is based on the synthetic outliers of docs/study.md.
    match: MatchSettings = section(MatchSettings(norm_clip_quantile=0.9))
    loss_weights: FitNetWeights = section(FitNetWeights())


class FitNet(TokenMethod):
    """FitNet: the sum over layers of the loss of all tokens, optionally with cross-entropy.

    `loss_weights.ce` None leaves the cross-entropy out. 0, as in the official code, keeps it as a
    term of weight zero: the student's last blocks, norm and head then get a zero gradient, so the
    optimiser applies weight decay to them.
    """

    Settings = FitNetSettings

    @classmethod
    def needs(cls, settings: FitNetSettings) -> MethodRequirements:
        """Returns the requirements; head and labels are needed only for the cross-entropy."""
        return MethodRequirements(
            logits=settings.loss_weights.ce is not None, labels=bool(settings.loss_weights.ce)
        )

    def __init__(
        self,
        teacher: VisionTransformer,
        student: Architecture,
        settings: FitNetSettings,
        rngs: nnx.Rngs,
    ) -> None:
        self.teacher_layers, self.student_layers = distilled_layers(
            settings, (0.5, 0.75), teacher.arch, student
        )
        self.tokens = match_tokens(student, teacher.arch, settings.interpolate_patch_grid)
        self.compare = Comparison(settings.match, self.tokens, self.teacher_layers)
        self.kd_weight = settings.loss_weights.kd
        self.ce_weight = settings.loss_weights.ce
        self.adapter = linear_adapters(
            self.student_layers, student.embed_dim, teacher.arch.embed_dim, rngs
        )

    def loss(self, teacher: ModelFeatures | None, student: ModelFeatures, batch: Batch) -> Scalars:
        """Returns the term `kd` and, if it has a weight, `ce`."""
        kd = sum(
            self.compare(
                self.adapter[str(own)](self.tokens.of_student(student.features[own])),
                teacher,
                layer,
            )
            for layer, own in zip(self.teacher_layers, self.student_layers, strict=True)
        )
        terms = {"kd": self.kd_weight * kd}
        if self.ce_weight is not None:
            logits = student.head_output()
            if self.ce_weight:
                terms["ce"] = self.ce_weight * cross_entropy(logits, batch.labels)
            else:  # zero gradients, independent of the labels
                terms["ce"] = 0.0 * jnp.sum(logits.astype(jnp.float32))
        return terms
