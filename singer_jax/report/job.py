"""The jobs `report` and `compare`: the page of a run, and of several runs side by side."""

from __future__ import annotations

import json
from typing import Any

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from singer_jax.config import default, flatten
from singer_jax.errors import InputError
from singer_jax.evaluation import table1
from singer_jax.files import as_path, write_text, writing
from singer_jax.report.collect import collect, column_order, read_metrics
from singer_jax.report.page import format_text, write_comparison, write_page
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


def compare(config: Any, workdir: epath.Path) -> None:
    """Several runs in one table: methods by tasks, mean and standard deviation over seeds.

    Writes compare.json and compare/index.html below the work directory, and prints the table.

    Args:
      config: as `singer_jax.config.compare` describes it.
      workdir: of what is written.

    Raises:
      InputError: fewer than two runs, not a run, or one that is not evaluated.
    """
    if len(config.runs) < 2:
        raise InputError("runs: give at least two, as --config.runs=\"('runs/a', 'runs/b')\"")
    described: list[dict[str, Any]] = []
    for folder in map(as_path, config.runs):
        settings = read_config(folder)
        rows, _ = results_of(folder, settings)
        if "measured here" not in rows:
            raise InputError(
                f"runs: {folder} is not evaluated; run the job evaluate with "
                f"--workdir={folder}/evaluation"
            )
        flat = flatten(settings.to_dict()) | {"probe": _protocol(folder)}
        described.append(
            {
                "kind": {k: v for k, v in flat.items() if not k.startswith(_NOT_THE_METHOD)},
                "seed": settings.seed,
                "row": rows["measured here"],
                "curve": read_metrics(folder),
            }
        )
    groups: dict[str, list[dict[str, Any]]] = {}
    for entry, name in zip(described, _names([e["kind"] for e in described]), strict=True):
        if entry["seed"] in (other["seed"] for other in groups.get(name, [])):
            raise InputError(f"runs: {name} is given twice with seed {entry['seed']}")
        groups.setdefault(name, []).append(entry)
    table = {name: _over_seeds([e["row"] for e in of]) for name, of in groups.items()}
    seeds = {name: [e["seed"] for e in of] for name, of in groups.items()}
    curves = {name: of[0]["curve"] for name, of in groups.items()}
    if jax.process_index() > 0:
        return
    text = {name: _in_words(row) for name, row in table.items()}
    content = {"seeds": seeds, "rows": table}
    with writing(workdir):
        write_text(workdir / "compare.json", json.dumps(content, indent=2) + "\n")
        write_comparison(workdir / "compare" / "index.html", text, curves)
    print(format_text(text))


# Keys in which two runs of a method may differ.
_NOT_THE_METHOD = (
    "seed",
    "data.path",
    "data.workers",
    "mesh.",
    "log.",
    "checkpoint.",
    "evals.",
)


def _names(kinds: list[dict[str, Any]]) -> list[str]:
    """A name for each run: method, models, and the keys in which not all runs agree."""
    shown = ("method.name", "teacher.model", "student.model")
    keys = sorted(set().union(*kinds) - set(shown))
    differing = [key for key in keys if len({repr(kind.get(key)) for kind in kinds}) > 1]
    names = []
    for kind in kinds:
        method, teacher, student = (kind[key] for key in shown)
        own = ", ".join(f"{key}={kind.get(key)}" for key in differing)
        names.append(f"{method} {teacher} -> {student}" + (f" ({own})" if own else ""))
    return names


def _protocol(run: epath.Path) -> str:
    return json.loads((run / "evaluation" / "results.json").read_text())["protocol"]


def _over_seeds(rows: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    found = {}
    for column in column_order(rows):
        values = [row[column] for row in rows if row.get(column) is not None]
        if values:
            spread = float(np.std(values, ddof=1)) if len(values) > 1 else None
            found[column] = {"mean": float(np.mean(values)), "std": spread, "runs": len(values)}
    return found


def _in_words(row: dict[str, dict[str, float]]) -> dict[str, str]:
    return {
        column: f"{cell['mean']:.4g}"
        + (f" +- {cell['std']:.2g} ({cell['runs']})" if cell["std"] is not None else "")
        for column, cell in row.items()
    }
