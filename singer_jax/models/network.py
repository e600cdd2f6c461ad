"""Model settings, and a model without its parameters: architecture, input and weights file."""

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
    """Section that overrides some fields of `Architecture`."""

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
    """Settings that select a model and its weights."""

    model: str = setting(
        "",
        TEXT,
        "timm name, or a name that `--config=configs/models.py` lists. Empty: the model named by "
        "the weights' config.json.",
    )
    weights: str = setting(
        "", TEXT, "Weights: Hub repository, file or work directory. Empty: random initialisation."
    )
    overrides: Mapping[str, Any] = section({}, _Overrides())
    weights_key: str = setting(
        "",
        TEXT,
        "Part of the weights file to load, such as `state_dict` or `student.backbone`. Empty: "
        "averaged weights if there are any, otherwise the model's.",
    )


@dataclasses.dataclass(frozen=True)
class FrozenSettings(ModelSettings):
    """Settings of a model that is not trained."""

    precision: str | None = setting(
        None,
        optional(OneOf(quantised.FORMATS)),
        "Quantised format of the query, key, value and first MLP matmuls. None: `precision`.",
    )


@dataclasses.dataclass(frozen=True)
class TeacherSettings(FrozenSettings):
    """Settings of the teacher and of the removal of artifacts from its features."""

    artifact_removal: str | None = setting(
        None,
        optional(OneOf(CLEANERS)),
        "Method that removes outlier tokens from the teacher's features. None: no removal.",
    )
    registers: RegisterSettings = section(RegisterSettings())
    approximate_gelu: bool = setting(
        False,
        Flag(),
        "Compute the GELU of the teacher's MLPs with its tanh approximation. On a GPU in bfloat16 "
        "the matrix product then computes it, too. Other activations are not changed.",
    )


@dataclasses.dataclass(frozen=True)
class StudentSettings(ModelSettings):
    """Settings of the student and its initial weights."""

    remat: bool = setting(
        False,
        Flag(),
        "Recompute each block in the backward pass. This takes less memory and more time.",
    )


@dataclasses.dataclass(frozen=True)
class Network:
    """A model without its parameters, and the normalisation of its input."""

    spec: ModelSpec
    graph: nnx.GraphDef

    @property
    def image_size(self) -> int:
        """Returns the side length of the square input in pixels.

        Raises:
          InputError: the input is not square.
        """
        height, width = self.spec.arch.img_size
        if height != width:
            raise InputError(f"{self.spec.name}: img_size {height} x {width} must be square")
        return height

    def merge(self, *params: Params) -> Any:
        """Returns the model with its parameters."""
        return nnx.merge(self.graph, *params)


def resolve_model(
    role: str,
    settings: ModelSettings,
    image_size: int | None = None,
    normalisation: str = "model",
) -> tuple[ModelSpec, WeightsFile | None]:
    """Returns the specification of the model that a user selects, and its weights file.

    Args:
      role: `teacher` or `student`, for messages.
      settings: settings of the model.
      image_size: side length of the input in pixels, unless `overrides` set it; None: the model's.
      normalisation: `imagenet` for ImageNet's input statistics, `model` for the model's own.

    Raises:
      InputError: the model or an architecture field is unknown, or the weights are missing or have
        another architecture.
    """
    model, fields = settings.model, dict(settings.overrides)
    if image_size is not None:
        fields.setdefault("img_size", image_size)
    if model:
        zoo.lookup(model, fields)  # reject a mistyped name before the weights are downloaded
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
