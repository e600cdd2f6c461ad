"""One task measured: features, kNN and a probe."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from singer_jax.data.dense import DepthTransform, SegmentationTransform
from singer_jax.data.images import EvalTransform, TrainTransform
from singer_jax.data.sources import Source
from singer_jax.evaluation.backbone import Backbone, Examples, extract_each
from singer_jax.evaluation.depth import Depth
from singer_jax.evaluation.heads import Task
from singer_jax.evaluation.knn import knn_top1
from singer_jax.evaluation.probe import (
    CropTrainer,
    FeatureTrainer,
    ProbeResult,
    ProbeSettings,
    probe,
)
from singer_jax.evaluation.progress import Keeper
from singer_jax.evaluation.segmentation import Segmentation
from singer_jax.evaluation.store import stored_examples


class Split(NamedTuple):
    """The data of a task; no training split where ImageNet's head is taken."""

    train: Source | None
    test: Source


def probe_task(
    backbone: Backbone,
    kind: str,
    split: Split,
    settings: ProbeSettings,
    seed: int = 0,
    workers: int = 0,
    store: Path | None = None,
    keeper: Keeper | None = None,
    test: Examples | None = None,
) -> tuple[ProbeResult, dict[str, Any]]:
    """Trains and tests a probe; kNN too where the task is a classification.

    Args:
      backbone: the model to measure.
      kind: `classification`, `segmentation` or `depth`.
      split: its data.
      settings: of the probe, with a number of epochs.
      seed: of head, order and crops.
      workers: of the loader.
      store: folder of stored features, for the fast protocol; None keeps them in memory.
      keeper: of the progress; default: nothing is kept.
      test: features of the test split, as `test_examples`; default: extracted here.

    Returns:
      the probe's result, and its metrics as `results.json` holds them.
    """
    task = task_of(backbone, kind, split.test.num_classes, settings)
    augment, centre = transforms_of(kind, backbone.image_size)

    def extract(source: Source) -> Examples:
        return backbone.extract(source, task, centre, workers)

    test = test or extract(split.test)
    head_shape = task.head_shape(backbone.arch)
    train: Examples | None = None
    if settings.protocol == "fast":
        views = [centre] + [augment] * settings.views
        of_views = (backbone, split.train, task, views, workers, seed)
        train = stored_examples(store, *of_views) if store else _in_memory(*of_views)
        trainer = FeatureTrainer(task, train, head_shape, settings, seed, backbone.mesh)
    else:
        trainer = CropTrainer(
            task, backbone, split.train, augment, extract, settings, seed, workers
        )
    keeper = keeper or Keeper()
    if kind == "classification" and not keeper.progress.nearest:
        bank = train or extract(split.train)
        top1 = knn_top1(
            bank,
            test,
            classes=split.test.num_classes,
            k=settings.knn_k,
            temperature=settings.knn_temperature,
            mesh=backbone.mesh,
        )
        keeper.keep(nearest={"knn_top1": 100 * top1})
        del bank
    result = probe(trainer, test, settings, seed, keeper)
    metrics = {
        **result.last,
        "head_is_finite": all(bool(np.isfinite(part).all()) for part in result.head.values()),
        **keeper.progress.nearest,
        "learning_rate": result.learning_rate,
        "held_out": {str(rate): value for rate, value in result.held_out.items()},
        "best": result.best,
        "best_epoch": result.best_epoch,
        "test_images": test.images,
    }
    return result, _without_infinities(metrics)


def _without_infinities(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Replaces numbers that JSON cannot hold by None."""
    found = {}
    for name, value in metrics.items():
        if isinstance(value, Mapping):
            value = _without_infinities(value)
        elif isinstance(value, float) and not math.isfinite(value):
            value = None
        found[name] = value
    return found


def _in_memory(
    backbone: Backbone,
    source: Source,
    task: Task,
    views: Sequence[Callable[..., Any]],
    workers: int,
    seed: int,
) -> Examples:
    """As `stored_examples`, in float32 and without files."""
    extracted = [
        backbone.extract(source, task, transform, workers, seed + view)
        for view, transform in enumerate(views)
    ]
    features, labels = (np.concatenate([e[part] for e in extracted]) for part in (0, 1))
    return Examples(features, labels, len(views))


def test_examples(
    backbones: Mapping[str, Backbone],
    kind: str,
    source: Source,
    settings: ProbeSettings,
    workers: int = 0,
) -> dict[str, Examples]:
    """Features of a test split of several models, by name; images are decoded and cropped once."""
    tasks = {
        name: task_of(backbone, kind, source.num_classes, settings)
        for name, backbone in backbones.items()
    }
    return extract_each(
        backbones, source, tasks, lambda size: transforms_of(kind, size)[1], workers
    )


def task_of(backbone: Backbone, kind: str, classes: int, settings: ProbeSettings) -> Task:
    """The task of a kind: `segmentation`, `depth`, or a classification."""
    if kind == "segmentation":
        return Segmentation(classes)
    if kind == "depth":
        return Depth(
            ignore_missing=not settings.depth_zero_as_bin,
            drop_saturated=settings.depth_drop_saturated,
        )
    return backbone.classification(classes, settings.pooling)


def transforms_of(kind: str, size: int) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The random training transform of a kind of task and its test transform, to `size` pixels."""
    if kind == "segmentation":
        return SegmentationTransform(size, train=True), SegmentationTransform(size, train=False)
    if kind == "depth":
        return DepthTransform(size, train=True), DepthTransform(size, train=False)
    return TrainTransform(size), EvalTransform(size)
