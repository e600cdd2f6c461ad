"""Job `quickstart`: trains, distils and evaluates small models on embedded digits.

It trains a teacher, fine-tunes it with a synthetic artifact, distils it with several methods in one
run, evaluates teacher, untrained student and all students with the measures of a study, prints one
table and saves a picture and a report. Finished parts are not repeated.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from singer_jax.data.sources import TEST, TRAIN
from singer_jax.evaluation.backbone import Backbone, load_backbone
from singer_jax.evaluation.scene_measures import LabelledImages, StudyMeasures
from singer_jax.io.files import make_workdir, write_text
from singer_jax.jobs.distill import distill
from singer_jax.jobs.study import TEACHER, Row, measured, singer_layers, with_outlier
from singer_jax.platform import parallel
from singer_jax.report.collect import collect
from singer_jax.report.page import write_page
from singer_jax.report.pictures import save_norm_maps
from singer_jax.runs.checkpoints import step_to_read
from singer_jax.runs.lock import holding
from singer_jax.runs.metrics import LOG
from singer_jax.runs.workdir import report_page, results_file
from singer_jax.settings.ranges import COUNT, OneOf, optional
from singer_jax.settings.settings import Settings, section, setting
from singer_jax.training.settings import DistillSettings

_SHOWN = 8  # number of test images in the report
_IN_A_PICTURE = 2  # number of test images in the picture of all models
# Heading and digits of the printed measures.
_COLUMNS = {
    "linear_top1": ("linear top-1, %", 1),
    "knn_top1": ("kNN top-1, %", 1),
    "norm_ratio": ("norm p99/median", 2),
    "cosine_to_clean_marked": ("cosine, marked", 3),
    "cosine_to_clean_others": ("cosine, others", 3),
    "removed_share": ("energy removed", 2),
}


@dataclasses.dataclass(frozen=True)
class QuickstartSettings(Settings):
    """Settings of the job `quickstart`: its runs, and the artifact of the teacher."""

    job: str = setting("quickstart", OneOf(("quickstart",)), "Name of the command.")
    base: DistillSettings = section(DistillSettings())
    artifact: str | None = setting(
        None,
        optional(TEACHER),
        "Synthetic outlier that the run `base` is fine-tuned with in the run `teacher`, as in the "
        "key `teachers` of a study. None: the run `teacher` alone, with its own model.",
    )
    patches: int = setting(1, COUNT, "Number of patches per image with the synthetic outlier.")
    teacher: DistillSettings = section(DistillSettings())
    distilled: DistillSettings = section(DistillSettings())


def quickstart(settings: QuickstartSettings, workdir: epath.Path) -> None:
    """Runs the quickstart as configs/quickstart.py describes it; raises as `distill`.

    Args:
      settings: settings of the runs.
      workdir: folder for one subfolder per run, results.json and report/.
    """
    if jax.process_index() == 0:
        make_workdir(workdir)
    with holding(workdir, jax.process_index() == 0):
        _run_all(settings, workdir)


def _run_all(settings: QuickstartSettings, workdir: epath.Path) -> None:
    teacher = settings.teacher
    if settings.artifact:
        _train("base", settings.base, workdir)
        given = settings.patches, settings.artifact, workdir / "base", workdir / "outlier"
        teacher = with_outlier(teacher, *given)
    _train("teacher", teacher, workdir)
    model = teacher.student
    weights = dataclasses.replace(
        settings.distilled.teacher,
        model=model.model,
        overrides=model.overrides,
        weights=str(workdir / "teacher"),
    )
    distilled = dataclasses.replace(settings.distilled, teacher=weights)
    _train("distilled", distilled, workdir)

    LOG.info("evaluating teacher and students (linear probe, kNN)")
    mesh, run = parallel.make_mesh(1), workdir / "distilled"
    backbone = load_backbone(mesh, run=str(workdir / "teacher"))
    train, test = (
        LabelledImages.read(distilled.data, backbone.image_size, split) for split in (TRAIN, TEST)
    )
    measures = StudyMeasures(backbone, train, test, singer_layers(backbone.arch))
    names = tuple(distilled.students.named)
    results = {"teacher": measures.of_teacher()}
    results |= measured(measures, distilled, run, names)
    write_text(results_file(workdir), json.dumps(results, indent=2) + "\n")

    page = report_page(workdir)
    trained = {f"student, {name}": _student(mesh, run, name) for name in names}
    report = collect(run, distilled, step_to_read(run), trained, _SHOWN)
    write_page(page, dataclasses.replace(report, results=_columns(results)))
    maps = {
        model.name: np.linalg.norm(model.tokens[:_IN_A_PICTURE], axis=-1).reshape(-1, *model.grid)
        for model in report.models
    }
    save_norm_maps(page.parent / "artifacts.png", report.images[:_IN_A_PICTURE], maps)
    print(_table(results))
    print(f"Pictures: {page.parent / 'artifacts.png'}. Report: {page}")


def _student(mesh: Mesh, run: epath.Path, name: str) -> Backbone:
    return load_backbone(mesh, run=str(run), student=name)


def _train(name: str, run: DistillSettings, workdir: epath.Path) -> None:
    LOG.info("training: %s (%s)", name, workdir / name)
    distill(run, workdir / name)


def _columns(results: Mapping[str, Row]) -> dict[str, dict[str, float | None]]:
    """Returns the shown columns of each row; None for a measure that a row does not have."""
    return {
        name: {title: row.get(key) for key, (title, _) in _COLUMNS.items()}
        for name, row in results.items()
    }


def _table(results: Mapping[str, Row]) -> str:
    lines = [f"{'':14}" + "".join(f"{title:>18}" for title, _ in _COLUMNS.values())]
    for name, row in results.items():
        cells = (
            "" if row.get(key) is None else f"{row[key]:.{digits}f}"
            for key, (_, digits) in _COLUMNS.items()
        )
        lines.append(f"{name:14}" + "".join(f"{cell:>18}" for cell in cells))
    return "\n".join(lines)
