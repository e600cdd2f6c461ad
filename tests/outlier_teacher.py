"""A tiny teacher with outliers: two neurons fire at bright patches and write huge vectors."""

from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from tests import tiny

SIZES = {"img_size": 32, "patch_size": 4, "embed_dim": 24, "depth": 4, "num_heads": 2}
THRESHOLD = 3.9  # of the normalised brightness; 6 % of the digits' patches are above
NEURONS = ((1, 70), (1, 11))  # by how strongly they fire


def write_teacher(path: Path, length: float = 10.0, **overrides: object) -> Path:
    """Random weights, in which channel 0 of a patch is its brightness and nothing else.

    Args:
      path: of the file.
      length: of what each of the outlier neurons writes where it fires with 1; 0: no outliers.
      **overrides: as for `tiny.write_teacher`.
    """
    tensors = load_file(tiny.write_teacher(path, **SIZES, **overrides))
    tensors["patch_embed.proj.weight"][0] = 6 / (3 * 4 * 4)
    for name, value in tensors.items():
        if name.endswith(("proj.bias", "fc2.bias", "fc2.weight", "attn.proj.weight")):
            value[0] = 0
        if name in ("pos_embed", "cls_token"):
            value[..., 0] = 0
    for name, value in (("weight", 1), ("bias", 0)):
        tensors[f"blocks.1.norm2.{name}"][0] = value
    rng = np.random.default_rng(0)
    for (block, neuron), steepness in zip(NEURONS, (80, 60), strict=True):
        mlp = f"blocks.{block}.mlp"
        tensors[f"{mlp}.fc1.weight"][neuron] = steepness * np.eye(24)[0]
        tensors[f"{mlp}.fc1.bias"][neuron] = -THRESHOLD * steepness
        direction = rng.standard_normal(24) * (np.arange(24) > 0)
        tensors[f"{mlp}.fc2.weight"][:, neuron] = length * direction / np.linalg.norm(direction)
    save_file({name: np.ascontiguousarray(value) for name, value in tensors.items()}, path)
    return path
