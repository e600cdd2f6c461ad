"""Whole jobs on a CPU that refuses what accelerators refuse, and computes in their way."""

import json
import warnings
from pathlib import Path

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from safetensors.numpy import load_file

from configs.quickstart import get_config
from singer_jax import config as config_lib
from singer_jax import main
from singer_jax.platform import backends, chips
from tests import tiny


@pytest.fixture(params=["gpu", "tpu"])
def accelerator(request, monkeypatch):
    """The CPU as PJRT's C interface shows a GPU or TPU.

    Programs cost nothing before they are compiled, a donated buffer that cannot be used is an
    error, products of float32 are exact only where a job asks for it, the data sheet is known, and
    the models compute as on that platform.
    """
    monkeypatch.setattr(jax.stages.Lowered, "cost_analysis", lambda self: None)
    monkeypatch.setitem(backends._CHOICES, "cpu", backends.choices(request.param))
    monkeypatch.setitem(chips.CHIPS, "cpu", chips.Chip(1e12, 1e12, 2**30, 1e9, 1e9))
    before = jax.config.jax_default_matmul_precision
    jax.config.update("jax_default_matmul_precision", None)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Some donated buffers were not usable")
        yield request.param
    jax.config.update("jax_default_matmul_precision", before)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    return tiny.write_teacher(tmp_path_factory.mktemp("weights") / "teacher.safetensors")


def run_config(teacher: Path, steps: int) -> ConfigDict:
    config = tiny.config(teacher)
    config.steps, config.evals.every_steps, config.evals.images = steps, 2, 32
    config.mesh.data = None
    return config


@pytest.fixture(scope="module")
def on_the_cpu(teacher, tmp_path_factory) -> dict[str, np.ndarray]:
    """The student of the same run, continued once, as the CPU computes it."""
    workdir = tmp_path_factory.mktemp("plain")
    for steps in (2, 4):
        assert main.run(run_config(teacher, steps), workdir) == 0
    return load_file(workdir / "student" / "model.safetensors")


def done(config: ConfigDict, workdir: Path) -> None:
    assert main.run(config, workdir) == 0
    assert jax.config.jax_default_matmul_precision is None  # nothing is left behind


@pytest.mark.slow
def test_every_job_runs(accelerator, teacher, on_the_cpu, tmp_path, capsys):
    run = tmp_path / "run"
    done(run_config(teacher, 2), run)
    done(run_config(teacher, 4), run)  # continues
    student = load_file(run / "student" / "model.safetensors")
    for key, value in on_the_cpu.items():
        # Four steps of Adam on sums in another order.
        np.testing.assert_allclose(student[key], value, rtol=1e-2, atol=1e-4, err_msg=key)
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-2])
    assert last["train/mfu"] > 0

    evaluation = config_lib.evaluation()
    evaluation.run, evaluation.data.source, evaluation.data.workers = str(run), "digits", 0
    evaluation.probe.protocol, evaluation.probe.epochs = "fast", 2
    done(evaluation, run / "evaluation")
    for job in (config_lib.report(), config_lib.export()):
        done(job, run)
    nullspace = config_lib.null_spaces()
    nullspace.precision = "float32"
    learnt_from = run_config(teacher, 2).teacher
    nullspace.teacher.update({key: learnt_from[key] for key in nullspace.teacher})
    nullspace.rank, nullspace.images = 4, 16
    nullspace.data.source, nullspace.data.workers = "digits", 0
    done(nullspace, tmp_path / "nullspace")


def test_the_quickstart_means_float32(monkeypatch, tmp_path):
    """Its precision stands in its runs, not at the top."""
    from singer_jax.jobs import quickstart

    found = []

    def seen(settings: quickstart.QuickstartSettings, workdir: object) -> None:
        found.append(jax.config.jax_default_matmul_precision)

    monkeypatch.setattr(quickstart, "quickstart", seen)
    jax.config.update("jax_default_matmul_precision", None)
    assert main.run(get_config(), tmp_path) == 0
    assert found == ["highest"]
