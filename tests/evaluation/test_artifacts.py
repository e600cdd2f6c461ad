"""Tests of measures of synthetic artifacts, and of closed-form linear probes."""

import numpy as np
import pytest

from singer_jax.evaluation import artifacts, linear

VECTOR = np.array([3.0, 0.0, 4.0])
MARKED = np.array([[True, False], [False, True]])


def with_outlier(share: float) -> np.ndarray:
    """Returns two images of two patches, with a share of the vector left in the marked patches."""
    plain = np.arange(12.0).reshape(2, 2, 3)
    return plain + share * MARKED[..., None] * VECTOR


@pytest.mark.parametrize(("left", "removed"), [(1, 0), (0, 1), (0.5, 0.75), (-1, 0), (2, -3)])
def test_the_share_of_the_outlier_energy_that_is_removed(left, removed):
    found = artifacts.removed_share(with_outlier(1), with_outlier(left), VECTOR, MARKED)
    assert found == pytest.approx(removed)


def test_a_projected_update_removes_the_share_that_is_in_the_subspace():
    onto = np.diag([1.0, 1, 0])
    after = with_outlier(1) - MARKED[..., None] * (VECTOR @ onto)
    found = artifacts.removed_share(with_outlier(1), after, VECTOR, MARKED)
    assert found == pytest.approx(artifacts.energy_within(VECTOR, onto))


def test_what_a_change_does_besides_counts_against_it_in_marked_patches_alone():
    after = with_outlier(0)
    after[..., 1] += 2  # at right angles
    after[0, 1] += 5  # not marked
    found = artifacts.removed_share(with_outlier(1), after, VECTOR, MARKED)
    assert found == pytest.approx(1 - 4 / 25)


def test_the_length_makes_the_norm_the_ratio_of_a_median_token():
    length = artifacts.outlier_length(np.array([4.0, 6.0]), 20)
    assert np.hypot(5, length) == pytest.approx(100)


def test_energy_in_a_subspace():
    assert artifacts.energy_within(VECTOR, np.diag([1.0, 1, 0])) == pytest.approx(9 / 25)
    assert artifacts.energy_within(VECTOR, np.eye(3)) == pytest.approx(1)


def test_relative_change():
    assert artifacts.relative_change(np.array([3.0, 4]), np.array([3.0, 4.5])) == pytest.approx(0.1)


def test_the_probe_is_ridge_regression_and_recovers_a_linear_map():
    rng = np.random.default_rng(0)
    features = rng.standard_normal((400, 3)) * [1, 100, 0.01] + [5, 0, 1]
    targets = features @ [[1.0, 2], [0.5, 0], [30, -9]] + [4, 5]
    # But for the penalty, which takes a thousandth of each weight.
    np.testing.assert_allclose(
        linear.fit(features, targets)(features), targets, rtol=0.02, atol=0.4
    )
    # The direct solution of the penalised problem.
    x = (features - features.mean(0)) / features.std(0)
    stacked = np.concatenate([x, np.sqrt(1e-3 * 400) * np.eye(3)])
    wanted = np.concatenate([targets - targets.mean(0), np.zeros((3, 2))])
    direct = np.linalg.lstsq(stacked, wanted, rcond=None)[0]
    predicted = x @ direct + targets.mean(0)
    np.testing.assert_allclose(linear.fit(features, targets)(features), predicted, rtol=1e-9)


def test_mean_iou_of_a_case_made_by_hand():
    # The single feature tells the class of a patch but for the last one, which is half of each.
    features = np.array([[[0.0], [0], [1], [1]]])
    masks = np.array([[[0, 0], [0, 0], [1, 1], [1, 0]]])
    none = np.zeros((1, 4), bool)
    found = linear.mean_iou(features, masks, features, masks, 3, none, none)
    assert found == pytest.approx(100 * (4 / 5 + 3 / 4) / 2)  # and class 2 is nowhere
    without = np.array([[False, False, False, True]])
    assert linear.mean_iou(features, masks, features, masks, 3, without, without) == 100


def test_depth_rmse_ignores_unknown_pixels_and_patches_that_are_left_out():
    features = np.arange(6.0).reshape(1, 6, 1)
    depth = np.repeat(features + 1, 2, axis=2)
    depth[0, 2, 1] = 0  # one pixel unknown: the mean is that of the other
    depth[0, 3] = 0  # the whole patch
    depth[0, 5] = 99
    left_out = np.array([[False] * 5 + [True]])
    found = linear.depth_rmse(features, depth, features, depth, left_out, left_out)
    assert found < 0.01


def test_top1():
    features = np.array([[0.0], [0.1], [1], [1.1]])
    labels = np.array([0, 0, 1, 1])
    assert linear.top1(features, labels, features, np.array([0, 1, 1, 1]), 2) == 75
