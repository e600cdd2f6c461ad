"""Job `study`: compares methods and artifact removal on teachers with synthetic artifacts.

A base teacher is trained. Each teacher of the study is the base, fine-tuned with its own kind of
artifact (`models.synthetic_outlier`), or the model of the section `given`. A cell is one run: all
its students learn from one teacher, with one seed. All teachers have their first seed before any
has its second; the variants and the runs with artifact removal follow. The measures of a cell are
appended to results.jsonl before the next cell starts. The same command resumes after the last
finished cell.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from singer_jax.data.checking import readable
from singer_jax.data.registry import open_source
from singer_jax.data.sources import TEST, TRAIN, Subset
from singer_jax.errors import InputError, StudentsStopped, listed
from singer_jax.evaluation.artifacts import outlier_length
from singer_jax.evaluation.backbone import Backbone, ModelSelection, load_backbone, load_teacher
from singer_jax.evaluation.null_spaces import collect_patches
from singer_jax.evaluation.scene_measures import LabelledImages, StudyMeasures, tokens_of
from singer_jax.io.files import make_workdir, write_text
from singer_jax.io.limits import read_object, read_text
from singer_jax.jobs.distill import distill
from singer_jax.methods import nullspace
from singer_jax.methods.base import teacher_layers
from singer_jax.methods.singer import DEPTHS
from singer_jax.models.architecture import CLEANERS, PLACES, Architecture
from singer_jax.models.export_timm import export_timm
from singer_jax.models.network import ModelSettings
from singer_jax.models.weights import to_timm
from singer_jax.models.zoo import lookup
from singer_jax.platform import parallel
from singer_jax.report.collect import restore, trained_singers
from singer_jax.runs.checkpoints import Checkpoints
from singer_jax.runs.lock import holding
from singer_jax.runs.metrics import LOG
from singer_jax.runs.workdir import export_folder
from singer_jax.settings.ranges import COUNT, NAME, Each, OneOf, Text, optional
from singer_jax.settings.settings import Settings, flatten, section, setting, to_dict
from singer_jax.training.restore import restore_states
from singer_jax.training.settings import DistillSettings, StudentsSettings
from singer_jax.training.setup import RunSetup

UNTRAINED = "untrained"  # name of the student before its first step in the results
DIRECTIONS = ("random", "null", "visible")
NONE, GIVEN = "none", "given"  # teachers without a synthetic artifact
TEACHER = Text(
    f"{NONE}|{GIVEN}|({'|'.join(DIRECTIONS)})-({'|'.join(PLACES)})-[1-9][0-9]*(\\.[0-9]+)?",
    "none, given, or direction-place-ratio such as null-background-20",
)

# Number of training images to measure the norms that scale a synthetic outlier.
_SCALED_ON = 256

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class StudySettings(Settings):
    """Settings of the job `study`."""

    job: str = setting("study", OneOf(("study",)), "Name of the command.")
    base: DistillSettings = section(DistillSettings())
    tuned: DistillSettings = section(DistillSettings())
    distilled: DistillSettings = section(DistillSettings())
    teachers: tuple[str, ...] = setting(
        ("none",),
        Each(TEACHER, least=1),
        "Teachers, each as direction-place-ratio of its synthetic outlier. The direction is "
        "random, or the most null or most visible one of the first distilled layer. The ratio is "
        "the norm of an affected patch over the median. `none`: fine-tuned without a vector; "
        "`given`: the model of the section `given`, not trained.",
    )
    given: ModelSettings = section(ModelSettings())
    patches: int = setting(2, COUNT, "Number of patches per image with the synthetic outlier.")
    seeds: int = setting(5, COUNT, "Number of seeds of the students in `main`.")
    main: tuple[str, ...] = setting((), Each(NAME), "Names of students that every teacher trains.")
    variant_seeds: int = setting(2, COUNT, "Number of seeds of the other students.")
    variants_on: tuple[str, ...] = setting(
        (), Each(NAME), "Teachers of the other students, and of the runs with artifact removal."
    )
    cleaners: tuple[str, ...] = setting(
        (),
        Each(OneOf(CLEANERS)),
        "Values of `teacher.artifact_removal` of further runs, for teachers with artifacts.",
    )
    cleaned: tuple[str, ...] = setting((), Each(NAME), "Students of runs with artifact removal.")
    images: int = setting(2000, COUNT, "Number of training images to fit the measures on.")
    tested: int | None = setting(
        None, optional(COUNT), "Number of test images, evenly spaced. None: all."
    )


class Cell(NamedTuple):
    """One run of the study.

    Attributes:
      teacher: name of the teacher.
      clean: artifact removal applied to the teacher; empty: none.
      seed: seed of the run.
      students: names of the students; if empty, the teacher itself is evaluated.
      variants: True if these are the students that are not in `main`.
    """

    teacher: str
    clean: str
    seed: int
    students: tuple[str, ...]
    variants: bool = False

    @property
    def name(self) -> str:
        """Name of the cell's folder."""
        return f"{'variants' if self.variants else self.clean or 'plain'}_{self.seed}"


def study(settings: StudySettings, workdir: epath.Path) -> None:
    """Trains, distils and evaluates the cells that are not in results.jsonl yet.

    Args:
      settings: settings of the study.
      workdir: folder for one subfolder per run, and results.jsonl.

    Raises:
      InputError: a student or teacher is unknown, several processes run, or the folder holds
        results of other settings; also as `distill`.
    """
    left = cells(settings)
    make_workdir(workdir)
    with holding(workdir):
        _run_cells(settings, workdir, left)


def _run_cells(settings: StudySettings, workdir: epath.Path, left: Sequence[Cell]) -> None:
    _check_same_study(settings, workdir)
    results = Results(workdir / "results.jsonl")
    images: dict[int, tuple[LabelledImages, LabelledImages]] = {}
    of_teacher: dict[str, StudyMeasures] = {}
    for cell in left:
        if results.holds(cell):
            continue
        teacher, folder = cell.teacher, workdir / cell.teacher
        if teacher not in of_teacher:
            backbone = _teacher(settings, teacher, workdir / "base", folder)
            size = backbone.image_size
            if size not in images:
                images[size] = _images(settings, size)
            of_teacher[teacher] = StudyMeasures(
                backbone, *images[size], singer_layers(backbone.arch)
            )
        measures = of_teacher[teacher]
        known = {"teacher": teacher, "clean": cell.clean, "seed": cell.seed}
        if not cell.students:
            results.add([known | {"student": ""} | measures.of_teacher()])
            continue
        run = distillation(settings, cell, folder / "teacher")
        lost: Mapping[str, str] = {}
        try:
            _run(run, folder / cell.name)
        except StudentsStopped as error:
            lost = error.students
        rows = {name: {"stopped": why} for name, why in lost.items()}
        done = [name for name in cell.students if name not in lost]
        if done:
            untrained = not (cell.clean or cell.variants)
            rows |= measured(measures, run, folder / cell.name, done, untrained)
        results.add([known | {"student": name} | row for name, row in rows.items()])
    print(f"{workdir / 'results.jsonl'}: {len(results.rows)} rows")


def _images(settings: StudySettings, size: int) -> tuple[LabelledImages, LabelledImages]:
    """Returns the training and test images of the measures, at a size in pixels."""
    data = settings.distilled.data
    train = LabelledImages.read(data, size, TRAIN, settings.images)
    return train, LabelledImages.read(data, size, TEST, settings.tested)


def cells(settings: StudySettings) -> list[Cell]:
    """Returns all cells of a study in the order of their computation.

    Raises:
      InputError: as `study`.
    """
    if jax.process_count() > 1:
        raise InputError("study: runs in one process only; start a single process")
    known = settings.distilled.students.named
    for key, names, allowed in (
        ("main", settings.main, known),
        ("cleaned", settings.cleaned, known),
        ("variants_on", settings.variants_on, settings.teachers),
    ):
        for name in names:
            if name not in allowed:
                raise InputError(f"{key}: unknown name {name!r}; allowed: {listed(allowed)}")
    for name in known:
        if name == UNTRAINED:
            raise InputError(f"distilled.students.{name}: the name of the untrained student")
    for teacher in settings.teachers:
        if teacher not in (NONE, GIVEN) and float(teacher.split("-")[2]) <= 1:
            raise InputError(f"teachers: {teacher} has a ratio of at most 1; give one above 1")
    if GIVEN in settings.teachers and not settings.given.weights:
        raise InputError("given.weights: missing, but teachers has `given`; give its weights")
    if set(settings.teachers) - {NONE, GIVEN}:
        _check_outliers(settings)
    variants = tuple(name for name in known if name not in settings.main)
    outlier = settings.distilled.teacher.registers.outlier
    found = []
    for seed, teacher in itertools.product(range(settings.seeds), settings.teachers):
        found += [Cell(teacher, "", 0, ())] if not seed else []
        found += [Cell(teacher, "", seed, settings.main)] if settings.main else []
    for seed, teacher in itertools.product(range(settings.seeds), settings.variants_on):
        if variants and seed < settings.variant_seeds:
            found.append(Cell(teacher, "", seed, variants, variants=True))
        if settings.cleaned:
            found += [
                Cell(teacher, clean, seed, settings.cleaned)
                for clean in settings.cleaners
                if _cleans(clean, teacher, outlier)
            ]
    return found


def _check_outliers(settings: StudySettings) -> None:
    """Raises `InputError` if too many patches are outliers, or an outlier quantile is too high."""
    student = settings.tuned.student
    patches = lookup(student.model, dict(student.overrides)).arch.num_patches
    if settings.patches >= patches:
        raise InputError(f"patches: {settings.patches}, but an image has {patches}; give fewer")
    most = 1 - (settings.patches + 1) / patches
    for name, own in settings.distilled.each().items():
        quantile = getattr(own.method, "outlier_quantile", 0)
        if quantile > most:
            raise InputError(
                f"distilled.students.{name}.method.outlier_quantile: {quantile:g}; with "
                f"{settings.patches} of {patches} patches are outliers, give at most {most:.3g}"
            )


def _cleans(clean: str, teacher: str, outlier: float) -> bool:
    """Returns True if a cleaner applies; registers need patches above `outlier` medians."""
    if teacher in (NONE, GIVEN):
        return teacher == GIVEN and clean != "synthetic_outlier"
    return clean != "registers" or float(teacher.split("-")[2]) > outlier


# Keys that may change between starts: they add runs and do not change finished ones.
_GROWING = ("teachers", "seeds", "cleaners")


def _check_same_study(settings: StudySettings, workdir: epath.Path) -> None:
    """Writes study.json; raises `InputError` if it exists with other settings."""
    own, path = flatten(to_dict(settings)), workdir / "study.json"
    if path.exists():
        saved = flatten(read_object(path))
        for key in sorted(own.keys() | saved.keys()):
            if own.get(key) != saved.get(key) and key not in _GROWING:
                raise InputError(
                    f"{key}: {own.get(key)!r}, but {workdir} holds results with "
                    f"{saved.get(key)!r}; take another --workdir"
                )
    write_text(path, json.dumps(to_dict(settings), indent=2) + "\n")


class Results:
    """Rows of a study, in a file of JSON lines that is replaced atomically.

    Args:
      path: path of the file.
    """

    def __init__(self, path: epath.Path) -> None:
        self.path = path
        text = read_text(path) if path.exists() else ""
        self.rows: list[Row] = [json.loads(line) for line in text.splitlines()]

    def holds(self, cell: Cell) -> bool:
        """Returns True if a cell was evaluated; all rows of a cell are added at once."""
        key = (cell.teacher, cell.clean, cell.seed)
        of_cell = {
            row["student"]
            for row in self.rows
            if (row["teacher"], row["clean"], row["seed"]) == key
        }
        return set(cell.students or ("",)) <= of_cell

    def add(self, rows: Sequence[Row]) -> None:
        """Appends the rows of a cell."""
        self.rows += rows
        write_text(self.path, "".join(json.dumps(row) + "\n" for row in self.rows))


def _teacher(
    settings: StudySettings, teacher: str, base: epath.Path, folder: epath.Path
) -> Backbone:
    """Trains a teacher unless it is given or finished, and returns it."""
    mesh = parallel.make_mesh(1)
    if teacher == GIVEN:
        return load_teacher(mesh, settings.given)
    _run(settings.base, base)
    tuned = with_outlier(settings.tuned, settings.patches, teacher, base, folder / "outlier")
    _run(tuned, folder / "teacher")
    return load_backbone(mesh, ModelSelection(run=str(folder / "teacher")))


def with_outlier(
    run: DistillSettings, patches: int, teacher: str, base: epath.Path, folder: epath.Path
) -> DistillSettings:
    """Writes a base's weights with a teacher's synthetic outlier, and returns the fine-tuning run.

    Args:
      run: settings of the fine-tuning, whose model and weights are replaced.
      patches: number of patches per image with the synthetic outlier.
      teacher: name of the teacher, which states the artifact.
      base: work directory of the base.
      folder: folder for the weights.
    """
    student = dataclasses.replace(run.student, weights=str(base))
    if teacher == NONE:
        return dataclasses.replace(run, student=student)
    direction, place, ratio = teacher.split("-")
    backbone = load_backbone(parallel.make_mesh(1), ModelSelection(run=str(base)))
    layers = singer_layers(backbone.arch)
    fields = {
        "synthetic_outlier": place,
        "synthetic_outlier_after": layers[0],
        "synthetic_outlier_patches": patches,
    }
    source = open_source(run.data, TRAIN)
    few = readable(Subset(source, np.arange(min(_SCALED_ON, len(source)))))
    of_layers, _ = collect_patches(backbone.network, backbone.params, backbone.mesh, few, layers)
    medians = [np.median(np.linalg.norm(tokens, axis=-1)) for tokens in of_layers.values()]
    unit = _direction(backbone.network.merge(backbone.params), layers[0], direction)
    vector = unit * outlier_length(np.array(medians), float(ratio))
    spec = backbone.network.spec
    changed = dataclasses.replace(spec, arch=dataclasses.replace(spec.arch, **fields))
    tensors = to_timm(backbone.params) | {"planted.vector": vector.astype(np.float32)}
    export_timm(folder, changed, tensors)
    overrides = dict(student.overrides) | fields
    student = dataclasses.replace(student, weights=str(folder), overrides=overrides)
    return dataclasses.replace(run, student=student)


def _direction(model: Any, layer: int, name: str) -> np.ndarray:
    """Returns a unit vector; `null` and `visible` are those of the next block's linear map."""
    if name == "random":
        drawn = np.random.default_rng(0).standard_normal(model.arch.embed_dim)
        return drawn / np.linalg.norm(drawn)
    vectors = np.asarray(nullspace.of_layer(model, layer, "mlp").vectors)
    return vectors[:, -1 if name == "null" else 0]


def distillation(settings: StudySettings, cell: Cell, teacher: epath.Path) -> DistillSettings:
    """Returns the run of a cell.

    Args:
      settings: settings of the study.
      cell: the cell.
      teacher: work directory of the teacher's run; unused for the teacher `given`.
    """
    run, model = settings.distilled, settings.given
    if cell.teacher != GIVEN:
        model = ModelSettings(weights=str(teacher))
    of_teacher = dataclasses.replace(
        run.teacher, **vars(model), artifact_removal=cell.clean or None
    )
    named = {
        name: dataclasses.replace(run.students.named[name], seed=cell.seed)
        for name in cell.students
    }
    students = StudentsSettings(named, run.students.execution)
    return dataclasses.replace(run, seed=cell.seed, teacher=of_teacher, students=students)


def measured(
    measures: StudyMeasures,
    run: DistillSettings,
    folder: epath.Path,
    students: Sequence[str],
    untrained: bool = True,
) -> dict[str, Row]:
    """Returns the measures of students of a run by name.

    `removed_over_steps` of a refiner lists the steps of the checkpoints, and the share of the
    synthetic outlier's energy that it removes at each.

    Args:
      measures: measures of the run's teacher before artifact removal.
      run: settings of the run.
      folder: work directory of the finished run.
      students: names of the students.
      untrained: True to measure the student before its first step, too.
    """
    teacher, layer = measures.teacher, measures.first
    prepared, states, taught, _ = restore(folder, run)
    singers, cleaned = trained_singers(prepared, states), None
    if run.teacher.artifact_removal:
        cleaner = Backbone(prepared.teacher_model.network, taught, prepared.any.mesh)
        cleaned = tokens_of(cleaner, measures.test, [layer])[layer]
    rows, each = {}, run.each()
    if untrained:
        student = prepared.any
        first = Backbone(student.distillation.student, student.init_student(), student.mesh)
        rows[UNTRAINED] = measures.of_student(first)
    for name in students:
        student = load_backbone(
            teacher.mesh, ModelSelection(weights=str(export_folder(folder, name)))
        )
        rows[name] = measures.of_student(student)
        clip = getattr(getattr(each[name].method, "match", None), "norm_clip_quantile", 1)
        if cleaned is not None:
            rows[name] |= measures.of_target(cleaned)
            if run.teacher.artifact_removal == "registers":  # registers change the next block
                del rows[name]["next_block_changed"]
        elif name in singers:
            rows[name] |= measures.of_target(measures.refined(singers[name].refiner[str(layer)]))
        elif clip < 1:
            rows[name] |= measures.of_target(measures.clipped(clip))
    if singers and cleaned is None and measures.marked.any():
        for name, shares in _removed_over_steps(measures, prepared, folder).items():
            if name in rows:
                rows[name]["removed_over_steps"] = shares
    return rows


def _removed_over_steps(
    measures: StudyMeasures, prepared: RunSetup, folder: epath.Path
) -> dict[str, list[tuple[int, float | None]]]:
    """Returns each refiner's removed share at the steps of the checkpoints, by student."""
    found: dict[str, list[tuple[int, float | None]]] = {}
    with contextlib.closing(Checkpoints(folder, read_only=True)) as checkpoints:
        for step in sorted(checkpoints.manager.all_steps()):
            states = restore_states(checkpoints, step, prepared.states)
            for name, singer in trained_singers(prepared, states).items():
                refined = measures.refined(singer.refiner[str(measures.first)])
                found.setdefault(name, []).append((step, measures.removed_share(refined)))
    return found


def singer_layers(teacher: Architecture) -> tuple[int, ...]:
    """Returns the distilled blocks that SiNGER chooses by default."""
    return teacher_layers(None, True, DEPTHS, teacher)


def _run(settings: DistillSettings, folder: epath.Path) -> None:
    LOG.info("training: %s", folder)
    distill(settings, folder)
