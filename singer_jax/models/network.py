"""A model as the rest of the system meets it: what it is, its input, where its weights are."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from flax import nnx

from singer_jax.errors import InputError
from singer_jax.models import quantised, zoo
from singer_jax.models.architecture import CLEANERS, FIELDS
from singer_jax.models.params import Params
from singer_jax.models.registers import RegisterSettings
from singer_jax.models.weight_files import WeightsFile, find_weights, read_hub_config
from singer_jax.models.weights import check_weights, named_model, spec_of_weights, stated_model
from singer_jax.models.zoo import ModelSpec
from singer_jax.settings.ranges import TEXT, Flag, OneOf, optional
from singer_jax.settings.settings import ABSENT, Setting, Settings, section, setting


class _Overrides:
    """A section of some fields of `Architecture`."""

    def leaves(self, value: Mapping[str, Any], prefix: str) -> dict[str, Setting]:
        return {
            prefix + name: dataclasses.replace(field, default=value.get(name, ABSENT))
            for name, field in FIELDS.items()
        }

    def to_dict(self, value: Mapping[str, Any]) -> dict[str, Any]:
        return dict(value)

    def from_flat(
        self, value: Mapping[str, Any], flat: Mapping[str, Any], prefix: str
    ) -> dict[str, Any]:
        given = {name: flat[prefix + name] for name in FIELDS if prefix + name in flat}
        return dict(value) | given


@dataclasses.dataclass(frozen=True)
class ModelSettings(Settings):
    """Which model, and its weights."""

    model: str = setting("", TEXT, "timm name; empty: as the config.json beside the weights says")
    weights: str = setting("", TEXT, "hub name, file or run; empty: random")
    overrides: Mapping[str, Any] = section({}, _Overrides())
    weights_key: str = setting(
        "",
        TEXT,
        "part of the weights' file, such as `state_dict` or `student.backbone`; empty: averaged "
        "weights before others",
    )


@dataclasses.dataclass(frozen=True)
class FrozenSettings(ModelSettings):
    """Which model to look at, and how it computes."""

    precision: str | None = setting(
        None,
        optional(OneOf(tuple(quantised.FORMATS))),
        "of the products that read its normalised tokens; None: as `precision`",
    )


@dataclasses.dataclass(frozen=True)
class TeacherSettings(FrozenSettings):
    """Which model to learn from, and what is learnt of its features."""

    artifact_removal: str | None = setting(
        None,
        optional(OneOf(CLEANERS)),
        "what takes outlier tokens out of its features; None: they are as they are",
    )
    registers: RegisterSettings = section(RegisterSettings())


@dataclasses.dataclass(frozen=True)
class StudentSettings(ModelSettings):
    """Which model to train, and from where."""

    remat: bool = setting(
        False, Flag(), "recompute blocks in the backward pass: less memory, more time"
    )


@dataclasses.dataclass(frozen=True)
class Network:
    """A model without its parameters, and how its input is normalised."""

    spec: ModelSpec
    graph: nnx.GraphDef

    @property
    def image_size(self) -> int:
        """Side of its square input, in pixels.

        Raises:
          InputError: the input is not square.
        """
        height, width = self.spec.arch.img_size
        if height != width:
            raise InputError(f"{self.spec.name}: img_size {height} x {width} must be square")
        return height

    def merge(self, *params: Params) -> Any:
        """The model with its parameters."""
        return nnx.merge(self.graph, *params)


def resolve_model(
    role: str,
    settings: ModelSettings,
    image_size: int | None = None,
    normalisation: str = "model",
) -> tuple[ModelSpec, WeightsFile | None]:
    """A model that a user names: what it is, and where its weights are.

    Args:
      role: `teacher` or `student`, for messages.
      settings: what the user says of it.
      image_size: side of its input in pixels, where `overrides` do not say it; None: the model's.
      normalisation: `imagenet` takes ImageNet's statistics, `model` its own.

    Raises:
      InputError: unknown model or architecture field; weights that are not there or of another
        architecture.
    """
    model, fields = settings.model, dict(settings.overrides)
    if image_size is not None:
        fields.setdefault("img_size", image_size)
    if model:
        zoo.lookup(model, fields)  # a mistyped name is refused before its weights are fetched
    path = find_weights(settings.weights) if settings.weights else None
    file = WeightsFile(path, settings.weights_key) if path else None
    stated = read_hub_config(path.parent) if path and not model else {}
    if "architecture" in stated:
        spec = stated_model(stated, fields)
    elif model:
        spec = named_model(model, path.parent, fields) if path else zoo.lookup(model, fields)
    else:
        raise InputError(f"{role}.model: empty; give a timm name such as vit_tiny_patch16_224")
    if file:
        spec = spec_of_weights(spec, file)
        classes = settings.overrides.get("num_classes", spec.arch.num_classes)
        if classes != spec.arch.num_classes:
            raise InputError(
                f"{role}.overrides: num_classes {classes}, but the head in {path} has "
                f"{spec.arch.num_classes}"
            )
        check_weights(spec, file)
    if normalisation == "imagenet":
        spec = dataclasses.replace(spec, mean=zoo.IMAGENET_MEAN, std=zoo.IMAGENET_STD)
    return spec, file
