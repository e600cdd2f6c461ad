"""Reads timm weights into a model.

A timm key and an NNX path differ by one rule: timm's `weight` is `kernel` (linear: transposed,
convolution: HWIO) or `scale` (LayerNorm). A process reads only the parts of each tensor that its
devices hold, and converts them directly to their sharding and dtype. Host memory never holds a
complete model.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array

from singer_jax.errors import InputError, listed
from singer_jax.io import limits
from singer_jax.models import foreign
from singer_jax.models.architecture import Architecture, ComputePolicy
from singer_jax.models.families import VARIANTS
from singer_jax.models.layers import NUM_CLASS_DISTANCES
from singer_jax.models.params import Keys, Params, from_leaves, leaves, split
from singer_jax.models.positions import resample_relative_positions
from singer_jax.models.quantised import fp8_scales
from singer_jax.models.state_dict import StateDict
from singer_jax.models.timm_arguments import current_names, stated_fields
from singer_jax.models.vit import VisionTransformer
from singer_jax.models.weight_files import (
    WeightsFile,
    open_weights,
    read_hub_config,
    read_input,
)
from singer_jax.models.zoo import ModelSpec, lookup
from singer_jax.platform.backends import Choices

_LOG = logging.getLogger("singer_jax")

# Limits of a model in a config.json; published models have up to 64 blocks and 4,096 patches.
_MOST_BLOCKS, _MOST_PATCHES = 100, 2**14
_MOST_NAMED = 5  # keys named in a message
_LONGEST_MESSAGE = 200  # characters of a message, without the folder of the file
_MOST_MISSING_BLOCKS = 24  # number of keys up to which all are named

_SCALES = "scales"  # name of the leaves that are computed, not read


def abstract_model(arch: Architecture, policy: ComputePolicy) -> tuple[nnx.GraphDef, Params]:
    """Returns a graph definition and parameters as `jax.ShapeDtypeStruct`s, without allocation."""
    graph, params = _abstract_model(arch, policy, policy.choices)
    return graph, jax.tree.map(lambda leaf: leaf, params)  # copied, so that callers can change it


@functools.lru_cache(maxsize=32)
def _abstract_model(
    arch: Architecture, policy: ComputePolicy, choices: Choices
) -> tuple[nnx.GraphDef, Params]:
    """Computes and caches the result of `abstract_model`, which is needed several times."""
    graph, state = nnx.split(
        nnx.eval_shape(
            lambda: VisionTransformer(arch, policy, rngs=_SingleKeyRngs(jax.random.key(0)))
        )
    )
    return graph, nnx.to_pure_dict(state)


class _SingleKeyRngs(NamedTuple):
    """Replacement of `nnx.Rngs`, whose counters take most of the time of a trace."""

    key: jax.Array

    def params(self) -> jax.Array:
        """Returns the same key for every parameter, because only shapes are needed."""
        return self.key


@functools.lru_cache(maxsize=32)
def abstract_params(arch: Architecture) -> Params:
    """Returns only the parameters of `abstract_model`, in float32 and not stacked.

    Only one block of each kind is traced, because the others have equal shapes.
    """
    kinds = [(number,) for number in arch.num_kv_heads or ()] or [None] * arch.depth
    of_kind = {
        kind: abstract_model(
            dataclasses.replace(arch, depth=1, synthetic_outlier_after=0, num_kv_heads=kind),
            ComputePolicy(),
        )[1]
        for kind in dict.fromkeys(kinds)
    }
    params = dict(of_kind[kinds[0]])
    params["blocks"] = {i: of_kind[kind]["blocks"][0] for i, kind in enumerate(kinds)}
    if "rope" in params:  # the frequencies of all blocks
        freqs = params["rope"]["freqs"]
        shape = (2, arch.depth, *freqs.shape[2:])
        params["rope"] = {"freqs": jax.ShapeDtypeStruct(shape, freqs.dtype)}
    return params


def timm_key(keys: Keys) -> str:
    """Returns the timm state-dict key of a parameter."""
    *parents, name = map(str, keys)
    return ".".join([*parents, "weight" if name in ("kernel", "scale") else name])


def timm_axes(keys: Keys, leaf: Any) -> tuple[int, ...]:
    """Returns the axes of a JAX parameter in the order in which PyTorch stores them."""
    if keys[-1] != "kernel":
        return tuple(range(leaf.ndim))
    return {2: (1, 0), 4: (3, 2, 0, 1)}[leaf.ndim]


def to_timm(params: Params) -> dict[str, np.ndarray]:
    """Returns parameters (or gradients) as a timm state dict: timm's keys, PyTorch's layouts."""
    return {
        timm_key(keys): np.ascontiguousarray(np.asarray(leaf).transpose(timm_axes(keys, leaf)))
        for keys, leaf in leaves(params)
    }


def spec_of_weights(spec: ModelSpec, weights: Path | WeightsFile) -> ModelSpec:
    """Returns `spec` updated with the properties of a weights file.

    The number of classes is that of the file's head. The input statistics, interpolation and crop
    come from a `config.json` in the same folder (timm's or transformers' layout), if there is one.
    """
    head = open_weights(weights).get("head.weight")
    # `check_weights` reports a head whose shape is not [classes, dim].
    arch = dataclasses.replace(spec.arch, num_classes=head.shape[0] if head and head.shape else 0)
    stated = read_input(_path(weights).parent)
    return dataclasses.replace(_with_input(spec, stated), arch=arch)


def _with_input(spec: ModelSpec, stated: Mapping[str, Any]) -> ModelSpec:
    """Returns `spec` with the input settings that timm's `pretrained_cfg` contains."""
    keys = ("mean", "std", "interpolation", "crop_pct")
    found = {key: stated[key] for key in keys if stated.get(key) is not None}
    return dataclasses.replace(
        spec, **{key: tuple(x) if isinstance(x, list) else x for key, x in found.items()}
    )


def _path(weights: Path | WeightsFile) -> Path:
    return weights.path if isinstance(weights, WeightsFile) else weights


def load_model(
    spec: ModelSpec,
    weights: Path | WeightsFile,
    policy: ComputePolicy = ComputePolicy(),
    shardings: Callable[[Params], Params] | None = None,
) -> tuple[nnx.GraphDef, Params]:
    """Loads a model with the weights of a file.

    Args:
      spec: specification of the model; `spec_of_weights` adapts it to the file's head and
        statistics.
      weights: a file that `weight_files.find_weights` returns, or a part of it.
      policy: dtypes of the model; weights are cast to `param_dtype`.
      shardings: function from abstract parameters to their shardings; default: one device.

    Returns:
      Graph definition and parameters; `nnx.merge` of the two is the `VisionTransformer`.

    Raises:
      InputError: keys are missing, unexpected or have another shape, or a tensor is not finite. The
        message names the first keys and the number of the others.
    """
    check_weights(spec, weights)
    graph, abstract = abstract_model(spec.arch, policy)
    tensors = model_tensors(spec, weights)
    placement = dict(leaves(shardings(abstract))) if shardings else {}

    def read(keys: Keys, shape: tuple[int, ...], part: tuple[slice, ...]) -> np.ndarray:
        tensor = tensors[timm_key(keys)]
        axes = timm_axes(keys, jax.ShapeDtypeStruct(shape, tensor.dtype))
        stored = tuple(part[axis] for axis in axes)
        if tuple(tensor.shape) != shape and keys[-1] in _RESAMPLED:
            array = _resampled(keys[-1], tensor.read(), spec)[stored]
        else:
            array = tensor.read(stored)
        return array.transpose(np.argsort(axes))

    def load(keys: Keys, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        found: dict[Any, np.ndarray] = {}

        def part_of(part: tuple[slice, ...]) -> np.ndarray:
            place = tuple((along.start, along.stop) for along in part)
            if place not in found:  # a part that several devices hold is read once
                if policy.stacked and keys[0] == "blocks":
                    blocks = range(spec.arch.depth)[part[0]]
                    each = [("blocks", index, *keys[1:]) for index in blocks]
                    array = np.stack([read(one, leaf.shape[1:], part[1:]) for one in each])
                else:
                    array = read(keys, leaf.shape, part)
                found[place] = np.ascontiguousarray(array.astype(leaf.dtype))
                _check_finite(_path(weights), keys, found[place])
            return found[place]

        if not placement:
            return jnp.asarray(part_of((slice(None),) * leaf.ndim))
        # device_put would compare the values across processes.
        return jax.make_array_from_callback(leaf.shape, placement[keys], part_of, leaf.dtype)

    stored = {keys: leaf for keys, leaf in leaves(abstract) if keys[-1] != _SCALES}
    params = from_leaves({keys: load(keys, leaf) for keys, leaf in stored.items()})
    return graph, with_scales(params, abstract, placement)


def without_scales(params: Params) -> Params:
    """Returns parameters without the scales of fp8 matmuls."""
    return split(params, lambda keys: keys[-1] != _SCALES)[0]


def with_scales(
    params: Params, abstract: Params, placement: Mapping[Keys, jax.sharding.Sharding] = {}
) -> Params:
    """Returns parameters with the scales of fp8 matmuls.

    Args:
      params: parameters of a model, with or without scales.
      abstract: abstract parameters of the model (`abstract_model`). A model without fp8 matmuls
        has no scales.
      placement: shardings by path; default: one device.
    """
    places = [keys for keys, _ in leaves(abstract) if keys[-1] == _SCALES]
    if not places:
        return params

    def computed(stored: dict[Keys, Array]) -> list[Array]:
        found = []
        for *block, branch, name, _ in places:
            norm = (*block, "norm1" if branch == "attn" else "norm2")
            kernel = stored[*block, branch, name, "kernel"]
            found.append(fp8_scales(kernel, stored[*norm, "scale"], stored.get((*norm, "bias"))))
        return found

    stored = dict(leaves(params))
    shardings = [placement[keys] for keys in places] if placement else None
    scales = jax.jit(computed, out_shardings=shardings)(stored)
    return from_leaves(stored | dict(zip(places, scales, strict=True)))


def _check_finite(path: Path, keys: Keys, array: np.ndarray) -> None:
    finite = np.isfinite(array)
    if not finite.all():
        count = finite.size - np.count_nonzero(finite)
        raise InputError(
            f"{path}: {timm_key(keys)} has {count:,} NaN or infinite values of {finite.size:,}; "
            "the weights are damaged or diverged"
        )


def check_weights(spec: ModelSpec, weights: Path | WeightsFile) -> None:
    """Raises the errors of `load_model` for keys and shapes without reading any tensor."""
    tensors, path = model_tensors(spec, weights), _path(weights)
    # Checked first, because tracing a model of a hundred blocks takes minutes.
    blocks = len({key.split(".")[1] for key in tensors if key.startswith("blocks.")})
    if spec.arch.depth - blocks > _MOST_MISSING_BLOCKS:
        raise InputError(
            f"{_unfit(spec, path, tensors)}: it has {blocks} blocks, expected {spec.arch.depth}"
        )
    _check_keys(spec, path, abstract_params(spec.arch), tensors)


def _unfit(spec: ModelSpec, path: Path, tensors: StateDict) -> str:
    """Returns the beginning of an error message for weights of another model."""
    form = tensors.taken.format
    return f"{path}{f', of {form},' if form else ''} does not hold the weights of {spec.name}"


def model_tensors(spec: ModelSpec, weights: Path | WeightsFile) -> StateDict:
    """Returns the tensors of a file under the keys of timm's model, old ones renamed as by timm.

    Raises:
      InputError: as `open_weights`; rotary positions of another head width.
    """
    opened = open_weights(weights)
    tensors = current_names(opened, spec.arch)
    tensors.pop("mask_token", None)  # of training to reconstruct
    _check_periods(spec, _path(weights), tensors)
    tensors = _without_zero_biases(spec, StateDict(tensors, opened.taken, opened.unread))
    kept = {id(tensor) for tensor in tensors.values()}
    left_out = tuple(key for key, tensor in opened.items() if id(tensor) not in kept)
    taken = opened.taken
    taken = dataclasses.replace(taken, left_out=(*taken.left_out, *left_out))
    return StateDict(tensors, taken, opened.unread)


def _check_periods(spec: ModelSpec, path: Path, tensors: dict[str, Any]) -> None:
    """Takes away the periods of DINOv3's rotary positions, which follow from the head width."""
    arch = spec.arch
    if arch.rope_type != "dinov3" or (periods := tensors.pop(foreign.PERIODS, None)) is None:
        return
    expected = arch.embed_dim // arch.num_heads // 4
    if math.prod(periods.shape) != expected:
        raise InputError(
            f"{path}: {foreign.PERIODS} has {math.prod(periods.shape)} values, {spec.name} with "
            f"{arch.num_heads} heads {expected}; try overrides num_heads"
        )


def _without_zero_biases(spec: ModelSpec, tensors: StateDict) -> StateDict:
    """Removes DINOv3's query and value biases for a model without them, if all are zero."""
    biases = [key for key in tensors if re.fullmatch(r"blocks\.\d+\.attn\.[qv]_bias", key)]
    if spec.arch.qkv_bias or not biases or not tensors.taken.format:
        return tensors
    if any(np.any(tensors[key].read() != 0) for key in biases):
        return tensors
    kept = {key: tensor for key, tensor in tensors.items() if key not in biases}
    return StateDict(kept, tensors.taken, tensors.unread)


def _check_keys(spec: ModelSpec, path: Path, abstract: Params, tensors: StateDict) -> None:
    expected = {
        timm_key(keys): tuple(leaf.shape[axis] for axis in timm_axes(keys, leaf))
        for keys, leaf in leaves(abstract)
    }
    missing = [key for key in expected if key not in tensors]
    surplus = [key for key in tensors if key not in expected]
    if unread := [key for key in missing if key in tensors.unread]:
        raise InputError(
            f"{path}: {listed(unread[:1])} is {tensors.unread[unread[0]]}, which is unsupported; "
            "save plain float tensors"
        )
    if len(missing) == len(expected):
        raise InputError(_foreign_keys(spec, path, tensors))
    mis_shaped = [
        f"{key} is {list(tensors[key].shape)}, expected {list(shape)}"
        for key, shape in expected.items()
        if key in tensors
        and tuple(tensors[key].shape) != shape
        and not _can_resample(key, tensors[key].shape, spec.arch)
    ]
    integers = [
        f"{key} is {tensors[key].dtype}"
        for key in expected
        if key in tensors and not _is_float(tensors[key].dtype)
    ]
    found = {
        "missing": missing,
        "surplus": surplus,
        "mis-shaped": mis_shaped,
        "not floats of 16 bits or more": integers,
    }
    if any(found.values()):
        problem, hint = _unfit(spec, path, tensors), _hint(missing, surplus)
        room = _LONGEST_MESSAGE - (len(problem) + len(hint) - len(str(path.parent)))
        raise InputError(f"{problem}: {_differences(found, room)}{hint}")


def _is_float(dtype: np.dtype) -> bool:
    """Says that numbers are weights: those of 8 bits need scales, and no file's scales are read."""
    return jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize > 1


# Overrides of a model for weights that lack some keys, or have others.
_MISSING_HINTS = (
    (r"cls_token", "class_token=False, global_pool='avg'"),
    (r"blocks\.0\.attn\.qkv\.bias", "qkv_bias=False"),
)
_SURPLUS_HINTS = (
    (r"fc_norm\.weight", "fc_norm=True, global_pool='avg'"),
    (r"head_dist\.weight", "distilled=True"),
    (r"blocks\.0\.ls1\.gamma", "init_values=1e-5"),
)
_EXPLAINED = r"cls_token|norm\.(?:weight|bias)|.*\.qkv\.bias"


def _hint(missing: list[str], surplus: list[str]) -> str:
    """Returns a hint with the overrides that the differences suggest; empty: no hint."""
    suggested = [
        override
        for hints, keys in ((_MISSING_HINTS, missing), (_SURPLUS_HINTS, surplus))
        for pattern, override in hints
        if any(re.fullmatch(pattern, key) for key in keys)
    ]
    # If other keys are missing, no override helps.
    explained = all(re.fullmatch(_EXPLAINED, key) for key in missing)
    return f"; try overrides {', '.join(suggested)}" if suggested and explained else ""


def _differences(found: Mapping[str, list[str]], room: int) -> str:
    """Returns the first keys of each kind and the number of the others.

    Args:
      found: keys by kind of difference.
      room: number of characters; at most five keys are named, or as many as fit.
    """
    for most in range(_MOST_NAMED, 0, -1):
        text = _first_differences(found, most)
        if len(text) <= room:
            break
    return text


def _first_differences(found: Mapping[str, list[str]], most: int) -> str:
    kinds = [kind for kind in found if found[kind]]
    left, shares = most, dict.fromkeys(kinds, 0)
    for kind in kinds * most:
        if left and shares[kind] < len(found[kind]):
            shares[kind], left = shares[kind] + 1, left - 1
    named = {kind: listed(found[kind], shares[kind]) for kind in kinds if shares[kind]}
    return "; ".join(f"{kind}: {named.get(kind, len(found[kind]))}" for kind in kinds)


def _foreign_keys(spec: ModelSpec, path: Path, tensors: StateDict) -> str:
    """Returns the error message for weights without any timm key."""
    keys = list(tensors)
    begins = sorted({key.split(".")[0] + "." if "." in key else key for key in keys})
    text = f"{path} holds no weights of {spec.name}: its {len(keys)} keys begin with "
    return text + listed(begins, 3) + (f"; {whose}" if (whose := foreign.looks(keys)) else "")


# Parameters of a square grid of patches, which can be resampled to another grid.
_RESAMPLED = ("pos_embed", "relative_position_bias_table")


def _can_resample(key: str, shape: tuple[int, ...], arch: Architecture) -> bool:
    """Returns whether a tensor is in `_RESAMPLED`, with a square grid and the right width."""
    if key == "pos_embed" and len(shape) == 3 and (shape[0], shape[2]) == (1, arch.embed_dim):
        places = shape[1] - arch.num_embedded_prefix_tokens
    elif key.endswith("relative_position_bias_table") and shape[1:] == (arch.num_heads,):
        places = shape[0] - NUM_CLASS_DISTANCES
    else:
        return False
    side = math.isqrt(max(places, 0))
    # A table has an odd side: as many distances before a patch as behind it, and none.
    return places > 0 and side**2 == places and (key == "pos_embed" or side % 2 == 1)


def _resampled(name: str, stored: np.ndarray, spec: ModelSpec) -> np.ndarray:
    """Returns a tensor of `_RESAMPLED`, resampled to the model's grid."""
    arch = spec.arch
    if name == "pos_embed":
        prefix = arch.num_embedded_prefix_tokens
        return resample_pos_embed(stored, arch.grid, prefix, spec.resampling)
    return resample_relative_positions(stored, arch.grid, NUM_CLASS_DISTANCES)


def resample_pos_embed(
    pos_embed: np.ndarray, grid: tuple[int, int], num_prefix_tokens: int, method: str = "bicubic"
) -> np.ndarray:
    """Resamples position embeddings of a square grid to another grid.

    Args:
      pos_embed: [1, prefix + side * side, dim].
      grid: rows and columns to resample to.
      num_prefix_tokens: number of leading positions that are not patches; they are kept.
      method: `bicubic` (Keys, a = -0.5, antialiased, weights renormalised at the edges),
        `bilinear` (not antialiased; FlexiViT, RADIO) or `bilinear_corners` (from the first patch
        to the last).

    Returns:
      [1, prefix + rows * columns, dim] in the dtype of `pos_embed`.
    """
    prefix, patches = np.split(pos_embed, [num_prefix_tokens], axis=1)
    side, dim = math.isqrt(patches.shape[1]), patches.shape[2]
    if method == "bicubic":
        image = jnp.asarray(patches, jnp.float32).reshape(1, side, side, dim)
        image = jax.image.resize(
            image, (1, *grid, dim), "cubic", antialias=True, precision=jax.lax.Precision.HIGHEST
        )
    else:
        image = patches.astype(np.float32).reshape(side, side, dim)
        for axis, size in enumerate(grid):
            weights = _linear_weights(side, size, corners=method == "bilinear_corners")
            image = np.moveaxis(np.tensordot(weights, image, (1, axis)), 0, axis)
    patches = np.asarray(image, pos_embed.dtype).reshape(1, -1, dim)
    return np.concatenate([prefix, patches], axis=1)


def _linear_weights(stored: int, wanted: int, corners: bool) -> np.ndarray:
    """Returns the matrix [wanted, stored] of linear interpolation between patch centres."""
    if corners:
        places = np.linspace(0, stored - 1, wanted)
    else:
        places = (np.arange(wanted) + 0.5) * stored / wanted - 0.5
    rows = [np.interp(places, np.arange(stored), row) for row in np.eye(stored)]
    return np.stack(rows, axis=1).astype(np.float32)


def model_arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of `Architecture` that timm's `config.json` overrides."""
    base = lookup(config["architecture"]).arch
    arguments = stated_fields(config.get("model_args", {}), base)
    arguments["num_classes"] = config.get("num_classes", 0)
    stated = config.get("pretrained_cfg", {})
    if "input_size" in stated:
        arguments.setdefault("img_size", tuple(stated["input_size"][1:]))
    return arguments


def stated_model(
    config: Mapping[str, Any], overrides: Mapping[str, Any] | None = None
) -> ModelSpec:
    """Returns the model that timm's `config.json` describes, with a user's overrides.

    Raises:
      InputError: the architecture is unknown or too large.
    """
    spec = lookup(config["architecture"], model_arguments(config) | dict(overrides or {}))
    where = f"{spec.name} with the settings of its config.json"
    limits.check(where, spec.arch.depth, _MOST_BLOCKS, "blocks")
    limits.check(where, spec.arch.num_patches, _MOST_PATCHES, "patches")
    variant = str(config.get("variant", ""))  # the file may hold anything there
    return dataclasses.replace(spec, name=variant) if VARIANTS.get(variant) == spec.name else spec


# Fields that no parameter shows: with another value, weights load and compute something else.
_WITHOUT_PARAMETERS = (
    *("num_heads", "norm_eps", "act_layer", "post_norm", "attn_pool_num_heads", "rope_type"),
    *("rope_temperature", "rope_grid_offset", "rope_grid_indexing", "ref_feat_shape"),
)


def named_model(model: str, folder: Path, overrides: Mapping[str, Any]) -> ModelSpec:
    """Returns the model of a timm name, with what a `config.json` beside its weights states.

    A field that no parameter shows, such as the activation, is that of the `config.json`, unless
    the user overrides it. A `config.json` that cannot be read as a model is named in the log.

    Args:
      model: the name.
      folder: of the weights.
      overrides: fields of `Architecture` that the user gives.

    Raises:
      InputError: as `lookup`.
    """
    spec = lookup(model, overrides)
    try:
        config = read_hub_config(folder)
        if "architecture" not in config:
            return spec
        stated = stated_model(config).arch
    except InputError as error:
        _LOG.warning("config.json is passed over, since the model is named: %s", error)
        return spec
    changed = {
        name: getattr(stated, name)
        for name in _WITHOUT_PARAMETERS
        if name not in overrides and getattr(stated, name) != getattr(spec.arch, name)
    }
    if not changed:
        return spec
    stated_fields = ", ".join(f"{name} {value}" for name, value in changed.items())
    _LOG.warning("%s: its config.json states %s, which is taken", model, stated_fields)
    return lookup(model, {**overrides, **changed})


def from_hub_config(config: Mapping[str, Any]) -> ModelSpec:
    """Returns the model of a `config.json` from `export_timm.to_hub_config` or from timm.

    Raises:
      InputError: the errors of `stated_model`.
    """
    return _with_input(stated_model(config), config.get("pretrained_cfg", {}))
