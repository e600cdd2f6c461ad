"""The job `evaluate`: a linear probe and kNN of a run's student or of any timm weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from singer_jax import parallel
from singer_jax.data.loader import worker_count
from singer_jax.data.sources import TEST, TRAIN, Source, make_source
from singer_jax.errors import InputError
from singer_jax.evaluation.backbone import Backbone, load_backbone
from singer_jax.evaluation.knn import knn_top1
from singer_jax.evaluation.probe import CropTrainer, FeatureTrainer, probe
from singer_jax.models.vit import Numerics
from singer_jax.telemetry import LOG
from singer_jax.training.setup import dtype_of


def evaluate(config: Any, workdir: Path) -> None:
    """Measures one backbone and writes `results.json`.

    Args:
      config: as `singer_jax.config.evaluation` describes it.
      workdir: for results.json.

    Raises:
      InputError: nothing to evaluate, no such data, or data without labels.
    """
    train, test = (make_source(config.data.source, config.data.path, s) for s in (TRAIN, TEST))
    if not train.num_classes:
        raise InputError(f"data.source: {config.data.source} has no labels to probe")
    mesh = parallel.make_mesh(config.mesh.data, config.mesh.fsdp)
    backbone = load_backbone(
        mesh,
        run=config.run,
        weights=config.weights,
        model=config.model,
        numerics=Numerics(dtype_of(config.precision)),
    )
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--workdir: cannot write to {workdir} ({error.strerror})") from error
    results = classify(backbone, train, test, config.probe, config.seed, config.data.workers)
    (workdir / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    for name, value in results.items():
        LOG.info("%s: %s", name, value)


def classify(
    backbone: Backbone,
    train: Source,
    test: Source,
    config: Any,
    seed: int = 0,
    workers: int | None = None,
) -> dict[str, Any]:
    """Linear probe and kNN on a labelled data set.

    Args:
      backbone: the model to measure.
      train, test: its splits.
      config: the `probe` part of the configuration.
      seed: of head, order and crops.
      workers: of the loader; None: one a spare core.

    Returns:
      `linear_top1`, `linear_top5`, `knn_top1` and what else is worth knowing, in percent.
    """
    workers = worker_count(workers)
    features, queries = (backbone.extract(s, config.token, workers) for s in (train, test))
    if config.augment:
        trainer = CropTrainer(backbone, train, config, seed, workers)
    else:
        trainer = FeatureTrainer(features, train.num_classes, config, seed)
    result = probe(trainer, queries, config, seed)
    nearest = knn_top1(
        features,
        queries,
        classes=train.num_classes,
        k=config.knn_k,
        temperature=config.knn_temperature,
    )
    return {
        "linear_top1": 100 * result.last.top1,
        "linear_top5": 100 * result.last.top5,
        "linear_loss": result.last.loss,
        "linear_best_top1": 100 * result.best.top1,
        "linear_best_epoch": result.best_epoch,
        "learning_rate": result.learning_rate,
        "held_out_top1": {str(rate): 100 * value for rate, value in result.held_out.items()},
        "knn_top1": 100 * nearest,
        "test_images": len(test),
    }
