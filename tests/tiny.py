"""The smallest configuration that is still a real one, for tests of whole runs."""

import json
from pathlib import Path

import numpy as np
from flax import nnx
from ml_collections import ConfigDict
from PIL import Image
from safetensors.numpy import save_file

from singer_jax.config import default
from singer_jax.models.export_timm import to_hub_config
from singer_jax.models.vit import VisionTransformer
from singer_jax.models.weights import to_timm
from singer_jax.models.zoo import lookup

TEACHER = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 3, "num_heads": 2}
STUDENT = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}


def write_teacher(path: Path, model: str = "vit_tiny_patch16_224", **overrides: object) -> Path:
    """Random weights of a tiny teacher; large enough that its blocks matter."""
    spec = lookup(model, TEACHER | {"num_classes": 0} | overrides)
    network = VisionTransformer(spec.arch, rngs=nnx.Rngs(1))
    rng = np.random.default_rng(2)
    tensors = {
        key: value + 0.1 * rng.standard_normal(value.shape).astype(np.float32)
        for key, value in to_timm(nnx.to_pure_dict(nnx.state(network))).items()
    }
    save_file(tensors, path)
    return path


def write_described(folder: Path, model: str = "vit_tiny_patch16_224") -> Path:
    """`write_teacher` with the `config.json` that says what it is."""
    folder.mkdir(parents=True, exist_ok=True)
    spec = lookup(model, TEACHER | {"num_classes": 0})
    (folder / "config.json").write_text(json.dumps(to_hub_config(spec)))
    return write_teacher(folder / "model.safetensors", model)


def config(
    teacher: Path | str, method: str = "singer", protocol: str = "recommended"
) -> ConfigDict:
    """A run on the digits that takes seconds."""
    config = default(protocol)
    config.method.name = method
    config.method.rank, config.method.outlier_quantile = 4, 0.8
    config.teacher.model = config.student.model = "vit_tiny_patch16_224"
    config.teacher.weights = str(teacher)
    config.teacher.overrides, config.student.overrides = dict(TEACHER), dict(STUDENT)
    config.precision = "float32"
    config.mesh.data = 1
    config.data.source, config.data.workers = "digits", 0
    config.batch_size, config.steps = 8, 6
    config.schedule.warmup_epochs = 0
    config.log.every_steps = config.checkpoint.every_steps = 2
    return config


def write_images(folder: Path, count: int, size: tuple[int, int] = (24, 20)) -> Path:
    """Different JPEGs named 000.jpg, 001.jpg, ..."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for number in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (3, 3, 3), dtype=np.uint8))
        coarse.resize(size, Image.Resampling.BICUBIC).save(folder / f"{number:03}.jpg", quality=95)
    return folder
