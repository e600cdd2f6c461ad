"""Tests that a resumed study is unchanged, and that its page depends on its results alone."""

import json
import signal
from pathlib import Path

import numpy as np
import pytest

from benchmarks import study
from singer_jax import main
from singer_jax.config import settings_of
from singer_jax.errors import InputError
from singer_jax.jobs.study import cells
from tests import cli, tiny

CONFIG = """
import configs.study

def get_config():
    config = configs.study.get_config("scenes")
    for name in ("base", "tuned", "distilled"):
        config[name].data.scenes.train, config[name].data.scenes.test = 64, 30
        config[name].batch_size, config[name].mesh.data = 16, 1
    config.base.steps = config.tuned.steps = 4
    config.distilled.steps, config.distilled.checkpoint.every_steps, config.images = 2, 1, 40
    config.teachers, config.seeds, config.variant_seeds = ("random-random-20",), 1, 1
    config.main, config.variants_on = ("fitnet", "fitnet_clip", "singer"), config.teachers
    config.cleaners, config.cleaned = ("synthetic_outlier", "registers"), ("fitnet",)
    for name in set(config.distilled.students) - {*config.main, "execution"}:
        del config.distilled.students[name]
    return config
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("config") / "two_cells.py"
    file.write_text(CONFIG)
    return file


@pytest.mark.slow
def test_two_cells_killed_and_resumed_make_the_same_table(file, tmp_path):
    environment = cli.environment()
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    status, printed = cli.finish(cli.start(environment, f"--config={file}", f"--workdir={whole}"))
    assert status == 0, printed
    assert "checkpoint_manager" not in printed  # what orbax says to whoever reads
    arguments = (f"--config={file}", f"--workdir={broken}")
    process = cli.start(environment, *arguments)
    results = broken / "results.jsonl"
    cli.wait_until(lambda: results.exists() and "singer" in results.read_text(), process)
    cli.signal_group(process, signal.SIGKILL)
    cli.finish(process)
    before = results.read_text()
    status, printed = cli.finish(cli.start(environment, *arguments))
    assert status == 0, printed
    assert results.read_text().startswith(before)  # what was measured is not measured again
    assert results.read_text() == (whole / "results.jsonl").read_text()
    rows = {study.name_of(row): row for row in map(json.loads, results.read_text().splitlines())}
    cleaned = "fitnet (synthetic_outlier)", "fitnet (registers)"
    assert set(rows) == {"", "untrained", "fitnet", "fitnet_clip", "singer", *cleaned}
    for name in cleaned:  # the neuron that writes the vector is found
        assert rows[name]["removed_share"] == pytest.approx(1, abs=0.05)
    # About: the last block's median is among those that scale the vector.
    assert rows[""]["norm_ratio_first"] == pytest.approx(20, rel=0.2)
    assert rows["singer"]["next_block_changed"] > 0
    shares = dict(rows["singer"]["removed_over_steps"])
    assert sorted(shares) == [1, 2] and shares[2] == rows["singer"]["removed_share"]

    status, printed = cli.finish(cli.start(environment, *arguments, "--config.distilled.steps=3"))
    assert status == 2 and "distilled.steps: 3" in printed


@pytest.mark.slow
def test_a_given_teacher_is_not_trained_and_a_student_that_is_stopped_stops_no_study(tmp_path):
    import configs.study

    config = configs.study.get_config("photos")
    config.given.weights = str(tiny.write_teacher(tmp_path / "teacher.safetensors"))
    config.given.model, config.given.overrides = "vit_tiny_patch16_224", dict(tiny.TEACHER)
    run = config.distilled
    run.data.source, config.cleaners, config.cleaned = "digits", ("shift_average",), ("fitnet",)
    run.student.overrides = dict(tiny.STUDENT)
    run.batch_size, run.mesh.data, run.steps, run.method.rank = 16, 1, 2, 4
    run.students.wild = {"method": {"name": "fitnet"}, "optimizer": {"learning_rate": 1e30}}
    config.main, config.variants_on, config.seeds = ("fitnet", "singer", "wild"), ("given",), 1
    config.tested = 30
    for name in set(run.students) - {*config.main, "execution"}:
        del run.students[name]
    run.students.fitnet.method["layers"] = (1,)
    config.images = 40
    assert main.run(config, tmp_path / "study") == 0
    assert sorted(path.name for path in (tmp_path / "study").iterdir()) == [
        "given",
        "results.jsonl",
        "study.json",
    ]
    lines = (tmp_path / "study" / "results.jsonl").read_text().splitlines()
    rows = {study.name_of(row): row for row in map(json.loads, lines)}
    assert set(rows) == {"", "untrained", "fitnet", "singer", "wild", "fitnet (shift_average)"}
    assert "is nan at step 2" in rows["wild"]["stopped"] and "linear_top1" not in rows["wild"]
    assert "miou" not in rows["singer"]  # digits have no masks
    kept = study.tagged(study.PHOTOS, tmp_path / "study")
    assert "Stopped: given, seed 0, wild." in study.page(kept)
    assert rows["singer"]["next_block_changed"] > 0 and "removed_share" not in rows["singer"]

    config.given.weights = ""
    with pytest.raises(InputError, match=r"given\.weights: missing"):
        cells(settings_of(config))


def test_what_it_asks_for_is_checked_before_any_work(tmp_path):
    import configs.study

    config = configs.study.get_config()
    config.patches = 36
    with pytest.raises(InputError, match="patches: 36, but an image has 36"):
        cells(settings_of(config))
    config.patches = 4
    with pytest.raises(InputError, match=r"students\..*quantile: 0.9; .* at most 0.861"):
        cells(settings_of(config))
    config.patches = 2
    config.main = ("fitnet", "fitnett")
    with pytest.raises(InputError, match="main: unknown name 'fitnett'; allowed: calibrated, "):
        cells(settings_of(config))
    assert main.run(config, tmp_path / "study") == 2
    config.main, config.teachers, config.variants_on = ("fitnet",), ("null-random-1.0",), ()
    with pytest.raises(InputError, match=r"teachers: null-random-1.0 .* give one above 1"):
        cells(settings_of(config))
    assert not (tmp_path / "study").exists()


def test_all_sizes_hold_their_own_rule():
    """The quantile leaves room for the outlier patches, and every configuration is valid."""
    import configs.study

    for name, size in configs.study.SIZES.items():
        patches = (size.image_size // size.patch_size) ** 2
        assert size.quantile <= 1 - (size.patches + 1) / patches
        config = configs.study.get_config(name)
        config.given.weights = "given.safetensors"
        every = cells(settings_of(config))
        assert len(every) == len(set(every)) >= size.seeds * len(size.teachers)


def test_the_page_follows_from_the_results(tmp_path):
    rows = study.read()
    assert study.page(rows) == study.PAGE.read_text()
    for name in ("one.svg", "two.svg"):
        study.plot(rows, tmp_path / name)
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()


def test_intervals_and_paired_differences():
    mean, half = study.interval([1.0, 2, 3, 4, 5])
    assert mean == 3 and half == pytest.approx(2.776 * np.sqrt(2.5 / 5), rel=1e-3)
    one = {seed: {"x": seed + 1.0} for seed in range(3)}
    other = {seed: {"x": float(seed)} for seed in (2, 1, 7)}
    assert study.pairs(one, other, "x") == [1, 1]


def test_differences_are_established_only_where_seeds_agree():
    score = dict.fromkeys(study.SCORES, 50.0)
    found = []
    for seed in range(5):
        for name, gain in (("fitnet", 0), ("singer", 9 + seed / 10), ("singer_clip", (-1) ** seed)):
            values = {key: value + gain for key, value in score.items()}
            known = {"study": study.DIGITS, "teacher": "none", "clean": "", "seed": seed}
            found.append(known | {"student": name} | values)
    every = study.differences(found)
    assert {one.student for one in every} == {"singer", "singer_clip"}
    assert {one.student for one in study.established(every)} == {"singer"}
