"""The job `report`: the page of a run."""

from __future__ import annotations

import contextlib
import dataclasses

import jax
from etils import epath

from singer_jax.errors import InputError
from singer_jax.evaluation import table1
from singer_jax.io.files import as_path, make_workdir
from singer_jax.io.limits import read_object
from singer_jax.report.collect import collect
from singer_jax.report.page import write_page
from singer_jax.runs.checkpoints import Checkpoints
from singer_jax.runs.lock import holding
from singer_jax.runs.telemetry import LOG
from singer_jax.settings.ranges import COUNT, NAME, TEXT, Each, OneOf
from singer_jax.settings.settings import Settings, setting, to_dict
from singer_jax.training.settings import DistillSettings, of_saved


@dataclasses.dataclass(frozen=True)
class ReportSettings(Settings):
    """Which run, and what is shown."""

    job: str = setting("report", OneOf(("report",)), "the command")
    run: str = setting("", TEXT, "a work directory; empty: --workdir itself")
    baselines: tuple[str, ...] = setting(
        (), Each(NAME), "other runs, whose students are shown beside"
    )
    images: int = setting(6, COUNT, "how many are shown")


def report(settings: ReportSettings, workdir: epath.Path) -> None:
    """Writes `report/index.html` below the work directory.

    Args:
      settings: which run, and what is shown.
      workdir: of the page; without `run` also the run itself.

    Raises:
      InputError: not a run, or one without a finished checkpoint.
    """
    run = as_path(settings.run) if settings.run else workdir
    its_settings = read_settings(run)
    baselines = {}
    for folder in map(as_path, settings.baselines):
        for name, own in read_settings(folder).each().items():
            baselines[f"student, {name or own.method_name} ({folder.name})"] = folder, name
    rows, note = results_of(run, its_settings)
    folder, first = workdir / "report", jax.process_index() == 0
    if first:
        make_workdir(folder)
    with holding(folder, first):
        found = collect(run, its_settings, baselines, settings.images, rows, note)
        if first:
            write_page(folder / "index.html", found)
            LOG.info("%s written", folder / "index.html")


def read_settings(run: epath.Path) -> DistillSettings:
    """The settings of a run, without the students that went wrong, which are named.

    Raises:
      InputError: the folder is not a run.
    """
    file = run / "config.json"
    if not file.is_file():
        raise InputError(f"run: {run} is not the work directory of a run: no config.json")
    try:
        saved = read_object(file)
    except InputError as error:
        raise InputError(f"run: {error}; start the run again, which writes it") from error
    settings = of_saved(saved)
    students = settings.students
    if not students.named or not (run / "checkpoints").is_dir():
        return settings
    with contextlib.closing(Checkpoints(run, read_only=True)) as checkpoints:
        step = checkpoints.latest_step()
        stopped = checkpoints.meta(step).get("stopped", {}) if step else {}
    for name, how in stopped.items():
        LOG.warning("%s: student %s is left out: %s", run, name, how)
    named = {name: one for name, one in students.named.items() if name not in stopped}
    return dataclasses.replace(settings, students=dataclasses.replace(students, named=named))


def results_of(
    run: epath.Path, settings: DistillSettings
) -> tuple[dict[str, dict[str, float | None]], str]:
    """Rows of the results table, published ones beside, and a note.

    From RUN/evaluation/results.json; of several students RUN/evaluation/NAME/results.json.
    """
    rows: dict[str, dict[str, float | None]] = {}
    note = ""
    for name, own in settings.each().items():
        found, its_note = results_of_student(run, name, own)
        rows |= {
            f"{name}, {row}" if row == MEASURED and name else row: of for row, of in found.items()
        }
        note = note or its_note
    return rows, note


MEASURED = "measured here"


def results_of_student(
    run: epath.Path, name: str, settings: DistillSettings
) -> tuple[dict[str, dict[str, float | None]], str]:
    """`results_of` one student.

    Args:
      run: the work directory.
      name: of the student; empty where it is the only one.
      settings: of its own run.
    """
    folder = run / "evaluation" / name if name else run / "evaluation"
    file = folder / "results.json"
    rows: dict[str, dict[str, float | None]] = {}
    note = ""
    if file.is_file():
        rows[MEASURED] = _measured(file)
    paper = table1.published(to_dict(settings), "")
    if paper:
        rows[f"published: {paper[0]}"] = paper[1]
        note = table1.NOTE
    return rows, note


def _measured(file: epath.Path) -> dict[str, float]:
    content = read_object(file)
    try:
        measured = {k: v for k, v in content["table1"].items() if v is not None}
        measured |= {
            f"{task} {metric}": metrics[metric]
            for task, metrics in content["tasks"].items()
            for metric in ("top1", "knn_top1", "miou", "rmse")
            if metric in metrics
        }
    except (AttributeError, KeyError, TypeError) as error:
        raise InputError(f"{file} is not the results of the job evaluate: {error!r}") from error
    wrong = next((k for k, v in measured.items() if not isinstance(v, int | float)), None)
    if wrong is not None:
        raise InputError(f"{file}: {wrong} is no number")
    return measured
