"""Tests that several models on the same decoded crops have the results of separate probes."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
import pytest

from singer_jax.data.registry import make_source
from singer_jax.data.sources import TEST, TRAIN, Subset
from singer_jax.errors import Stopped
from singer_jax.evaluation import measure, trainers
from singer_jax.evaluation.backbone import Backbone, ModelSelection, load_backbone
from singer_jax.evaluation.measure import ProbedModel, Split, probe_models
from singer_jax.evaluation.probe import ProbeSettings
from singer_jax.evaluation.progress import FileProgressStore, ProgressStore
from singer_jax.platform import parallel
from tests import tiny

SETTINGS = ProbeSettings(epochs=2, batch_size=16, learning_rates=(0.1, 0.5))
# Of 40 images, 4 of which are held out while the rates are compared.
BATCHES = 2 * 3 + 2 * 3
KIND = "classification"


@pytest.fixture(scope="module")
def backbones(tmp_path_factory) -> dict[str, Backbone]:
    weights = tiny.write_described(tmp_path_factory.mktemp("weights"))
    one = load_backbone(parallel.make_mesh(1), ModelSelection(weights=str(weights)))
    larger = jax.tree.map(lambda leaf: 1.1 * leaf, one.params)
    return {"one": one, "two": dataclasses.replace(one, params=larger)}


@pytest.fixture(scope="module")
def split() -> Split:
    return Split(
        Subset(make_source("digits", "", TRAIN), np.arange(40)),
        Subset(make_source("digits", "", TEST), np.arange(20)),
    )


def probed(
    backbones: dict[str, Backbone], split: Split, stores: dict[str, ProgressStore] | None = None
) -> dict[str, tuple]:
    tests = measure.test_examples(backbones, KIND, split.test, SETTINGS)
    stores = stores or {name: ProgressStore() for name in backbones}
    models = {
        name: ProbedModel(backbone, tests[name], progress_store=stores[name])
        for name, backbone in backbones.items()
    }
    return probe_models(models, KIND, split, SETTINGS)


@pytest.fixture(scope="module")
def alone(backbones, split) -> dict[str, tuple]:
    """Returns the results of separate probes of each model."""
    return {name: probed({name: one}, split)[name] for name, one in backbones.items()}


def assert_same(found: dict[str, tuple], expected: dict[str, tuple]) -> None:
    for name, (result, metrics) in expected.items():
        np.testing.assert_equal(found[name][0].head, result.head)
        assert found[name][1] == metrics


@pytest.mark.slow
def test_each_batch_is_decoded_once_for_all_models(backbones, split, alone, monkeypatch):
    decoded = []
    opened = trainers.train_batches

    class Counted:
        def __init__(self, batches: Iterator) -> None:
            self.batches = batches

        def __next__(self) -> dict:
            decoded.append(1)
            return next(self.batches)

        def close(self) -> None:
            self.batches.close()

    monkeypatch.setattr(trainers, "train_batches", lambda *a, **k: Counted(opened(*a, **k)))
    found = probed(backbones, split)
    assert len(decoded) == BATCHES
    assert_same(found, alone)
    heads = [result.head["kernel"] for result, _ in found.values()]
    assert not np.array_equal(*heads)


@pytest.mark.slow
def test_stopped_together_and_at_different_steps_they_end_with_the_same_bits(
    backbones, split, alone, tmp_path
):
    def stores(folder: Path, asked: Callable[[], bool]) -> dict[str, FileProgressStore]:
        return {name: FileProgressStore(folder / f"{name}.npz", "key", asked) for name in backbones}

    for question in (2, 9):  # while the rates are compared, and after
        folder = tmp_path / str(question)
        folder.mkdir()
        answers = itertools.chain([False] * (question - 1), [True])
        with pytest.raises(Stopped):
            probed(backbones, split, stores(folder, lambda answers=answers: next(answers)))
        steps = [progress_store.progress.step for progress_store in stores(folder, bool).values()]
        assert steps == [question if question < 6 else question - 6] * 2
        (folder / "two.npz").unlink()  # as if it had never been kept
        assert_same(probed(backbones, split, stores(folder, bool)), alone)
