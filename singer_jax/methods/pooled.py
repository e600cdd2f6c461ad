"""Feature distillation as in timm: one vector per image.

This is timm's `FeatureDistillationTask` (huggingface/pytorch-image-models) without its task loss.
"""

from __future__ import annotations

import dataclasses

from flax import nnx

from singer_jax.methods.base import Batch, Method, ModelFeatures, Scalars, linear_adapters
from singer_jax.methods.losses import LOSSES
from singer_jax.methods.match import LossSettings
from singer_jax.models.architecture import Architecture
from singer_jax.models.vit import VisionTransformer
from singer_jax.settings.ranges import NOT_NEGATIVE
from singer_jax.settings.settings import Settings, section, setting


@dataclasses.dataclass(frozen=True)
class PooledWeights(Settings):
    """Weights of the loss terms of pooled distillation."""

    kd: float = setting(1.0, NOT_NEGATIVE, "Weight of the distillation loss.")


@dataclasses.dataclass(frozen=True)
class PooledSettings(Settings):
    """Settings of the distillation of the pooled vector."""

    match: LossSettings = section(LossSettings())
    loss_weights: PooledWeights = section(PooledWeights())


class Pooled(Method):
    """Pooled distillation: the student predicts the vector that the teacher's head reads.

    The student's own final norm (and the attention pooling of a SigLIP) is applied but not trained,
    because its scale and bias would be redundant with the adapter. timm has no adapter if the
    widths are equal.
    """

    Settings = PooledSettings

    def __init__(
        self,
        teacher: VisionTransformer,
        student: Architecture,
        settings: PooledSettings,
        rngs: nnx.Rngs,
    ) -> None:
        self.teacher_layers, self.student_layers = (teacher.arch.depth - 1,), (student.depth - 1,)
        self.loss_name = settings.match.loss
        self.kd_weight = settings.loss_weights.kd
        self.adapter = linear_adapters(
            self.student_layers, student.embed_dim, teacher.arch.embed_dim, rngs
        )

    def loss(self, teacher: ModelFeatures | None, student: ModelFeatures, batch: Batch) -> Scalars:
        """Returns the term `kd`."""
        (last,), (own,) = self.teacher_layers, self.student_layers
        predicted = self.adapter[str(own)](student.model.pooled(student.features[own]))
        target = teacher.model.pooled(teacher.features[last])
        return {"kd": self.kd_weight * LOSSES[self.loss_name](predicted, target)}
