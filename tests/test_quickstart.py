"""Test of the quickstart's output, at a fraction of its length."""

import importlib.util
import json
from pathlib import Path

import pytest
from PIL import Image

from singer_jax import main

FILE = Path(__file__).parents[1] / "configs" / "quickstart.py"


@pytest.mark.slow
def test_it_trains_measures_and_draws_and_does_nothing_twice(tmp_path, capsys):
    spec = importlib.util.spec_from_file_location("quickstart_config", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config()
    for name in ("teacher", "distilled"):
        config[name].steps, config[name].mesh.data = 3, 1
    config.probe.epochs = 2
    assert main.run(config.copy_and_resolve_references(), tmp_path) == 0
    models = {"teacher", "student, untrained"}
    models |= {f"student, {name}" for name in ("fitnet", "final_norm", "singer")}
    printed = capsys.readouterr().out
    results = json.loads((tmp_path / "results.json").read_text())
    assert set(results) == models and all(name in printed for name in models)
    for row in results.values():
        assert 0 <= row["linear_top1"] <= 100 and 0 <= row["knn_top1"] <= 100
        assert row["norm_p99_over_median"] >= 1
    pictures = list((tmp_path / "report").glob("*.png"))
    assert len(pictures) == 6 and tmp_path / "report" / "artifacts.png" in pictures
    assert all(min(Image.open(picture).size) > 300 for picture in pictures)

    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/checkpoints/*")}
    assert main.run(config.copy_and_resolve_references(), tmp_path) == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert json.loads((tmp_path / "results.json").read_text()) == results
