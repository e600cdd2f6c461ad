"""Metrics and losses of dense probes against scikit-learn, NumPy and SciPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import sklearn.metrics
from hypothesis import given
from hypothesis import strategies as st

from singer_jax.errors import RunError
from singer_jax.evaluation import heads
from singer_jax.evaluation.classification import Classification
from singer_jax.evaluation.depth import Depth
from singer_jax.evaluation.segmentation import Segmentation

DIM = 3


def random_head(rng: np.random.Generator, inputs: int, outputs: int) -> dict:
    kernel = rng.standard_normal((inputs, outputs)).astype(np.float32)
    return {"kernel": kernel, "bias": rng.standard_normal(outputs).astype(np.float32)}


def bilinear(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Half-pixel bilinear interpolation of [rows, columns, out], written out."""

    def weights(small: int, large: int) -> np.ndarray:
        position = np.clip((np.arange(large) + 0.5) * small / large - 0.5, 0, small - 1)
        low = np.minimum(position.astype(int), small - 1)
        high, share = np.minimum(low + 1, small - 1), position - low
        matrix = np.zeros((large, small))
        matrix[np.arange(large), low] += 1 - share
        matrix[np.arange(large), high] += share
        return matrix

    rows, columns = (weights(*sides) for sides in zip(image.shape[:2], size, strict=True))
    return np.einsum("hr,wc,rco->hwo", rows, columns, image)


@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 4), st.integers(0, 99))
def test_upsampling_is_bilinear_at_half_pixels(rows, columns, factor, seed):
    image = np.random.default_rng(seed).standard_normal((rows, columns, 2)).astype(np.float32)
    size = (rows * factor, columns * factor)
    np.testing.assert_allclose(heads.upsample(image, size), bilinear(image, size), atol=1e-5)


@given(
    st.integers(1, 3), st.integers(2, 6), st.integers(0, 9999), st.sampled_from([0.0, 0.5, 0.95])
)
def test_miou_is_that_of_scikit_learn(images, classes, seed, ignored):
    rng = np.random.default_rng(seed)
    task, head = Segmentation(classes), random_head(rng, DIM, classes)
    features = rng.standard_normal((images, 2, 3, DIM)).astype(np.float32)
    labels = rng.integers(0, classes, (images, 4, 6))
    labels[rng.random(labels.shape) < ignored] = -1
    labels[0, 0, 0] = 0
    valid = np.ones(images, bool)
    counts = jax.device_get(task.count(head, features, labels, valid))
    logits = np.stack([bilinear(f @ head["kernel"] + head["bias"], (4, 6)) for f in features])
    known = labels != -1
    truth, predicted = labels[known], logits.argmax(-1)[known]
    occurs = sorted(set(truth) | set(predicted))  # absent classes are left out of the mean
    scores = sklearn.metrics.jaccard_score(
        truth, predicted, labels=occurs, average="macro", zero_division=0
    )
    found = task.metrics(counts)
    np.testing.assert_allclose(found["miou"], 100 * scores, rtol=1e-5)
    np.testing.assert_allclose(found["accuracy"], 100 * np.mean(truth == predicted), rtol=1e-5)
    log_p = np.log(scipy.special.softmax(logits, axis=-1))[known]
    expected = -np.mean(np.take_along_axis(log_p, truth[:, None], axis=1))
    np.testing.assert_allclose(heads.mean_loss(task, head, features, labels), expected, rtol=1e-4)


@given(st.integers(0, 9999), st.sampled_from([0.03, 0.6]))
def test_depth_metrics_are_those_of_numpy(seed, temperature):
    rng = np.random.default_rng(seed)
    task, head = Depth(bins=16), random_head(rng, 2 * DIM, 16)
    features = rng.standard_normal((2, 2, 2, 2 * DIM)).astype(np.float32)
    truth = rng.uniform(0, 11, (2, 6, 6)).astype(np.float32)
    truth[rng.random(truth.shape) < 0.3] = 0
    truth[0, 0, 0] = 5
    logits = np.stack([bilinear(f @ head["kernel"] + head["bias"], (6, 6)) for f in features])
    depth = scipy.special.softmax(logits / temperature, axis=-1) @ np.linspace(0, 10, 16)
    # A map that saturates at a limit counts or not by rounding: such maps are not compared.
    inside = (truth > 0) & (truth < 10)
    if not inside.any() or np.any(depth < 1e-4) or np.any(depth > 10 - 1e-4):
        return
    counts = jax.device_get(task.count(head, features, truth, np.ones(2, bool)))
    suffix = "" if temperature == 0.03 else "_t0.6"
    found = task.metrics(counts)
    p, t = depth[inside], truth[inside].astype(np.float64)
    expected = {
        "rmse": np.sqrt(np.mean((p - t) ** 2)),
        "mae": np.mean(np.abs(p - t)),
        "abs_rel": np.mean(np.abs(p - t) / t),
    }
    for name, value in expected.items():
        np.testing.assert_allclose(found[name + suffix], value, rtol=1e-3, err_msg=name)
    for n in (1, 2, 3):
        share = np.mean(np.maximum(p / t, t / p) < 1.25**n)
        assert found[f"delta{n}{suffix}"] == pytest.approx(share, abs=0.03)


def test_pixels_without_depth_train_a_bin_only_where_asked():
    rng = np.random.default_rng(0)
    head, features = random_head(rng, 2 * DIM, 8), rng.standard_normal((1, 2, 2, 2 * DIM))
    truth = np.zeros((1, 4, 4), np.float32)
    truth[0, :2] = 3.0
    half, whole = (Depth(bins=8, ignore_missing=ignore) for ignore in (True, False))
    upper = heads.mean_loss(half, head, features, truth)
    everything = heads.mean_loss(whole, head, features, truth)
    empty = np.zeros_like(truth)
    lower = heads.mean_loss(whole, head, features, empty)
    assert heads.mean_loss(half, head, features, empty) == 0  # nothing to learn from, and no NaN
    assert upper != everything and jnp.isfinite(lower)


@pytest.mark.parametrize(
    ("task", "labels", "words"),
    [
        (Segmentation(4), np.full((2, 4, 4), -1), "labelled pixel"),
        (Depth(bins=8), np.zeros((2, 4, 4), np.float32), "valid depth"),
    ],
)
def test_empty_masks_are_an_error_and_not_a_score(task, labels, words):
    rng = np.random.default_rng(0)
    inputs, outputs = (DIM, 4) if isinstance(task, Segmentation) else (2 * DIM, 8)
    head, features = random_head(rng, inputs, outputs), rng.standard_normal((2, 2, 2, inputs))
    counts = jax.device_get(task.count(head, features, labels, np.ones(2, bool)))
    with pytest.raises(RunError, match=words):
        task.metrics(counts)


@given(st.integers(2, 8), st.integers(1, 20), st.integers(0, 9999))
def test_top_k_are_those_of_scikit_learn(classes, images, seed):
    rng = np.random.default_rng(seed)
    task, head = Classification(classes), random_head(rng, DIM, classes)
    features = rng.standard_normal((images, DIM)).astype(np.float32)
    labels = rng.integers(0, classes, images)
    valid = rng.random(images) < 0.7
    valid[0] = True
    counts = jax.device_get(task.count(head, features, labels, valid))
    found = task.metrics(counts)
    logits = (features @ head["kernel"] + head["bias"])[valid]
    for name, k in (("top1", 1), ("top5", 5)):
        rank = (logits > np.take_along_axis(logits, labels[valid][:, None], 1)).sum(1)
        assert found[name] == pytest.approx(100 * np.mean(rank < k))
    loss = sklearn.metrics.log_loss(
        labels[valid], scipy.special.softmax(logits.astype(np.float64), 1), labels=range(classes)
    )
    assert found["loss"] == pytest.approx(loss, rel=1e-4, abs=1e-7)  # float32 beside 1


def test_a_head_that_is_not_a_number_is_never_right():
    task, labels, valid = Classification(8), np.array([0, 1, 2]), np.ones(3, bool)
    head = {"kernel": np.full((DIM, 8), np.nan, np.float32), "bias": np.zeros(8, np.float32)}
    counts = jax.device_get(task.count(head, np.ones((3, DIM), np.float32), labels, valid))
    assert task.metrics(counts)["top1"] == task.metrics(counts)["top5"] == 0
