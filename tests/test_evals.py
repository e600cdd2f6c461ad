"""Evaluation while training goes on where an image cannot be read; Table 1 does not."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest

from singer_jax import main
from singer_jax.data.images import EvalTransform
from singer_jax.data.registry import make_source
from singer_jax.data.sources import TEST, TRAIN
from singer_jax.errors import RunError
from singer_jax.evaluation.backbone import load_backbone
from singer_jax.jobs import distill
from singer_jax.training.held_out import HeldOut
from tests import tiny


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """Two classes of eight images in each split, one of each split damaged."""
    folder = tmp_path_factory.mktemp("images")
    for split in ("train", "val"):
        for label in ("cat", "dog"):
            tiny.write_images(folder / split / label, 8)
        (folder / split / "cat" / "003.jpg").write_bytes(b"no image")
    return folder


def test_unreadable_images_are_left_out_counted_and_named_once(images, tmp_path, mesh, caplog):
    config = tiny.config(tiny.write_teacher(tmp_path / "teacher.safetensors"))
    config.data.source = str(images)
    config.steps, config.evals.every_steps = 2, 1
    with caplog.at_level(logging.WARNING):
        assert main.run(config, tmp_path / "run") == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    evaluated = [row for row in rows if "eval/knn/top1" in row]
    assert [row["step"] for row in evaluated] == [1, 2]
    for row in evaluated:
        assert row["eval/images/unreadable"] == 2
        assert np.isfinite(row["eval/val/loss"])
    named = [r.getMessage() for r in caplog.records if "left out of kNN" in r.getMessage()]
    assert len(named) == 2
    for split in ("train", "val"):
        assert sum(str(images / split / "cat" / "003.jpg") in line for line in named) == 1

    model = load_backbone(mesh, run=str(tmp_path / "run"))
    task, transform = model.classification(2, None), EvalTransform(16)
    train, test = (make_source(str(images), "", split) for split in (TRAIN, TEST))
    told = []
    kept = model.extract(test, task, transform, left_out=told.extend)
    assert told == [3] and kept.labels.tolist() == [0] * 7 + [1] * 8
    assert len(np.unique(kept.features, axis=0)) == 8  # cat and dog hold the same eight pictures
    with pytest.raises(RunError, match=r"train/cat/003\.jpg"):
        model.extract(train, task, transform)


def test_held_out_batches_are_those_of_a_micro_batch(tmp_path, monkeypatch):
    """So that an evaluation never needs more memory than a step."""
    made = []

    class Recorded(HeldOut):
        def __init__(self, *arguments: object) -> None:
            super().__init__(*arguments)
            made.append(self.batch_size)

    monkeypatch.setattr(distill, "HeldOut", Recorded)
    config = tiny.config(tiny.write_teacher(tmp_path / "teacher.safetensors"))
    config.steps, config.evals.every_steps, config.grad_accum_steps = 1, 1, 4
    assert main.run(config, tmp_path / "run") == 0
    assert made == [config.batch_size // 4]
