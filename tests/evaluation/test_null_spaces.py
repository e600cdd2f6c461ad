"""The analysis before training: what it prints is what training would find."""

import json

import numpy as np
import pytest
from PIL import Image

from singer_jax import main
from singer_jax.config import null_spaces
from tests import tiny


@pytest.fixture
def config(tmp_path):
    config = null_spaces()
    config.teacher.model = "vit_tiny_patch16_224"
    config.teacher.overrides = dict(tiny.TEACHER)
    config.teacher.weights = str(tiny.write_teacher(tmp_path / "teacher.safetensors"))
    config.data.source, config.data.path = "folder", str(tiny.write_images(tmp_path / "i", 10))
    config.data.workers, config.mesh.data, config.precision = 0, 1, "float32"
    config.rank, config.outlier_quantile = 2, 0.8
    return config


def test_each_layer_source_and_threshold_is_a_row(config, tmp_path, capsys):
    config.thresholds = ("quantile=0.5", "rank=24", "absolute=0")
    assert main.run(config, tmp_path / "out") == 0
    found = json.loads((tmp_path / "out" / "nullspace.json").read_text())
    assert found["images"] == 10
    assert len(found["rows"]) == 2 * 4 * 3
    for row in found["rows"]:
        assert 0 <= row["share_soft"] <= 1.0001 and 0 <= row["defect_angle"] <= 90
        values = found["singular_values"][str(row["layer"])][row["source"]]
        assert values == sorted(values, reverse=True) and values[-1] == row["smallest"]
        if row["source"] == "calibrated":  # `rank` directions, all of which `project` takes
            assert row["dim"] == len(values) == 2
            assert (
                row["null_dim"]
                == {"quantile=0.5": 1, "rank=24": 2, "absolute=0": 0}[row["threshold"]]
            )
            continue
        expected = {"quantile=0.5": 12, "rank=24": 24, "absolute=0": 0}[row["threshold"]]
        assert row["null_dim"] == expected
        if row["threshold"] == "rank=24":  # the whole space
            np.testing.assert_allclose(row["share_project"], 1, atol=1e-4)
    printed = capsys.readouterr().out
    assert len(printed.splitlines()) == 1 + 24 + 2 and "project, soft:" in printed
    assert min(Image.open(tmp_path / "out" / "nullspace.png").size) > 300


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("thresholds", ("absolut=1",), "('absolut=1',); give"),
        ("thresholds", ("rank=many",), "each rule=number with the rule quantile, absolute"),
        ("weight_matrices", ("mpl",), "closest: mlp"),
        ("layers", (7,), "7 is out of range"),
        ("thresholds", ("rank=800",), "800.0 is not in 0..24"),
        ("quantile", 1.5, "quantile: 1.5"),
        ("images", 0, "images: 0"),
        ("images", 1, "images: 1, but the source calibrated needs two"),
    ],
)
def test_wrong_settings_are_one_line(config, tmp_path, capsys, key, value, words):
    config[key] = value
    assert main.run(config, tmp_path / "out") == 2
    printed = capsys.readouterr().err
    assert words in printed and len(printed.splitlines()) == 1
