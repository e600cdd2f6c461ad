"""Evaluation of a model on one task: features, kNN and a probe."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
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
from singer_jax.evaluation.feature_store import stored_examples, views_of
from singer_jax.evaluation.heads import Task
from singer_jax.evaluation.knn import knn_top1
from singer_jax.evaluation.probe import Probed, ProbeResult, ProbeSettings, probe_each
from singer_jax.evaluation.progress import ProgressStore
from singer_jax.evaluation.segmentation import Segmentation
from singer_jax.evaluation.trainers import CropBatches, CropTrainer, FeatureTrainer
from singer_jax.models.inference import ImagePass


class Split(NamedTuple):
    """Training and test data of a task; `train` is None for a task that reuses ImageNet's head."""

    train: Source | None
    test: Source


@dataclasses.dataclass(frozen=True)
class ProbedModel:
    """Model that is probed together with others.

    Attributes:
      backbone: model to evaluate.
      test: features of the test split, from `test_examples`.
      store: folder of stored features, for the fast protocol; None keeps them in memory.
      progress_store: progress of the probe.
    """

    backbone: Backbone
    test: Examples
    store: Path | None = None
    progress_store: ProgressStore = dataclasses.field(default_factory=ProgressStore)


def probe_task(
    backbone: Backbone,
    kind: str,
    split: Split,
    settings: ProbeSettings,
    seed: int = 0,
    workers: int = 0,
) -> tuple[ProbeResult, dict[str, Any]]:
    """Returns `probe_models` of one model, with all features and progress in memory."""
    test = test_examples({"": backbone}, kind, split.test, settings, workers)[""]
    models = {"": ProbedModel(backbone, test)}
    return probe_models(models, kind, split, settings, seed, workers)[""]


def probe_models(
    models: Mapping[str, ProbedModel],
    kind: str,
    split: Split,
    settings: ProbeSettings,
    seed: int = 0,
    workers: int = 0,
) -> dict[str, tuple[ProbeResult, dict[str, Any]]]:
    """Trains and tests a probe of each model, and runs kNN for a classification task.

    With the published protocol, models of the same image size share decoded and cropped training
    images. Their results equal those of separate evaluations.

    Args:
      models: models by name, on one mesh.
      kind: `classification`, `segmentation` or `depth`.
      split: training and test data.
      settings: settings of the probe; `epochs` must be set.
      seed: seed of heads, order and crops.
      workers: number of decoding processes.

    Returns:
      the probe's result of each model, and its metrics as `results.json` holds them.
    """
    if settings.protocol == "fast":
        groups = [[name] for name in models]
    else:
        sizes = sorted({model.backbone.image_size for model in models.values()})
        groups = [
            [name for name, model in models.items() if model.backbone.image_size == size]
            for size in sizes
        ]
    found = {}
    for names in groups:
        of_group = {name: models[name] for name in names}
        found |= _probe_group(of_group, kind, split, settings, seed, workers)
    return found


def _probe_group(
    models: Mapping[str, ProbedModel],
    kind: str,
    split: Split,
    settings: ProbeSettings,
    seed: int,
    workers: int,
) -> dict[str, tuple[ProbeResult, dict[str, Any]]]:
    """Returns `probe_models` of models of one image size."""
    first = next(iter(models.values())).backbone
    augment, centre = transforms_of(kind, first.image_size)
    crops = CropBatches(split.train, augment, settings, first.mesh, seed, workers)
    probed = []
    for name, model in models.items():
        backbone = model.backbone
        task = task_of(backbone, kind, split.test.num_classes, settings)
        extract = functools.partial(backbone.extract, task=task, transform=centre, workers=workers)
        bank: Examples | None = None
        if settings.protocol == "fast":
            transforms = [centre] + [augment] * settings.views
            of_views = backbone, task, views_of(split.train, transforms, workers, seed)
            bank = stored_examples(model.store, *of_views) if model.store else _in_memory(*of_views)
            shape = task.head_shape(backbone.arch)
            trainer = FeatureTrainer(task, bank, shape, settings, seed, backbone.mesh)
        else:
            trainer = CropTrainer(task, backbone, crops, extract, settings, seed)
        if kind == "classification" and not model.progress_store.progress.nearest:
            top1 = knn_top1(
                bank or extract(split.train),
                model.test,
                classes=split.test.num_classes,
                k=settings.knn_k,
                temperature=settings.knn_temperature,
                mesh=backbone.mesh,
            )
            model.progress_store.update(nearest={"knn_top1": 100 * top1})
        probed.append(Probed(trainer, model.test, model.progress_store, name))
    with contextlib.closing(crops):
        results = dict(zip(models, probe_each(probed, settings, seed), strict=True))
    return {name: (result, _metrics(result, models[name])) for name, result in results.items()}


def _metrics(result: ProbeResult, model: ProbedModel) -> dict[str, Any]:
    """Returns the metrics of a probe as `results.json` holds them."""
    return without_infinities(
        {
            **result.last,
            "head_is_finite": all(bool(np.isfinite(part).all()) for part in result.head.values()),
            **model.progress_store.progress.nearest,
            "learning_rate": result.learning_rate,
            "held_out": {str(rate): value for rate, value in result.held_out.items()},
            "best": result.best,
            "best_epoch": result.best_epoch,
            "test_images": model.test.images,
        }
    )


def without_infinities(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the metrics with non-finite numbers, which JSON cannot hold, replaced by None."""
    found = {}
    for name, value in metrics.items():
        if isinstance(value, Mapping):
            value = without_infinities(value)
        elif isinstance(value, float) and not math.isfinite(value):
            value = None
        found[name] = value
    return found


def _in_memory(backbone: Backbone, task: Task, views: Sequence[ImagePass]) -> Examples:
    """Returns `stored_examples` in float32 and without files."""
    batches = [batch for view in views for batch in backbone.batches(task, view)]
    features, labels = (np.concatenate(parts) for parts in zip(*batches, strict=True))
    return Examples(features, labels, len(views))


def test_examples(
    backbones: Mapping[str, Backbone],
    kind: str,
    source: Source,
    settings: ProbeSettings,
    workers: int = 0,
) -> dict[str, Examples]:
    """Returns features of a test split by model name; models share the decoded images."""
    tasks = {
        name: task_of(backbone, kind, source.num_classes, settings)
        for name, backbone in backbones.items()
    }
    return extract_each(
        backbones, source, tasks, lambda size: transforms_of(kind, size)[1], workers
    )


def task_of(backbone: Backbone, kind: str, classes: int, settings: ProbeSettings) -> Task:
    """Returns the task of a kind: `segmentation`, `depth`, or a classification."""
    if kind == "segmentation":
        return Segmentation(classes)
    if kind == "depth":
        return Depth(
            ignore_missing=not settings.depth_zero_as_bin,
            drop_saturated=settings.depth_drop_saturated,
        )
    return backbone.classification(classes, settings.pooling)


def transforms_of(kind: str, size: int) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Returns the random training transform and the test transform of a kind of task."""
    if kind == "segmentation":
        return SegmentationTransform(size, train=True), SegmentationTransform(size, train=False)
    if kind == "depth":
        return DepthTransform(size, train=True), DepthTransform(size, train=False)
    return TrainTransform(size), EvalTransform(size)
