"""A run that an older version left behind goes on and is evaluated.

`old_run.tar.gz` was made on 2026-11-23, before jobs/: the first two of four steps of `tiny.config`,
its teacher, and the student after all four.
"""

import json
import tarfile
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from singer_jax import config as config_lib
from singer_jax import main
from tests import tiny

ARCHIVE = Path(__file__).with_name("old_run.tar.gz")


def test_an_old_run_is_continued_and_evaluated(tmp_path, monkeypatch):
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)  # its configuration names the teacher by a relative path
    run = tmp_path / "run"
    config = tiny.config("teacher.safetensors")
    config.steps = 4
    config.method.match.norm_clip_quantile = 1.0  # the default of that version
    assert main.run(config, run) == 0
    rows = [json.loads(line) for line in (run / "metrics.jsonl").open()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    expected = load_file(tmp_path / "expected" / "model.safetensors")
    found = load_file(run / "student" / "model.safetensors")
    assert set(found) == set(expected)
    for key, value in expected.items():
        np.testing.assert_allclose(found[key], value, rtol=1e-4, atol=1e-6, err_msg=key)

    evaluation = config_lib.evaluation()
    evaluation.run, evaluation.data.source, evaluation.data.workers = str(run), "digits", 0
    evaluation.probe.protocol, evaluation.probe.epochs = "fast", 1
    assert main.run(evaluation, run / "evaluation") == 0
