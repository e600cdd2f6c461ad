"""Training without a teacher: cross-entropy of the student's head with the labels."""

from __future__ import annotations

import dataclasses

from flax import nnx

from singer_jax.methods.base import Batch, Method, MethodRequirements, ModelFeatures, Scalars
from singer_jax.methods.losses import cross_entropy
from singer_jax.models.architecture import Architecture
from singer_jax.models.vit import VisionTransformer
from singer_jax.settings.settings import Settings


@dataclasses.dataclass(frozen=True)
class SupervisedSettings(Settings):
    """None."""


class Supervised(Method):
    """The quickstart's teacher, and the baseline without distillation."""

    Settings = SupervisedSettings

    @classmethod
    def needs(cls, settings: Settings) -> MethodRequirements:
        """Labels and logits, no teacher."""
        return MethodRequirements(teacher=False, logits=True, labels=True)

    def __init__(
        self,
        teacher: VisionTransformer | None,
        student: Architecture,
        settings: Settings,
        rngs: nnx.Rngs,
    ) -> None:
        """Has no parts and no settings of its own; the arguments are those of every method."""

    def loss(self, teacher: ModelFeatures | None, student: ModelFeatures, batch: Batch) -> Scalars:
        """Term `ce`."""
        logits = student.head_output()
        return {"ce": cross_entropy(logits, batch.labels)}
