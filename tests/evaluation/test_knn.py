"""Tests of kNN against a direct computation."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from singer_jax.evaluation import knn
from singer_jax.evaluation.backbone import Examples
from singer_jax.platform import memory


def direct(bank: Examples, queries: Examples, classes: int, k: int, temperature: float) -> float:
    correct = 0
    units = bank.features / np.linalg.norm(bank.features, axis=1, keepdims=True)
    for query, label in zip(queries.features, queries.labels, strict=True):
        similarity = units @ (query / np.linalg.norm(query))
        votes = np.zeros(classes)
        for index in np.argsort(-similarity)[:k]:
            votes[bank.labels[index]] += np.exp(similarity[index] / temperature)
        correct += votes.argmax() == label
    return correct / len(queries.labels)


def random_features(rng: np.random.Generator, images: int, classes: int) -> Examples:
    labels = rng.integers(0, classes, images).astype(np.int32)
    return Examples(rng.standard_normal((images, 5)).astype(np.float32), labels)


# Few shapes, so that each program is compiled once: images, queries, classes, neighbours.
@settings(max_examples=15, deadline=None)
@given(
    st.sampled_from([(1, 1, 2, 1), (7, 30, 5, 25), (40, 23, 3, 10), (25, 4, 4, 25)]), st.integers()
)
def test_equals_a_direct_computation(shape, seed):
    images, queries, classes, k = shape
    rng = np.random.default_rng(abs(seed))
    bank, asked = (random_features(rng, n, classes) for n in (images, queries))
    found = knn.knn_top1(bank, asked, classes=classes, k=k, temperature=0.07)
    assert found == pytest.approx(direct(bank, asked, classes, k, 0.07))


def test_chunks_change_nothing(monkeypatch):
    rng = np.random.default_rng(0)
    bank, asked = (random_features(rng, n, 3) for n in (50, 23))
    whole = knn.knn_top1(bank, asked, classes=3)
    monkeypatch.setattr(memory, "device_memory", lambda mesh: 4 * 10 * 8 * 50)  # ten queries
    assert knn.knn_top1(bank, asked, classes=3) == whole
