"""The models by timm name: architecture and input statistics."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from singer_jax.errors import InputError, unknown
from singer_jax.models.vit import Architecture

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """What a model is and how its input is normalised.

    Attributes:
      name: timm name without a weights tag.
      timm_name: the timm model it is a variant of; `name` itself where timm knows it.
      arch: its architecture.
      mean, std: per channel, of images scaled to 0..1.
    """

    name: str
    timm_name: str
    arch: Architecture
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


def _vit(embed_dim: int, depth: int, num_heads: int, patch_size: int = 16) -> dict[str, Any]:
    return {
        "arch": Architecture(
            embed_dim=embed_dim, depth=depth, num_heads=num_heads, patch_size=patch_size
        ),
        "mean": (0.5, 0.5, 0.5),
        "std": (0.5, 0.5, 0.5),
    }


def _deit3(embed_dim: int, depth: int, num_heads: int) -> dict[str, Any]:
    return {
        "arch": Architecture(
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            no_embed_class=True,
            init_values=1e-6,
        ),
        "mean": IMAGENET_MEAN,
        "std": IMAGENET_STD,
    }


_FIELDS = {
    "vit_tiny_patch16_224": _vit(192, 12, 3),
    "vit_small_patch16_224": _vit(384, 12, 6),
    "vit_base_patch16_224": _vit(768, 12, 12),
    "vit_large_patch16_224": _vit(1024, 24, 16),
    "vit_huge_patch14_224": _vit(1280, 32, 16, patch_size=14),
    "deit3_tiny_patch16_224": _deit3(192, 12, 3),
    "deit3_small_patch16_224": _deit3(384, 12, 6),
    "deit3_medium_patch16_224": _deit3(512, 12, 8),
    "deit3_base_patch16_224": _deit3(768, 12, 12),
    "deit3_large_patch16_224": _deit3(1024, 24, 16),
}

# Students of the paper that timm does not name.
_VARIANTS = {"deit3_tiny_patch16_224": "deit3_small_patch16_224"}

MODELS: Mapping[str, ModelSpec] = {
    name: ModelSpec(name, _VARIANTS.get(name, name), **spec) for name, spec in _FIELDS.items()
}


def architecture_name(model: str) -> str:
    """`timm/vit_tiny_patch16_224.augreg_in21k` -> `vit_tiny_patch16_224`."""
    return model.rsplit("/", 1)[-1].split(".", 1)[0]


def lookup(model: str, overrides: Mapping[str, Any] | None = None) -> ModelSpec:
    """The specification of a timm name, with or without hub owner and weights tag.

    Args:
      model: for example `vit_tiny_patch16_224` or `timm/vit_tiny_patch16_224.augreg_in21k`.
      overrides: fields of `Architecture` that replace the named model's; `img_size` may be one
        number for a square.

    Raises:
      InputError: unknown model, unknown field, or sizes that do not fit together.
    """
    name = architecture_name(model)
    if name not in MODELS:
        raise unknown("model", name, MODELS)
    spec, overrides = MODELS[name], dict(overrides or {})
    fields = {field.name for field in dataclasses.fields(Architecture)}
    for key in overrides:
        if key not in fields:
            raise unknown(f"architecture field of {name}", key, fields)
    if isinstance(overrides.get("img_size"), int):
        overrides["img_size"] = (overrides["img_size"],) * 2
    try:
        return dataclasses.replace(spec, arch=dataclasses.replace(spec.arch, **overrides))
    except ValueError as error:
        raise InputError(f"{name} cannot be built: {error}") from error
