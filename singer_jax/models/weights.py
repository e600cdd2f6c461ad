"""Reads timm weights into a model.

A timm key and an NNX path differ by one rule: timm's `weight` is `kernel` (linear: transposed,
convolution: HWIO) or `scale` (LayerNorm). Of each tensor a process reads the parts that its
devices hold, and they go straight to their sharding and dtype: a model is never whole in host
memory.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from singer_jax.errors import InputError
from singer_jax.io import limits
from singer_jax.models.architecture import Architecture, ComputePolicy
from singer_jax.models.params import Keys, Params, from_leaves, leaves
from singer_jax.models.vit import VisionTransformer
from singer_jax.models.weight_files import (
    StoredTensor,
    open_weights,
    read_hub_config,
)
from singer_jax.models.zoo import ModelSpec, lookup
from singer_jax.platform.backends import Choices

# Fields of `Architecture` that timm's class Eva calls otherwise.
EVA_ARGUMENTS = {"reg_tokens": "num_reg_tokens"}

# Of a model that a config.json asks for; published ones have 40 blocks and 1,369 patches.
_MOST_BLOCKS, _MOST_PATCHES = 100, 2**14
_MOST_NAMED = 1000  # keys in a message
_MOST_MISSING_BLOCKS = 24  # of which each key is named


def abstract_model(arch: Architecture, policy: ComputePolicy) -> tuple[nnx.GraphDef, Params]:
    """Graph definition and parameters as `jax.ShapeDtypeStruct`s: nothing is allocated."""
    graph, params = _abstract_model(arch, policy, policy.choices)
    return graph, jax.tree.map(lambda leaf: leaf, params)  # not the dicts of another caller


@functools.lru_cache(maxsize=32)
def _abstract_model(
    arch: Architecture, policy: ComputePolicy, choices: Choices
) -> tuple[nnx.GraphDef, Params]:
    """Kept, since a start asks for it several times."""
    graph, state = nnx.split(
        nnx.eval_shape(lambda: VisionTransformer(arch, policy, rngs=_OneKey(jax.random.key(0))))
    )
    return graph, nnx.to_pure_dict(state)


class _OneKey(NamedTuple):
    """In the place of `nnx.Rngs`, whose counting takes most of the time of a trace."""

    key: jax.Array

    def params(self) -> jax.Array:
        """The same one for every parameter: only shapes are asked for."""
        return self.key


@functools.lru_cache(maxsize=32)
def abstract_params(arch: Architecture) -> Params:
    """The parameters alone, as those of `abstract_model` in float32 and not stacked.

    One block is traced: the others are like it.
    """
    params = abstract_model(dataclasses.replace(arch, depth=1, planted_after=0), ComputePolicy())[1]
    return params | {"blocks": dict.fromkeys(range(arch.depth), params["blocks"][0])}


def timm_key(keys: Keys) -> str:
    """The timm state-dict key of a parameter."""
    *parents, name = map(str, keys)
    return ".".join([*parents, "weight" if name in ("kernel", "scale") else name])


def timm_axes(keys: Keys, leaf: Any) -> tuple[int, ...]:
    """The axes of a parameter of ours, in the order in which PyTorch stores them."""
    if keys[-1] != "kernel":
        return tuple(range(leaf.ndim))
    return {2: (1, 0), 4: (3, 2, 0, 1)}[leaf.ndim]


def to_timm(params: Params) -> dict[str, np.ndarray]:
    """Parameters (or gradients) as a timm state dict: timm's keys, PyTorch's layouts."""
    return {
        timm_key(keys): np.ascontiguousarray(np.asarray(leaf).transpose(timm_axes(keys, leaf)))
        for keys, leaf in leaves(params)
    }


def spec_of_weights(spec: ModelSpec, path: Path) -> ModelSpec:
    """`spec` with what the weights say of themselves.

    The number of classes is that of the file's head; the input's statistics, interpolation and crop
    come from a `config.json` beside the file (timm's hub layout), where there is one.
    """
    head = open_weights(path).get("head.weight")
    # A head of another shape than [classes, dim] is named by `check_weights`.
    arch = dataclasses.replace(spec.arch, num_classes=head.shape[0] if head and head.shape else 0)
    stated = read_hub_config(path.parent).get("pretrained_cfg", {})
    return dataclasses.replace(_with_input(spec, stated), arch=arch)


def _with_input(spec: ModelSpec, stated: Mapping[str, Any]) -> ModelSpec:
    """Returns `spec` with the input that timm's `pretrained_cfg` states, as far as it does."""
    keys = ("mean", "std", "interpolation", "crop_pct")
    found = {key: stated[key] for key in keys if stated.get(key) is not None}
    return dataclasses.replace(
        spec, **{key: tuple(x) if isinstance(x, list) else x for key, x in found.items()}
    )


def load_model(
    spec: ModelSpec,
    path: Path,
    policy: ComputePolicy = ComputePolicy(),
    shardings: Callable[[Params], Params] | None = None,
) -> tuple[nnx.GraphDef, Params]:
    """A model with the weights of a file.

    Args:
      spec: what the model is; `spec_of_weights` adapts it to the file's head and statistics.
      path: a file as `weight_files.find_weights` gives it.
      policy: dtypes of the model; weights are cast to `param_dtype`.
      shardings: from abstract parameters to a sharding for each; default: one device.

    Returns:
      graph definition and parameters; `nnx.merge` of the two is the `VisionTransformer`.

    Raises:
      InputError: with every missing, surplus and mis-shaped key.
    """
    check_weights(spec, path)
    graph, abstract = abstract_model(spec.arch, policy)
    tensors = _tensors(spec, path)
    placement = dict(leaves(shardings(abstract))) if shardings else {}

    def read(keys: Keys, shape: tuple[int, ...], part: tuple[slice, ...]) -> np.ndarray:
        tensor = tensors[timm_key(keys)]
        axes = timm_axes(keys, jax.ShapeDtypeStruct(shape, tensor.dtype))
        stored = tuple(part[axis] for axis in axes)
        if keys == ("pos_embed",) and tuple(tensor.shape) != shape:
            prefix = spec.arch.num_embedded_prefix_tokens
            array = resample_pos_embed(tensor.read(), spec.arch.grid, prefix)[stored]
        else:
            array = tensor.read(stored)
        return array.transpose(np.argsort(axes))

    def load(keys: Keys, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        found: dict[Any, np.ndarray] = {}

        def part_of(part: tuple[slice, ...]) -> np.ndarray:
            place = tuple((along.start, along.stop) for along in part)
            if place not in found:  # devices that hold the same part read it once
                if policy.stacked and keys[0] == "blocks":
                    blocks = range(spec.arch.depth)[part[0]]
                    each = [("blocks", index, *keys[1:]) for index in blocks]
                    array = np.stack([read(one, leaf.shape[1:], part[1:]) for one in each])
                else:
                    array = read(keys, leaf.shape, part)
                found[place] = np.ascontiguousarray(array.astype(leaf.dtype))
            return found[place]

        if not placement:
            return jnp.asarray(part_of((slice(None),) * leaf.ndim))
        # Not device_put: of several processes it would compare what each has read.
        return jax.make_array_from_callback(leaf.shape, placement[keys], part_of, leaf.dtype)

    return graph, from_leaves({keys: load(keys, leaf) for keys, leaf in leaves(abstract)})


def check_weights(spec: ModelSpec, path: Path) -> None:
    """Raises `InputError` as `load_model` would, without reading a tensor."""
    tensors = _tensors(spec, path)
    # Before the model is traced, which takes minutes for a hundred blocks.
    blocks = len({key.split(".")[1] for key in tensors if key.startswith("blocks.")})
    if spec.arch.depth - blocks > _MOST_MISSING_BLOCKS:
        raise InputError(
            f"{path} does not hold the weights of {spec.name}: it has {blocks} blocks, expected "
            f"{spec.arch.depth}"
        )
    _check_keys(spec, path, abstract_params(spec.arch), tensors)


def _tensors(spec: ModelSpec, path: Path) -> dict[str, StoredTensor]:
    """The tensors of a file under the keys of timm's model, as timm itself renames old ones."""
    tensors = open_weights(path)
    if spec.arch.eva:
        return tensors
    # DeiT-III was published with gamma_1 and gamma_2.
    return {re.sub(r"gamma_(\d)$", r"ls\1.gamma", key): t for key, t in tensors.items()}


def _check_keys(
    spec: ModelSpec, path: Path, abstract: Params, tensors: Mapping[str, StoredTensor]
) -> None:
    expected = {
        timm_key(keys): tuple(leaf.shape[axis] for axis in timm_axes(keys, leaf))
        for keys, leaf in leaves(abstract)
    }
    missing = [key for key in expected if key not in tensors]
    surplus = [key for key in tensors if key not in expected]
    mis_shaped = [
        f"{key} is {list(tensors[key].shape)}, expected {list(shape)}"
        for key, shape in expected.items()
        if key in tensors
        and tuple(tensors[key].shape) != shape
        and not (key == "pos_embed" and _can_resample(tensors[key].shape, spec.arch))
    ]
    found = {"missing": missing, "surplus": surplus, "mis-shaped": mis_shaped}
    if any(found.values()):
        details = "; ".join(f"{kind}: {_listed(keys)}" for kind, keys in found.items() if keys)
        raise InputError(f"{path} does not hold the weights of {spec.name}: {details}")


def _listed(keys: list[str]) -> str:
    more = len(keys) - _MOST_NAMED
    return ", ".join(keys[:_MOST_NAMED]) + (f" and {more} more" if more > 0 else "")


def _can_resample(shape: tuple[int, ...], arch: Architecture) -> bool:
    """Whether a stored position embedding is that of a square grid and of the right width."""
    if len(shape) != 3 or (shape[0], shape[2]) != (1, arch.embed_dim):
        return False
    patches = shape[1] - arch.num_embedded_prefix_tokens
    return patches > 0 and math.isqrt(patches) ** 2 == patches


def resample_pos_embed(
    pos_embed: np.ndarray, grid: tuple[int, int], num_prefix_tokens: int
) -> np.ndarray:
    """Position embeddings of a square grid for another grid (timm `resample_abs_pos_embed`).

    Keys bicubic (a = -0.5), antialiased, weights renormalised at the edges, prefix kept.

    Args:
      pos_embed: [1, prefix + side * side, dim].
      grid: rows and columns to resample to.
      num_prefix_tokens: leading positions that are no patches.

    Returns:
      [1, prefix + rows * columns, dim] in the dtype of `pos_embed`.
    """
    prefix, patches = np.split(pos_embed, [num_prefix_tokens], axis=1)
    side, dim = math.isqrt(patches.shape[1]), patches.shape[2]
    image = jnp.asarray(patches, jnp.float32).reshape(1, side, side, dim)
    image = jax.image.resize(
        image, (1, *grid, dim), "cubic", antialias=True, precision=jax.lax.Precision.HIGHEST
    )
    patches = np.asarray(image, pos_embed.dtype).reshape(1, -1, dim)
    return np.concatenate([prefix, patches], axis=1)


def model_arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of `Architecture` that timm's `config.json` states, to override its architecture."""
    ours = {theirs: name for name, theirs in EVA_ARGUMENTS.items()}
    arguments = {
        ours.get(name, name): value
        for name, value in config.get("model_args", {}).items()
        if name != "fc_norm"
    }
    arguments["num_classes"] = config.get("num_classes", 0)
    stated = config.get("pretrained_cfg", {})
    if "input_size" in stated:
        arguments.setdefault("img_size", tuple(stated["input_size"][1:]))
    return arguments


def stated_model(
    config: Mapping[str, Any], overrides: Mapping[str, Any] | None = None
) -> ModelSpec:
    """The model that timm's `config.json` asks for, with a user's overrides.

    Raises:
      InputError: an architecture that is not known here, or an absurdly large one.
    """
    spec = lookup(config["architecture"], model_arguments(config) | dict(overrides or {}))
    where = f"{spec.name} as its config.json asks for it"
    limits.check(where, spec.arch.depth, _MOST_BLOCKS, "blocks")
    limits.check(where, spec.arch.num_patches, _MOST_PATCHES, "patches")
    return spec


def from_hub_config(config: Mapping[str, Any]) -> ModelSpec:
    """Returns the model of a `config.json` of `export_timm.to_hub_config`, or of timm's own.

    Raises:
      InputError: as `stated_model`.
    """
    return _with_input(stated_model(config), config.get("pretrained_cfg", {}))
