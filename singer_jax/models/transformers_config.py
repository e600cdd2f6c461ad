"""Converts the `config.json` of transformers' vision models to timm's `config.json`.

Version 5 of transformers writes values of a nested `vision_config` only if they differ from the
defaults of its class, so these defaults are listed here too.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from singer_jax.errors import InputError, excerpt
from singer_jax.models.architecture import FIELDS
from singer_jax.settings import ranges
from singer_jax.settings.ranges import POSITIVE, Each, Flag, Range, Text

_ACTIVATIONS = {
    "gelu": "gelu",
    "quick_gelu": "quick_gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}
_BASE = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 16,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-6,
}
_DINOV2 = _BASE | {"mlp_ratio": 4, "qkv_bias": True, "use_swiglu_ffn": False}
_SIGLIP = _BASE | {
    "intermediate_size": 3072,
    "hidden_act": "gelu_pytorch_tanh",
    "vision_use_head": True,
}


@dataclasses.dataclass(frozen=True)
class _Kind:
    """A model family of transformers.

    Attributes:
      base: the timm model that it is a variant of.
      defaults: default values of its configuration.
    """

    base: str
    defaults: Mapping[str, Any]


_VIT = _BASE | {"intermediate_size": 3072, "qkv_bias": True, "layer_norm_eps": 1e-12}
_CLIP = _BASE | {
    "intermediate_size": 3072,
    "patch_size": 32,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
_DINOV3 = _BASE | {
    "hidden_size": 384,
    "intermediate_size": 1536,
    "num_attention_heads": 6,
    "layer_norm_eps": 1e-5,
    "rope_theta": 100.0,
    "query_bias": True,
    "key_bias": False,
    "value_bias": True,
    "proj_bias": True,
    "mlp_bias": True,
    "use_gated_mlp": False,
    "num_register_tokens": 0,
}
_KINDS = {
    "vit": _Kind("vit_base_patch16_224", _VIT),
    "vit_mae": _Kind("vit_base_patch16_224", _VIT),
    "deit": _Kind("deit_base_distilled_patch16_224", _VIT),
    "dinov2": _Kind("vit_base_patch14_dinov2", _DINOV2 | {"patch_size": 14}),
    "dinov2_with_registers": _Kind(
        "vit_base_patch14_reg4_dinov2", _DINOV2 | {"num_register_tokens": 4}
    ),
    "dinov3_vit": _Kind("vit_base_patch16_dinov3", _DINOV3),
    "clip_vision_model": _Kind("vit_base_patch16_clip_224", _CLIP),
    "siglip_vision_model": _Kind("vit_base_patch16_siglip_224", _SIGLIP),
    "siglip2_vision_model": _Kind("vit_base_patch16_siglip_224", _SIGLIP | {"num_patches": 256}),
}
# Models of images and text, whose `vision_config` describes the vision model.
_WITH_TEXT = {
    "clip": "clip_vision_model",
    "siglip": "siglip_vision_model",
    "siglip2": "siglip2_vision_model",
}

_COUNT = Range(1, 2**24, whole=True)
_ALLOWED = {
    "hidden_size": FIELDS["embed_dim"].allowed,
    "num_hidden_layers": FIELDS["depth"].allowed,
    "num_attention_heads": FIELDS["num_heads"].allowed,
    "num_channels": Range(3, 3, whole=True),
    "image_size": FIELDS["img_size"].allowed,
    "patch_size": FIELDS["patch_size"].allowed,
    "hidden_act": Text("[a-z_]+", "the name of an activation"),
    "layer_norm_eps": FIELDS["norm_eps"].allowed,
    "intermediate_size": _COUNT,
    "mlp_ratio": FIELDS["mlp_ratio"].allowed,
    "rope_theta": Range(100, 100),
    "num_register_tokens": FIELDS["reg_tokens"].allowed,
    "num_patches": _COUNT,
    "key_bias": Flag(),
    **{name: Flag() for name in ("qkv_bias", "query_bias", "value_bias", "vision_use_head")},
    **{name: Flag() for name in ("proj_bias", "mlp_bias", "use_gated_mlp", "use_swiglu_ffn")},
}


# PIL's numbers of the interpolations.
_RESAMPLING = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")
_PREPROCESSING = {
    "image_mean": Each(Range(), length=3),
    "image_std": Each(POSITIVE, length=3),
    "rescale_factor": POSITIVE,
    "resample": Range(0, len(_RESAMPLING) - 1, whole=True),
    **{f"do_{name}": Flag() for name in ("normalize", "rescale", "resize", "center_crop")},
}


def as_timm_config(where: object, config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns timm's `config.json` for transformers' model.

    Args:
      where: file that is named in errors.
      config: content of transformers' `config.json`, which has a `model_type`.

    Raises:
      InputError: timm has no equivalent model, or a value is invalid.
    """
    kind = config.get("model_type")
    name = kind if isinstance(kind, str) else ""
    vision: Any = config
    if name in _WITH_TEXT:
        name, vision = _WITH_TEXT[name], config.get("vision_config") or {}
    if name not in _KINDS or not isinstance(vision, Mapping):
        known = ", ".join(sorted([*_KINDS, *_WITH_TEXT]))
        raise InputError(f"{where}: model_type {excerpt(str(kind), 40)!r}; known: {known}")
    model, found = _KINDS[name], {}
    for key, default in model.defaults.items():
        found[key] = vision.get(key, default)
        if key == "patch_size" and _is_square(found[key]):
            found[key] = found[key][0]
        ranges.check(f"{where}: {key}", found[key], _ALLOWED[key])
    arguments, base = _arguments(where, name, found), model.base
    if name == "dinov3_vit" and arguments["qkv_bias"]:
        base += "_qkvb"
    size = arguments["img_size"]
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    return {
        "architecture": base,
        "num_classes": 0,
        "model_args": arguments,
        "pretrained_cfg": {"input_size": [3, height, width]},
    }


def as_timm_input(where: object, stated: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what `preprocessor_config.json` states of the input, as timm's `pretrained_cfg`.

    Args:
      where: the file, for messages.
      stated: its content; what it does not state is left out.

    Raises:
      InputError: a value that an image processor cannot have.
    """
    for key, allowed in _PREPROCESSING.items():
        if stated.get(key) is not None:
            ranges.check(f"{where}: {key}", stated[key], allowed)
    found: dict[str, Any] = {}
    if stated.get("do_normalize") is False:
        found |= {"mean": [0.0] * 3, "std": [1.0] * 3}
    elif stated.get("image_mean") is not None and stated.get("image_std") is not None:
        found |= {"mean": list(stated["image_mean"]), "std": list(stated["image_std"])}
    factor = 1.0 if stated.get("do_rescale") is False else stated.get("rescale_factor")
    if factor is not None and not math.isclose(255 * factor, 1.0, rel_tol=1e-6):
        if "mean" not in found:
            raise InputError(
                f"{where}: another rescale_factor than 1/255 needs image_mean and _std"
            )
        # The model's own images are in 0..1.
        found = {key: [value / (255 * factor) for value in found[key]] for key in found}
    if stated.get("do_resize") is False:
        return found
    if stated.get("resample") is not None:
        found["interpolation"] = _RESAMPLING[stated["resample"]]
    resized, crop = _side(stated.get("size")), _side(stated.get("crop_size"))
    if resized:
        cropped = crop is not None and stated.get("do_center_crop") is not False
        found["crop_pct"] = crop / resized if cropped else 1.0
    return found


def _side(size: Any) -> float | None:
    """Returns the shorter side that an image processor's size states; None: it states none."""
    sides = size.values() if isinstance(size, Mapping) else [size]
    if isinstance(size, Mapping) and "shortest_edge" in size:
        sides = [size["shortest_edge"]]
    numbers = [side for side in sides if isinstance(side, int) and side > 0]
    return min(numbers, default=None)


def _is_square(size: Any) -> bool:
    return isinstance(size, list) and len(size) == 2 and size[0] == size[1]


def _arguments(where: object, name: str, found: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of `Architecture` that a configuration sets."""
    dim, activation = found["hidden_size"], found["hidden_act"]
    gated = found.get("use_gated_mlp") or found.get("use_swiglu_ffn")
    expected = ("silu",) if found.get("use_gated_mlp") else tuple(_ACTIVATIONS)
    if activation not in expected:
        raise InputError(f"{where}: hidden_act {activation!r}; give {' or '.join(expected)}")
    arguments: dict[str, Any] = {
        "patch_size": found["patch_size"],
        "embed_dim": dim,
        "depth": found["num_hidden_layers"],
        "num_heads": found["num_attention_heads"],
        "norm_eps": found["layer_norm_eps"],
        "img_size": found["image_size"],
    }
    if not gated:
        arguments["act_layer"] = _ACTIVATIONS[activation]
    if isinstance(arguments["img_size"], list):
        arguments["img_size"] = tuple(arguments["img_size"])
    if "num_patches" in found:
        side = math.isqrt(found["num_patches"])
        if side * side != found["num_patches"]:
            raise InputError(f"{where}: num_patches {found['num_patches']} is not a square number")
        arguments["img_size"] = side * found["patch_size"]
    if found.get("use_swiglu_ffn"):
        # Two thirds of the hidden width, rounded up to a multiple of 8; one map has both halves.
        half = (int(int(dim * found["mlp_ratio"]) * 2 / 3) + 7) // 8 * 8
        arguments |= {"mlp_layer": "swiglu_packed", "mlp_ratio": _ratio(2 * half, dim)}
    elif "mlp_ratio" in found:
        arguments["mlp_ratio"] = float(found["mlp_ratio"])
    else:
        arguments["mlp_ratio"] = _ratio(found["intermediate_size"], dim)
    if found.get("use_gated_mlp"):
        arguments["mlp_layer"] = "swiglu"
    if "num_register_tokens" in found:
        arguments["reg_tokens"] = found["num_register_tokens"]
    if "qkv_bias" in found:
        arguments["qkv_bias"] = found["qkv_bias"]
    if name == "dinov3_vit":
        _check_dinov3(where, found)
        arguments["qkv_bias"] = found["query_bias"]
    if found.get("vision_use_head") is False:
        arguments["global_pool"] = "avg"
    return arguments


def _check_dinov3(where: object, found: Mapping[str, Any]) -> None:
    """Raises `InputError` for biases that timm's DINOv3 does not have."""
    same = found["query_bias"] == found["value_bias"]
    if found["key_bias"] or not (same and found["proj_bias"] and found["mlp_bias"]):
        raise InputError(
            f"{where}: timm's DINOv3 has biases of query and value together, none of the keys, and "
            "those of proj and mlp"
        )


def _ratio(hidden: int, dim: int) -> float:
    """Returns the MLP ratio that gives the hidden width after rounding down."""
    ratio = hidden / dim
    return ratio if int(dim * ratio) == hidden else math.nextafter(ratio, math.inf)
