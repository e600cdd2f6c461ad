"""The job `evaluate`: every task of Table 1 whose data is there, or one labelled source."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from singer_jax import parallel
from singer_jax.data.benchmarks import NotInstalled, open_benchmark
from singer_jax.data.dense import DepthTransform, SegmentationTransform
from singer_jax.data.images import EvalTransform, TrainTransform
from singer_jax.data.loader import worker_count
from singer_jax.data.sources import TEST, TRAIN, Source, make_source
from singer_jax.errors import InputError, unknown
from singer_jax.evaluation import table1
from singer_jax.evaluation.backbone import Backbone, Examples, load_backbone
from singer_jax.evaluation.heads import Depth, Segmentation, Task
from singer_jax.evaluation.knn import knn_top1
from singer_jax.evaluation.probe import CropTrainer, FeatureTrainer, ProbeResult, probe, score
from singer_jax.evaluation.store import stored_examples
from singer_jax.models.vit import Numerics
from singer_jax.telemetry import LOG
from singer_jax.training.setup import NORMALISATIONS, dtype_of

PROTOCOLS = ("paper", "fast")


class Split(NamedTuple):
    """The data of a task; no training split where ImageNet's head is taken."""

    train: Source | None
    test: Source


def evaluate(config: Any, workdir: Path) -> None:
    """Measures one backbone; a task that is finished is not done again.

    Args:
      config: as `singer_jax.config.evaluation` describes it.
      workdir: for results.json, tasks/ (what is finished) and features/ (of the fast protocol).

    Raises:
      InputError: nothing to evaluate, no data at all, or data that is there in part.
    """
    if config.probe.protocol not in PROTOCOLS:
        raise unknown("probe.protocol", config.probe.protocol, PROTOCOLS)
    benchmarks, splits, skipped = _find_data(config)
    mesh = parallel.make_mesh(config.mesh.data, config.mesh.fsdp)
    backbone = load_backbone(
        mesh,
        run=config.run,
        weights=config.weights,
        model=config.model,
        numerics=Numerics(dtype_of(config.precision)),
    )
    try:
        (workdir / "tasks").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--workdir: cannot write to {workdir} ({error.strerror})") from error
    for name, reason in skipped.items():
        LOG.info("skipped %s: %s", name, reason)

    identity = backbone.digest()
    results: dict[str, dict[str, Any]] = {}
    for name, split in splits.items():
        benchmark = benchmarks[name]
        if benchmark.kind == "transfer" and "imagenet" not in results:
            skipped[name] = "needs the head of the task imagenet, which is not measured"
            continue
        measured = _with_statistics(backbone, benchmark, config.data.normalisation)
        key = _key(config, benchmark, identity, split)
        file = workdir / "tasks" / f"{name}.json"
        found = _finished(file, key)
        if found is None:
            LOG.info("== %s", name)
            found = _measure(name, benchmark, measured, split, config, workdir)
            _write(file, {"key": key, "metrics": found})
        results[name] = found
        LOG.info("%s: %s", name, _brief(found))

    run = _config_of(config.run)
    row = table1.row({k: v for k, v in results.items() if k in table1.TASKS})
    content = {
        "model": backbone.network.spec.name,
        "run": {k: run[k] for k in ("seed", "method", "teacher", "student")} if run else None,
        "protocol": config.probe.protocol,
        "tasks": results,
        "skipped": skipped,
        "table1": row,
    }
    if config.data.source == "table1":
        rows: dict[str, Any] = {"measured here": row}
        paper = table1.published(run, backbone.network.spec.name)
        if paper:
            rows[f"published: {paper[0]}"] = paper[1]
            content["published"] = {"of": paper[0], "row": paper[1]}
        print(table1.format_rows(rows))
        print(table1.NOTE)
    _write(workdir / "results.json", content)


def _find_data(
    config: Any,
) -> tuple[dict[str, table1.Benchmark], dict[str, Split], dict[str, str]]:
    """The tasks, the data of those that have some, and why the others are skipped."""
    data = config.data
    if data.source != "table1":
        train, test = (make_source(data.source, data.path, split) for split in (TRAIN, TEST))
        if not train.num_classes:
            raise InputError(f"data.source: {data.source} has no labels to probe")
        name = Path(data.source).name
        return {name: table1.Benchmark(data.source)}, {name: Split(train, test)}, {}
    chosen = tuple(config.tasks) or tuple(table1.TASKS)
    for name in chosen:
        if name not in table1.TASKS:
            raise unknown("task", name, table1.TASKS)
    splits, skipped = {}, {}
    for name in chosen:
        benchmark = table1.TASKS[name]
        try:
            test = open_benchmark(benchmark.data, data.path, TEST)
            transfer = benchmark.kind == "transfer"
            train = None if transfer else open_benchmark(benchmark.data, data.path, TRAIN)
            splits[name] = Split(train, test)
        except NotInstalled as error:
            if config.tasks:
                raise
            skipped[name] = str(error)
    if not splits:
        raise InputError(
            "data.path: none of the data sets is there; set it to the folder that holds them "
            '(README, "Data"), or give one as data.source'
        )
    return table1.TASKS, splits, skipped


def _with_statistics(
    backbone: Backbone, benchmark: table1.Benchmark, normalisation: str
) -> Backbone:
    """The backbone with the image statistics of the official code, where they are asked for."""
    if normalisation not in NORMALISATIONS:
        raise unknown("data.normalisation", normalisation, NORMALISATIONS)
    if normalisation == "model":
        return backbone
    spec = dataclasses.replace(backbone.network.spec, mean=benchmark.mean, std=benchmark.std)
    return dataclasses.replace(backbone, network=dataclasses.replace(backbone.network, spec=spec))


def _measure(
    name: str,
    benchmark: table1.Benchmark,
    backbone: Backbone,
    split: Split,
    config: Any,
    workdir: Path,
) -> dict[str, Any]:
    workers = worker_count(config.data.workers)
    head_file = workdir / "tasks" / f"{name}.npz"
    if benchmark.kind == "transfer":
        head = dict(np.load(workdir / "tasks" / "imagenet.npz"))
        classes = head["bias"].shape[0]
        if split.test.num_classes > classes:
            raise InputError(
                f"{name} has {split.test.num_classes} classes, the head of imagenet {classes}"
            )
        task = backbone.classification(classes, config.probe.token)
        test = backbone.extract(split.test, task, EvalTransform(backbone.image_size), workers)
        heads = {part: value[None] for part, value in head.items()}
        return score(task, heads, test)[0] | {"test_images": test.images}
    settings = ConfigDict(config.probe)
    settings.epochs = benchmark.epochs if settings.epochs is None else settings.epochs
    result, metrics = probe_task(
        backbone,
        benchmark.kind,
        split,
        settings,
        config.seed,
        workers,
        workdir / "features" / name,
    )
    np.savez(head_file, **result.head)
    return metrics


def probe_task(
    backbone: Backbone,
    kind: str,
    split: Split,
    config: Any,
    seed: int = 0,
    workers: int = 0,
    store: Path | None = None,
) -> tuple[ProbeResult, dict[str, Any]]:
    """Trains and tests a probe; kNN too where the task is a classification.

    Args:
      backbone: the model to measure.
      kind: `classification`, `segmentation` or `depth`.
      split: its data.
      config: the `probe` part of the configuration, with a number of epochs.
      seed: of head, order and crops.
      workers: of the loader.
      store: folder of stored features, for the fast protocol; None keeps them in memory.

    Returns:
      the probe's result, and its metrics as `results.json` holds them.
    """
    task, augment, centre = task_of(backbone, kind, split.test.num_classes, config)

    def extract(source: Source) -> Examples:
        return backbone.extract(source, task, centre, workers)

    test, head_shape = extract(split.test), task.head_shape(backbone.arch)
    train: Examples | None = None
    if config.protocol == "fast":
        views = [centre] + [augment] * config.views
        if store:
            train = stored_examples(store, backbone, split.train, task, views, workers)
        else:
            train = extract(split.train)
        trainer = FeatureTrainer(task, train, head_shape, config, seed)
    else:
        trainer = CropTrainer(task, backbone, split.train, augment, extract, config, seed, workers)
    result = probe(trainer, test, config, seed)
    metrics: dict[str, Any] = {
        **result.last,
        "learning_rate": result.learning_rate,
        "held_out": {str(rate): value for rate, value in result.held_out.items()},
        "best": result.best,
        "best_epoch": result.best_epoch,
        "test_images": test.images,
    }
    if kind == "classification":
        bank = extract(split.train) if train is None else train
        metrics["knn_top1"] = 100 * knn_top1(
            Examples(*bank.take(np.arange(bank.images))),
            test,
            classes=split.test.num_classes,
            k=config.knn_k,
            temperature=config.knn_temperature,
        )
    return result, metrics


def task_of(
    backbone: Backbone, kind: str, classes: int, config: Any
) -> tuple[Task, Callable[..., Any], Callable[..., Any]]:
    """The task of a kind, its random training transform and its test transform."""
    size = backbone.image_size
    if kind == "segmentation":
        transforms = (SegmentationTransform(size, train=train) for train in (True, False))
        return Segmentation(classes), *transforms
    if kind == "depth":
        transforms = (DepthTransform(size, train=train) for train in (True, False))
        return Depth(ignore_missing=not config.depth_zero_as_bin), *transforms
    task = backbone.classification(classes, config.token)
    return task, TrainTransform(size), EvalTransform(size)


def _key(config: Any, benchmark: table1.Benchmark, identity: str, split: Split) -> str:
    parts = {
        "model": identity,
        "task": repr(benchmark),
        "probe": config.probe.to_dict(),
        "seed": config.seed,
        "precision": config.precision,
        "normalisation": config.data.normalisation,
        "data": [source.fingerprint() for source in split if source is not None],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _finished(file: Path, key: str) -> dict[str, Any] | None:
    try:
        content = json.loads(file.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    return content["metrics"] if content["key"] == key else None


def _write(file: Path, content: Any) -> None:
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=2) + "\n")
    partial.replace(file)


def _brief(metrics: dict[str, Any]) -> str:
    numbers = {k: v for k, v in metrics.items() if isinstance(v, float)}
    return ", ".join(f"{name} {value:.4g}" for name, value in numbers.items())


def _config_of(run: str) -> dict[str, Any] | None:
    file = Path(run).expanduser() / "config.json"
    return json.loads(file.read_text()) if run and file.is_file() else None
