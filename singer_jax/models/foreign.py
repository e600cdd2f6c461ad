"""State dicts of other libraries, recognised by their keys and renamed to timm's keys.

A format is recognised only if all its marks are present. A key that no rule covers is not renamed,
so that the comparison with timm's model reports it. Nothing is guessed.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Mapping

import jax.numpy as jnp
import numpy as np

from singer_jax.errors import InputError, listed
from singer_jax.io import limits
from singer_jax.models.tensors import (
    DerivedTensor,
    StoredTensor,
    added,
    joined,
    reshaped,
    rows,
    transposed,
    zeros,
)

Tensors = dict[str, StoredTensor]
Rules = tuple[tuple[str, str], ...]


@dataclasses.dataclass(frozen=True)
class Format:
    """The names that a library gives to the tensors of a vision transformer.

    Attributes:
      name: name for messages.
      root: key of the patch embedding, which determines the prefix.
      marks: patterns of keys that must all be present.
      never: pattern of keys that must be absent.
      rules: patterns of keys and their replacements; the first pattern that matches a whole key is
        applied.
      dropped: pattern of keys that are not part of a timm model.
      beside: timm's names of keys that are outside the prefix.
      finish: function that converts tensors after the renaming.
    """

    name: str
    root: str
    marks: tuple[str, ...] = ()
    never: str = "$^"
    rules: Rules = ()
    dropped: str = "$^"
    beside: Mapping[str, str] = dataclasses.field(default_factory=dict)
    finish: Callable[[Tensors], Tensors] = lambda tensors: tensors

    def matches(self, keys: Iterable[str]) -> bool:
        """Returns whether keys, without their prefix, belong to this format."""
        keys = list(keys)
        marked = all(any(re.fullmatch(mark, key) for key in keys) for mark in self.marks)
        return marked and not any(re.fullmatch(self.never, key) for key in keys)


# Counters that profilers add to a model.
_COUNTERS = r"(?:.*\.)?total_(?:ops|params)"
# Parts of a state dict that pretraining by reconstruction or distillation adds to the encoder.
_HEADS = rf"(?:dino_|ibot_)?head\.(?:mlp\d?|last_layer\d?)\..*|{_COUNTERS}"
_PRETRAINING = rf"mask_token|masked_embed|decoder_.*|{_HEADS}"


def _joined(tensors: Tensors, module: str, parts: int) -> Tensors:
    """Joins tensors that rules have named `MODULE.0`, `MODULE.1` and so on, where all are there."""
    found: Tensors = {}
    for key, tensor in tensors.items():
        if match := re.fullmatch(rf"(.*\.{module})\.\d\.(weight|bias)", key):
            names = [f"{match[1]}.{number}.{match[2]}" for number in range(parts)]
            if key in names and all(name in tensors for name in names):
                found[f"{match[1]}.{match[2]}"] = joined(*(tensors[name] for name in names))
                continue
        found[key] = tensor
    return found


def _fused(tensors: Tensors) -> Tensors:
    """Joins query, key and value."""
    return _joined(tensors, "qkv", 3)


def _without_class_position(tensors: Tensors) -> Tensors:
    """Adds the position of the class token to the token, if timm embeds only the patches."""
    cls_token, positions = tensors.get("cls_token"), tensors.get("pos_embed")
    if cls_token is None or positions is None or "reg_token" not in tensors:
        return tensors
    tokens = positions.shape[1] if len(positions.shape) == 3 else 0
    return tensors | {
        "cls_token": added(cls_token, rows(positions, 0, 1, axis=1)),
        "pos_embed": rows(positions, 1, max(tokens, 1), axis=1),
    }


def _dinov3_bias(tensors: Tensors) -> Tensors:
    """Splits the bias of query, key and value; the bias of the keys is masked or must be zero."""
    found: Tensors = {}
    for key, tensor in tensors.items():
        block = key.removesuffix("qkv.bias")
        if key.endswith("qkv.bias_mask"):
            continue
        if block == key:
            found[key] = tensor
            continue
        dim = tensor.shape[0] // 3 if tensor.shape else 0
        if tensor.shape != (3 * dim,):
            raise InputError(f"{key} has shape {list(tensor.shape)}, not three times a width")
        masked = f"{block}qkv.bias_mask" in tensors
        found[f"{block}q_bias"] = rows(tensor, 0, dim)
        found[f"{block}v_bias"] = DerivedTensor(
            (tensor,), (dim,), tensor.dtype, _value_bias(key, dim, masked)
        )
    return found


def _value_bias(key: str, dim: int, masked: bool) -> Callable[[np.ndarray], np.ndarray]:
    def compute(bias: np.ndarray) -> np.ndarray:
        if not masked and np.any(bias[dim : 2 * dim] != 0):
            raise InputError(f"{key}: the keys have a bias, which timm's model does not have")
        return bias[2 * dim :]

    return compute


PERIODS = "rope_embed.periods"
_MOST_PERIODS = 1024  # a quarter of the width of a head; published ones have 16 or 32
_ROPE_BASE = 100.0


def _meta_dinov3(tensors: Tensors) -> Tensors:
    """Checks the rope's periods, which timm computes, and splits biases.

    The number of periods is checked where the width of a head is known.
    """
    periods = tensors.get(PERIODS)
    if periods is not None:
        if not jnp.issubdtype(periods.dtype, jnp.floating):
            raise InputError(f"{PERIODS} is {periods.dtype}, not floats")
        limits.check(PERIODS, math.prod(periods.shape), _MOST_PERIODS, "values")
        stored = np.asarray(periods.read(), np.float64).ravel()
        expected = _ROPE_BASE ** (np.arange(len(stored)) / max(len(stored), 1))
        if not np.allclose(stored, expected, rtol=0.02):  # some files store them in bfloat16
            raise InputError(
                f"{PERIODS} differ from those of base {_ROPE_BASE:g}, which timm computes"
            )
    return _dinov3_bias(tensors)


def _headed(tensors: Tensors) -> Tensors:
    """Adds a zero bias to a head without bias, as timm does for CLIP."""
    head = tensors.get("head.weight")
    if head is not None and "head.bias" not in tensors and head.shape:
        tensors["head.bias"] = zeros(head.shape[0])
    return tensors


def _clip(tensors: Tensors) -> Tensors:
    """Converts class token, positions and head to the shapes of timm."""
    if (token := tensors.get("cls_token")) is not None:
        tensors["cls_token"] = reshaped(token, (1, 1, *token.shape[-1:]))
    return _headed(_positioned(_fused(tensors)))


def _positioned(tensors: Tensors) -> Tensors:
    if (positions := tensors.get("pos_embed")) is not None:
        tensors["pos_embed"] = reshaped(positions, (1, *positions.shape[-2:]))
    return tensors


def _open_clip(tensors: Tensors) -> Tensors:
    if (proj := tensors.pop("proj", None)) is not None:
        tensors["head.weight"] = transposed(proj, (1, 0))
    return _clip(tensors)


def _siglip(tensors: Tensors) -> Tensors:
    """Splits the projection of the pooling into those of the query and of key and value."""
    for kind in ("weight", "bias"):
        packed = tensors.pop(f"attn_pool.in_proj_{kind}", None)
        if packed is not None:
            dim = packed.shape[0] // 3 if packed.shape else 0
            tensors[f"attn_pool.q.{kind}"] = rows(packed, 0, dim)
            tensors[f"attn_pool.kv.{kind}"] = rows(packed, dim, 3 * dim)
    return _positioned(_fused(tensors))


def _siglip2(tensors: Tensors) -> Tensors:
    """Converts the linear map of flattened patches to the equivalent convolution."""
    key = "patch_embed.proj.weight"
    weight = tensors[key]
    dim, size = weight.shape if len(weight.shape) == 2 else (0, 0)
    side = round((size / 3) ** 0.5)
    if not size or 3 * side * side != size:
        raise InputError(f"{key} has shape {list(weight.shape)}, not that of square patches")
    tensors[key] = transposed(reshaped(weight, (dim, side, side, 3)), (0, 3, 1, 2))
    return _siglip(tensors)


def _hf_dinov2(tensors: Tensors) -> Tensors:
    return _without_class_position(_fused(_joined(tensors, "fc1", 2)))


def _hf_dinov3(tensors: Tensors) -> Tensors:
    registers = tensors.get("reg_token")
    if registers is not None and registers.shape[1:2] == (0,):
        del tensors["reg_token"]  # for a model without registers
    found: Tensors = {}
    for key, tensor in tensors.items():
        match = re.fullmatch(r"(.*)qkv\.([02])\.bias", key)
        found[f"{match[1]}{'qkv'[int(match[2])]}_bias" if match else key] = tensor
    return _fused(found)


# Names of parts of a block that several models of transformers share: first those of version 4 and
# of files of version 5, then the module names of version 5.
_BLOCK = r"(?:encoder\.|model\.)?layers?\.(\d+)\."
_QKV: Rules = tuple(
    (
        rf"{_BLOCK}(?:attention\.attention|attention|self_attn)\.{name}(?:_proj)?\.(weight|bias)",
        rf"blocks.\1.attn.qkv.{number}.\2",
    )
    for number, names in enumerate((("query", "q"), ("key", "k"), ("value", "v")))
    for name in names
)
_OUT = rf"{_BLOCK}(?:attention\.output\.dense|attention\.o_proj|self_attn\.out_proj)\.(weight|bias)"
_BLOCKS: Rules = (
    *_QKV,
    (_OUT, r"blocks.\1.attn.proj.\2"),
    (rf"{_BLOCK}(?:layernorm_before|layer_norm1|norm1)\.(weight|bias)", r"blocks.\1.norm1.\2"),
    (rf"{_BLOCK}(?:layernorm_after|layer_norm2|norm2)\.(weight|bias)", r"blocks.\1.norm2.\2"),
    (rf"{_BLOCK}(?:intermediate\.dense|mlp\.fc1)\.(weight|bias)", r"blocks.\1.mlp.fc1.\2"),
    (rf"{_BLOCK}(?:output\.dense|mlp\.fc2)\.(weight|bias)", r"blocks.\1.mlp.fc2.\2"),
)
_EMBEDDINGS: Rules = (
    (r"embeddings\.cls_token", "cls_token"),
    (r"embeddings\.distillation_token", "dist_token"),
    (r"embeddings\.register_tokens", "reg_token"),
    (r"embeddings\.position_embeddings", "pos_embed"),
    (
        r"embeddings\.patch_embeddings\.(?:projection\.)?(weight|bias)",
        r"patch_embed.proj.\1",
    ),
    (r"(?:layernorm|norm)\.(weight|bias)", r"norm.\1"),
)
_HF_DINOV2: Rules = (
    *_EMBEDDINGS,
    *_BLOCKS,
    (rf"{_BLOCK}layer_scale([12])\.lambda1", r"blocks.\1.ls\2.gamma"),
    (rf"{_BLOCK}mlp\.weights_in\.(weight|bias)", r"blocks.\1.mlp.fc1.\2"),
    (rf"{_BLOCK}mlp\.(?:weights_out|down_proj)\.(weight|bias)", r"blocks.\1.mlp.fc2.\2"),
    (rf"{_BLOCK}mlp\.gate_proj\.(weight|bias)", r"blocks.\1.mlp.fc1.0.\2"),
    (rf"{_BLOCK}mlp\.up_proj\.(weight|bias)", r"blocks.\1.mlp.fc1.1.\2"),
)
_HF_DINOV3: Rules = (
    *_EMBEDDINGS,
    *_BLOCKS,
    (rf"{_BLOCK}layer_scale([12])\.lambda1", r"blocks.\1.gamma_\2"),
    (rf"{_BLOCK}mlp\.gate_proj\.(weight|bias)", r"blocks.\1.mlp.fc1_g.\2"),
    (rf"{_BLOCK}mlp\.down_proj\.(weight|bias)", r"blocks.\1.mlp.fc2.\2"),
)
_PLAIN_MLP = ((rf"{_BLOCK}mlp\.up_proj\.(weight|bias)", r"blocks.\1.mlp.fc1.\2"),)
_GATED_MLP = ((rf"{_BLOCK}mlp\.up_proj\.(weight|bias)", r"blocks.\1.mlp.fc1_x.\2"),)
_HF_CLIP: Rules = (
    *_BLOCKS,
    (r"embeddings\.class_embedding", "cls_token"),
    (r"embeddings\.position_embedding\.weight", "pos_embed"),
    (r"embeddings\.patch_embedding\.(weight|bias)", r"patch_embed.proj.\1"),
    (r"pre_layrnorm\.(weight|bias)", r"norm_pre.\1"),
    (r"post_layernorm\.(weight|bias)", r"norm.\1"),
    (r"head\.probe", "attn_pool.latent"),
    (r"head\.attention\.(in_proj_weight|in_proj_bias)", r"attn_pool.\1"),
    (r"head\.attention\.out_proj\.(weight|bias)", r"attn_pool.proj.\1"),
    (r"head\.layernorm\.(weight|bias)", r"attn_pool.norm.\1"),
    (r"head\.mlp\.(fc[12])\.(weight|bias)", r"attn_pool.mlp.\1.\2"),
)
_RESBLOCK = r"transformer\.resblocks\.(\d+)\."
_OPEN_CLIP: Rules = (
    (r"class_embedding", "cls_token"),
    (r"positional_embedding", "pos_embed"),
    (r"conv1\.(weight|bias)", r"patch_embed.proj.\1"),
    (r"ln_pre\.(weight|bias)", r"norm_pre.\1"),
    (r"ln_post\.(weight|bias)", r"norm.\1"),
    (rf"{_RESBLOCK}ln_([12])\.(weight|bias)", r"blocks.\1.norm\2.\3"),
    (rf"{_RESBLOCK}ls_([12])\.gamma", r"blocks.\1.ls\2.gamma"),
    (rf"{_RESBLOCK}attn\.in_proj_(weight|bias)", r"blocks.\1.attn.qkv.\2"),
    (rf"{_RESBLOCK}attn\.out_proj\.(weight|bias)", r"blocks.\1.attn.proj.\2"),
    (rf"{_RESBLOCK}mlp\.c_fc\.(weight|bias)", r"blocks.\1.mlp.fc1.\2"),
    (rf"{_RESBLOCK}mlp\.c_proj\.(weight|bias)", r"blocks.\1.mlp.fc2.\2"),
)
_CHUNKED: Rules = (
    (r"register_tokens", "reg_token"),
    (r"blocks\.\d+\.(\d+)\.mlp\.w12\.(.*)", r"blocks.\1.mlp.fc1.\2"),
    (r"blocks\.\d+\.(\d+)\.mlp\.w3\.(.*)", r"blocks.\1.mlp.fc2.\2"),
    (r"blocks\.(\d+)\.mlp\.w12\.(.*)", r"blocks.\1.mlp.fc1.\2"),
    (r"blocks\.(\d+)\.mlp\.w3\.(.*)", r"blocks.\1.mlp.fc2.\2"),
    (r"blocks\.\d+\.(\d+)\.(.*)", r"blocks.\1.\2"),
)
_META_DINOV3: Rules = (
    (r"storage_tokens", "reg_token"),
    (r"blocks\.(\d+)\.ls([12])\.gamma", r"blocks.\1.gamma_\2"),
    (r"blocks\.(\d+)\.mlp\.w1\.(.*)", r"blocks.\1.mlp.fc1_g.\2"),
    (r"blocks\.(\d+)\.mlp\.w2\.(.*)", r"blocks.\1.mlp.fc1_x.\2"),
    (r"blocks\.(\d+)\.mlp\.w3\.(.*)", r"blocks.\1.mlp.fc2.\2"),
)

# Flax's names, as the ViT and augreg releases have them.
_FLAX_BLOCK = r"Transformer/encoderblock_(\d+)/"
_FLAX_ATTENTION = rf"{_FLAX_BLOCK}MultiHeadDotProductAttention_\d/"
_FLAX: Rules = (
    (r"cls", "cls_token"),
    (r"(?:Transformer/posembed_input/)?pos_embedding", "pos_embed"),
    (r"embedding/(kernel|bias)", r"patch_embed.proj.\1"),
    (r"Transformer/encoder_norm/(scale|bias)", r"norm.\1"),
    (rf"{_FLAX_BLOCK}LayerNorm_0/(scale|bias)", r"blocks.\1.norm1.\2"),
    (rf"{_FLAX_BLOCK}LayerNorm_[12]/(scale|bias)", r"blocks.\1.norm2.\2"),
    (rf"{_FLAX_BLOCK}MlpBlock_\d/Dense_0/(kernel|bias)", r"blocks.\1.mlp.fc1.\2"),
    (rf"{_FLAX_BLOCK}MlpBlock_\d/Dense_1/(kernel|bias)", r"blocks.\1.mlp.fc2.\2"),
    (rf"{_FLAX_ATTENTION}query/(kernel|bias)", r"blocks.\1.attn.qkv.0.\2"),
    (rf"{_FLAX_ATTENTION}key/(kernel|bias)", r"blocks.\1.attn.qkv.1.\2"),
    (rf"{_FLAX_ATTENTION}value/(kernel|bias)", r"blocks.\1.attn.qkv.2.\2"),
    (rf"{_FLAX_ATTENTION}out/(kernel|bias)", r"blocks.\1.attn.proj.\2"),
    (r"head/(kernel|bias)", r"head.\1"),
)


def _flax(tensors: Tensors) -> Tensors:
    """Converts kernels to PyTorch's layout."""
    found: Tensors = {}
    for key, tensor in tensors.items():
        stem, _, name = key.rpartition(".")
        if name == "scale":
            found[f"{stem}.weight"] = tensor
        elif name == "kernel":
            found[f"{stem}.weight"] = _flax_kernel(stem, tensor)
        elif name == "bias" and len(tensor.shape) == 2:  # axes: heads, channels
            found[key] = reshaped(tensor, (tensor.shape[0] * tensor.shape[1],))
        else:
            found[key] = tensor
    return _fused(found)


def _flax_kernel(stem: str, kernel: StoredTensor) -> StoredTensor:
    shape = kernel.shape
    if len(shape) == 4:
        return transposed(kernel, (3, 2, 0, 1))
    if len(shape) == 3 and stem.endswith("attn.proj"):  # heads, channels, out
        kernel = reshaped(kernel, (shape[0] * shape[1], shape[2]))
    elif len(shape) == 3:  # in, heads, channels
        kernel = reshaped(kernel, (shape[0], shape[1] * shape[2]))
    return transposed(kernel, (1, 0))


_PROJ = "patch_embed.proj.weight"
_HF_PROJ = "embeddings.patch_embeddings.projection.weight"
_HF_CONV = "embeddings.patch_embedding.weight"
_HF_DROPPED = rf"embeddings\.mask_token|pooler\..*|{_COUNTERS}"
_CLASSIFIER = {f"classifier.{kind}": f"head.{kind}" for kind in ("weight", "bias")}

# The first matching format is used; timm's own names are the last with their root.
FORMATS = (
    Format(
        "Meta's DINOv3",
        _PROJ,
        (rf"storage_tokens|{re.escape(PERIODS)}",),
        rules=_META_DINOV3,
        dropped=rf"local_cls_norm\..*|{_PRETRAINING}",
        finish=_meta_dinov3,
    ),
    Format(
        "Meta's DINOv2",
        _PROJ,
        (r"register_tokens|blocks\.\d+\.\d+\..*|.*\.mlp\.w12\..*",),
        rules=_CHUNKED,
        dropped=_PRETRAINING,
        finish=_without_class_position,
    ),
    Format("Meta's DINOv2", _PROJ, ("mask_token", r"blocks\.0\.ls1\.gamma"), dropped=_PRETRAINING),
    Format("MAE", _PROJ, (r"decoder_(?:embed|pred)\..*",), dropped=_PRETRAINING),
    Format("iBOT", _PROJ, ("masked_embed",), dropped=_PRETRAINING),
    Format("", _PROJ, dropped=_HEADS),
    Format(
        "transformers' DeiTModel",
        _HF_PROJ,
        (r"embeddings\.distillation_token",),
        rules=(*_EMBEDDINGS, *_BLOCKS),
        dropped=_HF_DROPPED,
        beside=_CLASSIFIER
        | {f"cls_classifier.{kind}": f"head.{kind}" for kind in ("weight", "bias")}
        | {f"distillation_classifier.{kind}": f"head_dist.{kind}" for kind in ("weight", "bias")},
        finish=_fused,
    ),
    Format(
        "transformers' Dinov2WithRegistersModel",
        _HF_PROJ,
        (r"embeddings\.register_tokens", r".*layer_scale1\.lambda1"),
        rules=_HF_DINOV2,
        dropped=_HF_DROPPED,
        finish=_hf_dinov2,
    ),
    Format(
        "transformers' Dinov2Model",
        _HF_PROJ,
        (r".*layer_scale1\.lambda1",),
        rules=_HF_DINOV2,
        dropped=_HF_DROPPED,
        finish=_hf_dinov2,
    ),
    Format(
        "transformers' ViTModel",
        _HF_PROJ,
        (r"embeddings\.position_embeddings", r".*layernorm_before\.weight"),
        never=r".*\.lambda_1",
        rules=(*_EMBEDDINGS, *_BLOCKS),
        dropped=_HF_DROPPED,
        beside=_CLASSIFIER,
        finish=_fused,
    ),
    Format(
        "transformers' DINOv3ViTModel",
        "embeddings.patch_embeddings.weight",
        (r".*layer_scale1\.lambda1", r".*mlp\.gate_proj\.weight"),
        rules=(*_HF_DINOV3, *_GATED_MLP),
        dropped=_HF_DROPPED,
        finish=_hf_dinov3,
    ),
    Format(
        "transformers' DINOv3ViTModel",
        "embeddings.patch_embeddings.weight",
        (r".*layer_scale1\.lambda1",),
        rules=(*_HF_DINOV3, *_PLAIN_MLP),
        dropped=_HF_DROPPED,
        finish=_hf_dinov3,
    ),
    Format(
        "transformers' CLIPVisionModel",
        _HF_CONV,
        (r"embeddings\.class_embedding", r"pre_layrnorm\.weight"),
        rules=_HF_CLIP,
        dropped=r"embeddings\.position_ids",
        beside={"visual_projection.weight": "head.weight"},
        finish=_clip,
    ),
    Format(
        "transformers' SiglipVisionModel",
        _HF_CONV,
        (r"embeddings\.position_embedding\.weight", r"post_layernorm\.weight"),
        never=r"embeddings\.class_embedding",
        rules=_HF_CLIP,
        dropped=r"embeddings\.position_ids",
        finish=_siglip,
    ),
    Format(
        "open_clip's visual tower",
        "conv1.weight",
        ("class_embedding", r"transformer\.resblocks\.0\.attn\.in_proj_weight"),
        rules=_OPEN_CLIP,
        finish=_open_clip,
    ),
    Format(
        "the Flax release of ViT",
        "embedding/kernel",
        (r"pre_logits/.*",),
        rules=_FLAX,
        # The head of a model with a representation layer does not read the pooled features.
        dropped=r"(?:pre_logits|head)/.*",
        finish=_flax,
    ),
    Format(
        "the Flax release of ViT",
        "embedding/kernel",
        rules=_FLAX,
        finish=_flax,
    ),
)
_SIGLIP2 = Format(
    "transformers' Siglip2VisionModel",
    _HF_CONV,
    rules=_HF_CLIP,
    dropped=r"embeddings\.position_ids",
    finish=_siglip2,
)

_MOST_MODELS = 16  # keys of both towers in one state dict

# Models that are not vision transformers of timm, by a characteristic key.
_LOOKS = (
    (r".*layer1\.0\.conv1\.weight", "a ResNet's"),
    (r".*relative_position_bias_table", "a Swin's or BEiT's"),
    (r".*conv_proj\.weight", "torchvision's VisionTransformer's"),
    (r".*stages\.0\.(?:blocks|layers)\.0\..*", "a ConvNeXt's"),
    (r".*backbone\..*", "a DINO training's"),
    (r".*embeddings\.patch_embeddings?\..*", "another model's of transformers"),
)


def recognise(where: object, tensors: Mapping[str, StoredTensor]) -> list[tuple[str, Format]]:
    """Returns the formats of a state dict, each with the prefix under which its keys lie.

    Args:
      where: the file, for messages.
      tensors: the state dict.

    Raises:
      InputError: more models than a state dict has.
    """
    roots = {form.root for form in FORMATS}
    prefixes = dict.fromkeys(
        prefix
        for key in tensors
        for root in roots
        if (prefix := key.removesuffix(root)) != key and (not prefix or prefix[-1] in "./")
    )
    if len(prefixes) > _MOST_MODELS:
        raise InputError(f"{where}: {len(prefixes)} models in one state dict; give a file of one")
    found: list[tuple[str, Format]] = []
    for prefix in prefixes:
        bare = {key.removeprefix(prefix): key for key in tensors if key.startswith(prefix)}
        for form in FORMATS:
            if form.root in bare and form.matches(bare):
                flat = len(tensors[bare[form.root]].shape) == 2
                flat = flat and form.name.endswith("SiglipVisionModel")
                found.append((prefix, _SIGLIP2 if flat else form))
                break
    return found


def looks(keys: Iterable[str]) -> str:
    """Returns a phrase on the library that the keys seem to come from; empty: unknown."""
    keys = list(keys)
    for pattern, owner in _LOOKS:
        if any(re.fullmatch(pattern, key) for key in keys):
            return f"they look like {owner}"
    return ""


def convert(
    where: object, tensors: Mapping[str, StoredTensor], prefix: str, form: Format | None
) -> tuple[Tensors, list[str]]:
    """Returns the tensors under timm's keys, and the keys that are left out.

    Args:
      where: file that is named in errors.
      tensors: tensors by the keys of the file.
      prefix: prefix of the model's keys.
      form: format of the keys; None: unknown, and the keys are not renamed.

    Raises:
      InputError: a tensor does not have the shape of the format, or two have the same name.
    """
    if form is None:
        return dict(tensors), []
    found: Tensors = {}
    left_out = []
    for key, tensor in tensors.items():
        bare = key.removeprefix(prefix)
        if not key.startswith(prefix):
            bare = form.beside.get(key.removeprefix(_outer(prefix)), "")
            name = bare
        elif re.fullmatch(form.dropped, bare):
            name = ""
        else:
            name = _renamed(bare, form.rules)
        if not name:
            left_out.append(key)
        elif name in found:
            raise InputError(f"{where}: {form.name} with two tensors for {listed([name])}")
        else:
            found[name] = tensor
    try:
        return form.finish(found), left_out
    except InputError as error:
        raise InputError(f"{where}, {form.name or 'a timm model'}: {error}") from error


def _outer(prefix: str) -> str:
    """Returns the outer prefix (`module.vit.` -> `module.`), where a wrapper's head is found."""
    return prefix.removesuffix(".").rpartition(".")[0] + "." if prefix.count(".") > 1 else ""


def _renamed(key: str, rules: Rules) -> str:
    for pattern, replacement in rules:
        if match := re.fullmatch(pattern, key):
            return match.expand(replacement)
    return key
