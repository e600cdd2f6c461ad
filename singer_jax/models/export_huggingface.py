"""Exports a model for transformers: `AutoModel.from_pretrained(FOLDER)` opens it.

The family depends on the features of the architecture, not on its name: DeiT-III, a ViT with
LayerScale, becomes transformers' Dinov2Model. Weights are copied bit for bit. Parameters that only
transformers has (positions of prefix tokens, mask tokens) are written as zeros.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from etils import epath

from singer_jax.errors import InputError
from singer_jax.io.files import write_text
from singer_jax.models.architecture import FIELDS, Architecture
from singer_jax.models.weight_files import CONFIG_FILE, WEIGHTS_FILE
from singer_jax.models.write_safetensors import write_safetensors
from singer_jax.models.zoo import ModelSpec
from singer_jax.settings.ranges import NOT_NEGATIVE, Allowed, Flag, OneOf, Range

PROCESSOR_FILE = "preprocessor_config.json"

Tensors = dict[str, np.ndarray]

_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_tanh": "gelu_pytorch_tanh",
    "quick_gelu": "quick_gelu",
}
# Pillow's numbers of the interpolations, which transformers uses.
_RESAMPLING = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3}

# Fields of an architecture that every family supports.
_SIZES = ("img_size", "patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio", "norm_eps")

# The modules of each family by timm's module names; # is the index of a block. These are the names
# that transformers saves; the attribute names in its classes differ since release 5.
_VIT_EMBEDDINGS = {
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "norm": "layernorm",
}
_VIT_ATTENTION = {
    "blocks.#.attn.q": "encoder.layer.#.attention.attention.query",
    "blocks.#.attn.k": "encoder.layer.#.attention.attention.key",
    "blocks.#.attn.v": "encoder.layer.#.attention.attention.value",
    "blocks.#.attn.proj": "encoder.layer.#.attention.output.dense",
}
_VIT = {
    **_VIT_EMBEDDINGS,
    **_VIT_ATTENTION,
    "blocks.#.norm1": "encoder.layer.#.layernorm_before",
    "blocks.#.norm2": "encoder.layer.#.layernorm_after",
    "blocks.#.mlp.fc1": "encoder.layer.#.intermediate.dense",
    "blocks.#.mlp.fc2": "encoder.layer.#.output.dense",
    "pooler": "pooler.dense",
}
_DEIT = _VIT | {"dist_token": "embeddings.distillation_token"}
_DINOV2 = {
    **_VIT_EMBEDDINGS,
    **_VIT_ATTENTION,
    "reg_token": "embeddings.register_tokens",
    "mask_token": "embeddings.mask_token",
    "blocks.#.norm1": "encoder.layer.#.norm1",
    "blocks.#.norm2": "encoder.layer.#.norm2",
    "blocks.#.ls1.gamma": "encoder.layer.#.layer_scale1.lambda1",
    "blocks.#.ls2.gamma": "encoder.layer.#.layer_scale2.lambda1",
    "blocks.#.mlp.fc1": "encoder.layer.#.mlp.fc1",
    "blocks.#.mlp.fc2": "encoder.layer.#.mlp.fc2",
}
_DINOV2_SWIGLU = {
    "blocks.#.mlp.fc1": "encoder.layer.#.mlp.weights_in",
    "blocks.#.mlp.fc2": "encoder.layer.#.mlp.weights_out",
}
_DINOV3 = {
    "cls_token": "embeddings.cls_token",
    "reg_token": "embeddings.register_tokens",
    "mask_token": "embeddings.mask_token",
    "patch_embed.proj": "embeddings.patch_embeddings",
    "norm": "norm",
    "blocks.#.norm1": "layer.#.norm1",
    "blocks.#.norm2": "layer.#.norm2",
    "blocks.#.attn.q": "layer.#.attention.q_proj",
    "blocks.#.attn.k": "layer.#.attention.k_proj",
    "blocks.#.attn.v": "layer.#.attention.v_proj",
    "blocks.#.attn.proj": "layer.#.attention.o_proj",
    "blocks.#.gamma_1": "layer.#.layer_scale1.lambda1",
    "blocks.#.gamma_2": "layer.#.layer_scale2.lambda1",
    "blocks.#.mlp.fc1_g": "layer.#.mlp.gate_proj",
    "blocks.#.mlp.fc1_x": "layer.#.mlp.up_proj",
    "blocks.#.mlp.fc1": "layer.#.mlp.up_proj",
    "blocks.#.mlp.fc2": "layer.#.mlp.down_proj",
}
_CLIP = {
    "cls_token": "vision_model.embeddings.class_embedding",
    "pos_embed": "vision_model.embeddings.position_embedding.weight",
    "patch_embed.proj": "vision_model.embeddings.patch_embedding",
    "norm_pre": "vision_model.pre_layrnorm",
    "norm": "vision_model.post_layernorm",
    "blocks.#.norm1": "vision_model.encoder.layers.#.layer_norm1",
    "blocks.#.norm2": "vision_model.encoder.layers.#.layer_norm2",
    "blocks.#.attn.q": "vision_model.encoder.layers.#.self_attn.q_proj",
    "blocks.#.attn.k": "vision_model.encoder.layers.#.self_attn.k_proj",
    "blocks.#.attn.v": "vision_model.encoder.layers.#.self_attn.v_proj",
    "blocks.#.attn.proj": "vision_model.encoder.layers.#.self_attn.out_proj",
    "blocks.#.mlp.fc1": "vision_model.encoder.layers.#.mlp.fc1",
    "blocks.#.mlp.fc2": "vision_model.encoder.layers.#.mlp.fc2",
}
_SIGLIP = _CLIP | {
    "attn_pool.latent": "vision_model.head.probe",
    "attn_pool.proj": "vision_model.head.attention.out_proj",
    "attn_pool.norm": "vision_model.head.layernorm",
    "attn_pool.mlp.fc1": "vision_model.head.mlp.fc1",
    "attn_pool.mlp.fc2": "vision_model.head.mlp.fc2",
    "attn_pool.in_proj_weight": "vision_model.head.attention.in_proj_weight",
    "attn_pool.in_proj_bias": "vision_model.head.attention.in_proj_bias",
}


@dataclasses.dataclass(frozen=True)
class _Family:
    """A model family of transformers.

    Attributes:
      model_type: type that AutoModel looks up.
      model_class: name of the class without a head.
      modules: module names by timm's module names.
      takes: supported values of fields of `Architecture`.
      needs: required values of fields. Every other field that is not a size must have its default.
      settings: function for the part of the configuration that is specific to the family.
    """

    model_type: str
    model_class: str
    modules: Mapping[str, str]
    takes: Mapping[str, Allowed]
    needs: Mapping[str, Any]
    settings: Callable[[Architecture], dict[str, Any]]

    def differences(self, arch: Architecture) -> list[str]:
        """Returns the fields of an architecture that this family cannot express."""
        return [
            name
            for name, field in FIELDS.items()
            if name not in _SIZES
            and not (
                self.takes[name].admits(getattr(arch, name))
                if name in self.takes and name not in self.needs
                else getattr(arch, name) == self.needs.get(name, field.default)
            )
        ]


def _hidden(arch: Architecture) -> dict[str, Any]:
    return {"intermediate_size": int(arch.embed_dim * arch.mlp_ratio)}


def _dinov2_settings(arch: Architecture) -> dict[str, Any]:
    swiglu = arch.mlp_layer == "swiglu_packed"
    ratio: float = arch.mlp_ratio
    if swiglu:  # transformers takes two thirds of the width, rounded up to a multiple of 8
        ratio = round(arch.mlp_ratio * 3 / 4)
        wanted, kept = int(arch.embed_dim * arch.mlp_ratio) // 2, int(arch.embed_dim * ratio)
        if (int(kept * 2 / 3) + 7) // 8 * 8 != wanted:
            raise InputError(f"formats: transformers has no SwiGLU of {wanted} hidden channels")
    elif ratio != int(ratio):
        raise InputError(f"formats: transformers' dinov2 takes a whole mlp_ratio, not {ratio:g}")
    registers = {"num_register_tokens": arch.reg_tokens} if arch.reg_tokens else {}
    return {"mlp_ratio": int(ratio), "use_swiglu_ffn": swiglu, **registers}


def _vit_settings(arch: Architecture) -> dict[str, Any]:
    # The pooler is a linear map and an activation; as identities they return the class token.
    return {**_hidden(arch), "qkv_bias": arch.qkv_bias, "pooler_act": "linear"}


def _dinov3_settings(arch: Architecture) -> dict[str, Any]:
    hidden = int(arch.embed_dim * arch.mlp_ratio)
    gated = arch.mlp_layer == "swiglu"
    if gated and arch.swiglu_align_to:
        hidden += -hidden % arch.swiglu_align_to
    return {
        "intermediate_size": hidden,
        "use_gated_mlp": gated,
        "num_register_tokens": arch.reg_tokens,
        "query_bias": arch.qkv_bias,
        "value_bias": arch.qkv_bias,
        "key_bias": False,
        "rope_theta": arch.rope_temperature,
        **({"hidden_act": "silu"} if gated else {}),
    }


_ACTIVATION = {"act_layer": OneOf(tuple(_ACTIVATIONS))}
_POOLED = {"global_pool": OneOf(("token", "avg"))}
_VIT_FIELDS = {
    **_ACTIVATION,
    **_POOLED,
    "num_classes": Range(0, whole=True),
    "no_embed_class": Flag(),
    "qkv_bias": Flag(),
}
_DINOV2_FIELDS = _VIT_FIELDS | {
    "init_values": NOT_NEGATIVE,
    "mlp_layer": OneOf(("mlp", "swiglu_packed")),
}

_FAMILIES = (
    _Family("vit", "ViTModel", _VIT, _VIT_FIELDS, {}, _vit_settings),
    _Family(
        "deit",
        "DeiTModel",
        _DEIT,
        {**_ACTIVATION, "num_classes": Range(0, whole=True), "qkv_bias": Flag()},
        {"distilled": True},
        _vit_settings,
    ),
    _Family("dinov2", "Dinov2Model", _DINOV2, _DINOV2_FIELDS, {}, _dinov2_settings),
    _Family(
        "dinov2_with_registers",
        "Dinov2WithRegistersModel",
        _DINOV2,
        {
            **_DINOV2_FIELDS,
            "reg_tokens": Range(1, whole=True),
        },
        {"no_embed_class": True},
        _dinov2_settings,
    ),
    _Family(
        "dinov3_vit",
        "DINOv3ViTModel",
        _DINOV3,
        {
            **_POOLED,
            **_ACTIVATION,
            "init_values": NOT_NEGATIVE,
            "mlp_layer": OneOf(("mlp", "swiglu")),
            "qkv_bias": Flag(),
            "reg_tokens": Range(0, whole=True),
            "rope_temperature": NOT_NEGATIVE,
            "swiglu_align_to": Range(0, whole=True),
        },
        {
            "eva": True,
            "k_bias": False,
            "num_classes": 0,
            "pos_embed": False,
            "rope_type": "dinov3",
        },
        _dinov3_settings,
    ),
    _Family(
        "clip_vision_model",
        "CLIPVisionModel",
        _CLIP,
        _ACTIVATION | {"no_embed_class": Flag()},
        {"pre_norm": True, "num_classes": 0},
        _hidden,
    ),
    _Family(
        "siglip_vision_model",
        "SiglipVisionModel",
        _SIGLIP,
        _ACTIVATION,
        {"class_token": False, "global_pool": "map", "num_classes": 0},
        _hidden,
    ),
)


def check_huggingface(spec: ModelSpec) -> None:
    """Raises `InputError` if no model of transformers computes the same."""
    _family(spec).settings(spec.arch)
    height, width = spec.arch.img_size
    if height != width and _family(spec).modules in (_CLIP, _SIGLIP):
        raise InputError(
            f"formats: huggingface's CLIP and SigLIP need square images, not {height} x {width}"
        )
    if spec.interpolation not in _RESAMPLING:
        raise InputError(f"formats: huggingface has no interpolation {spec.interpolation!r}")


def export_huggingface(
    folder: epath.Path, spec: ModelSpec, tensors: Mapping[str, np.ndarray]
) -> None:
    """Writes `model.safetensors`, `config.json` and `preprocessor_config.json` for transformers.

    Args:
      folder: output folder, which is made if needed.
      spec: specification of the model.
      tensors: weights of the model as returned by `weights.to_timm`.

    Raises:
      InputError: no model of transformers computes the same.
      RunError: the weights cannot be written.
    """
    check_huggingface(spec)
    family = _family(spec)
    renamed = _renamed(family, spec.arch, dict(tensors))
    write_safetensors(folder / WEIGHTS_FILE, renamed, {"format": "pt"})
    dtypes = {str(tensor.dtype) for tensor in tensors.values()}
    config = _config(family, spec.arch) | {"dtype": dtypes.pop() if len(dtypes) == 1 else "float32"}
    write_text(folder / CONFIG_FILE, json.dumps(config, indent=2) + "\n")
    write_text(folder / PROCESSOR_FILE, json.dumps(processor_config(spec), indent=2) + "\n")


def processor_config(spec: ModelSpec) -> dict[str, Any]:
    """Returns the `preprocessor_config.json` of a model: resize, centre crop, normalise."""
    height, width = spec.arch.img_size
    return {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": int(min(height, width) / spec.crop_pct)},
        "resample": _RESAMPLING[spec.interpolation],
        "do_center_crop": True,
        "crop_size": {"height": height, "width": width},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(spec.mean),
        "image_std": list(spec.std),
    }


def _family(spec: ModelSpec) -> _Family:
    differences = [(family.differences(spec.arch), family) for family in _FAMILIES]
    fewest, family = min(differences, key=lambda found: len(found[0]))
    if spec.arch.num_classes and spec.arch.global_pool != "token" and not fewest:
        fewest = ["global_pool"]  # the heads of these families read the class token
    if fewest:
        name = fewest[0]
        raise InputError(
            f"formats: huggingface has no model like {spec.name}: {name} is "
            f"{getattr(spec.arch, name)!r}, which {family.model_class} cannot express"
        )
    return family


def _config(family: _Family, arch: Architecture) -> dict[str, Any]:
    head = f"{family.model_class.removesuffix('Model')}ForImageClassification"
    head += "WithTeacher" if arch.distilled else ""
    height, width = arch.img_size
    labels = {"num_labels": arch.num_classes} if arch.num_classes else {}
    return {
        "architectures": [head if arch.num_classes else family.model_class],
        "model_type": family.model_type,
        "hidden_size": arch.embed_dim,
        "num_hidden_layers": arch.depth,
        "num_attention_heads": arch.num_heads,
        "hidden_act": _ACTIVATIONS[arch.act_layer],
        "layer_norm_eps": arch.norm_eps,
        "image_size": height if height == width else [height, width],
        "patch_size": arch.patch_size,
        "num_channels": 3,
        **family.settings(arch),
        **labels,
    }


def _renamed(family: _Family, arch: Architecture, tensors: Tensors) -> Tensors:
    modules = dict(family.modules)
    if arch.mlp_layer == "swiglu_packed":
        modules |= _DINOV2_SWIGLU
    head = {key: tensors.pop(key) for key in list(tensors) if key.startswith("head")}
    found = {
        _renamed_key(modules, key): tensor
        for key, tensor in _reshaped(family, arch, _split_attention(tensors))
    }
    if not head:
        return found
    prefix = family.model_type
    found = {f"{prefix}.{key}": tensor for key, tensor in found.items()}
    if arch.distilled:
        names = {"head": "cls_classifier", "head_dist": "distillation_classifier"}
        return found | {_renamed_key(names, key): tensor for key, tensor in head.items()}
    weight = head["head.weight"]
    if prefix != "vit":  # the head also reads the mean of the patches
        weight = np.concatenate([weight, np.zeros_like(weight)], axis=1)
    return found | {"classifier.weight": weight, "classifier.bias": head["head.bias"]}


def _renamed_key(modules: Mapping[str, str], key: str) -> str:
    module, dot, parameter = key.rpartition(".")
    if parameter not in ("weight", "bias"):
        module, dot, parameter = key, "", ""
    number = re.match(r"blocks\.(\d+)\.", module)
    name = modules[re.sub(r"^blocks\.\d+\.", "blocks.#.", module)]
    return (name.replace("#", number[1]) if number else name) + dot + parameter


def _split_attention(tensors: Tensors) -> Iterator[tuple[str, np.ndarray]]:
    """Yields query, key and value as separate linear maps."""
    for key, tensor in tensors.items():
        if ".attn.qkv." in key:
            for name, part in zip("qkv", np.split(tensor, 3), strict=True):
                yield key.replace(".qkv.", f".{name}."), part
        elif key.endswith((".q_bias", ".v_bias")):
            module, name = key.removesuffix("_bias").rsplit(".", 1)
            yield f"{module}.{name}.bias", tensor
        else:
            yield key, tensor


def _reshaped(
    family: _Family, arch: Architecture, tensors: Iterator[tuple[str, np.ndarray]]
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields tensors in the shapes of transformers, and the tensors that only transformers has."""
    pool: Tensors = {}
    for key, tensor in tensors:
        if key == "pos_embed":
            if arch.class_token and arch.no_embed_class:
                tensor = np.concatenate([np.zeros_like(tensor[:, :1]), tensor], axis=1)
            yield key, tensor[0] if family.modules is _CLIP or family.modules is _SIGLIP else tensor
        elif key == "cls_token" and family.modules is _CLIP:
            yield key, tensor[0, 0]
        elif key.startswith(("attn_pool.q.", "attn_pool.kv.")):
            pool[key] = tensor
        else:
            yield key, tensor
    for name in ("weight", "bias") if pool else ():
        parts = [pool[f"attn_pool.q.{name}"], pool[f"attn_pool.kv.{name}"]]
        yield f"attn_pool.in_proj_{name}", np.concatenate(parts)
    yield from _added(family, arch, tensor.dtype)


def _added(
    family: _Family, arch: Architecture, dtype: np.dtype
) -> Iterator[tuple[str, np.ndarray]]:
    dim = arch.embed_dim
    if "mask_token" in family.modules:  # used in pretraining only
        yield "mask_token", np.zeros((1, 1, dim) if arch.eva else (1, dim), dtype)
    if "pooler" in family.modules:
        yield "pooler.weight", np.eye(dim, dtype=dtype)
        yield "pooler.bias", np.zeros(dim, dtype)
