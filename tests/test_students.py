"""Whole runs of several students: what they leave behind, killed and resumed, measured, shown."""

import collections
import json
import math
import re
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict
from safetensors.numpy import load_file

from singer_jax import main
from singer_jax.config import compare, evaluation, replay, report
from singer_jax.data.images import EvalTransform
from singer_jax.data.registry import make_source
from singer_jax.data.sources import TEST, TRAIN
from tests import cli, tiny

CONFIG = """
import os
from tests import tiny

def get_config(protocol="recommended"):
    if "HOLD_AFTER" in os.environ:
        from tests.loop import hold_if_asked
        hold_if_asked()
    config = tiny.config({teacher!r}, protocol=protocol)
    config.steps, config.checkpoint.every_steps, config.evals.every_steps = 12, 3, 6
    config.students.singer = {{}}
    config.students.fitnet = {{"method": {{"name": "fitnet"}}, "overrides": {{"depth": 3}}}}
    config.students.fitnet.seed = 1
    return config
"""


ENVIRONMENT = cli.environment(quickly=True)


@pytest.fixture(scope="module")
def config_file(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("config")
    teacher = tiny.write_teacher(folder / "teacher.safetensors", num_classes=10)
    file = folder / "two.py"
    file.write_text(CONFIG.format(teacher=str(teacher)))
    return file


@pytest.fixture(scope="module")
def whole(config_file, tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    arguments = (f"--config={config_file}", f"--workdir={workdir}")
    status, printed = cli.finish(cli.start(ENVIRONMENT, *arguments))
    assert status == 0, printed
    assert "2 students, sequential, peak memory " in printed
    assert "singer: teacher layer 1: " in printed
    return workdir


def students(workdir: Path) -> dict[str, dict[str, np.ndarray]]:
    files = sorted((workdir / "students").glob("*/model.safetensors"))
    return {file.parent.name: load_file(file) for file in files}


def test_each_student_has_its_metrics_and_its_export(whole):
    names = {path.name for path in whole.iterdir()}
    files = {"config.json", "weights.json", "metrics.jsonl"}
    folders = {"tensorboard", "checkpoints", "checkpoints.manifests", "students"}
    assert names == files | folders
    last = json.loads((whole / "metrics.jsonl").read_text().splitlines()[-2])
    shared = ("train/images_per_second", "train/unreadable_images")
    own = ("train/singer/loss_outlier", "train/fitnet/loss_kd", "train/fitnet/learning_rate")
    assert all(np.isfinite(last[name]) for name in (*shared, *own))
    assert "train/loss" not in last and "train/fitnet/loss_outlier" not in last
    measured = json.loads((whole / "metrics.jsonl").read_text().splitlines()[-1])
    for name in ("singer", "fitnet"):
        assert measured[f"eval/{name}/val/loss"] > 0
        assert 0 <= measured[f"eval/{name}/knn/top1"] <= 100
    assert set(students(whole)) == {"singer", "fitnet"}
    described = json.loads((whole / "students" / "fitnet" / "config.json").read_text())
    assert described["model_args"]["depth"] == 3


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_an_interrupted_run_ends_with_the_same_bits(config_file, whole, tmp_path, number):
    arguments = (f"--config={config_file}", f"--workdir={tmp_path}")
    process = cli.start(cli.held(ENVIRONMENT, 5), *arguments)
    cli.wait_until((tmp_path / "checkpoints" / "3").is_dir, process)
    process.send_signal(number)
    status, _ = cli.finish(process)
    assert status in (-signal.SIGKILL, 75) and not (tmp_path / "students").exists()
    status, printed = cli.finish(cli.start(ENVIRONMENT, *arguments))
    assert status == 0 and "continuing after step" in printed, printed
    found, expected = students(tmp_path), students(whole)
    for name, tensors in expected.items():
        for key, value in tensors.items():
            np.testing.assert_array_equal(found[name][key], value, err_msg=f"{name} {key}")


@pytest.mark.slow
def test_two_processes_do_what_one_does(config_file, whole, tmp_path):
    started = cli.start_together(
        ENVIRONMENT,
        2,
        f"--config={config_file}",
        f"--workdir={tmp_path}",
        "--config.mesh.data=2",
        "--config.mesh.fsdp=1",
    )
    for status, printed in map(cli.finish, started):
        assert status == 0, printed
    for name, tensors in students(whole).items():
        for key, value in students(tmp_path)[name].items():
            # Float32 sums in another order, over 12 steps.
            np.testing.assert_allclose(
                value, tensors[key], rtol=1e-3, atol=1e-4, err_msg=f"{name} {key}"
            )
    rows = [
        [json.loads(line) for line in (run / "metrics.jsonl").open()] for run in (whole, tmp_path)
    ]
    for expected, found in zip(*rows, strict=True):
        assert set(expected) - {"train/images_per_second"} <= set(found)
        for name in expected:
            if "loss" in name:
                assert found[name] == pytest.approx(expected[name], rel=1e-3)


def configuration(config_file: Path) -> ConfigDict:
    module: dict = {}
    exec(config_file.read_text(), module)
    return module["get_config"]()


def test_other_students_are_another_run(config_file, whole, capsys):
    config = configuration(config_file)
    config.students.fitnet.seed = 2
    assert main.run(config, whole) == 2
    assert "students.fitnet.seed: 1 -> 2" in capsys.readouterr().err
    del config.students["fitnet"]
    assert main.run(config, whole) == 2
    assert "students.fitnet." in capsys.readouterr().err


@pytest.mark.slow
def test_another_schedule_continues_the_same_run(config_file, whole, tmp_path):
    config = configuration(config_file)
    config.students.execution = "parallel"
    assert main.run(config, tmp_path) == 0
    shutil.rmtree(tmp_path / "checkpoints" / "12")
    config.students.execution = "sequential"
    assert main.run(config, tmp_path) == 0
    for name, tensors in students(whole).items():
        for key, value in students(tmp_path)[name].items():
            np.testing.assert_allclose(value, tensors[key], atol=1e-4, err_msg=f"{name} {key}")


@pytest.mark.slow
def test_one_that_goes_wrong_is_named_and_the_others_are_finished(config_file, tmp_path, capsys):
    config = configuration(config_file)
    config.students.bad = {"optimizer": {"name": "sgd", "learning_rate": 1e30}}
    for _ in range(2):  # the second time nothing is left to train
        assert main.run(config, tmp_path) == 1
        found = r"bad: train/bad/loss_\w+ is (nan|inf) at step 2, stopped after step 1"
        assert re.search(found, capsys.readouterr().err)
    last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert "eval/singer/val/loss" in last and last["step"] == 12
    assert not any(name.startswith("eval/bad/") for name in last)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").open()]
    assert max(row["step"] for row in rows if "train/bad/loss" in row) == 1
    assert set(students(tmp_path)) == {"bad", "fitnet", "singer"}
    assert all(np.isfinite(value).all() for value in students(tmp_path)["bad"].values())
    # Its state before that step is in each later checkpoint.
    again = replay()
    again.run, again.student = str(tmp_path), "bad"
    assert main.run(again, "") == 1
    assert "step 2: invalid value (" in capsys.readouterr().err.splitlines()[-1]
    # What reads the run goes on without it.
    assert main.run(evaluate(tmp_path), tmp_path / "evaluation") == 0
    assert {path.name for path in (tmp_path / "evaluation").iterdir()} == WITH_TEACHER
    shown = report()
    shown.images, shown.baselines = 2, (str(tmp_path),)
    assert main.run(shown, tmp_path) == 0
    text = (tmp_path / "report" / "index.html").read_text()
    assert f"student, singer ({tmp_path.name})" in text and "student, bad" not in text
    both = compare()
    both.runs = (str(tmp_path),)
    assert main.run(both, tmp_path / "compared") == 0


@pytest.mark.slow
def test_when_all_go_wrong_the_run_ends_at_once(config_file, tmp_path, capsys):
    config = configuration(config_file)
    config.optimizer.name, config.optimizer.learning_rate = "sgd", 1e30
    assert main.run(config, tmp_path) == 1
    assert "all students are stopped: fitnet: " in capsys.readouterr().err
    assert not (tmp_path / "students").exists()


WITH_TEACHER = {"teacher", "fitnet", "singer"}


def evaluate(run: Path, **changes: str) -> ConfigDict:
    config = evaluation()
    config.run, config.data.source, config.data.workers, config.mesh.data = str(run), "digits", 0, 1
    config.probe.epochs, config.probe.protocol = 2, "fast"
    config.update_from_flattened_dict(changes)
    return config


@pytest.fixture(scope="module")
def evaluated(whole) -> Path:
    assert main.run(evaluate(whole), whole / "evaluation") == 0
    return whole / "evaluation"


@pytest.mark.slow
def test_all_are_measured_on_images_that_are_cropped_once(whole, evaluated, tmp_path, monkeypatch):
    assert {path.name for path in evaluated.iterdir()} == WITH_TEACHER
    cropped = collections.Counter()
    once = EvalTransform.__call__

    def counted(self: EvalTransform, *arguments: object) -> np.ndarray:
        cropped["test"] += 1
        return once(self, *arguments)

    monkeypatch.setattr(EvalTransform, "__call__", counted)
    assert main.run(evaluate(whole, student="fitnet"), tmp_path) == 0
    alone = json.loads((tmp_path / "fitnet" / "results.json").read_text())
    assert alone == json.loads((evaluated / "fitnet" / "results.json").read_text())
    one = cropped["test"]
    assert main.run(evaluate(whole), tmp_path / "all") == 0
    sizes = [len(make_source("digits", "", split)) for split in (TRAIN, TEST)]
    train, test = (64 * math.ceil(size / 64) for size in sizes)  # whole batches
    assert one == train + test and cropped["test"] - one == 3 * train + test


def test_a_student_that_is_not_there_is_named(whole, tmp_path, capsys):
    assert main.run(evaluate(whole, student="vitkd"), tmp_path) == 2
    assert "student: 'vitkd', but" in capsys.readouterr().err


@pytest.mark.slow
def test_the_page_shows_all_students_side_by_side(whole, evaluated):
    config = report()
    config.images = 3
    assert main.run(config, whole) == 0
    text = (whole / "report" / "index.html").read_text()
    for words in ("student, fitnet", "student, singer", "fitnet, measured here", "layer 1, singer"):
        assert words in text


def test_the_students_of_a_run_are_compared(whole, evaluated, tmp_path, capsys):
    config = compare()
    config.runs = (str(whole),)
    assert main.run(config, tmp_path) == 0
    rows = json.loads((tmp_path / "compare.json").read_text())["rows"]
    assert len(rows) == 2 and all("digits top1" in row for row in rows.values())
