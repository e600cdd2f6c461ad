"""Job `compare`: compares several runs, or the students of one run, in a table."""

from __future__ import annotations

import collections
import dataclasses
import json
from typing import Any

import jax
import numpy as np
from etils import epath

from singer_jax.errors import InputError
from singer_jax.evaluation.results import Results, read_results
from singer_jax.io.files import as_path, make_workdir, write_text, writing
from singer_jax.report.collect import column_order, read_metrics
from singer_jax.report.page import format_text, write_comparison
from singer_jax.runs.lock import holding
from singer_jax.runs.metrics import LOG
from singer_jax.runs.workdir import (
    comparison_file,
    comparison_page,
    evaluation_folder,
    student_results_file,
)
from singer_jax.settings.ranges import NAME, Each, OneOf
from singer_jax.settings.settings import Settings, flatten, setting, to_dict
from singer_jax.training.settings import read_settings


@dataclasses.dataclass(frozen=True)
class CompareSettings(Settings):
    """Settings of the job `compare`."""

    job: str = setting("compare", OneOf(("compare",)), "Name of the command.")
    runs: tuple[str, ...] = setting(
        (), Each(NAME), "Work directories of the runs, each evaluated into its folder evaluation/."
    )


def compare(settings: CompareSettings, workdir: epath.Path) -> None:
    """Writes a table of several runs: methods by tasks, mean and standard deviation over seeds.

    Runs that differ only in the seed share a row. Their evaluations must agree in settings, step,
    data and code. Row names state the settings that differ. The function writes compare.json and
    compare/index.html into the work directory, and prints the table.

    Args:
      settings: settings of the job.
      workdir: folder for the output.

    Raises:
      InputError: there are fewer than two students, or a folder is not a run or is not evaluated.
    """
    described: list[dict[str, Any]] = []
    for folder in map(as_path, settings.runs):
        for student, own in read_settings(folder).each().items():
            file = student_results_file(folder, student)
            results = read_results(file)
            if results is None:
                raise InputError(
                    f"runs: {folder} is not evaluated; run the job evaluate with "
                    f"--workdir={evaluation_folder(folder)}"
                )
            flat = flatten(to_dict(own)) | _evaluation(results, file)
            described.append(
                {
                    "kind": {k: v for k, v in flat.items() if not k.startswith(_NOT_THE_METHOD)},
                    "data": results.data,
                    "seed": own.seed,
                    "row": results.row,
                    "curve": read_metrics(folder, student),
                }
            )
    if len(described) < 2:
        raise InputError(
            "runs: give at least two runs, as --config.runs=\"('runs/a', 'runs/b')\", or one run "
            "with several students"
        )
    for task in sorted(_on_different_data([entry["data"] for entry in described])):
        for entry in described:
            entry["kind"][f"evaluation.data.{task}"] = entry["data"].get(task, "none")[:8]
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
    page = comparison_page(workdir)
    make_workdir(page.parent)
    with holding(page.parent), writing(workdir):
        write_text(comparison_file(workdir), json.dumps(content, indent=2) + "\n")
        write_comparison(page, text, curves)
    print(format_text(text))


# Prefixes of keys that may differ between runs in the same row.
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
    """Returns a name for each run: method, models, and the keys in which the runs differ."""
    shown = ("method.name", "teacher.model", "student.model")
    keys = sorted(set().union(*kinds) - set(shown))
    differing = [
        key
        for key in keys
        if len({repr(kind.get(key)) for kind in kinds if _states(kind, key)}) > 1
    ]
    names = []
    for kind in kinds:
        method, teacher, student = (kind[key] for key in shown)
        own = ", ".join(f"{key}={kind.get(key)}" for key in differing if _states(kind, key))
        names.append(f"{method} {teacher} -> {student}" + (f" ({own})" if own else ""))
    return names


_KNOWN = "known settings"


def _states(kind: dict[str, Any], key: str) -> bool:
    """Returns False for a key of an evaluation whose settings are unknown."""
    return kind["evaluation"] == _KNOWN or not key.startswith("evaluation.")


def _evaluation(results: Results, file: epath.Path) -> dict[str, Any]:
    """Returns the keys and values that must be equal in evaluations that are averaged.

    Results without recorded settings are never averaged with others.
    """
    if results.version is None:
        LOG.warning("%s does not record its settings; run the job evaluate again", file)
        return {"evaluation": f"unknown settings: {file.parent}"}
    found = {"version": results.version, "step": results.step} | results.settings
    return {"evaluation": _KNOWN} | {f"evaluation.{k}": v for k, v in found.items()}


def _on_different_data(data: list[dict[str, str]]) -> set[str]:
    """Returns the tasks that were evaluated on different data in different runs."""
    pairs = {pair for of_one in data for pair in of_one.items()}
    tasks = collections.Counter(task for task, _ in pairs)
    return {task for task, digests in tasks.items() if digests > 1}


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
