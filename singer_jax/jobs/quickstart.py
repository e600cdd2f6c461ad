"""Job `quickstart`: trains, distils and evaluates small models on embedded digits.

It trains a teacher with a synthetic artifact, distils it with several methods in one run, evaluates
teacher, untrained student and all students with the same protocol, prints one table and saves
pictures. Finished parts are not repeated.
"""

from __future__ import annotations

import dataclasses
import json

import jax
import numpy as np
from etils import epath

from singer_jax.data.images import EvalTransform, open_image
from singer_jax.data.registry import open_source
from singer_jax.data.sources import TEST, TRAIN, Source, Subset
from singer_jax.evaluation.backbone import Backbone, load_backbone
from singer_jax.evaluation.measure import Split, probe_task
from singer_jax.evaluation.patches import cosine_to_teacher, linear_map, norm_ratio, patch_tokens
from singer_jax.evaluation.probe import ProbeSettings
from singer_jax.io.files import make_workdir, write_text
from singer_jax.jobs.distill import distill
from singer_jax.platform import parallel
from singer_jax.report.collect import collect
from singer_jax.report.page import write_page
from singer_jax.report.pictures import save_norm_maps, save_patch_maps
from singer_jax.runs.checkpoints import step_to_read
from singer_jax.runs.lock import holding
from singer_jax.runs.metrics import LOG
from singer_jax.runs.workdir import report_page, results_file
from singer_jax.settings.ranges import OneOf
from singer_jax.settings.settings import Settings, section, setting
from singer_jax.training.settings import DistillSettings
from singer_jax.training.setup import setup_students

_SHOWN = 8  # number of test images in each model's picture
_IN_A_PICTURE = 2  # number of test images in the picture of all models
_FITTED = 512  # number of training images to fit the map to the teacher's features


@dataclasses.dataclass(frozen=True)
class QuickstartSettings(Settings):
    """Settings of the job `quickstart`: two runs, and the probe that evaluates their models."""

    job: str = setting("quickstart", OneOf(("quickstart",)), "Name of the command.")
    teacher: DistillSettings = section(DistillSettings())
    distilled: DistillSettings = section(DistillSettings())
    probe: ProbeSettings = section(ProbeSettings())


def quickstart(settings: QuickstartSettings, workdir: epath.Path) -> None:
    """Runs the quickstart as configs/quickstart.py describes it; raises as `distill`.

    Args:
      settings: settings of both runs and of the probe.
      workdir: folder for one subfolder per run, results.json and report/.
    """
    if jax.process_index() == 0:
        make_workdir(workdir)
    with holding(workdir, jax.process_index() == 0):
        _run_all(settings, workdir)


def _run_all(settings: QuickstartSettings, workdir: epath.Path) -> None:
    weights = dataclasses.replace(settings.distilled.teacher, weights=str(workdir / "teacher"))
    distilled = dataclasses.replace(settings.distilled, teacher=weights)
    for name, run in (("teacher", settings.teacher), ("distilled", distilled)):
        LOG.info("training: %s (%s)", name, workdir / name)
        distill(run, workdir / name)

    mesh, students = parallel.make_mesh(), str(workdir / "distilled")
    backbones = {
        "teacher": load_backbone(mesh, run=str(workdir / "teacher")),
        "student, untrained": _untrained(distilled),
    }
    for name in distilled.students.named:
        backbones[f"student, {name}"] = load_backbone(mesh, run=students, student=name)
    LOG.info("evaluating teacher and students (linear probe, kNN)")
    data = distilled.data
    train, test = (open_source(data, split) for split in (TRAIN, TEST))
    fitted = Subset(train, np.arange(_FITTED))
    teacher_fitted, teacher_test = (
        patch_tokens(backbones["teacher"], source) for source in (fitted, test)
    )
    pixels = _pixels(test, backbones["teacher"].image_size)
    results, page = {}, report_page(workdir)
    for name, backbone in backbones.items():
        split = Split(train, test)
        _, scores = probe_task(backbone, "classification", split, settings.probe, distilled.seed)
        tokens = patch_tokens(backbone, test)
        results[name] = {
            "linear_top1": scores["top1"],
            "knn_top1": scores["knn_top1"],
            "norm_p99_over_median": norm_ratio(tokens),
        }
        mapping = linear_map(patch_tokens(backbone, fitted), teacher_fitted)
        cosine = cosine_to_teacher(tokens, teacher_test, mapping)
        shape = (-1, *backbone.network.spec.arch.grid)
        save_patch_maps(
            page.parent / f"{name.replace(', ', '_').lower()}.png",
            name,
            pixels,
            np.linalg.norm(tokens[:_SHOWN], axis=-1).reshape(shape),
            None if name == "teacher" else cosine[:_SHOWN].reshape(shape),
        )
    write_text(results_file(workdir), json.dumps(results, indent=2) + "\n")
    columns = {name: _columns(row) for name, row in results.items()}
    run = workdir / "distilled"
    names = [f"student, {name}" for name in distilled.students.named]
    trained = {name: backbones[name] for name in names}
    report = collect(run, distilled, step_to_read(run), trained, _SHOWN)
    write_page(page, dataclasses.replace(report, results=columns))
    maps = {
        model.name: np.linalg.norm(model.tokens[:_IN_A_PICTURE], axis=-1).reshape(-1, *model.grid)
        for model in report.models
    }
    save_norm_maps(page.parent / "artifacts.png", report.images[:_IN_A_PICTURE], maps)
    print(_table(results))
    print(f"Pictures: {page.parent} (artifacts.png compares all models). Report: {page}")


def _untrained(settings: DistillSettings) -> Backbone:
    """Returns a student before its first step; all students start from the same weights."""
    source = open_source(settings.data, TRAIN)
    run = setup_students(settings, len(source), source.num_classes).any
    return Backbone(run.distillation.student, run.init_student(), run.mesh)


def _pixels(source: Source, size: int) -> np.ndarray:
    transform = EvalTransform(size)
    return np.stack([transform(open_image(source[index].image)) for index in range(_SHOWN)])


def _columns(row: dict[str, float]) -> dict[str, float]:
    return {
        "linear top-1": row["linear_top1"],
        "kNN top-1": row["knn_top1"],
        "norm p99/median": row["norm_p99_over_median"],
    }


def _table(results: dict[str, dict[str, float]]) -> str:
    lines = [f"{'':22}{'linear top-1':>14}{'kNN top-1':>12}{'norm p99/median':>18}"]
    for name, row in results.items():
        lines.append(
            f"{name:22}{row['linear_top1']:>12.1f} %{row['knn_top1']:>10.1f} %"
            f"{row['norm_p99_over_median']:>18.2f}"
        )
    return "\n".join(lines)
