"""The argument names of timm's classes for fields of `Architecture`, and old parameter names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, TypeVar

from singer_jax.errors import InputError
from singer_jax.models.architecture import FIELDS, Architecture
from singer_jax.settings.renamed import current_field

Stored = TypeVar("Stored")

# Fields for which a class has an argument, and the argument's name where it differs.
_COMMON = "img_size patch_size embed_dim depth num_heads mlp_ratio qkv_bias init_values global_pool"
_VIT = (
    f"{_COMMON} class_token no_embed_class reg_tokens pre_norm final_norm fc_norm act_layer "
    "pool_include_prefix qk_norm scale_attn_norm scale_mlp_norm proj_bias"
)
_EVA = (
    f"{_COMMON} class_token no_embed_class qk_norm qkv_fused num_kv_heads swiglu_align_to "
    "attn_only_layer_scale attn_pool_num_heads attn_pool_mlp_ratio rope_type rope_temperature "
    "rope_grid_offset rope_grid_indexing ref_feat_shape"
)
_OWN_WORDS = {
    "fc_norm": "use_fc_norm",
    "pos_embed": "use_abs_pos_emb",
    "scale_mlp_norm": "scale_mlp",
}
_ARGUMENTS: Mapping[str, Mapping[str, str]] = {
    "VisionTransformer": {name: name for name in _VIT.split()},
    "Eva": {name: name for name in _EVA.split()}
    | _OWN_WORDS
    | {
        "reg_tokens": "num_reg_tokens",
        "pre_norm": "use_pre_transformer_norm",
        "post_norm": "use_post_norm",
        "final_norm": "use_post_transformer_norm",
        "scale_attn_norm": "scale_attn_inner",
    },
    "Beit": {name: name for name in _COMMON.split()}
    | _OWN_WORDS
    | {"rel_pos_bias": "use_rel_pos_bias"},
}

# Arguments of timm that change neither the parameters nor the outputs of a trained model.
_WITHOUT_EFFECT = re.compile(
    r".*drop.*_rate|drop_rate|dynamic_img_(size|pad)|weight_init|fix_init|head_init_scale|"
    r"rope_(shift|jitter|rescale)_coords|qkv_bias_separate|strict_img_size|pretrained_strict"
)


def timm_class(arch: Architecture) -> str:
    """Returns timm's class for an architecture; a distilled model is a `VisionTransformer` too."""
    if arch.rel_pos_bias:
        return "Beit"
    return "Eva" if arch.eva else "VisionTransformer"


def changed_arguments(arch: Architecture, base: Architecture) -> dict[str, Any]:
    """Returns the arguments with which timm changes a model of architecture `base` to `arch`.

    Raises:
      InputError: a field differs, but timm's class has no argument for it.
    """
    kind, words = timm_class(base), _ARGUMENTS[timm_class(base)]
    changed = {name for name in FIELDS if getattr(arch, name) != getattr(base, name)}
    changed.discard("num_classes")
    if kind == "VisionTransformer" and "global_pool" in changed:
        changed.add("fc_norm")  # the default depends on the pooling
    if kind != "VisionTransformer" and changed & {"global_pool", "fc_norm", "final_norm"}:
        changed |= {"fc_norm", "final_norm"} & set(words)
    for name in sorted(changed - set(words)):
        if not name.startswith("synthetic_outlier"):
            raise InputError(
                f"overrides: {name} of timm's class {kind} cannot be changed: it has no such "
                f"argument and could not load the model; it has {name}={getattr(base, name)}"
            )
    found = {words.get(name, name): getattr(arch, name) for name in sorted(changed)}
    if "use_post_transformer_norm" in found:
        found["use_post_transformer_norm"] = arch.final_norm and not arch.fc_norm
    if "rope_type" in found:
        found["use_rot_pos_emb"] = arch.rope_type is not None
        found["rope_rotate_half"] = arch.rope_type == "dinov3"
    return found


def stated_fields(arguments: Mapping[str, Any], base: Architecture) -> dict[str, Any]:
    """Returns the fields of `Architecture` that arguments of timm change in a model.

    Args:
      arguments: arguments of timm's class; those without effect on a trained model are ignored.
      base: architecture of the model without the arguments.

    Raises:
      InputError: an argument has no corresponding field.
    """
    kind = timm_class(base)
    ours = {word: name for name, word in _ARGUMENTS[kind].items()}
    arguments = {current_field(name): value for name, value in arguments.items()}
    left = {name: value for name, value in arguments.items() if not _WITHOUT_EFFECT.fullmatch(name)}
    if left.pop("in_chans", 3) != 3:
        raise InputError(f"in_chans {arguments['in_chans']}: images have 3 channels")
    if kind == "VisionTransformer" and "pos_embed" in left:
        left["pos_embed"] = left["pos_embed"] in ("learn", True)
    fields = {ours[name]: left.pop(name) for name in list(left) if name in ours}
    fields |= {name: left.pop(name) for name in list(left) if name in FIELDS}
    if "global_pool" in fields and "fc_norm" not in fields:
        explicit = base.global_pool == "avg" and not base.fc_norm
        fields["fc_norm"] = fields["global_pool"] == "avg" and not explicit
    if kind == "Eva":
        _read_eva(left, fields, base)
    if left:
        raise InputError(f"timm's argument {min(left)} of its class {kind} is not supported")
    return fields


def _read_eva(left: dict[str, Any], fields: dict[str, Any], base: Architecture) -> None:
    """Moves the arguments that only timm's class Eva has from `left` to `fields`."""
    if fields.get("fc_norm"):
        fields["final_norm"] = True
    if "attn_type" in left:
        fields["k_bias"] = left.pop("attn_type") == "rope"
    if "swiglu_mlp" in left:
        both = {name: fields.get(name, getattr(base, name)) for name in _SPLITTING}
        kind = "swiglu" if any(both.values()) else "swiglu_packed"
        fields["mlp_layer"] = kind if left.pop("swiglu_mlp") else "mlp"
    if "use_rot_pos_emb" in left:
        rope = fields.get("rope_type", base.rope_type or "cat")
        fields["rope_type"] = rope if left.pop("use_rot_pos_emb") else None
    rope = fields.get("rope_type", base.rope_type)
    halves = left.pop("rope_rotate_half", base.rope_type == "dinov3")
    if rope is not None and halves != (rope == "dinov3"):
        raise InputError(f"timm's argument rope_rotate_half with rope_type {rope} is not supported")


# With either of these arguments, timm's class Eva has separate layers for gate and value.
_SPLITTING = ("scale_mlp_norm", "swiglu_align_to")


def current_names(tensors: Mapping[str, Stored], arch: Architecture) -> dict[str, Stored]:
    """Returns tensors by the keys of timm's model; old keys are renamed or dropped as in timm.

    Args:
      tensors: tensors by the keys of a file.
      arch: architecture of the model.
    """
    kind = timm_class(arch)
    dropped = {"VisionTransformer": r"pre_logits\..*", "Beit": r".*relative_position_index"}
    found = {}
    masked = kind == "Eva" and "mask_token" in tensors  # mask token of pretraining
    for key, tensor in tensors.items():
        if kind == "Eva" and re.fullmatch(r"rope\.(?!freqs$).*|.*\.rope\..*", key):
            continue  # constant tables
        if masked and re.fullmatch(r"mask_token|lm_head\..*", key):
            continue
        if re.fullmatch(dropped.get(kind, ""), key):
            continue
        if masked and arch.fc_norm:
            key = re.sub(r"^norm\.", "fc_norm.", key)
        if kind == "VisionTransformer":  # DeiT-III was published with gamma_1 and gamma_2
            key = re.sub(r"gamma_(\d)$", r"ls\1.gamma", key)
        found[key] = tensor
    return found
