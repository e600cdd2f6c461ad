"""Logit distillation: "Distilling the Knowledge in a Neural Network", Hinton et al., 2015."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from singer_jax.methods.base import Batch, Method, MethodRequirements, ModelFeatures, Scalars
from singer_jax.methods.losses import divergence
from singer_jax.models.architecture import Architecture
from singer_jax.models.vit import VisionTransformer
from singer_jax.settings.ranges import NOT_NEGATIVE, POSITIVE
from singer_jax.settings.settings import Settings, section, setting


@dataclasses.dataclass(frozen=True)
class LogitKDWeights(Settings):
    """Weights of the loss terms of logit distillation."""

    kd: float = setting(1.0, NOT_NEGATIVE, "Weight of the distillation loss.")


@dataclasses.dataclass(frozen=True)
class LogitKDSettings(Settings):
    """Settings of logit distillation."""

    temperature: float = setting(
        4.0, POSITIVE, "Temperature of the softmax of student and teacher."
    )
    loss_weights: LogitKDWeights = section(LogitKDWeights())


class LogitKD(Method):
    """Logit distillation: T^2 KL(teacher || student) at temperature T, without labels."""

    Settings = LogitKDSettings

    @classmethod
    def needs(cls, settings: LogitKDSettings) -> MethodRequirements:
        """Returns the requirements: the heads of student and teacher."""
        return MethodRequirements(logits=True, teacher_logits=True)

    def __init__(
        self,
        teacher: VisionTransformer,
        student: Architecture,
        settings: LogitKDSettings,
        rngs: nnx.Rngs,
    ) -> None:
        self.temperature = settings.temperature
        self.kd_weight = settings.loss_weights.kd
        self.last = teacher.arch.depth - 1

    @property
    def teacher_reads(self) -> tuple[int, ...]:
        """The teacher's last block, which its head reads."""
        return (self.last,)

    def loss(self, teacher: ModelFeatures | None, student: ModelFeatures, batch: Batch) -> Scalars:
        """Returns the term `kd`, the mean over the images."""
        taught, own = (
            jax.nn.log_softmax(forward.head_output().astype(jnp.float32) / self.temperature)
            for forward in (teacher, student)
        )
        return {"kd": self.kd_weight * self.temperature**2 * divergence(own, taught)}
