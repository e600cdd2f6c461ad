"""Whole runs in processes of their own: killed, stopped, resumed, refused."""

import json
import re
import shlex
import signal
from pathlib import Path

import numpy as np
import pytest

from tests import cli
from tests.cli import assert_same_student, finish, start, steps, wait_for_step
from tests.damage import files


@pytest.fixture(scope="module")
def config_file(tmp_path_factory) -> Path:
    return cli.write_config(tmp_path_factory.mktemp("config"))


@pytest.fixture(scope="module")
def environment() -> dict[str, str]:
    return cli.environment()


@pytest.fixture(scope="module")
def uninterrupted(config_file, environment, tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    status, printed = finish(start(environment, f"--config={config_file}", f"--workdir={workdir}"))
    assert status == 0, printed
    return workdir


def test_a_work_directory_holds_what_the_readme_says(uninterrupted):
    names = {path.name for path in uninterrupted.iterdir()}
    files = {"config.json", "weights.json", "metrics.jsonl"}
    assert names == files | {"tensorboard", "checkpoints", "checkpoints.manifests", "student"}
    assert json.loads((uninterrupted / "config.json").read_text())["method"]["rank"] == 4
    last = json.loads((uninterrupted / "metrics.jsonl").read_text().splitlines()[-1])
    for name in ("loss", "loss_kd", "loss_outlier", "loss_info", "images_per_second"):
        assert np.isfinite(last[f"train/{name}"])
    assert 0 <= last["train/layer_2/outlier_energy_share"] <= 1


@pytest.mark.parametrize(
    "step", [pytest.param(1, marks=pytest.mark.slow), 7, pytest.param(8, marks=pytest.mark.slow)]
)
def test_a_killed_run_ends_with_the_same_bits(
    config_file, environment, tmp_path, uninterrupted, step
):
    arguments = (f"--config={config_file}", f"--workdir={tmp_path}")
    process = start(cli.held(environment, step + 3), *arguments)
    wait_for_step(process, tmp_path, step)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "student").exists()
    status, printed = finish(start(environment, *arguments))
    assert status == 0 and f"taken over from process {process.pid} of" in printed, printed
    assert_same_student(tmp_path, uninterrupted)
    assert steps(tmp_path) == sorted(set(steps(tmp_path)))  # no row twice
    assert set(steps(uninterrupted)) <= set(steps(tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_run_saves_says_so_and_continues(
    config_file, environment, tmp_path, uninterrupted, number
):
    arguments = (f"--config={config_file}", f"--workdir={tmp_path}")
    process = start(cli.held(environment, 4), *arguments)
    wait_for_step(process, tmp_path, 2)
    process.send_signal(number)
    status, printed = finish(process)
    assert status == 75, printed
    assert "stopped after step" in printed.splitlines()[-1]
    status, printed = finish(start(environment, *arguments))
    assert status == 0 and "continuing after step" in printed
    assert_same_student(tmp_path, uninterrupted)


@pytest.mark.slow
def test_more_steps_continue_a_finished_run(config_file, environment, tmp_path):
    arguments = (f"--config={config_file}", f"--workdir={tmp_path}")
    assert finish(start(environment, *arguments, "--config.steps=3"))[0] == 0
    status, printed = finish(start(environment, *arguments, "--config.steps=5"))
    assert status == 0 and "continuing after step 3 of 5" in printed
    assert steps(tmp_path) == [1, 2, 3, 4, 5]


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_checkpoint(config_file, tmp_path):
    environment = cli.environment(quickly=True)
    arguments = (
        f"--config={config_file}",
        f"--workdir={tmp_path}",
        "--config.checkpoint.every_steps=1",
    )
    blow_up = ("--config.optimizer.learning_rate=1e30", "--config.optimizer.name=sgd")
    blow_up += ("--config.method.name=fitnet",)
    status, printed = finish(start(environment, *arguments, *blow_up))
    assert status == 1
    last = printed.splitlines()[-1]
    assert "at step" in last and "last good checkpoint is kept" in last
    bad = int(last.split("at step ")[1].split(";")[0])
    kept = sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit())
    assert kept and max(kept) < bad
    before = {file: file.read_bytes() for file in files(tmp_path)}
    assert json.loads((tmp_path / "nan" / "student.json").read_text())["step"] == bad
    python, *command = shlex.split(last.split("replay it: ")[1])
    assert (python, *command[:2]) == ("python", *cli.PROGRAM)
    status, printed = finish(start(environment, *command[2:]))
    assert status == 1
    found = rf"singer_jax: step {bad}: invalid value \((nan|inf)\) encountered in \w+ \(in .*\.py:"
    assert re.match(found, printed.splitlines()[-1]), printed
    assert {file: file.read_bytes() for file in files(tmp_path)} == before


@pytest.mark.slow
def test_a_run_whose_only_checkpoint_is_damaged_fails_in_one_line(
    config_file, environment, tmp_path
):
    arguments = (f"--config={config_file}", f"--workdir={tmp_path}")
    assert finish(start(environment, *arguments, "--config.steps=3"))[0] == 0
    files = (tmp_path / "checkpoints" / "3" / "state").glob("**/d/*")
    data = max(files, key=lambda path: path.stat().st_size)
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    status, printed = finish(start(environment, *arguments, "--config.steps=5"))
    assert status == 1
    # Orbax may report a thread of its own after the command's own line.
    lines = [line for line in printed.splitlines() if line.startswith("singer_jax: ")]
    assert len(lines) == 1 and "no checkpoint is whole (3: " in lines[0]
    assert (tmp_path / "checkpoints" / "3").is_dir()
