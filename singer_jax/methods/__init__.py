"""Distillation methods by name."""

from __future__ import annotations

from collections.abc import Mapping

from flax import nnx
from jaxtyping import Array

from singer_jax.methods.base import Batch, FrozenVariable, Method, MethodRequirements, ModelFeatures
from singer_jax.methods.fitnet import FitNet
from singer_jax.methods.logit_kd import LogitKD
from singer_jax.methods.pooled import Pooled
from singer_jax.methods.relational import Relational
from singer_jax.methods.singer import Singer
from singer_jax.methods.supervised import Supervised
from singer_jax.methods.vitkd import ViTKD, ViTKDOfficial
from singer_jax.methods.weighted_sum import WeightedSum, WeightedSumSettings
from singer_jax.models.architecture import Architecture
from singer_jax.models.vit import VisionTransformer
from singer_jax.settings.settings import Settings

METHODS: dict[str, type[Method]] = {
    "singer": Singer,
    "fitnet": FitNet,
    "vitkd": ViTKD,
    "vitkd_official": ViTKDOfficial,
    "relational": Relational,
    "pooled": Pooled,
    "logit_kd": LogitKD,
    "supervised": Supervised,
}
"""The methods by name. A method of your own is added with `METHODS[name] = Class`."""

__all__ = [
    "METHODS",
    "Batch",
    "FrozenVariable",
    "Method",
    "ModelFeatures",
    "chosen",
    "make",
    "measure",
    "needs",
]


def chosen(settings: Settings) -> dict[str, tuple[float, Settings]]:
    """Returns the chosen methods by name, each with its weight and its own settings.

    Args:
      settings: Settings of a method in `METHODS`, or of a sum of several methods.

    Raises:
      ValueError: The settings belong to no method in `METHODS`, or the sum is empty or holds a
        method twice.
    """
    names = {method.Settings: name for name, method in METHODS.items()}
    several = isinstance(settings, WeightedSumSettings)
    parts = settings.methods if several else ((1.0, settings),)
    for _, part in parts:
        if type(part) not in names:
            raise ValueError(
                f"{type(part).__name__} belongs to no method in singer_jax.methods.METHODS; pass "
                "the `Settings` of one of them"
            )
    found = {names[type(part)]: (weight, part) for weight, part in parts}
    if not found or len(found) < len(parts):
        raise ValueError("WeightedSumSettings.methods: give one or more methods, each once")
    return found


def needs(settings: Settings) -> MethodRequirements:
    """Returns what the methods read; arguments and errors are those of `chosen`."""
    each = [METHODS[name].needs(own) for name, (_, own) in chosen(settings).items()]
    return MethodRequirements(*(any(values) for values in zip(*each, strict=True)))


def measure(teacher: ModelFeatures, settings: Settings) -> dict[str, dict[str, Array]]:
    """Measures the teacher on one batch for the methods that need it before they are made.

    Args:
      teacher: The teacher and its features of the batch.
      settings: Settings as for `chosen`, which raises the same errors.

    Returns:
      The measurements of each such method by its name; those of several batches are added.
    """
    return {
        name: METHODS[name].measure(teacher, own)
        for name, (_, own) in chosen(settings).items()
        if METHODS[name].needs(own).measured
    }


def make(
    teacher: VisionTransformer | None,
    student: Architecture,
    settings: Settings,
    rngs: nnx.Rngs,
    measured: Mapping[str, Mapping[str, Array]] | None = None,
) -> Method:
    """Makes the method, or the weighted sum of several.

    Arguments and errors are those of `chosen` and `Method`. `measured` is the sum of `measure` over
    the first batches; it is None if no method needs it.
    """
    parts = chosen(settings)
    given = {name: {"measured": found} for name, found in (measured or {}).items()}
    methods = {
        name: METHODS[name](teacher, student, own, rngs, **given.get(name, {}))
        for name, (_, own) in parts.items()
    }
    weights = {name: weight for name, (weight, _) in parts.items()}
    if list(weights.values()) == [1.0]:
        return next(iter(methods.values()))
    return WeightedSum(methods, weights)
