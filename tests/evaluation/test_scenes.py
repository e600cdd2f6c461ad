"""Tests of the jobs on generated scenes: distillation, three kinds of label, check_data."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from singer_jax import main
from singer_jax.config import check_data, evaluation, null_spaces, report
from singer_jax.data.registry import make_source
from singer_jax.data.scenes import SURFACES, SceneSettings
from singer_jax.data.sources import TEST
from tests import tiny

COUNTS = {"size": 20, "train": 160, "test": 80}
DATA = {"source": "scenes", "workers": 0, "scenes": COUNTS}


@pytest.fixture
def run(tmp_path) -> Path:
    """Trains a copy of the teacher for two steps, with losses and kNN on held-out images."""
    folder = tmp_path
    config = tiny.config(tiny.write_teacher(folder / "teacher.safetensors"), "fitnet")
    config.student.weights, config.student.overrides = config.teacher.weights, dict(tiny.TEACHER)
    config.data.update(DATA)
    config.steps, config.evals.every_steps, config.evals.images = 2, 2, 16
    assert main.run(config, folder / "run") == 0
    row = json.loads((folder / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert 0 <= row["eval/knn/top1"] <= 100 and row["eval/val/loss"] > 0
    return folder / "run"


@pytest.mark.slow
def test_a_run_on_them_is_probed_for_class_mask_and_depth(run):
    """A nearly random backbone suffices, because its patches encode position and colour."""
    config = evaluation()
    config.run, config.mesh.data = str(run), 1
    config.data.update(DATA)
    config.probe.protocol, config.probe.views, config.probe.batch_size = "fast", 0, 8
    config.probe.learning_rates = (30.0,)
    assert main.run(config, run / "evaluation") == 0
    tasks = json.loads((run / "evaluation" / "results.json").read_text())["tasks"]
    assert set(tasks) == {"scenes", "scenes_masks", "scenes_depth"}
    assert all(metrics["test_images"] == COUNTS["test"] for metrics in tasks.values())
    assert 0 <= tasks["scenes"]["top1"] <= 100  # tests/data says that it can be learned

    settings = SceneSettings(**COUNTS)
    masks, depths = (
        np.concatenate([source[index].label.ravel() for index in range(len(source))])
        for source in (make_source(f"scenes_{of}", "", TEST, settings) for of in ("masks", "depth"))
    )
    commonest = 100 * np.bincount(masks).max() / len(masks)
    assert tasks["scenes_masks"]["accuracy"] > commonest + 10
    constant = depths[depths > 0].std()  # of the best constant
    assert tasks["scenes_depth"]["rmse_t0.6"] < 0.9 * constant

    config = report()
    config.images = 2
    assert main.run(config, run) == 0
    page = (run / "report" / "index.html").read_text()
    assert "scenes_masks miou" in page and "scenes_depth rmse" in page


def test_null_spaces_are_measured_on_them(tmp_path):
    config = null_spaces()
    config.teacher.model = "vit_tiny_patch16_224"
    config.teacher.weights = str(tiny.write_teacher(tmp_path / "teacher.safetensors"))
    config.teacher.overrides = dict(tiny.TEACHER)
    config.rank, config.mesh.data, config.images = 4, 1, 8
    config.data.update(DATA)
    assert main.run(config, tmp_path) == 0
    assert json.loads((tmp_path / "nullspace.json").read_text())["images"] == 8


def test_they_are_counted_and_shown(tmp_path, capsys):
    config = check_data()
    config.data.update(DATA)
    config.images = 4
    assert main.run(config, tmp_path) == 0
    printed = capsys.readouterr().out
    assert "scenes train: 160 images, 10 classes" in printed
    assert "scenes_depth test: 80 images, a label for each pixel" in printed
    sheets = {path.name: np.asarray(Image.open(path)) for path in tmp_path.glob("*.png")}
    assert len(sheets) == 6
    masks, depths = (sheets[f"scenes_{of}_train.png"] for of in ("masks", "depth"))
    np.testing.assert_array_equal(masks[:128], depths[:128])  # the pictures, labels below
    assert len(np.unique(masks[128:256].reshape(-1, 3), axis=0)) <= len(SURFACES)
    assert len(np.unique(depths[128:256])) > 30


def test_a_number_that_cannot_be_is_one_line(tmp_path, capsys):
    config = check_data()
    config.data.update(DATA)
    config.data.scenes.size = 4
    assert main.run(config, tmp_path) == 2
    printed = capsys.readouterr().err
    assert "data.scenes.size: 4" in printed and len(printed.splitlines()) == 1
