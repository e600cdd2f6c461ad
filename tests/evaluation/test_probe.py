"""The linear probe: rates trained together, chosen without the test split."""

import numpy as np
import pytest

from singer_jax.config import evaluation
from singer_jax.errors import InputError
from singer_jax.evaluation.backbone import Features
from singer_jax.evaluation.probe import FeatureTrainer, probe


@pytest.fixture
def config():
    config = evaluation().probe
    config.epochs, config.batch_size = 5, 16
    return config


def clusters(images: int, seed: int, classes: int = 4, dim: int = 6) -> Features:
    """Features of classes that overlap a little."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, images).astype(np.int32)
    centres = 2 * np.random.default_rng(0).standard_normal((classes, dim))
    values = centres[labels] + rng.standard_normal((images, dim))
    return Features(values.astype(np.float32), labels)


def test_rates_trained_together_are_those_trained_alone(config):
    train, chosen = clusters(70, 1), np.arange(70)
    rates = (0.01, 0.5, 3.0)
    trainer = FeatureTrainer(train, 4, config, seed=3)
    *_, together = trainer.train(chosen, rates)
    for index, rate in enumerate(rates):
        *_, alone = trainer.train(chosen, (rate,))
        for name in ("kernel", "bias"):
            # One batched product sums in another order than one product alone.
            np.testing.assert_allclose(
                together[name][index], alone[name][0], rtol=1e-4, atol=1e-6, err_msg=name
            )


def test_the_rate_is_chosen_without_a_look_at_the_test_split(config):
    config.learning_rates = (1e-6, 0.5)
    trainer = FeatureTrainer(clusters(200, 1), 4, config)
    test = clusters(100, 2)
    result = probe(trainer, test, config)
    assert result.learning_rate == 0.5
    assert result.held_out[0.5] > result.held_out[1e-6]
    assert result.last.top1 > 0.8
    # On a test split whose labels are wrong the untrained head would win; the choice stays.
    wrong = probe(trainer, Features(test.values, (test.labels + 1) % 4), config)
    assert wrong.held_out == result.held_out and wrong.learning_rate == 0.5


def test_held_out_images_are_not_trained_on_while_choosing(config):
    config.learning_rates = (0.1, 0.5)
    seen = []

    class Watched(FeatureTrainer):
        def train(self, chosen, rates):
            seen.append((len(rates), set(chosen.tolist())))
            return super().train(chosen, rates)

        def features(self, chosen):
            seen.append((0, set(chosen.tolist())))
            return super().features(chosen)

    probe(Watched(clusters(50, 1), 4, config), clusters(10, 2), config)
    (both, choosing), (_, held_out), (one, final) = seen
    assert (both, one) == (2, 1) and final == set(range(50))
    assert len(held_out) == 5 and not held_out & choosing and held_out | choosing == final


def test_a_head_learns_what_can_be_learnt(config):
    config.epochs = 30
    train, test = clusters(400, 1), clusters(400, 2)
    result = probe(FeatureTrainer(train, 4, config), test, config)
    nearest = np.argmin(
        [
            np.square(test.values - train.values[train.labels == label].mean(0)).sum(1)
            for label in range(4)
        ],
        axis=0,
    )
    # Nearest class mean is the best there is for these clusters, up to the noise of the means.
    assert result.last.top1 > np.mean(nearest == test.labels) - 0.03
    assert result.best.top1 >= result.last.top1 and 1 <= result.best_epoch <= 30


@pytest.mark.parametrize(
    ("key", "value"),
    [("learning_rates", ()), ("learning_rates", (0.0,)), ("held_out", 1.0), ("epochs", 0)],
)
def test_settings_that_cannot_work_are_named(config, key, value):
    config[key] = value
    with pytest.raises(InputError, match=rf"probe\.{key}"):
        probe(FeatureTrainer(clusters(50, 1), 4, config), clusters(10, 2), config)


def test_images_without_labels_cannot_be_probed(config):
    with pytest.raises(InputError, match="labels"):
        FeatureTrainer(clusters(50, 1), 0, config)
