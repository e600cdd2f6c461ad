"""The models by timm name: architecture and input statistics."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num

from singer_jax.errors import InputError, unknown
from singer_jax.models.architecture import FIELDS, Architecture
from singer_jax.settings import ranges

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
      interpolation, crop_pct: how timm resizes an image before its centre crop, and the crop's side
        over the resized one's; only told to others.
    """

    name: str
    timm_name: str
    arch: Architecture
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    # Not shown: what is measured of a model does not depend on them.
    interpolation: str = dataclasses.field(default="bilinear", repr=False)
    crop_pct: float = dataclasses.field(default=0.875, repr=False)

    def prepare(
        self, images: Num[Array, "batch height width 3"]
    ) -> Float[Array, "batch height width 3"]:
        """Images in 0..255 as the model takes them: its size (bilinear), mean and deviation."""
        size = (images.shape[0], *self.arch.img_size, 3)
        images = jnp.asarray(images, jnp.float32)
        if images.shape != size:
            images = jax.image.resize(images, size, "linear")
        return (images / 255 - jnp.asarray(self.mean)) / jnp.asarray(self.std)


def _sizes(embed_dim: int, depth: int, num_heads: int) -> dict[str, int]:
    return {"embed_dim": embed_dim, "depth": depth, "num_heads": num_heads}


_TINY, _SMALL, _BASE = _sizes(192, 12, 3), _sizes(384, 12, 6), _sizes(768, 12, 12)
_LARGE, _HUGE = _sizes(1024, 24, 16), _sizes(1280, 32, 16)


def _spec(
    statistics: tuple[tuple[float, ...], tuple[float, ...]], img_size: int, **arch: Any
) -> dict[str, Any]:
    return {
        "arch": Architecture(img_size=(img_size, img_size), **arch),
        "mean": statistics[0],
        "std": statistics[1],
    }


_IMAGENET = (IMAGENET_MEAN, IMAGENET_STD)
_HALF = ((0.5,) * 3, (0.5,) * 3)
_OPENAI = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


def _vit(**arch: Any) -> dict[str, Any]:
    return _spec(_HALF, 224, **arch)


def _deit3(**arch: Any) -> dict[str, Any]:
    return _spec(_IMAGENET, 224, no_embed_class=True, init_values=1e-6, **arch)


def _clip(**arch: Any) -> dict[str, Any]:
    return _spec(_OPENAI, 224, pre_norm=True, norm_eps=1e-5, **arch)


def _dinov2(**arch: Any) -> dict[str, Any]:
    return _spec(_IMAGENET, 518, patch_size=14, init_values=1e-5, num_classes=0, **arch)


def _dinov2_registers(**arch: Any) -> dict[str, Any]:
    return _dinov2(reg_tokens=4, no_embed_class=True, **arch)


def _dinov3(**arch: Any) -> dict[str, Any]:
    return _spec(
        _IMAGENET,
        256,
        **{
            "eva": True,
            "reg_tokens": 4,
            "qkv_bias": False,
            "init_values": 1e-5,
            "norm_eps": 1e-5,
            "global_pool": "avg",
            "num_classes": 0,
        }
        | arch,
    )


def _siglip(img_size: int, **arch: Any) -> dict[str, Any]:
    return _spec(_HALF, img_size, class_token=False, global_pool="map", num_classes=0, **arch)


_GIANT = _sizes(1536, 40, 24) | {"mlp_ratio": 2.66667 * 2, "mlp_layer": "swiglu_packed"}
_SO400M = _sizes(1152, 27, 16) | {"mlp_ratio": 3.7362, "patch_size": 14}
_DINOV3_SIZES = {
    "small": _SMALL,
    "small_plus": _SMALL | {"mlp_layer": "swiglu"},
    "base": _BASE,
    "large": _LARGE,
    "huge_plus": _sizes(1280, 32, 20) | {"mlp_layer": "swiglu"},
    "7b": _sizes(4096, 40, 32) | {"mlp_layer": "swiglu", "mlp_ratio": 2.0},
}
_DINOV2_SIZES = {"tiny": _TINY, "small": _SMALL, "base": _BASE, "large": _LARGE, "giant": _GIANT}

_FIELDS = {
    "vit_tiny_patch16_224": _vit(**_TINY),
    "vit_small_patch16_224": _vit(**_SMALL),
    "vit_base_patch16_224": _vit(**_BASE),
    "vit_large_patch16_224": _vit(**_LARGE),
    "vit_huge_patch14_224": _vit(patch_size=14, num_classes=0, **_HUGE),
    "deit3_tiny_patch16_224": _deit3(**_TINY),
    "deit3_small_patch16_224": _deit3(**_SMALL),
    "deit3_medium_patch16_224": _deit3(**_sizes(512, 12, 8)),
    "deit3_base_patch16_224": _deit3(**_BASE),
    "deit3_large_patch16_224": _deit3(**_LARGE),
    "vit_base_patch16_clip_224": _clip(**_BASE),
    "vit_base_patch16_clip_quickgelu_224": _clip(act_layer="quick_gelu", num_classes=512, **_BASE),
    "vit_xsmall_patch16_clip_224": _clip(num_classes=512, **_sizes(256, 10, 4)),
    "unic_large_patch14_336": _spec(_IMAGENET, 336, patch_size=14, num_classes=0, **_LARGE),
    **{f"vit_{name}_patch14_dinov2": _dinov2(**size) for name, size in _DINOV2_SIZES.items()},
    **{
        f"vit_{name}_patch14_reg4_dinov2": _dinov2_registers(**size)
        for name, size in _DINOV2_SIZES.items()
    },
    **{f"vit_{name}_patch16_dinov3": _dinov3(**size) for name, size in _DINOV3_SIZES.items()},
    **{
        f"vit_{name}_patch16_dinov3_qkvb": _dinov3(qkv_bias=True, **size)
        for name, size in _DINOV3_SIZES.items()
        if name != "7b"
    },
    **{f"vit_base_patch16_siglip_{size}": _siglip(size, **_BASE) for size in (224, 256, 384, 512)},
    **{f"vit_large_patch16_siglip_{size}": _siglip(size, **_LARGE) for size in (256, 384)},
    **{f"vit_so400m_patch14_siglip_{size}": _siglip(size, **_SO400M) for size in (224, 378)},
}

# Models that timm does not name, and the timm model each is a variant of.
_VARIANTS = {
    "deit3_tiny_patch16_224": "deit3_small_patch16_224",
    "vit_tiny_patch14_dinov2": "vit_small_patch14_dinov2",
    "vit_tiny_patch14_reg4_dinov2": "vit_small_patch14_reg4_dinov2",
    "unic_large_patch14_336": "vit_large_patch16_224",
}

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
    for key, value in overrides.items():
        if key not in FIELDS:
            raise unknown(f"architecture field of {name}", key, FIELDS)
        ranges.check(f"{key} of {name}", value, FIELDS[key].allowed)
    try:
        return dataclasses.replace(spec, arch=dataclasses.replace(spec.arch, **overrides))
    except ValueError as error:
        raise InputError(f"{name} cannot be built: {error}") from error
