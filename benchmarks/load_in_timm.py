"""Loads an exported student in timm and compares its features with those of this project.

  python -m benchmarks.load_in_timm runs/quickstart/singer/student

This requires the packages of the extra `bench` (benchmarks/README.md). The largest absolute
differences of the last block's raw tokens and of the output on random images are printed.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.results import report
from benchmarks.step import import_timm
from singer_jax.models.weights import from_hub_config, load_model


def main(folder: Path) -> None:
    """Compares both models on two images."""
    import torch

    timm = import_timm()
    weights = folder / "model.safetensors"
    stated = json.loads((folder / "config.json").read_text())
    theirs = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    spec = from_hub_config(stated)
    ours = nnx.merge(*load_model(spec, weights))
    images = np.random.default_rng(0).standard_normal((2, *spec.arch.img_size, 3))
    images = images.astype(np.float32)
    with torch.no_grad():
        pixels = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
        _, blocks = theirs.forward_intermediates(
            pixels, indices=1, output_fmt="NLC", return_prefix_tokens=True
        )
        patches, *prefix = blocks[-1] if spec.arch.num_prefix_tokens else (blocks[-1],)
        tokens = torch.cat([*prefix, patches], dim=1).numpy()
        output = theirs(pixels).numpy()
    feature = ours.features(jnp.asarray(images))[-1]
    difference = {
        "tokens of the last block": np.abs(tokens - np.asarray(feature)).max(),
        "output": np.abs(output - np.asarray(ours.head_output(feature))).max(),
    }
    rows = [{"compared": name, "largest difference": f"{x:.2e}"} for name, x in difference.items()]
    report(
        f"Export of {stated['architecture']} {stated['model_args']} loaded by timm",
        f"python -m benchmarks.load_in_timm {folder}",
        rows,
        "cpu",
        ("jax", "flax", "torch", "timm"),
    )


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_default_matmul_precision", "highest")
    main(Path(sys.argv[1]))
