"""Exports a model for timm: `timm.create_model("local-dir:FOLDER", pretrained=True)` opens it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from singer_jax.io.files import write_text
from singer_jax.models.timm_arguments import changed_arguments
from singer_jax.models.weight_files import CONFIG_FILE, WEIGHTS_FILE
from singer_jax.models.write_safetensors import write_safetensors
from singer_jax.models.zoo import MODELS, ModelSpec


def trained_here(spec: ModelSpec) -> ModelSpec:
    """Returns the specification of a model that was trained with this package's transforms.

    The specification of its initial weights may have another interpolation and crop. The returned
    one describes `data.images.EvalTransform`.
    """
    return dataclasses.replace(spec, interpolation="bilinear", crop_pct=224 / 256)


def to_hub_config(spec: ModelSpec) -> dict[str, Any]:
    """Returns timm's `config.json` for a model: its timm base model and the differences.

    `pretrained_cfg` describes the preprocessing of images, so that `timm.data.resolve_data_config`
    of the loaded model returns the right input transform. timm does not read `variant`, the name
    of a model that timm does not have.

    Raises:
      InputError: timm's model has no argument for a difference.
    """
    arch = spec.arch
    changed = changed_arguments(arch, MODELS[spec.timm_name].arch)
    variant = {"variant": spec.name} if spec.name != spec.timm_name else {}
    return {
        "architecture": spec.timm_name,
        **variant,
        "num_classes": arch.num_classes,
        "num_features": arch.embed_dim,
        "global_pool": arch.global_pool,
        "model_args": changed,
        "pretrained_cfg": {
            "input_size": [3, *arch.img_size],
            # timm takes img_size from input_size if the model has learned positions.
            "fixed_input_size": arch.pos_embed or arch.rel_pos_bias,
            "interpolation": spec.interpolation,
            "crop_pct": spec.crop_pct,
            "crop_mode": "center",
            "mean": list(spec.mean),
            "std": list(spec.std),
            "num_classes": arch.num_classes,
            "first_conv": "patch_embed.proj",
            "classifier": ["head", "head_dist"] if arch.distilled else "head",
        },
    }


def export_timm(
    folder: epath.Path,
    spec: ModelSpec,
    tensors: Mapping[str, np.ndarray],
    made_from: Mapping[str, Any] | None = None,
) -> None:
    """Writes `model.safetensors` and `config.json` in timm's hub layout.

    Args:
      folder: output folder, which is made if needed.
      spec: specification of the model, whose input statistics go into `pretrained_cfg`.
      tensors: weights of the model as returned by `weights.to_timm`. The written file is compared
        with them.
      made_from: origin of the model, which both files contain as JSON under `singer_jax`.
        `config.json` also has the `sha256` of `model.safetensors`.

    Raises:
      RunError: the files cannot be written.
    """
    metadata, config = {"format": "pt"}, to_hub_config(spec)
    if made_from:
        metadata["singer_jax"] = json.dumps(made_from)
    sha256 = write_safetensors(folder / WEIGHTS_FILE, tensors, metadata)
    if made_from:
        config["singer_jax"] = {**made_from, "sha256": sha256}
    write_text(folder / CONFIG_FILE, json.dumps(config, indent=2) + "\n")
