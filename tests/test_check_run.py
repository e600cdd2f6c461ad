"""Tests of `check_run` on work directories: intact, corrupt, in use by a process, and resumed."""

import json
import logging
import shutil
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from singer_jax import main
from singer_jax.config import check_run
from tests import cli, tiny
from tests.damage import files, flip, largest


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[ConfigDict, Path]:
    """Returns a configuration and a finished run of it with checkpoints 2 and 4."""
    folder = tmp_path_factory.mktemp("finished")
    config = tiny.config(tiny.write_teacher(folder / "teacher.safetensors"), "fitnet")
    config.steps = 4
    assert main.run(config, folder / "run") == 0
    return config, folder / "run"


@pytest.fixture
def run(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished[1], tmp_path / "run"))


def check(run: Path, capsys) -> tuple[int, dict[str, str], str]:
    """Returns the exit status, the text of each finding, and the line on stderr."""
    config = check_run()
    config.run = str(run)
    capsys.readouterr()
    status = main.run(config, "")
    printed = capsys.readouterr()
    return status, dict(line.split(": ", 1) for line in printed.out.splitlines()), printed.err


def test_a_whole_run_and_one_that_another_process_holds(finished, run, capsys):
    process = cli.hold(run)
    try:
        before = {file: file.read_bytes() for file in files(run)}
        status, lines, _ = check(run, capsys)
        assert status == 0
        assert {file: file.read_bytes() for file in files(run)} == before
        assert main.run(finished[0], run) == 2
        printed = capsys.readouterr().err
        assert f"in use by process {process.pid} of" in printed and len(printed.splitlines()) == 1
    finally:
        process.kill()
        process.communicate()
    assert lines["checkpoints/2"] == lines["checkpoints/4"] == "every checksum matches"
    assert lines["metrics.jsonl"] == "3 rows"
    assert "sha256 matches" in lines["student/model.safetensors"]
    assert "sha256 matches" in lines["weights of teacher"]
    assert lines["config.json"] == lines["weights.json"] == "readable"


def _cut(name: str):
    def cut(run: Path) -> None:
        content = (run / name).read_bytes()
        (run / name).write_bytes(content[: len(content) - 9])

    return cut


DAMAGES = {
    "checkpoints/2": lambda run: flip(largest(run / "checkpoints" / "2" / "state"), 5000),
    "config.json": _cut("config.json"),
    "weights.json": _cut("weights.json"),
    "metrics.jsonl": _cut("metrics.jsonl"),
    "student/config.json": _cut("student/config.json"),
    "student/model.safetensors": _cut("student/model.safetensors"),
    "student/model.safetensors, a bit": lambda run: flip(
        run / "student" / "model.safetensors", -99
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_corrupt_files_are_named(run, capsys, name):
    DAMAGES[name](run)
    status, lines, error = check(run, capsys)
    name = name.split(",")[0]
    assert status == 1
    assert [key for key, line in lines.items() if line.startswith("CORRUPT: ")] == [name]
    assert error.endswith(f"corrupt: {name}\n") and len(error.splitlines()) == 1


def test_a_folder_that_is_no_run_is_refused(tmp_path, capsys):
    status, _, error = check(tmp_path, capsys)
    assert status == 2 and "not the work directory of a run" in error


def test_a_missing_run_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main.run(check_run(), "") == 2
    assert capsys.readouterr().err == "singer_jax: run: empty; give --config.run=DIR\n"


def test_a_damaged_run_resumes_bit_exact_from_the_previous_checkpoint(
    finished, run, caplog, capsys
):
    caplog.set_level(logging.INFO)
    config, newest = finished[0].copy_and_resolve_references(), run / "checkpoints" / "4"
    student = run / "student" / "model.safetensors"
    expected = student.read_bytes()
    student.unlink()
    for name in ("config.json", "metrics.jsonl"):
        DAMAGES[name](run)
    flip(largest(newest / "state"), 5000)
    damaged = {file: file.read_bytes() for file in files(newest)}

    config.seed = 5  # another run: it moves nothing
    assert main.run(config, run) == 2
    assert "another configuration: seed: 0 -> 5" in capsys.readouterr().err
    assert {file: file.read_bytes() for file in files(newest)} == damaged

    config.seed = 0
    assert main.run(config, run) == 0
    assert "continuing after step 2 of 4" in caplog.text
    assert student.read_bytes() == expected
    assert [json.loads(line)["step"] for line in (run / "metrics.jsonl").open()] == [1, 2, 3, 4]
    status, lines, _ = check(run, capsys)
    assert status == 0
    assert lines["checkpoints.damaged/4"].startswith("moved here earlier: ")
