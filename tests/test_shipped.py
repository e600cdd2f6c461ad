"""Tests that shipped configurations have the recorded settings, and that each one trains."""

import json

import numpy as np
import pytest

from singer_jax import main
from singer_jax.config import PROTOCOLS, settings_of
from singer_jax.runs.metrics import metric_name
from tests import shipped, tiny

CONFIGS = shipped.distillations()
METHODS = ("fitnet", "vitkd", "singer")
VITL = ("vits_fitnet", "vits_singer", "vitt_fitnet", "vitt_vitkd", "vitt_singer")


def test_each_has_a_text():
    assert {file.stem for file in shipped.TEXTS.glob("*.txt")} == set(CONFIGS)


@pytest.mark.parametrize("name", CONFIGS)
def test_it_is_what_its_text_says(name):
    """`python -m tests.shipped` updates the recorded texts."""
    assert shipped.describe(CONFIGS[name]) == (shipped.TEXTS / f"{name}.txt").read_text()


# Each file, and each method's published protocol once; one of each method in an ordinary run.
TRAINED = [name for name in CONFIGS if name.endswith("_recommended") or "vitl_vitt" in name]
FEW = {"singer_vitl_vitt_recommended"}
assert set(TRAINED) >= FEW


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in FEW else pytest.mark.slow) for name in TRAINED],
)
def test_it_trains_when_it_is_shrunk(name, tmp_path):
    config = CONFIGS[name].copy_and_resolve_references()
    size = tiny.TEACHER | {"depth": 6}
    teacher = tiny.write_teacher(
        tmp_path / "t.safetensors", config.teacher.model, **size, num_classes=10
    )
    config.teacher.weights = str(teacher)
    config.teacher.overrides = size
    config.student.overrides = tiny.STUDENT | {"depth": 4}
    config.method.rank = 4
    config.batch_size, config.steps, config.mesh.data = 8, 2, 1
    config.data.source, config.data.workers, config.log.every_steps = "digits", 0, 1
    assert main.run(config, tmp_path / "run") == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    for name in settings_of(config).each():
        losses = [row[metric_name("train", name, "loss")] for row in rows]
        assert len(losses) == 2 and np.all(np.isfinite(losses)) and losses[0] > 0


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize(
    ("family", "which", "alone"),
    [
        ("table1_vitl", "", {name: name.partition("_")[::2] for name in VITL}),
        ("table1_deit3", "", {name: ("deit3b", name) for name in METHODS}),
        ("table1_deit3", "small,", {name: ("deit3t", name) for name in METHODS}),
    ],
)
def test_a_row_of_table_1_is_the_run_that_is_shipped_alone(family, which, alone, protocol):
    students = settings_of(shipped.load(family).get_config(which + protocol)).each()
    teacher = "vitl" if family == "table1_vitl" else "deit3s" if which else "deit3l"
    assert set(students) == set(alone)
    for name, (student, method) in alone.items():
        single = shipped.load(f"{method}_{teacher}_{student}").get_config(protocol)
        assert students[name] == settings_of(single)
