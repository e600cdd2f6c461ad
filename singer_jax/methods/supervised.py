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
    """Settings of training without a teacher; there are none."""


class Supervised(Method):
    """Supervised training: the baseline without distillation, and the quickstart's teacher."""

    Settings = SupervisedSettings

    @classmethod
    def needs(cls, settings: Settings) -> MethodRequirements:
        """Returns the requirements: labels and logits, but no teacher."""
        return MethodRequirements(teacher=False, logits=True, labels=True)

    def __init__(
        self,
        teacher: VisionTransformer | None,
        student: Architecture,
        settings: Settings,
        rngs: nnx.Rngs,
    ) -> None:
        """Makes the method, which has no parts; the arguments are those of every method."""

    def loss(self, teacher: ModelFeatures | None, student: ModelFeatures, batch: Batch) -> Scalars:
        """Returns the term `ce`."""
        logits = student.head_output()
        return {"ce": cross_entropy(logits, batch.labels)}
