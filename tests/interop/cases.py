"""Tiny models of every family that is exported, and digests of what their exports hold.

tests/interop opens the exports with the libraries they are for. What it has seen is recorded, so
that the ordinary tests notice a change without those libraries:

  python -m tests.interop.cases > tests/interop/recorded.json
"""

import hashlib
import json
import tempfile
from pathlib import Path

import numpy as np
from etils import epath
from safetensors.numpy import load_file

from singer_jax.models.export_huggingface import export_huggingface
from singer_jax.models.params import leaves
from singer_jax.models.weights import abstract_params, timm_axes, timm_key
from singer_jax.models.zoo import ModelSpec, lookup

RECORDED = Path(__file__).with_name("recorded.json")
SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}

# A model and what differs from it beside the sizes.
CASES = {
    "vit": ("vit_tiny_patch16_224", {"num_classes": 0}),
    "vit with a head": ("vit_tiny_patch16_224", {"num_classes": 5}),
    "vit, mean of patches": ("vit_tiny_patch16_224", {"num_classes": 0, "global_pool": "avg"}),
    "deit, distilled": ("deit_tiny_distilled_patch16_224", {"num_classes": 0}),
    "deit, distilled, with a head": ("deit_tiny_distilled_patch16_224", {"num_classes": 5}),
    "deit3": ("deit3_small_patch16_224", {"num_classes": 0}),
    "deit3 with a head": ("deit3_small_patch16_224", {"num_classes": 5}),
    "dinov2": ("vit_small_patch14_dinov2", {}),
    "dinov2 with registers": ("vit_small_patch14_reg4_dinov2", {}),
    "dinov2 giant": ("vit_giant_patch14_dinov2", {"embed_dim": 48}),
    "dinov3": ("vit_small_patch16_dinov3", {}),
    "dinov3 with biases": ("vit_small_patch16_dinov3_qkvb", {}),
    "dinov3 plus": ("vit_small_plus_patch16_dinov3", {}),
    "clip": ("vit_base_patch16_clip_224", {"num_classes": 0}),
    "clip, quick gelu": ("vit_base_patch16_clip_quickgelu_224", {"num_classes": 0}),
    "siglip": ("vit_base_patch16_siglip_224", {}),
}


def spec_of(case: str) -> ModelSpec:
    """The tiny model."""
    model, changes = CASES[case]
    return lookup(model, SIZES | changes)


def tensors_of(spec: ModelSpec) -> dict[str, np.ndarray]:
    """Random weights, in timm's layout, that make every part of the model matter."""
    rng = np.random.default_rng(0)
    found = {}
    for keys, leaf in leaves(abstract_params(spec.arch)):
        shape = [leaf.shape[axis] for axis in timm_axes(keys, leaf)]
        near = 1 if keys[-1] in ("scale", "gamma", "gamma_1", "gamma_2") else 0
        found[timm_key(keys)] = (near + 0.2 * rng.standard_normal(shape)).astype(np.float32)
    return found


def digest(weights: Path) -> str:
    """A digest of the names, shapes and bits in a safetensors file."""
    found = hashlib.sha256()
    for key, tensor in sorted(load_file(weights).items()):
        found.update(f"{key} {tensor.shape} {tensor.dtype}".encode())
        found.update(tensor.tobytes())
    return found.hexdigest()


def exported(case: str, folder: Path) -> dict[str, object]:
    """Returns the content of the export of a case for transformers."""
    spec = spec_of(case)
    export_huggingface(epath.Path(folder), spec, tensors_of(spec))
    config = json.loads((folder / "config.json").read_text())
    return {"config": config, "weights": digest(folder / "model.safetensors")}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        found = {case: exported(case, Path(name) / case) for case in CASES}
    print(json.dumps(found, indent=1))
