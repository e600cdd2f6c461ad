"""Test of the quickstart's output, at a fraction of its length."""

import importlib.util
import json
from pathlib import Path

import pytest
from PIL import Image

from benchmarks import quickstart
from singer_jax import main

FILE = Path(__file__).parents[1] / "configs" / "quickstart.py"


@pytest.mark.slow
def test_it_trains_measures_and_draws_and_does_nothing_twice(tmp_path, capsys):
    spec = importlib.util.spec_from_file_location("quickstart_config", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config()
    for name in ("base", "teacher", "distilled"):
        config[name].steps, config[name].mesh.data = 3, 1
    assert main.run(config.copy_and_resolve_references(), tmp_path) == 0
    printed = capsys.readouterr().out
    results = json.loads((tmp_path / "results.json").read_text())
    models = {"teacher", "untrained", "fitnet", "fitnet_clip", "singer"}
    assert set(results) == models == set(quickstart.NAMES)
    assert all(f"\n{name} " in printed for name in models)
    for row in results.values():
        assert 0 <= row["linear_top1"] <= 100 and 0 <= row["knn_top1"] <= 100
        assert row["norm_ratio"] >= 1
    assert results["teacher"]["outlier_in_null_space"] > 0.9
    assert results["teacher"]["norm_ratio_first"] == pytest.approx(20, rel=0.2)
    assert min(Image.open(tmp_path / "report" / "artifacts.png").size) > 300

    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/checkpoints/*")}
    assert main.run(config.copy_and_resolve_references(), tmp_path) == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert json.loads((tmp_path / "results.json").read_text()) == results


def test_the_table_follows_from_the_kept_rows_and_all_seeds_have_the_same_order():
    rows = [json.loads(line) for line in quickstart.KEPT.read_text().splitlines()]
    assert quickstart.page(rows) == quickstart.PAGE.read_text()
    score = {(row["seed"], row["model"]): row["linear_top1"] for row in rows}
    for seed in quickstart.SEEDS:
        kept = min(score[seed, "fitnet_clip"], score[seed, "singer"])
        assert score[seed, "fitnet"] < score[seed, "untrained"] < kept


def test_the_readme_shows_the_table_of_the_kept_results():
    root = Path(__file__).parents[1]
    table = [
        line
        for line in (root / "benchmarks" / "quickstart.md").read_text().splitlines()
        if line.startswith("|")
    ]
    assert "\n".join(table) in (root / "README.md").read_text()
