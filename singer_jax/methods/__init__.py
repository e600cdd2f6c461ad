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
    """The methods that settings are of, by name, each with its weight and its own settings.

    Args:
      settings: of a method in `METHODS`, or of a sum of several.

    Raises:
      ValueError: of no method in `METHODS`, or a sum of none or of one method twice.
    """
    names = {method.Settings: name for name, method in METHODS.items()}
    several = isinstance(settings, WeightedSumSettings)
    parts = settings.methods if several else ((1.0, settings),)
    for _, part in parts:
        if type(part) not in names:
            raise ValueError(f"{type(part).__name__} is of no method in singer_jax.methods.METHODS")
    found = {names[type(part)]: (weight, part) for weight, part in parts}
    if not found or len(found) < len(parts):
        raise ValueError("a sum of methods holds one or more, each once")
    return found


def needs(settings: Settings) -> MethodRequirements:
    """What the methods look at; arguments and errors as `chosen`."""
    each = [METHODS[name].needs(own) for name, (_, own) in chosen(settings).items()]
    return MethodRequirements(*(any(values) for values in zip(*each, strict=True)))


def measure(teacher: ModelFeatures, settings: Settings) -> dict[str, dict[str, Array]]:
    """What the methods must know of the first batches, of one batch, by the names of those that do.

    Args:
      teacher: its features of the batch.
      settings: as of `chosen`; errors too.
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
    """The method, or the sum of several; arguments and errors as `chosen` and `Method`.

    `measured` is the sum of `measure` over the first batches; None where no method needs it.
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
