"""Tests of the linear probe: rates train together and are selected without the test split."""

import dataclasses
import math

import numpy as np
import pytest

from singer_jax.errors import InputError
from singer_jax.evaluation.backbone import Examples
from singer_jax.evaluation.classification import Classification
from singer_jax.evaluation.depth import Depth
from singer_jax.evaluation.probe import ProbeSettings, probe
from singer_jax.evaluation.trainers import FeatureTrainer
from singer_jax.platform import memory


@pytest.fixture
def settings() -> ProbeSettings:
    return ProbeSettings(epochs=5, batch_size=16)


TASK, SHAPE = Classification(4), (6, 4)


def clusters(images: int, seed: int, classes: int = 4, dim: int = 6) -> Examples:
    """Returns examples of classes that overlap slightly."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, images).astype(np.int32)
    centres = 2 * np.random.default_rng(0).standard_normal((classes, dim))
    values = centres[labels] + rng.standard_normal((images, dim))
    return Examples(values.astype(np.float32), labels)


def test_rates_trained_together_are_those_trained_alone(settings):
    train, chosen = clusters(70, 1), np.arange(70)
    rates = (0.01, 0.5, 3.0)
    trainer = FeatureTrainer(TASK, train, SHAPE, settings, seed=3)
    *_, (_, together) = trainer.train(chosen, rates)
    for index, rate in enumerate(rates):
        *_, (_, alone) = trainer.train(chosen, (rate,))
        for name in ("kernel", "bias"):
            # One batched product sums in another order than one product alone.
            np.testing.assert_allclose(
                together[name][index], alone[name][0], rtol=1e-4, atol=1e-6, err_msg=name
            )


def test_the_rate_is_chosen_without_a_look_at_the_test_split(settings):
    settings = dataclasses.replace(settings, learning_rates=(1e-6, 0.5))
    trainer = FeatureTrainer(TASK, clusters(200, 1), SHAPE, settings)
    test = clusters(100, 2)
    result = probe(trainer, test, settings)
    assert result.learning_rate == 0.5
    assert result.held_out[0.5] > result.held_out[1e-6]
    assert result.last["top1"] > 80
    # On a test split whose labels are wrong the untrained head would win; the choice stays.
    wrong = probe(trainer, Examples(test.features, (test.labels + 1) % 4), settings)
    assert wrong.held_out == result.held_out and wrong.learning_rate == 0.5


def test_a_rate_that_diverges_is_named_and_not_chosen(settings, caplog):
    """Depth is included, since it once excluded every pixel of such a head."""
    settings = dataclasses.replace(settings, learning_rates=(1e30, 0.1))
    rng = np.random.default_rng(0)
    features = rng.standard_normal((40, 2, 2, 4)).astype(np.float32)
    depth = Examples(features, rng.uniform(1, 9, (40, 4, 4)).astype(np.float32))
    for task, train, shape in (
        (TASK, clusters(50, 1), SHAPE),
        (Depth(bins=8), depth, (4, 8)),
        (Depth(bins=8, drop_saturated=True), depth, (4, 8)),
    ):
        caplog.clear()
        result = probe(FeatureTrainer(task, train, shape, settings), train, settings)
        assert result.learning_rate == 0.1 and result.held_out[1e30] == -math.inf
        assert "the head at learning rate 1e+30 is not finite" in caplog.text
        assert math.isfinite(result.last[task.score])


def test_held_out_images_are_not_trained_on_while_choosing(settings):
    settings = dataclasses.replace(settings, learning_rates=(0.1, 0.5))
    seen = []

    class Watched(FeatureTrainer):
        def train(self, chosen, rates, *progress):
            seen.append((len(rates), set(chosen.tolist())))
            return super().train(chosen, rates, *progress)

        def centre(self, chosen):
            seen.append((0, set(chosen.tolist())))
            return super().centre(chosen)

    probe(Watched(TASK, clusters(50, 1), SHAPE, settings), clusters(10, 2), settings)
    (both, choosing), (_, held_out), (one, final) = seen
    assert (both, one) == (2, 1) and final == set(range(50))
    assert len(held_out) == 5 and not held_out & choosing and held_out | choosing == final


def test_a_head_learns_what_can_be_learnt(settings):
    settings = dataclasses.replace(settings, epochs=30)
    train, test = clusters(400, 1), clusters(400, 2)
    result = probe(FeatureTrainer(TASK, train, SHAPE, settings), test, settings)
    nearest = np.argmin(
        [
            np.square(test.features - train.features[train.labels == label].mean(0)).sum(1)
            for label in range(4)
        ],
        axis=0,
    )
    # Nearest class mean is the best there is for these clusters, up to the noise of the means.
    assert result.last["top1"] > 100 * np.mean(nearest == test.labels) - 3
    assert result.best["top1"] >= result.last["top1"] and 1 <= result.best_epoch <= 30


def test_images_without_labels_cannot_be_probed(settings):
    with pytest.raises(InputError, match="labels"):
        FeatureTrainer(TASK, clusters(50, 1), (6, 0), settings)


def test_views_are_trained_in_turn_and_the_centre_crop_chooses(monkeypatch):
    settings = ProbeSettings(epochs=4, batch_size=10)
    one, two, three = (clusters(20, seed) for seed in (1, 2, 3))
    views = Examples(
        np.concatenate([v.features for v in (one, two, three)]),
        np.concatenate([v.labels for v in (one, two, three)]),
        3,
    )
    trainer = FeatureTrainer(TASK, views, SHAPE, settings)
    assert trainer.images == 20
    np.testing.assert_array_equal(trainer.centre(np.arange(20)).features, one.features)

    def epochs() -> list[np.ndarray]:
        """Returns the kernel after each epoch of two steps."""
        trained = trainer.train(np.arange(20), (0.5,))
        return [np.asarray(heads["kernel"]) for step, heads in trained if step % 2 == 0]

    whole = epochs()
    # The same, streamed from the file in batches instead of as one program an epoch.
    monkeypatch.setattr(memory, "device_memory", lambda mesh: 1)
    streamed = epochs()
    for a, b in zip(whole, streamed, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    # Without the centre crop's features nothing changes: epochs see views 1 and 2 only.
    views.features[:20] = 0
    again = epochs()
    np.testing.assert_array_equal(streamed[-1], again[-1])
