"""Former names of settings and metrics: read from older runs, refused on a command line."""

import subprocess
import sys

import pytest

from singer_jax.config import defaults
from singer_jax.errors import InputError
from singer_jax.jobs import JOBS
from singer_jax.settings import renamed, settings
from singer_jax.training.settings import of_saved

FORMER = {
    "accumulation": 2,
    "checkpoint.every": 7,
    "data.strict": True,
    "evals.every": 3,
    "log.every": 5,
    "method.append_last": False,
    "method.match.clip": 0.8,
    "method.match.space": "l2",
    "method.matching": "official",
    "method.nullspace.epsilon": 2.0,
    "method.nullspace.order": "official",
    "method.nullspace.rule": "absolute",
    "method.nullspace.source": "block",
    "method.nullspace.start": "official",
    "method.nullspace.use": "soft",
    "method.quantile": 0.5,
    "method.resample_grids": True,
    "method.terms.singer": 0.5,
    "method.weights.kd": 3.0,
    "optimizer.clip_norm": 1.5,
    "schedule.final_ratio": 0.5,
    "teacher.clean": "registers",
}


def test_every_former_key_of_an_older_run_sets_the_renamed_one():
    known = settings.flatten(settings.to_dict(of_saved(FORMER)))
    for key, value in FORMER.items():
        assert known[renamed.current_key(key)] == value, key


def test_a_former_value_is_read_as_the_renamed_one():
    assert of_saved({"students.schedule": "one_by_one"}).students.execution == "sequential"
    of_student = {"students.a.method.quantile": 0.5, "students.a.method.name": "singer"}
    assert of_saved(of_student).students.named["a"].method.outlier_quantile == 0.5


def test_no_current_key_of_any_job_is_taken_for_a_former_one():
    for job in JOBS:
        for key in settings.leaves(defaults(job)):
            assert renamed.current_key(key) == key or job in ("quickstart", "study"), (job, key)


@pytest.mark.parametrize("key", ["method.nullspace.use", "accumulation", "log.every"])
def test_a_former_key_is_refused_with_its_current_name(key):
    with pytest.raises(InputError, match=f"{key} is now {renamed.current_key(key)}"):
        settings.check(settings.leaves(defaults("distill")), {key: 1})


def test_a_former_flag_is_refused_with_its_current_name(tmp_path):
    command = (sys.executable, "-m", "singer_jax.main", "--config=configs/singer_vitl_vitt.py")
    former = (f"--workdir={tmp_path}", "--config.method.quantile=0.9")
    done = subprocess.run([*command, *former], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.strip().endswith(
        "--config.method.quantile is now --config.method.outlier_quantile"
    )


def test_former_metrics_are_read_under_their_current_names():
    names = {
        "train/waiting": "train/data_wait_fraction",
        "eval/held_out/loss": "eval/val/loss",
        "eval/small/held_out/loss_kd": "eval/small/val/loss_kd",
        "train/loss": "train/loss",
        "step": "step",
    }
    assert {name: renamed.current_metric(name) for name in names} == names
