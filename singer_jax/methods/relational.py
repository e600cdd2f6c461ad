"""Relational distillation: the student learns the similarities between patches of an image.

This is the local loss of LightlyTrain's `distillation` v3 (lightly-ai/lightly-train), which applies
it to the last block after the final norm (`match.target_space=final_norm`).
"""

from __future__ import annotations

import dataclasses

import jax
from flax import nnx
from jaxtyping import Array, Float

from singer_jax.methods.base import (
    Batch,
    LayerSettings,
    ModelFeatures,
    Scalars,
    distilled_layers,
    linear_adapters,
)
from singer_jax.methods.losses import divergence
from singer_jax.methods.match import Comparison, MatchSettings, SpaceSettings, TokenMethod
from singer_jax.methods.norms import cosine_similarity_matrix
from singer_jax.methods.tokens import match_tokens
from singer_jax.models.architecture import Architecture
from singer_jax.models.vit import VisionTransformer
from singer_jax.settings.ranges import NOT_NEGATIVE, POSITIVE
from singer_jax.settings.settings import Settings, section, setting


@dataclasses.dataclass(frozen=True)
class RelationalWeights(Settings):
    """Weights of the loss terms of relational distillation."""

    kd: float = setting(1.0, NOT_NEGATIVE, "Weight of the distillation loss.")


@dataclasses.dataclass(frozen=True)
class RelationalSettings(LayerSettings):
    """Settings of relational distillation."""

    similarity_temperature: float = setting(
        0.07, POSITIVE, "Temperature of the softmax over the cosine similarities of patches."
    )
    match: SpaceSettings = section(SpaceSettings())
    loss_weights: RelationalWeights = section(RelationalWeights())


class Relational(TokenMethod):
    """Relational distillation: the KL divergence of patch similarities, summed over the layers.

    By default only the last block is distilled.
    """

    Settings = RelationalSettings

    def __init__(
        self,
        teacher: VisionTransformer,
        student: Architecture,
        settings: RelationalSettings,
        rngs: nnx.Rngs,
    ) -> None:
        self.teacher_layers, self.student_layers = distilled_layers(
            settings, (), teacher.arch, student
        )
        self.tokens = match_tokens(student, teacher.arch, settings.interpolate_patch_grid)
        match = MatchSettings(target_space=settings.match.target_space)
        self.compare = Comparison(match, self.tokens, self.teacher_layers)
        self.temperature = settings.similarity_temperature
        self.kd_weight = settings.loss_weights.kd
        self.adapter = linear_adapters(
            self.student_layers, student.embed_dim, teacher.arch.embed_dim, rngs
        )

    def loss(self, teacher: ModelFeatures | None, student: ModelFeatures, batch: Batch) -> Scalars:
        """Returns the term `kd`: mean KL(teacher || student) of the patches' softmax(cos / T)."""
        kd = 0.0
        for layer, own in zip(self.teacher_layers, self.student_layers, strict=True):
            predicted = self.adapter[str(own)](self.tokens.of_student(student.features[own]))
            target = self.compare.target(teacher, layer)
            kd += divergence(self._log_similarities(predicted), self._log_similarities(target))
        return {"kd": self.kd_weight * kd}

    def _log_similarities(
        self, tokens: Float[Array, "batch matched dim"]
    ) -> Float[Array, "batch patches patches"]:
        patches = tokens[:, self.tokens.num_prefix_tokens :]
        return jax.nn.log_softmax(cosine_similarity_matrix(patches) / self.temperature)
