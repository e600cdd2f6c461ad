"""Tests that two real processes evaluate, report and export as one does, and write files once."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from singer_jax import config as config_lib
from singer_jax import main
from singer_jax.config import settings_of
from singer_jax.jobs import evaluate, export, nullspace, report
from tests import cli, tiny
from tests.data import official

pytestmark = pytest.mark.slow

# All jobs in one start of the processes; each has a folder of its own, as hosts that share no disk.
SCRIPT = """
import sys
from pathlib import Path
import jax
from singer_jax.platform import hosts
from tests.evaluation import test_hosts

joining = dict(flag.removeprefix("--").split("=") for flag in sys.argv[3:])
hosts.join(joining["coordinator"], int(joining["processes"]), int(joining["process"]))
with hosts.together():
    jax.config.update("jax_default_matmul_precision", "highest")
    assert jax.process_count() == 2 and jax.local_device_count() == 1
    test_hosts.run_jobs(Path(sys.argv[1]), Path(sys.argv[2]) / f"host{jax.process_index()}")
"""


def run_jobs(inputs: Path, workdir: Path) -> None:
    """Runs every job that reads a run, on two devices."""
    for name, protocol, mesh in (("fast", "fast", (1, 2)), ("paper", "paper", (2, 1))):
        config = config_lib.evaluation()
        config.run, config.data.path = str(inputs / "run"), str(inputs / "data")
        config.data.workers = 0
        config.mesh.data, config.mesh.fsdp = mesh
        config.probe.protocol, config.probe.epochs, config.probe.views = protocol, 2, 1
        config.probe.batch_size = 5
        config.tasks = ("imagenet", "imagenet_v2", "ade20k") if name == "fast" else ("nyud",)
        evaluate.evaluate(settings_of(config), workdir / name)
    config = config_lib.export()
    config.run, config.formats = str(inputs / "run"), ("timm",)
    export.export(settings_of(config), workdir / "export")
    config = config_lib.report()
    config.run, config.images = str(inputs / "run"), 3
    report.report(settings_of(config), workdir)
    config = config_lib.null_spaces()
    teacher = tiny.config(inputs / "teacher.safetensors").teacher
    config.teacher.update({key: teacher[key] for key in config.teacher})
    config.data.source, config.data.workers, config.images = "digits", 0, 11
    config.mesh.data, config.mesh.fsdp, config.precision = 1, 2, "float32"
    config.weight_matrices, config.thresholds, config.rank = (
        ("mlp", "calibrated"),
        ("quantile=0.5",),
        2,
    )
    nullspace.nullspace(settings_of(config), workdir / "nullspace")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    config = tiny.config(tiny.write_teacher(folder / "teacher.safetensors"), "fitnet")
    config.steps = 2
    assert main.run(config, folder / "run") == 0
    for write in (official.imagenet, official.imagenet_v2, official.ade20k, official.nyud):
        write(folder / "data")
    return folder


@pytest.fixture(scope="module")
def results(inputs, tmp_path_factory) -> tuple[Path, Path]:
    """Returns the folders of one process and of two."""
    one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    environment = cli.environment(quickly=True)
    program = ("-c", SCRIPT, str(inputs), str(two))
    hosts = cli.start_together(environment, 2, program=program)
    run_jobs(inputs, one / "host0")
    for process in hosts:
        status, printed = cli.finish(process)
        assert status == 0, printed
    return one / "host0", two


def numbers(content: Any, name: str = "") -> dict[str, Any]:
    """Returns the leaves of a JSON object by their path."""
    if isinstance(content, dict | list):
        items = content.items() if isinstance(content, dict) else enumerate(content)
        return {k: v for key, part in items for k, v in numbers(part, f"{name}/{key}").items()}
    return {name: content}


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_process_0_writes_all_that_one_process_writes_and_the_others_nothing(results):
    one, two = results
    assert files(two / "host0") == files(one)
    assert "fast/features/ade20k/features.npy" in files(one)
    assert not (two / "host1").exists() or not files(two / "host1")


@pytest.mark.parametrize("file", ["fast/results.json", "paper/results.json"])
def test_two_processes_find_the_metrics_of_one(results, file):
    expected, found = (
        numbers(json.loads((folder / file).read_text()))
        for folder in (results[0], results[1] / "host0")
    )
    assert set(found) == set(expected)
    for name, value in expected.items():
        # Sums in another order; T = 0.03 makes depth nearly a choice of bins.
        tolerance = 2e-2 if "nyud" in name or "NYUd" in name else 1e-3
        assert found[name] == (
            pytest.approx(value, rel=tolerance) if isinstance(value, float) else value
        ), name


@pytest.mark.parametrize("task", ["fast/tasks/ade20k", "fast/tasks/imagenet", "paper/tasks/nyud"])
def test_two_processes_train_the_head_of_one(results, task):
    expected, found = (
        dict(np.load(folder / f"{task}.npz")) for folder in (results[0], results[1] / "host0")
    )
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-3, atol=1e-4)


def test_two_processes_export_the_same_student(results):
    expected, found = (
        load_file(folder / "export" / "student" / "model.safetensors")
        for folder in (results[0], results[1] / "host0")
    )
    np.testing.assert_equal(found, expected)


def test_two_processes_find_the_same_null_spaces(results):
    expected, found = (
        numbers(json.loads((folder / "nullspace" / "nullspace.json").read_text()))
        for folder in (results[0], results[1] / "host0")
    )
    for name, value in expected.items():
        assert found[name] == (
            pytest.approx(value, rel=1e-3, abs=1e-5) if isinstance(value, float) else value
        ), name
