"""Counts the supported pretrained plain vision transformers of timm, with reasons for the others.

    python -m benchmarks.coverage > benchmarks/COVERAGE.md

This requires torch, torchvision and timm. A weights tag is covered if the zoo knows the model's
name, the arguments by which timm makes the model mean the architecture of the zoo, timm's
parameters have the names and shapes of ours, and the input statistics are those of the tag.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from benchmarks.record_timm import FILES, STATISTICS
from benchmarks.step import import_timm
from singer_jax.errors import InputError
from singer_jax.models.architecture import Architecture
from singer_jax.models.params import leaves
from singer_jax.models.timm_arguments import stated_fields
from singer_jax.models.weights import abstract_params, timm_axes, timm_key
from singer_jax.models.zoo import MODELS, lookup

# Values of arguments that are not JSON, by the names of timm's classes and functions.
_NORMS = {"LayerNorm": "layernorm", "RmsNorm": "rmsnorm", "rmsnorm": "rmsnorm"}
_MLPS = {"GluMlp": "swiglu_packed", "SwiGLU": "swiglu", "Mlp": "mlp"}
_BLOCKS = {"Block": False, "ResPostBlock": True}
_UNSUPPORTED = {
    "DiffParallelScalingBlock": "differential attention, parallel blocks",
    "ParallelScalingBlock": "parallel blocks",
    "ParallelThingsBlock": "parallel blocks",
    "diff": "differential attention",
}


class Unsupported(Exception):
    """The reason why a model is not supported."""


def _name(value: Any) -> str:
    value = value.func if isinstance(value, functools.partial) else value
    return value if isinstance(value, str) else value.__name__


def fields(arguments: Mapping[str, Any], base: Architecture) -> dict[str, Any]:
    """Translates timm's arguments, classes and functions included, to fields of `Architecture`."""
    left, found = dict(arguments), {}
    for word in ("block_fn", "attn_layer"):
        if word in left and _name(left[word]) in _UNSUPPORTED:
            raise Unsupported(_UNSUPPORTED[_name(left[word])])
    if "block_fn" in left:
        found["post_norm"] = _BLOCKS[_name(left.pop("block_fn"))]
    if "norm_layer" in left:
        norm = left.pop("norm_layer")
        found["norm_layer"] = _NORMS[_name(norm)]
        found["norm_eps"] = getattr(norm, "keywords", {}).get("eps", 1e-6)
    if "embed_norm_layer" in left:
        same = getattr(left.pop("embed_norm_layer"), "keywords", {}) == {"eps": found["norm_eps"]}
        if not same:
            raise Unsupported("a norm of its own in the patch embedding")
        found["embed_norm"] = True
    if "mlp_layer" in left:
        found["mlp_layer"] = _MLPS[_name(left.pop("mlp_layer"))]
    if "act_layer" in left:
        activation = _name(left.pop("act_layer")).lower()
        if found.get("mlp_layer", "mlp") == "mlp":  # a gated one has its own
            found["act_layer"] = activation
    left.pop("distilled", None)
    return stated_fields(left, base) | found


@contextlib.contextmanager
def _arguments_of(module: Any) -> Iterator[Callable[[str], dict[str, Any]]]:
    """Returns a function that finds the arguments with which a module of timm creates a model."""
    stem = module.__name__.rsplit(".", 1)[-1]
    create = next(f"_create_{name}" for name in (stem, "eva") if hasattr(module, f"_create_{name}"))
    real, given = getattr(module, create), {}

    def spy(variant: str, pretrained: bool = False, **arguments: Any) -> None:
        given[variant] = arguments

    setattr(module, create, spy)
    try:
        yield lambda name: (getattr(module, name)(), given[name])[1]
    finally:
        setattr(module, create, real)


def _wrong(name: str, arguments: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Returns how a model of the zoo differs from timm's; an empty text if it does not."""
    arch = MODELS[name].arch
    stated = fields(arguments, arch)
    for field, value in stated.items():
        value = tuple(value) if isinstance(value, list) else value
        own = getattr(arch, field)
        same = abs(own - value) < 1e-3 if field == "mlp_ratio" else own == value
        if not same and field != "img_size":
            return f"{field} is {own}, in timm {value}"
    ours = {
        timm_key(keys): tuple(leaf.shape[axis] for axis in timm_axes(keys, leaf))
        for keys, leaf in leaves(abstract_params(arch))
    }
    differing = sorted(key for key in ours | shapes if ours.get(key) != shapes.get(key))
    if not differing:
        return ""
    key = differing[0]
    return f"{key}: {ours.get(key)}, in timm {shapes.get(key)}"


def _statistics(tag: str, config: Any) -> str:
    """Returns the input statistics of a tag that differ; an empty text if none does."""
    spec = lookup(tag)
    ours = {name: getattr(spec, name) for name in STATISTICS} | {"size": spec.arch.img_size}
    theirs = {name: getattr(config, name) for name in STATISTICS}
    theirs["size"] = tuple(config.input_size[1:])
    return ", ".join(name for name, value in theirs.items() if ours[name] != value)


def count(file: str) -> tuple[int, Counter[str]]:
    """Returns the number of covered tags of one of timm's files, and the reasons of the others."""
    timm = import_timm()
    from timm.models import get_pretrained_cfg, list_models

    module = importlib.import_module(f"timm.models.{file}")
    tags = list_models(module=file, pretrained=True)
    reasons: dict[str, str] = {}
    with _arguments_of(module) as arguments_of:
        given = {name: arguments_of(name) for name in {tag.split(".")[0] for tag in tags}}
    for name in given:
        reasons[name] = "" if name in MODELS else "not in the zoo"
        try:
            if name in MODELS:
                arch = MODELS[name].arch
                model = timm.create_model(name, num_classes=arch.num_classes, device="meta")
                shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
                reasons[name] = _wrong(name, given[name], shapes)
            else:
                fields(given[name], MODELS["vit_base_patch16_224"].arch)
                size, patch = (get_pretrained_cfg(name).input_size[1], given[name]["patch_size"])
                if size % patch:
                    reasons[name] = f"{size} pixels are not a multiple of patch size {patch}"
        except (InputError, Unsupported) as error:
            reasons[name] = str(error)
    covered, others = 0, Counter()
    for tag in tags:
        name = tag.split(".")[0]
        reason = reasons[name] or _statistics(tag, get_pretrained_cfg(tag))
        covered += not reason
        others[f"{name}: {reason}"] += bool(reason)
    return covered, +others


def main() -> None:
    timm = import_timm()
    print(f"# Coverage of timm {timm.__version__}\n")
    print(
        "Written by `python -m benchmarks.coverage`: pretrained tags of plain vision transformers."
    )
    print("\n| file | covered | of | % |\n|---|---|---|---|")
    found = {file: count(file) for file in FILES}
    for file, (covered, others) in found.items():
        total = covered + others.total()
        print(f"| {file}.py | {covered} | {total} | {100 * covered / total:.1f} |")
    print("\n| not covered: model and reason | tags |\n|---|---|")
    for _, others in found.values():
        for reason, tags in sorted(others.items()):
            print(f"| {reason} | {tags} |")


if __name__ == "__main__":
    main()
