"""Distillation methods by name."""

from __future__ import annotations

from typing import Any

from flax import nnx

from singer_jax.methods.base import Batch, Constant, Forward, Method, Needs
from singer_jax.methods.fitnet import FitNet
from singer_jax.methods.logit_kd import LogitKD
from singer_jax.methods.singer import Singer
from singer_jax.methods.supervised import Supervised
from singer_jax.methods.vitkd import ViTKD, ViTKDOfficial
from singer_jax.methods.weighted_sum import WeightedSum
from singer_jax.models.architecture import Architecture
from singer_jax.models.vit import VisionTransformer

METHODS: dict[str, type[Method]] = {
    "singer": Singer,
    "fitnet": FitNet,
    "vitkd": ViTKD,
    "vitkd_official": ViTKDOfficial,
    "logit_kd": LogitKD,
    "supervised": Supervised,
}

__all__ = ["METHODS", "Batch", "Constant", "Forward", "Method", "make", "needs"]


def _chosen(config: Any) -> dict[str, float]:
    """Methods and weights: `terms` where any is not 0, else `name` alone."""
    terms = {name: float(weight) for name, weight in config.terms.items() if weight}
    return terms or {config.name: 1.0}


def needs(config: Any) -> Needs:
    """What the configured methods look at.

    Args:
      config: the `method` part of the configuration.
    """
    each = [METHODS[name].needs(config) for name in _chosen(config)]
    return Needs(*(any(values) for values in zip(*each, strict=True)))


def make(
    teacher: VisionTransformer | None, student: Architecture, config: Any, rngs: nnx.Rngs
) -> Method:
    """The configured method, or the sum of several; arguments and errors as `Method`."""
    weights = _chosen(config)
    methods = {name: METHODS[name](teacher, student, config, rngs) for name in weights}
    if list(weights.values()) == [1.0]:
        return next(iter(methods.values()))
    return WeightedSum(methods, weights)
