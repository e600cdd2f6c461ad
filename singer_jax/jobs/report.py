"""The job `report`: the page of a run."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping

import jax
from etils import epath

from singer_jax.errors import InputError
from singer_jax.evaluation import table1
from singer_jax.evaluation.backbone import Backbone, load_backbone
from singer_jax.evaluation.results import Results, read_results
from singer_jax.io.files import as_path, make_workdir
from singer_jax.io.limits import read_object
from singer_jax.platform import parallel
from singer_jax.report.collect import collect
from singer_jax.report.page import write_page
from singer_jax.runs import verify
from singer_jax.runs.checkpoints import Checkpoints, fingerprint, step_to_read
from singer_jax.runs.lock import holding
from singer_jax.runs.metrics import LOG
from singer_jax.settings.ranges import COUNT, NAME, TEXT, Each, OneOf, optional
from singer_jax.settings.settings import Settings, setting, to_dict
from singer_jax.training.settings import DistillSettings, of_saved


@dataclasses.dataclass(frozen=True)
class ReportSettings(Settings):
    """Settings of the job `report`."""

    job: str = setting("report", OneOf(("report",)), "the command")
    run: str = setting("", TEXT, "work directory of the run; empty: --workdir itself")
    baselines: tuple[str, ...] = setting(
        (), Each(NAME), "work directories of other runs, whose students are shown as well"
    )
    step: int | None = setting(
        None, optional(COUNT), "step of the run's checkpoint; None: the newest without corruption"
    )
    images: int = setting(6, COUNT, "number of images that are shown")


def report(settings: ReportSettings, workdir: epath.Path) -> None:
    """Writes `report/index.html` below the work directory.

    Args:
      settings: which run, and what is shown.
      workdir: the folder of the page; without `run` also the run itself.

    Raises:
      InputError: not a run, or one without a finished checkpoint.
      RunError: no checkpoint of the run is without corruption.
    """
    run = as_path(settings.run) if settings.run else workdir
    _read_config(run)
    step = step_to_read(run, settings.step)
    its_settings = read_settings(run, step)
    mesh = parallel.make_mesh()
    backbones, shown = {}, {}
    for name, own in its_settings.each().items():
        backbones[name] = load_backbone(mesh, run=str(run), student=name, step=step)
        shown[f"student, {name or own.method_name}"] = backbones[name]
    for folder in map(as_path, settings.baselines):
        of_baseline = step_to_read(folder)
        for name, own in read_settings(folder, of_baseline).each().items():
            backbone = load_backbone(mesh, run=str(folder), student=name, step=of_baseline)
            shown[f"student, {name or own.method_name} ({folder.name})"] = backbone
    folder, first = workdir / "report", jax.process_index() == 0
    if first:
        make_workdir(folder)
    with holding(folder, first):
        found = collect(run, its_settings, step, shown, settings.images)
        rows, note = results_of(run, its_settings, backbones)
        if first:
            write_page(folder / "index.html", dataclasses.replace(found, results=rows, note=note))
            LOG.info("%s written", folder / "index.html")


def _read_config(run: epath.Path) -> DistillSettings:
    """Reads the settings of a run; raises `InputError` where there are none."""
    file = run / "config.json"
    if not file.is_file():
        raise InputError(f"run: {run} is not the work directory of a run: no config.json")
    try:
        saved = read_object(file)
    except InputError as error:
        raise InputError(f"run: {error}; start the run again, which writes it") from error
    return of_saved(saved)


def read_settings(run: epath.Path, step: int | None = None) -> DistillSettings:
    """Reads the settings of a run, without the students that stopped with an error.

    Args:
      run: the work directory.
      step: the step of the checkpoint that says which students stopped; None: as
        `Checkpoints.step_to_read`.

    Raises:
      InputError: the folder is not a run.
      RunError: no checkpoint of several students is without corruption.
    """
    settings = _read_config(run)
    students = settings.students
    if not students.named or not verify.finished(run / "checkpoints"):
        return settings
    with contextlib.closing(Checkpoints(run, read_only=True)) as checkpoints:
        stopped = checkpoints.meta(checkpoints.step_to_read(step)).get("stopped", {})
    for name, how in stopped.items():
        LOG.warning("%s: student %s is left out: %s", run, name, how)
    named = {name: one for name, one in students.named.items() if name not in stopped}
    return dataclasses.replace(settings, students=dataclasses.replace(students, named=named))


def results_file(run: epath.Path, student: str) -> epath.Path:
    """Returns where the results of a student lie; its name is empty where it is the only one."""
    folder = run / "evaluation" / student if student else run / "evaluation"
    return folder / "results.json"


def results_of(
    run: epath.Path, settings: DistillSettings, shown: Mapping[str, Backbone] | None = None
) -> tuple[dict[str, dict[str, float | None]], str]:
    """Returns the rows of the results table, published ones included, and a note.

    The rows are those of RUN/evaluation/results.json; of several students, those of
    RUN/evaluation/NAME/results.json. The name of a row says where other weights were measured
    than those that the page shows.

    Args:
      run: the work directory.
      settings: those of the run.
      shown: the students of the page by name.
    """
    rows: dict[str, dict[str, float | None]] = {}
    note = ""
    for name, own in settings.each().items():
        file = results_file(run, name)
        results = read_results(file)
        if results:
            label = _label(results, fingerprint(shown[name].params) if shown else None)
            if label != MEASURED:
                LOG.warning("%s: %s; run the job evaluate again", file, label)
            rows[f"{name}, {label}" if name else label] = results.row
        paper = table1.published(to_dict(own), "")
        if paper:
            rows[f"published: {paper[0]}"] = paper[1]
            note = note or table1.NOTE
    return rows, note


MEASURED = "measured here"


def _label(results: Results, shown: str | None) -> str:
    """Returns the name of a row, which says where the measured student is not the shown one."""
    if results.digest is None:
        return f"{MEASURED}, of an unknown checkpoint with unknown settings"
    if shown in (None, results.digest):
        return MEASURED
    where = "other weights" if results.step is None else f"the student of step {results.step}"
    return f"measured on {where}, not on the one shown"
