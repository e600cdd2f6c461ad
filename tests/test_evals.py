"""Tests of unreadable images: evaluation during training continues, Table 1 stops."""

import json
import logging
import types
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from singer_jax import main
from singer_jax.config import report, settings_of
from singer_jax.data.checking import readable
from singer_jax.data.images import EvalTransform, UnreadableImage
from singer_jax.data.registry import make_source
from singer_jax.data.sources import TEST, TRAIN, DigitsSource, Record, Subset, evenly
from singer_jax.errors import RunError
from singer_jax.evaluation.backbone import ModelSelection, load_backbone
from singer_jax.evaluation.null_spaces import collect_patches
from singer_jax.jobs import distill, validation
from singer_jax.platform import parallel
from singer_jax.training.setup import setup_students
from singer_jax.training.validation_losses import ValidationLosses
from tests import tiny


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """Creates two classes of eight images in each split, with one corrupt image per split."""
    folder = tmp_path_factory.mktemp("images")
    for split in ("train", "val"):
        for label in ("cat", "dog"):
            tiny.write_images(folder / split / label, 8)
        (folder / split / "cat" / "003.jpg").write_bytes(b"no image")
    return folder


def test_unreadable_images_are_left_out_counted_and_named_once(images, tmp_path, mesh, caplog):
    config = tiny.config(tiny.write_teacher(tmp_path / "teacher.safetensors"), "fitnet")
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

    page = report()
    page.run, page.images = str(tmp_path / "run"), 16
    with caplog.at_level(logging.WARNING):
        assert main.run(page, tmp_path / "page") == 0
    assert (tmp_path / "page" / "report" / "index.html").is_file()
    assert f"skipping unreadable image: {images / 'val' / 'cat' / '003.jpg'}" in caplog.text

    model = load_backbone(mesh, ModelSelection(run=str(tmp_path / "run")))
    task, transform = model.classification(2, None), EvalTransform(16)
    train, test = (make_source(str(images), "", split) for split in (TRAIN, TEST))
    patches = collect_patches(model.network, model.params, mesh, readable(test), [0])[0][0]
    assert len(patches) == 15 and len(np.unique(patches[:, 0], axis=0)) == 8  # none counts twice
    left_out = []
    kept = model.extract(test, task, transform, left_out=left_out.extend)
    assert left_out == [3] and kept.labels.tolist() == [0] * 7 + [1] * 8
    assert len(np.unique(kept.features, axis=0)) == 8  # cat and dog hold the same eight pictures
    with pytest.raises(RunError, match=r"train/cat/003\.jpg"):
        model.extract(train, task, transform)


@pytest.mark.parametrize(("devices", "batch_size", "images"), [(1, 4, 10), (4, 8, 15)])
def test_held_out_losses_are_those_of_every_image(tmp_path, devices, batch_size, images):
    """Covers a last batch that is not full, and one with fewer images than devices."""
    config = tiny.config(tiny.write_teacher(tmp_path / "teacher.safetensors"), "fitnet")
    config.mesh.data = devices
    run = setup_students(settings_of(config), 64, 10)
    teacher = run.load_teacher()
    states = run.init_states(teacher)
    held_out = ValidationLosses(run, DigitsSource(TEST), batch_size)

    def loss(*chosen: int) -> float:
        held_out.test = Subset(DigitsSource(TEST), np.array(chosen))
        return held_out(states, teacher)[""]["loss"]

    alone = [loss(number) for number in range(images)]
    assert np.std(alone) > 1e-3 * np.mean(alone)
    assert loss(*range(images)) == pytest.approx(np.mean(alone), rel=1e-5)


def test_one_unreadable_image_never_ends_an_evaluation():
    """Also where it is alone in its batch, as the last image of a split may be."""
    mesh = SimpleNamespace(mesh=parallel.make_mesh(1))
    run = SimpleNamespace(any=mesh, students=None, image_size=8)
    for bad in range(9):
        replaced: list[int] = []
        test = Damaged(evenly(DigitsSource(TEST), 9), bad)
        held_out = ValidationLosses(
            run, test, 4, replaced=lambda indices, to=replaced: to.extend(indices)
        )
        batches = [np.asarray(batch["image"]) for batch in held_out._batches()]
        assert [len(batch) for batch in batches] == [4, 4, 1] and replaced == [bad]


class Damaged(Subset):
    """A source with one image that cannot be read."""

    def __init__(self, source: Subset, bad: int) -> None:
        super().__init__(source, np.arange(len(source)))
        self.bad = bad

    def __getitem__(self, index: int) -> Record:
        if index == self.bad:
            raise UnreadableImage("damaged")
        return super().__getitem__(index)


def test_knn_compares_with_several_images_of_each_class():
    assert validation.bank_size(1000, 10) == 1000
    assert validation.bank_size(1000, 1000) == 10_000
    assert validation.bank_size(1000, 21_841) == 20_000
    assert validation.bank_size(50_000, 1000) == 50_000


def test_a_run_that_ends_within_its_warm_up_is_a_warning(tmp_path, caplog):
    config = tiny.config(tiny.write_teacher(tmp_path / "teacher.safetensors"))
    for epochs, warned in ((1, False), (5, True)):
        config.steps, config.schedule.warmup_epochs = 8, epochs
        settings = settings_of(config)
        distill._warn_of_long_warmup(settings, setup_students(settings, 64, 10))
        assert ("5 epochs are 40 steps, the run has 8" in caplog.text) == warned


def test_held_out_batches_are_those_of_a_micro_batch(tmp_path, monkeypatch):
    """An evaluation must never need more memory than a step."""
    made = []

    class Recorded(ValidationLosses):
        def __init__(self, *arguments: object) -> None:
            super().__init__(*arguments)
            made.append(self.batch_size)

    monkeypatch.setattr(validation, "ValidationLosses", Recorded)
    config = tiny.config(tiny.write_teacher(tmp_path / "teacher.safetensors"), "fitnet")
    config.steps, config.evals.every_steps, config.grad_accum_steps = 1, 1, 4
    assert main.run(config, tmp_path / "run") == 0
    assert made == [config.batch_size // 4]


def test_unreadable_images_of_every_process_are_counted(monkeypatch):
    own = validation.Validation.__new__(validation.Validation)
    own.test = own.bank = types.SimpleNamespace(num_classes=0)
    own.losses, own.stopped, own.unreadable = lambda states, teacher: {}, {}, {"a", "b"}
    monkeypatch.setattr(parallel, "of_each_process", lambda found: [found, {"b", "c"}])
    assert own({}, None) == {"eval/images/unreadable": 3}
