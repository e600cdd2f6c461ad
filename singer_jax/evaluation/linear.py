"""Linear probes in closed form: ridge regression on frozen features.

What trained probes measure, without noise of their own and in a fraction of the time; the published
protocols are in `evaluation.probe`.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

_PENALTY = 1e-3  # of standardised features, over their number of rows


class Probe(NamedTuple):
    """A linear map of standardised features.

    Attributes:
      mean, scale: [dim] of the features that it was fitted on.
      weight, bias: [dim, out] and [out].
    """

    mean: np.ndarray
    scale: np.ndarray
    weight: np.ndarray
    bias: np.ndarray

    def __call__(self, features: Float[np.ndarray, "rows dim"]) -> Float[np.ndarray, "rows out"]:
        return (features - self.mean) / self.scale @ self.weight + self.bias


def fit(
    features: Float[np.ndarray, "rows dim"],
    targets: Float[np.ndarray, "rows out"],
    weights: Float[np.ndarray, " rows"] | None = None,
) -> Probe:
    """The map of least squares with a small penalty, in float64.

    Args:
      features, targets: these.
      weights: of the rows' squared errors; None: all alike.
    """
    features, targets = features.astype(np.float64), targets.astype(np.float64)
    weights = np.ones(len(features)) if weights is None else weights / weights.mean()
    mean, bias = (np.average(values, axis=0, weights=weights) for values in (features, targets))
    deviation = np.sqrt(np.average(np.square(features - mean), axis=0, weights=weights))
    scale = np.maximum(deviation, 1e-12)
    x = (features - mean) / scale
    penalty = _PENALTY * len(x) * np.eye(x.shape[1])
    weighted = x.T * weights
    solved = np.linalg.solve(weighted @ x + penalty, weighted @ (targets - bias))
    return Probe(mean, scale, solved, bias)


def top1(
    train: Float[np.ndarray, "images dim"],
    train_labels: Int[np.ndarray, " images"],
    test: Float[np.ndarray, "tested dim"],
    test_labels: Int[np.ndarray, " tested"],
    classes: int,
) -> float:
    """Per cent of test images whose class the probe finds."""
    probe = fit(train, np.eye(classes)[train_labels])
    return float(100 * np.mean(probe(test).argmax(1) == test_labels))


def mean_iou(
    train: Float[np.ndarray, "images patches dim"],
    train_masks: Int[np.ndarray, "images patches pixels"],
    test: Float[np.ndarray, "tested patches dim"],
    test_masks: Int[np.ndarray, "tested patches pixels"],
    classes: int,
    train_left_out: Bool[np.ndarray, "images patches"],
    test_left_out: Bool[np.ndarray, "tested patches"],
) -> float:
    """Mean over classes of intersection over union of pixels, per cent; one class a patch.

    The probe predicts what share of a patch's pixels is of each class, and the largest counts for
    all of them. It is fitted with the same weight on every class, however rare, as the mean over
    classes has it. Patches that are left out neither train nor count; nor do classes without a
    pixel.
    """
    shares = np.stack([(train_masks == label).mean(-1) for label in range(classes)], axis=-1)
    shares = shares[~train_left_out]
    weights = shares @ (1 / np.maximum(shares.mean(0), 1e-12))
    probe = fit(train[~train_left_out], shares, weights)
    predicted = probe(test[~test_left_out]).argmax(1)
    truth = test_masks[~test_left_out]
    confusion = np.zeros((classes, classes))
    np.add.at(confusion, (truth, predicted[:, None]), 1)
    union = confusion.sum(0) + confusion.sum(1) - np.diag(confusion)
    seen = confusion.sum(1) > 0
    return float(100 * np.mean(np.diag(confusion)[seen] / union[seen]))


def depth_rmse(
    train: Float[np.ndarray, "images patches dim"],
    train_depth: Float[np.ndarray, "images patches pixels"],
    test: Float[np.ndarray, "tested patches dim"],
    test_depth: Float[np.ndarray, "tested patches pixels"],
    train_left_out: Bool[np.ndarray, "images patches"],
    test_left_out: Bool[np.ndarray, "tested patches"],
) -> float:
    """Root mean squared error of the mean depth of a patch, in metres; pixels of 0 are unknown."""

    def of_patches(depth: np.ndarray, left_out: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        known = depth > 0
        mean = depth.sum(-1) / np.maximum(known.sum(-1), 1)
        return mean, known.any(-1) & ~left_out

    mean, kept = of_patches(train_depth, train_left_out)
    probe = fit(train[kept], mean[kept][:, None])
    mean, kept = of_patches(test_depth, test_left_out)
    return float(np.sqrt(np.mean(np.square(probe(test[kept])[:, 0] - mean[kept]))))
