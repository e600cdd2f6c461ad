"""Tests that the analysis before training prints the numbers that training would find."""

import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from singer_jax import main
from singer_jax.config import null_spaces
from singer_jax.evaluation import norm_summary
from singer_jax.jobs import nullspace as job
from tests import outlier_teacher, tiny


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
    config.thresholds, config.details = ("quantile=0.5", "rank=24", "absolute=0"), True
    assert main.run(config, tmp_path / "out") == 0
    found = json.loads((tmp_path / "out" / "nullspace.json").read_text())
    assert found["images"] == 10
    assert len(found["rows"]) == 2 * 4 * 3
    for row in found["rows"]:
        assert 0 <= row["share_soft"] <= 1.0001 and 0 <= row["defect_angle"] <= 90
        left = row["outlier_medians"] * max(1 - row["share_project"], 0) ** 0.5
        assert row["left_medians"] == pytest.approx(left)
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
    # The norms of three layers and the verdict stand before the details.
    assert len(printed.splitlines()) == 1 + 3 + 1 + 1 + 24 + 3 and "project, soft:" in printed
    assert printed.splitlines()[4].startswith("verdict: ")
    assert min(Image.open(tmp_path / "out" / "nullspace.png").size) > 300


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("thresholds", ("absolut=1",), "('absolut=1',); give"),
        ("thresholds", ("rank=many",), "each rule=number with the rule quantile, absolute"),
        ("weight_matrices", ("mpl",), "closest: mlp"),
        ("layers", (7,), "7 is out of range"),
        ("thresholds", ("rank=800",), "800.0 is not in 0..24"),
        ("rank", 25, "rank: 25, but the teacher's width is 24"),
        ("outlier_quantile", 1.5, "outlier_quantile: 1.5"),
        ("images", 0, "images: 0"),
        ("images", 1, "images: 1, but calibrated needs 2"),
    ],
)
def test_wrong_settings_are_one_line(config, tmp_path, capsys, key, value, words):
    config[key] = value
    assert main.run(config, tmp_path / "out") == 2
    printed = capsys.readouterr().err
    assert words in printed and len(printed.splitlines()) == 1


def test_an_unreadable_image_is_left_out_of_the_measures_and_the_pictures(
    config, tmp_path, monkeypatch
):
    """The result and the norms beside each picture are those of a folder without it."""
    drawn = []
    monkeypatch.setattr(
        job, "save_norm_maps", lambda path, images, maps, largest: drawn.append((images, maps))
    )
    config.weight_matrices, config.thresholds = ("mlp",), ("quantile=0.5",)
    found = []
    for name, damage in (("damaged", Path.write_bytes), ("without", None)):
        config.data.path = str(tiny.write_images(tmp_path / name, 10))
        for number in ("000", "009"):
            file = tmp_path / name / f"{number}.jpg"
            damage(file, b"no image") if damage else file.unlink()
        assert main.run(config, tmp_path / f"of_{name}") == 0
        found.append(json.loads((tmp_path / f"of_{name}" / "nullspace.json").read_text()))
    assert found[0] == found[1] and found[0]["images"] == 8
    assert found[0]["verdict"].endswith("; measured on 8 images")
    jax.tree.map(np.testing.assert_array_equal, *drawn)


@pytest.mark.parametrize("length", [40, 0])
def test_the_verdict_says_whether_there_are_artifacts_and_where(tmp_path, capsys, length):
    config = null_spaces()
    config.teacher.model = "vit_tiny_patch16_224"
    config.teacher.weights = str(outlier_teacher.write_teacher(tmp_path / "t.safetensors", length))
    config.teacher.overrides = dict(outlier_teacher.SIZES)
    config.data.source, config.data.workers = "digits", 0
    config.mesh.data, config.precision, config.rank, config.images = 1, "float32", 2, 32
    config.layers, config.include_last_layer = (1, 3), False
    assert main.run(config, tmp_path / "out") == 0
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 1 + 4 + 1  # no table of singular values unless it is asked for
    found = json.loads((tmp_path / "out" / "nullspace.json").read_text())
    assert printed[-1] == f"verdict: {found['verdict']}"
    shares = [row["above_3"] for row in found["norms"]]
    assert [row["layer"] for row in found["norms"]] == [0, 1, 2, 3]
    assert shares[0] == 0
    if length:
        assert min(shares[1:]) > 0.01
        held = [
            row["share_project"]
            for row in found["rows"]
            if (row["source"], row["threshold"]) == ("mlp", "quantile=0.5")
        ]
        assert f"artifacts in layers 1 to 3 (up to {max(shares):.2%}" in found["verdict"]
        assert f"holds {np.mean(held):.0%} (left of an outlier at best: " in found["verdict"]
        assert re.search(r"best: \d+\.\d medians of \d+\.\d\)", found["verdict"])
        assert len(held) == 2
    else:
        assert max(shares) < 0.001
        assert found["verdict"].startswith("no artifacts") and "fitnet" in found["verdict"]
    assert min(Image.open(tmp_path / "out" / "norms.png").size) > 300


def test_a_norm_is_compared_with_the_median_of_its_own_image():
    norms = np.ones((2, 2, 1000))
    norms[:, 1] *= 100  # a bright image has no artifacts for that
    norms[1, 0, :4] = [3.5, 4, 6, 10]
    clean, dirty = norm_summary.summarise(norms)
    assert (clean.largest, clean.above_3, clean.has_artifacts) == (1, 0, False)
    assert (dirty.largest, dirty.above_3, dirty.above_5) == (10, 4 / 2000, 2 / 2000)
    assert norm_summary.artifacts(norms).sum() == 4
    verdict = norm_summary.verdict([clean, dirty], [0], [], "mlp")
    assert "artifacts in layer 1 (up to 0.20%" in verdict and "none of which" in verdict


def test_energy_chooses_what_is_left(config, tmp_path):
    """Each row states its own limit; `calibrated` is chosen on other images than it is measured."""
    config.thresholds, config.weight_matrices = ("energy=0.5", "energy=1"), ("mlp", "calibrated")
    config.rank = 16
    assert main.run(config, tmp_path / "out") == 0
    rows = json.loads((tmp_path / "out" / "nullspace.json").read_text())["rows"]
    assert len(rows) == 2 * 2 * 2
    dims = {(row["layer"], row["source"], row["threshold"]): row["null_dim"] for row in rows}
    for layer in {row["layer"] for row in rows}:
        for source in config.weight_matrices:
            smaller, larger = (dims[layer, source, f"energy={k}"] for k in ("1", "0.5"))
            assert smaller >= 1 and (source == "calibrated" or smaller <= larger)
    for row in rows:
        limit = float(row["threshold"].partition("=")[2])
        if row["source"] == "mlp":
            assert row["left_medians"] <= 1.01 * limit


@pytest.mark.parametrize(
    ("held", "words"),
    [
        (norm_summary.Removal(0.99, 1.2, 13), "holds 99% (left of an outlier at best: 1.2 medians"),
        (norm_summary.Removal(0.99, 1.2, 13), "SiNGER can remove them"),
        (norm_summary.Removal(0.89, 4.3, 13), "clips the rest (method.name=singer)"),
        (norm_summary.Removal(0.2, 11.6, 13), "SiNGER removes little of them: use FitNet"),
    ],
)
def test_the_verdict_depends_on_the_length_that_is_left(held, words):
    norms = np.ones((1, 1, 1000))
    norms[0, 0, :4] = 13
    assert words in norm_summary.verdict(norm_summary.summarise(norms), [0], [held], "mlp")
