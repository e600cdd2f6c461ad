"""The shipped distillation configurations: what they are, and that each one trains."""

import json

import numpy as np
import pytest

from singer_jax import main
from tests import shipped, tiny

CONFIGS = shipped.distillations()


def test_each_has_a_text():
    assert {file.stem for file in shipped.TEXTS.glob("*.txt")} == set(CONFIGS)


@pytest.mark.parametrize("name", CONFIGS)
def test_it_is_what_its_text_says(name):
    """`python -m tests.shipped` writes the texts anew."""
    assert shipped.describe(CONFIGS[name]) == (shipped.TEXTS / f"{name}.txt").read_text()


# Each file, and each method's published protocol once.
TRAINED = [name for name in CONFIGS if name.endswith("_recommended") or "vitl_vitt" in name]


@pytest.mark.parametrize("name", TRAINED)
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
    config.data.source, config.data.workers, config.log.every = "digits", 0, 1
    assert main.run(config, tmp_path / "run") == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    losses = [row["train/loss"] for row in rows]
    assert len(losses) == 2 and np.all(np.isfinite(losses)) and losses[0] > 0
