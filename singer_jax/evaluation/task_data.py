"""Data of an evaluation: the tasks of Table 1 that are installed, or one labelled source."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from singer_jax.data.benchmarks import NotInstalled, open_benchmark
from singer_jax.data.registry import DataSettings, announced, open_source
from singer_jax.data.sources import TEST, TRAIN
from singer_jax.errors import InputError
from singer_jax.evaluation import table1
from singer_jax.evaluation.backbone import Backbone
from singer_jax.evaluation.measure import Split


class TaskData(NamedTuple):
    """Tasks of an evaluation and their data.

    Attributes:
      benchmarks: the tasks by name.
      splits: available data by the name of the task.
      skipped: reasons for skipping the other tasks, by name.
    """

    benchmarks: Mapping[str, table1.Benchmark]
    splits: dict[str, Split]
    skipped: dict[str, str]


def find_data(data: DataSettings, tasks: tuple[str, ...] = ()) -> TaskData:
    """Finds the data of the tasks.

    Args:
      data: the source; `table1` for the tasks of Table 1.
      tasks: tasks of Table 1; empty: all whose data are installed.

    Raises:
      InputError: no data set was found, or a data set is incomplete.
    """
    named = {benchmark.data: name for name, benchmark in table1.TASKS.items()}
    chosen = tasks or tuple(table1.TASKS)
    if data.source in named and table1.TASKS[named[data.source]].kind != "classification":
        chosen = (named[data.source],)
    elif data.source != "table1":
        return _labelled_source(data)
    splits, skipped = {}, {}
    for name, benchmark in table1.TASKS.items():  # imagenet precedes tasks that reuse its head
        if name not in chosen:
            continue
        try:
            test = announced(open_benchmark(benchmark.data, data.path, TEST), f"{name} test")
            train = None
            if benchmark.kind != "transfer":
                found = open_benchmark(benchmark.data, data.path, TRAIN)
                train = announced(found, f"{name} train")
            splits[name] = Split(train, test)
        except NotInstalled as error:
            if name in tasks or data.source != "table1":
                raise
            skipped[name] = str(error)
    if not splits:
        raise InputError(
            "data.path: no data set of Table 1 found, expected e.g. DATA/imagenet/val "
            "(docs/data.md); for your own labelled images set --config.data.source=FOLDER"
        )
    return TaskData(table1.TASKS, splits, skipped)


def _labelled_source(data: DataSettings) -> TaskData:
    sources = tuple(table1.SCENES) if data.source == "scenes" else (data.source,)
    benchmarks, splits = {}, {}
    for source in sources:
        name, benchmark = Path(source).name, table1.SCENES.get(source, table1.Benchmark(source))
        benchmarks[name] = benchmark
        splits[name] = _split(dataclasses.replace(data, source=source), benchmark.kind)
    return TaskData(benchmarks, splits, {})


def _split(data: DataSettings, kind: str) -> Split:
    train, test = (open_source(data, split) for split in (TRAIN, TEST))
    if not train.num_classes and kind == "classification":
        raise InputError(
            f"data.source: {data.source} has no labels for a probe; give one subfolder per class"
        )
    if train.num_classes != test.num_classes:
        raise InputError(
            f"data.source: {data.source} has {train.num_classes} classes to train and "
            f"{test.num_classes} to test"
        )
    return Split(train, test)


def with_statistics(
    backbone: Backbone, benchmark: table1.Benchmark, normalisation: str
) -> Backbone:
    """Returns the backbone, with the official code's image statistics if configured."""
    if normalisation == "model":
        return backbone
    spec = dataclasses.replace(backbone.network.spec, mean=benchmark.mean, std=benchmark.std)
    return dataclasses.replace(backbone, network=dataclasses.replace(backbone.network, spec=spec))


def data_digest(split: Split) -> str:
    """Returns a digest of a task's data."""
    return _digest(_fingerprints(split))


def task_key(benchmark: table1.Benchmark, split: Split, imagenet: str | None) -> str:
    """Returns a digest of a task and its data, and for a transfer also of the ImageNet head.

    Args:
      benchmark: the task.
      split: its data.
      imagenet: key of the task whose head a transfer reuses.
    """
    parts = [repr(benchmark), *_fingerprints(split)]
    return _digest([*parts, imagenet] if benchmark.kind == "transfer" else parts)


def _fingerprints(split: Split) -> list[str]:
    return [source.fingerprint() for source in split if source is not None]


def _digest(parts: list[str | None]) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
