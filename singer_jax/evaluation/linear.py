"""Linear probes in closed form: ridge regression on frozen features.

They estimate the metrics of trained probes deterministically and in a fraction of the time. The
published protocols are in `evaluation.probe`.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from jaxtyping import Bool, Float, Int

from singer_jax.evaluation import segmentation

_PENALTY = 1e-3  # ridge penalty for standardised features, per row


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


def mean_iou(
    train: Float[np.ndarray, "images patches dim"],
    train_masks: Int[np.ndarray, "images patches pixels"],
    test: Float[np.ndarray, "tested patches dim"],
    test_masks: Int[np.ndarray, "tested patches pixels"],
    classes: int,
    train_left_out: Bool[np.ndarray, "images patches"],
    test_left_out: Bool[np.ndarray, "tested patches"],
) -> float:
    """Returns the mean intersection over union of the classes in percent, one class per patch.

    The probe predicts the share of each class among a patch's pixels. The class with the largest
    share is the prediction for all pixels of the patch. The fit gives every class the same weight,
    as the mean over classes does. Excluded patches are used neither for training nor for testing.
    Absent classes are treated as in `segmentation.mean_iou`.
    """
    shares = np.stack([(train_masks == label).mean(-1) for label in range(classes)], axis=-1)
    shares = shares[~train_left_out]
    weights = shares @ (1 / np.maximum(shares.mean(0), 1e-12))
    probe = fit(train[~train_left_out], shares, weights)
    predicted = probe(test[~test_left_out]).argmax(1)
    truth = test_masks[~test_left_out]
    confusion = np.zeros((classes, classes))
    np.add.at(confusion, (truth, predicted[:, None]), 1)
    return 100 * segmentation.mean_iou(confusion)


def depth_rmse(
    train: Float[np.ndarray, "images patches dim"],
    train_depth: Float[np.ndarray, "images patches pixels"],
    test: Float[np.ndarray, "tested patches dim"],
    test_depth: Float[np.ndarray, "tested patches pixels"],
    train_left_out: Bool[np.ndarray, "images patches"],
    test_left_out: Bool[np.ndarray, "tested patches"],
) -> float:
    """Returns the root mean squared error of the patches' mean depth, in metres; 0 is missing."""

    def of_patches(depth: np.ndarray, left_out: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        known = depth > 0
        mean = depth.sum(-1) / np.maximum(known.sum(-1), 1)
        return mean, known.any(-1) & ~left_out

    mean, kept = of_patches(train_depth, train_left_out)
    probe = fit(train[kept], mean[kept][:, None])
    mean, kept = of_patches(test_depth, test_left_out)
    return float(np.sqrt(np.mean(np.square(probe(test[kept]).ravel() - mean[kept]))))
