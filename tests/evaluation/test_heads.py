"""Tests of dense probes' metrics and losses against scikit-learn, NumPy and SciPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import sklearn.metrics
from hypothesis import given
from hypothesis import strategies as st

from singer_jax.errors import RunError
from singer_jax.evaluation import heads, linear
from singer_jax.evaluation.classification import Classification
from singer_jax.evaluation.depth import Depth, depth_counts, depth_metrics
from singer_jax.evaluation.segmentation import Segmentation, mean_iou

DIM = 3


def random_head(rng: np.random.Generator, inputs: int, outputs: int) -> dict:
    kernel = rng.standard_normal((inputs, outputs)).astype(np.float32)
    return {"kernel": kernel, "bias": rng.standard_normal(outputs).astype(np.float32)}


def bilinear(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Computes half-pixel bilinear interpolation of [rows, columns, out] explicitly."""

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


# Few shapes, so that each program is compiled once.
@given(st.sampled_from([(1, 1, 4), (1, 5, 2), (4, 3, 1), (5, 4, 3)]), st.integers(0, 99))
def test_upsampling_is_bilinear_at_half_pixels(shape, seed):
    rows, columns, factor = shape
    image = np.random.default_rng(seed).standard_normal((rows, columns, 2)).astype(np.float32)
    size = (rows * factor, columns * factor)
    np.testing.assert_allclose(heads.upsample(image, size), bilinear(image, size), atol=1e-5)


@given(st.sampled_from([(1, 2), (3, 6)]), st.integers(0, 9999), st.sampled_from([0.0, 0.5, 0.95]))
def test_miou_is_that_of_scikit_learn(shape, seed, ignored):
    images, classes = shape
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
    inside = (truth > 0) & (truth < 10)
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
        share = np.mean(np.maximum(p / t, t / np.maximum(p, 1e-9)) < 1.25**n)
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


@given(st.sampled_from([(2, 20), (5, 1), (8, 13)]), st.integers(0, 9999))
def test_top_k_are_those_of_scikit_learn(shape, seed):
    classes, images = shape
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


def metrics_of(task: object, head: dict, features: np.ndarray, labels: np.ndarray) -> dict:
    """Returns the metrics of one head on one batch without padding."""
    counts = task.count(head, features, labels, np.ones(len(features), bool))
    return task.metrics(jax.device_get(counts))


def of_task(task: object) -> tuple[np.ndarray, np.ndarray, int, int]:
    """Returns features, labels, and the numbers of inputs and outputs of a head."""
    rng = np.random.default_rng(0)
    if isinstance(task, Classification):
        return np.ones((40, DIM), np.float32), np.arange(40) % task.classes, DIM, task.classes
    if isinstance(task, Segmentation):
        features = np.ones((2, 2, 2, DIM), np.float32)
        return features, rng.integers(0, task.classes, (2, 4, 4)), DIM, task.classes
    features = np.ones((2, 2, 2, 2 * DIM), np.float32)
    return features, rng.uniform(0.1, 9.9, (2, 4, 4)).astype(np.float32), 2 * DIM, task.bins


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    "task", [Classification(8), Segmentation(4), Depth(bins=8), Depth(bins=8, drop_saturated=True)]
)
def test_a_head_that_is_not_finite_scores_worse_than_any_other(task, bad):
    features, labels, inputs, outputs = of_task(task)
    head = {"kernel": np.zeros((inputs, outputs), np.float32), "bias": np.zeros(outputs)}
    worst = metrics_of(task, head | {"bias": np.full(outputs, bad, np.float32)}, features, labels)
    for chosen in range(outputs):  # a constant prediction of each class or bin
        bias = 30 * np.eye(outputs, dtype=np.float32)[chosen]
        other = metrics_of(task, head | {"bias": bias}, features, labels)
        assert worst[task.score] < other[task.score] or np.isnan(other[task.score])
    zeros = ("top1", "top5", "miou", "accuracy", "delta1", "delta3")
    assert not any(worst.get(name, 0) for name in zeros)


def test_every_pixel_with_a_depth_counts_wherever_it_is_predicted():
    truth = np.array([[2.0, 5.0, 0.0, 10.0]], np.float32)
    everywhere = np.ones(truth.shape, bool)
    for prediction in (0.0, 5.2, 10.0):
        predicted = np.full(truth.shape, prediction, np.float32)
        counts = depth_counts(predicted, truth, everywhere, 10.0)
        expected = np.sqrt(np.mean((prediction - np.array([2.0, 5.0])) ** 2))
        assert depth_metrics(jax.device_get(counts))["rmse"] == pytest.approx(expected)
        # As the official code: a pixel at a limit has no part in the metrics.
        official = jax.device_get(depth_counts(predicted, truth, everywhere, 10.0, True))
        expected = expected if prediction == 5.2 else np.nan
        assert depth_metrics(official)["rmse"] == pytest.approx(expected, nan_ok=True)


@pytest.mark.parametrize("classes", [2, 8])
def test_equal_logits_are_right_as_often_as_chance(classes):
    task = Classification(classes)
    features, labels, inputs, _ = of_task(task)
    zero = {"kernel": np.zeros((inputs, classes)), "bias": np.zeros(classes)}
    found = metrics_of(task, zero, features, labels)
    assert found["top1"] == pytest.approx(100 / classes)
    assert found["top5"] == pytest.approx(100 * min(1, 5 / classes))
    if classes == 8:  # 0 to 2 are ahead of 3 to 6, which are ahead of 7
        bias = np.array([2, 2, 2, 1, 1, 1, 1, 0], np.float32)
        chances = [
            metrics_of(task, zero | {"bias": bias}, features[:1], np.array([label]))
            for label in (0, 3, 7)
        ]
        assert [found["top1"] for found in chances] == pytest.approx([100 / 3, 0, 0])
        assert [found["top5"] for found in chances] == pytest.approx([100, 50, 0])


def test_both_mious_leave_out_the_same_classes():
    """The trained probe and the closed form both count a class that is only predicted as 0."""
    confusion = np.array([[3, 1, 0, 0], [0, 2, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    assert mean_iou(confusion) == pytest.approx((3 / 4 + 2 / 3) / 2)
    confusion[0, 2] = 1
    assert mean_iou(confusion) == pytest.approx((3 / 5 + 2 / 3 + 0) / 3)
    # One-hot features make the closed form predict the class of the patch.
    masks = np.arange(3)[None, :, None]
    features = np.eye(3)[None]
    kept = np.zeros((1, 3), bool)
    tested = np.array([[0, 1, 0]])[..., None]  # class 2 is predicted once and never true
    splits = (linear.DenseSplit(features, labels, kept) for labels in (masks, tested))
    found = linear.mean_iou(*splits, 4)
    assert found == pytest.approx(100 * (1 / 2 + 1 + 0) / 3)
