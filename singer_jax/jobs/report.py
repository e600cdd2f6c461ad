"""The job `report`: the page of a run."""

from __future__ import annotations

import json
from typing import Any

import jax
from etils import epath
from ml_collections import ConfigDict

from singer_jax.config import default
from singer_jax.errors import InputError
from singer_jax.evaluation import table1
from singer_jax.files import as_path
from singer_jax.report.collect import collect
from singer_jax.report.page import write_page
from singer_jax.telemetry import LOG


def report(config: Any, workdir: epath.Path) -> None:
    """Writes `report/index.html` below the work directory.

    Args:
      config: as `singer_jax.config.report` describes it.
      workdir: of the page; without `run` also the run itself.

    Raises:
      InputError: not a run, or one without a finished checkpoint.
    """
    run = as_path(config.run) if config.run else workdir
    settings = read_config(run)
    baselines = {}
    for folder in map(as_path, config.baselines):
        other = read_config(folder)
        baselines[f"student, {other.method.name} ({folder.name})"] = folder
    rows, note = results_of(run, settings)
    found = collect(run, settings, baselines, config.images, rows, note)
    if jax.process_index() > 0:
        return
    file = workdir / "report" / "index.html"
    write_page(file, found)
    LOG.info("%s written", file)


def read_config(run: epath.Path) -> ConfigDict:
    """The configuration of a run.

    Raises:
      InputError: the folder is not a run.
    """
    file = run / "config.json"
    if not file.is_file():
        raise InputError(f"run: {run} is not the work directory of a run: no config.json")
    config = default()
    with config.ignore_type():
        config.update(json.loads(file.read_text()))  # keys that are newer than the run keep theirs
    return config


def results_of(run: epath.Path, settings: Any) -> tuple[dict[str, dict[str, float | None]], str]:
    """Rows of the results table from RUN/evaluation/results.json, published ones beside, a note."""
    file = run / "evaluation" / "results.json"
    rows: dict[str, dict[str, float | None]] = {}
    note = ""
    if file.is_file():
        content = json.loads(file.read_text())
        measured = {k: v for k, v in content["table1"].items() if v is not None}
        measured |= {
            f"{task} {metric}": metrics[metric]
            for task, metrics in content["tasks"].items()
            for metric in ("top1", "knn_top1", "miou", "rmse")
            if metric in metrics
        }
        rows["measured here"] = measured
    paper = table1.published(settings.to_dict(), "")
    if paper:
        rows[f"published: {paper[0]}"] = paper[1]
        note = table1.NOTE
    return rows, note
