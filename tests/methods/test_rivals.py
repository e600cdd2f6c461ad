"""Relational distillation and distillation of the pooled vector: losses, and a run of each."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import scipy.special
from flax import nnx

from singer_jax import main, methods
from singer_jax.methods.base import Batch, ModelFeatures
from singer_jax.methods.match import LossSettings, SpaceSettings
from singer_jax.methods.pooled import PooledSettings
from singer_jax.methods.relational import RelationalSettings, RelationalWeights
from singer_jax.models.architecture import Architecture
from singer_jax.models.vit import VisionTransformer
from tests import tiny

TEACHER = Architecture(
    img_size=(16, 16), patch_size=4, embed_dim=24, depth=3, num_heads=2, num_classes=0
)
STUDENT = dataclasses.replace(TEACHER, embed_dim=12, depth=2)
BATCH = Batch(key=jax.random.key(0))


def forward(arch: Architecture, seed: int) -> ModelFeatures:
    model = VisionTransformer(arch, rngs=nnx.Rngs(seed))
    images = jax.random.normal(jax.random.key(2), (3, *arch.img_size, 3))
    return ModelFeatures(model, dict(enumerate(model.features(images))))


def adapted(method: methods.Method, layer: int, tokens: jax.Array) -> np.ndarray:
    adapter = method.adapter[str(layer)]
    kernel, bias = (np.asarray(x[...], np.float64) for x in (adapter.kernel, adapter.bias))
    return np.asarray(tokens, np.float64) @ kernel + bias


def normalised(x: np.ndarray) -> np.ndarray:
    """Applies a final norm that is at its initialisation."""
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt(np.square(centred).mean(-1, keepdims=True) + TEACHER.norm_eps)


def similarities(patches: np.ndarray) -> np.ndarray:
    unit = patches / np.linalg.norm(patches, axis=-1, keepdims=True)
    return scipy.special.softmax(unit @ unit.swapaxes(1, 2) / 0.07, axis=-1)


@pytest.mark.parametrize("space", ["residual", "final_norm"])
def test_relational_is_the_divergence_of_the_patches_similarities(space):
    teacher, student = forward(TEACHER, 0), forward(STUDENT, 1)
    settings = RelationalSettings(
        match=SpaceSettings(target_space=space), loss_weights=RelationalWeights(kd=2.0)
    )
    method = methods.make(teacher.model, STUDENT, settings, nnx.Rngs(0))
    assert (method.teacher_layers, method.student_layers) == ((2,), (1,))
    theirs = np.asarray(teacher.features[2], np.float64)[:, 1:]
    theirs = similarities(normalised(theirs) if space == "final_norm" else theirs)
    own = similarities(adapted(method, 1, student.features[1])[:, 1:])
    expected = 2 * np.mean(np.sum(theirs * np.log(theirs / own), axis=-1))
    terms = method.loss(teacher, student, BATCH)
    np.testing.assert_allclose(terms["kd"], expected, rtol=1e-4)


def test_relational_is_invariant_to_norms_and_rotations():
    teacher = forward(TEACHER, 0)
    settings = RelationalSettings(layers=(0, 1))
    method = methods.make(teacher.model, TEACHER, settings, nnx.Rngs(0))
    rotation = np.linalg.qr(np.random.default_rng(0).normal(size=(24, 24)))[0]
    for layer in method.student_layers:
        method.adapter[str(layer)].kernel[...] = rotation
        method.adapter[str(layer)].bias[...] *= 0
    larger = {layer: 7 * x for layer, x in teacher.features.items()}
    terms = method.loss(teacher, ModelFeatures(teacher.model, larger), BATCH)
    # Cosines of float32, divided by 0.07, in differences of logarithms up to 30.
    np.testing.assert_allclose(terms["kd"], 0, atol=1e-5)


@pytest.mark.parametrize("pool", ["token", "avg"])
@pytest.mark.parametrize("loss", ["mse", "cosine"])
def test_pooled_compares_the_inputs_of_the_heads(pool, loss):
    """The grids may differ, because one vector per image has no grid."""
    arch = dataclasses.replace(TEACHER, global_pool=pool)
    finer = dataclasses.replace(STUDENT, patch_size=2)
    teacher, student = forward(arch, 0), forward(finer, 1)
    settings = PooledSettings(match=LossSettings(loss=loss))
    method = methods.make(teacher.model, finer, settings, nnx.Rngs(0))
    theirs = normalised(np.asarray(teacher.features[2], np.float64))
    theirs = theirs[:, 0] if pool == "token" else theirs[:, 1:].mean(1)
    own = adapted(method, 1, normalised(np.asarray(student.features[1], np.float64))[:, 0])
    cosine = (theirs * own).sum(1) / np.linalg.norm(theirs, axis=1) / np.linalg.norm(own, axis=1)
    expected = {"mse": np.mean((theirs - own) ** 2), "cosine": np.mean(1 - cosine)}
    terms = method.loss(teacher, student, BATCH)
    np.testing.assert_allclose(terms["kd"], expected[loss], rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["relational", "pooled"])
def test_a_whole_run(tmp_path, name):
    config = tiny.config(tiny.write_teacher(tmp_path / "teacher.safetensors"), name)
    config.optimizer.learning_rate = 1e-2
    config.steps = 30
    config.log.every_steps = config.checkpoint.every_steps = 15
    assert main.run(config, tmp_path / "run") == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    assert rows[-1]["train/loss_kd"] < 0.9 * rows[0]["train/loss_kd"]
    assert (tmp_path / "run" / "student" / "model.safetensors").exists()
