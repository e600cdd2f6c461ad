"""Tests of models for evaluation: loading from runs and weights, and feature extraction."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from singer_jax import main
from singer_jax.config import evaluation
from singer_jax.data.images import EvalTransform, open_image
from singer_jax.data.registry import make_source
from singer_jax.data.sources import TEST, Subset
from singer_jax.errors import InputError
from singer_jax.evaluation import backbone as backbone_lib
from singer_jax.evaluation.backbone import ModelSelection, load_backbone
from singer_jax.evaluation.classification import Classification
from singer_jax.models import zoo
from singer_jax.models.export_timm import to_hub_config
from singer_jax.platform import parallel
from tests import tiny


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Creates a tiny run whose student has left its random initialisation."""
    folder = tmp_path_factory.mktemp("run")
    teacher = tiny.write_teacher(folder / "teacher.safetensors")
    config = tiny.config(teacher, "fitnet")  # compiles in half of the time
    config.steps = 3
    assert main.run(config, folder / "run") == 0
    return folder / "run"


@pytest.fixture(scope="module")
def mesh():
    return parallel.make_mesh(2)


@pytest.fixture(scope="module")
def digits():
    return make_source("digits", "", TEST)


def test_a_checkpoint_and_its_export_give_the_same_features(run, mesh, digits):
    few = Subset(digits, np.arange(10))
    of_run, of_export = (
        load_backbone(mesh, ModelSelection(**where))
        .extract(few, Classification(10), EvalTransform(16))
        .features
        for where in ({"run": str(run)}, {"weights": str(run)})
    )
    np.testing.assert_array_equal(of_run, of_export)
    assert np.std(of_run, axis=0).max() > 0


@pytest.mark.parametrize("token", ["cls", "avg"])
@pytest.mark.parametrize("per_device", [1, 3, 64])
def test_every_image_counts_once_whatever_the_batch(
    run, mesh, digits, token, per_device, monkeypatch
):
    monkeypatch.setattr(backbone_lib, "_MOST_IMAGES", per_device)
    few = Subset(digits, np.arange(11))
    model = load_backbone(mesh, ModelSelection(run=str(run)))
    task = model.classification(10, token)
    found = model.extract(few, task, EvalTransform(16))
    images = np.stack([EvalTransform(16)(open_image(few[i].image)) for i in range(11)])
    expected = model.features(model.params, jnp.asarray(images), task)
    np.testing.assert_array_equal(found.labels, [few[i].label for i in range(11)])
    np.testing.assert_allclose(found.features, expected, rtol=1e-4, atol=1e-5)


def test_the_job_measures_a_run_and_weights_alike(run, tmp_path, monkeypatch):
    results = {}
    for name, settings in (("run", {"run": str(run)}), ("weights", {"weights": str(run)})):
        config = evaluation()
        config.update(settings)
        config.data.source, config.data.workers = "digits", 0
        config.mesh.data = 1
        config.probe.protocol, config.probe.epochs = "fast", 2
        config.probe.learning_rates = (0.1, 0.5)
        assert main.run(config, tmp_path / name) == 0
        results[name] = json.loads((tmp_path / name / "results.json").read_text())
    of_run, of_weights = (results[name]["tasks"]["digits"] for name in ("run", "weights"))
    assert of_run == of_weights
    assert of_run["test_images"] == 360
    assert 10 < of_run["top1"] <= of_run["top5"] <= 100 and 10 < of_run["knn_top1"] <= 100
    assert set(of_run["held_out"]) == {"0.1", "0.5"}


def test_the_published_protocol_sees_new_crops(run, tmp_path):
    config = evaluation("paper")
    config.run, config.data.source, config.data.workers = str(run), "digits", 0
    config.mesh.data = 1
    config.probe.epochs = 1
    assert main.run(config, tmp_path) == 0
    found = json.loads((tmp_path / "results.json").read_text())["tasks"]["digits"]
    assert found["learning_rate"] == 0.5 and found["top1"] > 10


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "give --config.run=DIR or --config.weights"),
        ({"run": "/nowhere"}, "/nowhere holds no checkpoints"),
        ({"weights": "/nowhere/model.safetensors"}, "/nowhere/model.safetensors"),
        ({"weights": "vit_tinny_patch16_224"}, "vit_tinny_patch16_224"),
    ],
)
def test_missing_models_are_named(mesh, arguments, words):
    with pytest.raises(InputError, match=words):
        load_backbone(mesh, ModelSelection(**arguments))


def test_a_run_without_a_checkpoint_says_so(mesh, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(InputError, match="no finished checkpoint"):
        load_backbone(mesh, ModelSelection(run=str(tmp_path)))


def test_a_model_without_class_token_is_probed_on_its_pooled_output(mesh, digits, tmp_path):
    model = "vit_base_patch16_siglip_224"
    path = tiny.write_teacher(tmp_path / "model.safetensors", model)
    spec = zoo.lookup(model, {**tiny.TEACHER, "num_classes": 0})
    (tmp_path / "config.json").write_text(json.dumps(to_hub_config(spec)))
    backbone = load_backbone(mesh, ModelSelection(weights=str(path)))
    few = Subset(digits, np.arange(5))
    task = backbone.classification(10, None)
    assert task.token == "pooled"
    found = backbone.extract(few, task, EvalTransform(16)).features
    images = np.stack([EvalTransform(16)(open_image(few[i].image)) for i in range(5)])
    network = backbone.network
    expected = network.merge(backbone.params)(network.spec.prepare(jnp.asarray(images)))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(InputError, match="has no class token"):
        backbone.classification(10, "cls")
