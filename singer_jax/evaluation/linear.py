"""Linear probes in closed form: ridge regression on frozen features.

They estimate the metrics of trained probes deterministically and in a fraction of the time. The
published protocols are in `evaluation.probe`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, Num

from singer_jax.evaluation import segmentation

_PENALTY = 1e-3  # ridge penalty for standardised features, per row


class DenseSplit(NamedTuple):
    """Patch features of a split and the labels of their pixels.

    Patches in `left_out` are used neither for training nor for testing.
    """

    features: Float[np.ndarray, "images patches dim"]
    labels: Num[np.ndarray, "images patches pixels"]
    left_out: Bool[np.ndarray, "images patches"]


def fit(
    features: Float[np.ndarray, "rows dim"],
    targets: Float[np.ndarray, "rows out"],
    weights: Float[np.ndarray, " rows"] | None = None,
) -> Callable[[Float[np.ndarray, "rows dim"]], Float[np.ndarray, "rows out"]]:
    """Fits a linear map by least squares with a small ridge penalty, in float64.

    Args:
      features: inputs, one row per sample.
      targets: outputs, one row per sample.
      weights: weight of each row's squared error; None: equal weights.
    """
    # Imported here, because only the job study needs it.
    from sklearn.linear_model import Ridge
    from sklearn.preprocessing import StandardScaler

    weights = np.ones(len(features)) if weights is None else weights / weights.mean()
    features, targets = features.astype(np.float64), targets.astype(np.float64)
    scaler = StandardScaler().fit(features, sample_weight=weights)
    ridge = Ridge(_PENALTY * len(features))
    ridge.fit(scaler.transform(features), targets, sample_weight=weights)
    return lambda rows: ridge.predict(scaler.transform(rows.astype(np.float64)))


def top1(
    train: Float[np.ndarray, "images dim"],
    train_labels: Int[np.ndarray, " images"],
    test: Float[np.ndarray, "tested dim"],
    test_labels: Int[np.ndarray, " tested"],
    classes: int,
) -> float:
    """Returns the percentage of test images whose class the probe predicts."""
    probe = fit(train, np.eye(classes)[train_labels])
    return float(100 * np.mean(probe(test).argmax(1) == test_labels))


def mean_iou(train: DenseSplit, test: DenseSplit, classes: int) -> float:
    """Returns the mean intersection over union of the classes in percent, one class per patch.

    The probe predicts the share of each class among a patch's pixels. The class with the largest
    share is the prediction for all pixels of the patch. The fit gives every class the same weight,
    as the mean over classes does. Absent classes are treated as in `segmentation.mean_iou`.
    """
    shares = np.stack([(train.labels == label).mean(-1) for label in range(classes)], axis=-1)
    shares = shares[~train.left_out]
    weights = shares @ (1 / np.maximum(shares.mean(0), 1e-12))
    probe = fit(train.features[~train.left_out], shares, weights)
    predicted = probe(test.features[~test.left_out]).argmax(1)
    truth = test.labels[~test.left_out]
    confusion = np.zeros((classes, classes))
    np.add.at(confusion, (truth, predicted[:, None]), 1)
    return 100 * segmentation.mean_iou(confusion)


def depth_rmse(train: DenseSplit, test: DenseSplit) -> float:
    """Returns the root mean squared error of the patches' mean depth, in metres; 0 is missing."""

    def known_patches(split: DenseSplit) -> tuple[np.ndarray, np.ndarray]:
        known = split.labels > 0
        mean = split.labels.sum(-1) / np.maximum(known.sum(-1), 1)
        kept = known.any(-1) & ~split.left_out
        return split.features[kept], mean[kept]

    features, depth = known_patches(train)
    probe = fit(features, depth[:, None])
    features, depth = known_patches(test)
    return float(np.sqrt(np.mean(np.square(probe(features).ravel() - depth))))
