"""The job `report`: the page of a run."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
from etils import epath

from singer_jax.evaluation import table1
from singer_jax.evaluation.backbone import Backbone, ModelSelection, load_backbone
from singer_jax.evaluation.results import Results, read_results
from singer_jax.io.files import as_path, make_workdir
from singer_jax.platform import parallel
from singer_jax.report.collect import collect
from singer_jax.report.page import write_page
from singer_jax.runs.checkpoints import fingerprint, step_to_read
from singer_jax.runs.lock import holding
from singer_jax.runs.metrics import LOG
from singer_jax.runs.workdir import report_page, student_results_file
from singer_jax.settings.ranges import COUNT, NAME, TEXT, Each, OneOf, optional
from singer_jax.settings.settings import Settings, setting, to_dict
from singer_jax.training.restore import read_config, read_settings
from singer_jax.training.settings import DistillSettings


@dataclasses.dataclass(frozen=True)
class ReportSettings(Settings):
    """Settings of the job `report`."""

    job: str = setting("report", OneOf(("report",)), "Name of the command.")
    run: str = setting("", TEXT, "Work directory of the run. Empty: --workdir.")
    baselines: tuple[str, ...] = setting(
        (), Each(NAME), "Work directories of other runs whose students are shown as well."
    )
    step: int | None = setting(
        None,
        optional(COUNT),
        "Step of the run's checkpoint. None: the newest checkpoint without corruption.",
    )
    images: int = setting(6, COUNT, "Number of images that are shown.")


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
    read_config(run)
    step = step_to_read(run, settings.step)
    its_settings = read_settings(run, step)
    mesh = parallel.make_mesh()
    backbones, shown = {}, {}
    for name, own in its_settings.each().items():
        backbones[name] = load_backbone(mesh, ModelSelection(run=str(run), student=name, step=step))
        shown[f"student, {name or own.method_name}"] = backbones[name]
    for folder in map(as_path, settings.baselines):
        of_baseline = step_to_read(folder)
        for name, own in read_settings(folder, of_baseline).each().items():
            backbone = load_backbone(
                mesh, ModelSelection(run=str(folder), student=name, step=of_baseline)
            )
            shown[f"student, {name or own.method_name} ({folder.name})"] = backbone
    page, first = report_page(workdir), jax.process_index() == 0
    if first:
        make_workdir(page.parent)
    with holding(page.parent, first):
        found = collect(run, its_settings, step, shown, settings.images)
        rows, note = results_of(run, its_settings, backbones)
        if first:
            write_page(page, dataclasses.replace(found, results=rows, note=note))
            LOG.info("%s written", page)


def results_of(
    run: epath.Path, settings: DistillSettings, shown: Mapping[str, Backbone] | None = None
) -> tuple[dict[str, dict[str, float | None]], str]:
    """Returns the rows of the results table, published ones included, and a note.

    The rows are those of RUN/evaluation/results.json; with several students, those of
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
        file = student_results_file(run, name)
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
