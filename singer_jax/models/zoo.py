"""Registry of models by timm name, with architecture and input statistics."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num

from singer_jax.errors import InputError, unknown
from singer_jax.models.architecture import FIELDS, Architecture
from singer_jax.models.families import (
    FAMILIES,
    LEFT_OUT,
    TAGS,
    VARIANTS,
    Family,
)
from singer_jax.models.families import IMAGENET_MEAN as IMAGENET_MEAN
from singer_jax.models.families import IMAGENET_STD as IMAGENET_STD
from singer_jax.settings import ranges
from singer_jax.settings.renamed import current_field


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """Specification of a model and its input.

    Attributes:
      name: timm name without a weights tag.
      timm_name: the timm model that it is a variant of, which is `name` itself for a timm model.
      arch: architecture of the model.
      mean, std: mean and standard deviation per channel of images scaled to 0..1.
      interpolation: interpolation with which images are resized for the model.
      crop_pct: side length of the centre crop relative to the resized image in evaluation.
      resampling: method that resamples the position embedding (`weights.resample_pos_embed`).
    """

    name: str
    timm_name: str
    arch: Architecture
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    # None of these changes the output of a loaded model, so none is part of the repr.
    interpolation: str = dataclasses.field(default="bicubic", repr=False)
    crop_pct: float = dataclasses.field(default=0.9, repr=False)
    resampling: str = dataclasses.field(default="bicubic", repr=False)

    def prepare(
        self, images: Num[Array, "batch height width 3"]
    ) -> Float[Array, "batch height width 3"]:
        """Returns images in 0..255 resized (bilinear) and normalised for the model."""
        size = (images.shape[0], *self.arch.img_size, 3)
        images = jnp.asarray(images, jnp.float32)
        if images.shape != size:
            images = jax.image.resize(images, size, "linear")
        return (images / 255 - jnp.asarray(self.mean)) / jnp.asarray(self.std)


def _spec(family: Family, name: str) -> ModelSpec:
    arch = Architecture(**family.fields(name))
    given = {"crop_pct": 1.0 if arch.img_size[0] >= 336 else 0.9} | family.input
    return ModelSpec(name, VARIANTS.get(name, name), arch, **given)


MODELS: Mapping[str, ModelSpec] = {
    name: _spec(family, name) for family in FAMILIES for name in family.members()
}


def architecture_name(model: str) -> str:
    """Returns a name without owner and weights tag: `timm/NAME.TAG` becomes `NAME`."""
    return model.rsplit("/", 1)[-1].split(".", 1)[0]


def _tag_input(model: str) -> dict[str, Any]:
    """Returns the fields of `ModelSpec` that a name, with or without weights tag, changes."""
    name, found = model.rsplit("/", 1)[-1], {}
    for pattern, fields in TAGS:
        if re.fullmatch(pattern, name):
            found |= fields
    return found


def lookup(model: str, overrides: Mapping[str, Any] | None = None) -> ModelSpec:
    """Returns the specification of a timm name, with or without Hub owner and weights tag.

    Args:
      model: for example `vit_tiny_patch16_224` or `timm/vit_tiny_patch16_224.augreg_in21k`.
      overrides: fields of `Architecture` to change; `img_size` may be one number for a square.

    Raises:
      InputError: the model or a field is unknown, or the sizes are inconsistent.
    """
    name = architecture_name(model)
    for pattern, reason in LEFT_OUT:
        if re.fullmatch(pattern, name):
            raise InputError(f"model: {name} of timm is not supported: {reason}")
    if name not in MODELS:
        raise unknown("model", name, MODELS)
    spec, overrides = dataclasses.replace(MODELS[name], **_tag_input(model)), dict(overrides or {})
    for key, value in overrides.items():
        if (current := current_field(key)) != key:
            raise InputError(f"overrides: {key} is now {current}")
        if key not in FIELDS:
            raise unknown(f"architecture field of {name}", key, FIELDS)
        ranges.check(f"{key} of {name}", value, FIELDS[key].allowed)
    try:
        return dataclasses.replace(spec, arch=dataclasses.replace(spec.arch, **overrides))
    except ValueError as error:
        raise InputError(f"{name} cannot be built: {error}") from error
