"""Logit distillation: "Distilling the Knowledge in a Neural Network", Hinton et al., 2015."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from singer_jax.methods.base import Batch, Forward, Method, Needs, Scalars
from singer_jax.models.architecture import Architecture
from singer_jax.models.vit import VisionTransformer


class LogitKD(Method):
    """T^2 KL(teacher || student) of the class probabilities at temperature T; no labels needed."""

    @classmethod
    def needs(cls, config: Any) -> Needs:
        """Both heads."""
        return Needs(logits=True, teacher_logits=True)

    def __init__(
        self, teacher: VisionTransformer, student: Architecture, config: Any, rngs: nnx.Rngs
    ) -> None:
        self.temperature = config.temperature
        self.kd_weight = 1.0 if config.weights.kd is None else config.weights.kd
        self.last = teacher.arch.depth - 1

    @property
    def teacher_reads(self) -> tuple[int, ...]:
        """The last block, for the head."""
        return (self.last,)

    def loss(self, teacher: Forward | None, student: Forward, batch: Batch) -> Scalars:
        """Term `kd`, the mean over the images."""
        taught, own = (
            jax.nn.log_softmax(forward.head_output().astype(jnp.float32) / self.temperature)
            for forward in (teacher, student)
        )
        divergence = jnp.sum(jnp.exp(taught) * (taught - own), axis=-1)
        return {"kd": self.kd_weight * self.temperature**2 * jnp.mean(divergence)}
