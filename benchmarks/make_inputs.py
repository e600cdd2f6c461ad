"""Writes inputs for full-size runs without ImageNet and without the Hugging Face Hub.

The inputs are random weights in timm's layout and a folder of random JPEGs.

  python -m benchmarks.make_inputs weights vit_large_patch16_224 /tmp/vit_large.safetensors
  python -m benchmarks.make_inputs images 64 /tmp/images
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from PIL import Image
from safetensors.numpy import save_file

from singer_jax.models.params import leaves
from singer_jax.models.vit import VisionTransformer
from singer_jax.models.weights import abstract_params, timm_axes, timm_key, to_timm
from singer_jax.models.zoo import lookup


def write_weights(model: str, path: Path) -> None:
    """Writes randomly initialised weights of a timm model as `.safetensors`."""
    network = VisionTransformer(lookup(model).arch, rngs=nnx.Rngs(0))
    tensors = to_timm(nnx.to_pure_dict(nnx.state(network)))
    save_file(tensors, path, metadata={"format": "pt"})


def write_blank_weights(path: Path, model: str, **overrides: Any) -> Path:
    """Writes zeros for every weight into a sparse file, for programs that read only shapes."""
    header, end = {}, 0
    for keys, leaf in leaves(abstract_params(lookup(model, overrides).arch)):
        begin, end = end, end + 4 * leaf.size
        shape = [leaf.shape[axis] for axis in timm_axes(keys, leaf)]
        header[timm_key(keys)] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(file.tell() + end)
    return path


def write_images(count: int, folder: Path, size: tuple[int, int] = (500, 375)) -> None:
    """Writes smooth random JPEGs of ImageNet's usual size, about 50 KiB each."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for number in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (48, 64, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize(size, Image.Resampling.BICUBIC), np.int16)
        pixels = (smooth + rng.integers(-12, 13, smooth.shape)).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:06}.jpg", quality=85)


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    kind, what, where = sys.argv[1:]
    if kind == "weights":
        write_weights(what, Path(where))
    else:
        write_images(int(what), Path(where))
