"""Contents of a run's report, computed from its checkpoint: tokens, norms, singular values."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import Float, UInt8

from singer_jax.data.checking import readable
from singer_jax.data.images import EvalTransform
from singer_jax.data.loader import eval_batches
from singer_jax.data.registry import open_source
from singer_jax.data.sources import TEST, TRAIN, Source, evenly
from singer_jax.errors import InputError
from singer_jax.evaluation.backbone import Backbone
from singer_jax.evaluation.patches import cosine_to_teacher, linear_map, patch_tokens
from singer_jax.io import limits
from singer_jax.methods.singer import Singer, refine
from singer_jax.methods.weighted_sum import WeightedSum
from singer_jax.models.inference import ImagePass, leave_out
from singer_jax.models.network import ModelSettings
from singer_jax.models.params import Params
from singer_jax.platform import parallel
from singer_jax.runs.checkpoints import Checkpoints
from singer_jax.runs.metrics import read_rows
from singer_jax.runs.workdir import metrics_file
from singer_jax.settings.settings import to_dict
from singer_jax.training.restore import restore_states
from singer_jax.training.settings import DistillSettings
from singer_jax.training.setup import RunSetup, setup_students
from singer_jax.training.step import TrainState

_FITTED = 256  # number of training images to fit the maps to the teacher's features


@dataclasses.dataclass(frozen=True)
class ModelMaps:
    """Patch tokens of one model on the shown images.

    Attributes:
      name: name of the model.
      tokens: patch tokens of the last block.
      grid: rows and columns of patches.
      cosine: cosine similarity of each patch to the teacher's; None for the teacher itself, and if
        the grids differ.
    """

    name: str
    tokens: Float[np.ndarray, "images patches dim"]
    grid: tuple[int, int]
    cosine: Float[np.ndarray, "images patches"] | None


@dataclasses.dataclass(frozen=True)
class LayerNorms:
    """Patch norms of a distilled layer before and after refinement, and its null space.

    `name` states the layer, and the student for which it is refined if there are several.
    """

    name: str
    before: Float[np.ndarray, " patches"]
    after: Float[np.ndarray, " patches"]
    singular_values: Float[np.ndarray, " dim"]
    threshold: float
    null_dim: int


@dataclasses.dataclass(frozen=True)
class Report:
    """Contents of a report page.

    Attributes:
      title: title of the page.
      config: configuration of the run, as nested dicts.
      rows: rows of metrics.jsonl.
      images: pixels as the models saw them.
      models: teacher, refined teachers, students, baselines.
      layers: patch norms of the distilled layers, for methods with refiners.
      results: numbers by row and column name, including published ones.
      note: note below the results.
      summary: what was run: models, method and data, as the user named them.
    """

    title: str
    config: dict[str, Any]
    rows: list[dict[str, float]]
    images: UInt8[np.ndarray, "images height width 3"]
    models: list[ModelMaps]
    layers: list[LayerNorms]
    results: dict[str, dict[str, float | None]]
    note: str = ""
    summary: dict[str, str] = dataclasses.field(default_factory=dict)


def restore(
    run: epath.Path, settings: DistillSettings, step: int | None = None
) -> tuple[RunSetup, dict[str, TrainState], Params | None, int]:
    """Restores a run: its setups, states, the teacher's parameters, and the checkpoint's step.

    Args:
      run: work directory.
      settings: settings of the run.
      step: step of the checkpoint; None: as `Checkpoints.step_to_read`.

    Raises:
      InputError: the run has no finished checkpoint.
      RunError: every checkpoint is corrupt.
    """
    source = open_source(settings.data, TRAIN)
    # On this machine's devices, which may differ from those of the training.
    settings = dataclasses.replace(
        settings,
        mesh=parallel.MeshSettings(),
        batch_size=jax.device_count() * settings.grad_accum_steps,
    )
    prepared = setup_students(settings, len(source), source.num_classes)
    with contextlib.closing(Checkpoints(run, read_only=True)) as checkpoints:
        step = checkpoints.step_to_read(step)
        states = restore_states(checkpoints, step, prepared.states)
        teacher = (checkpoints.meta(step).get("weights") or {}).get("teacher", {})
    neurons = teacher.get("clean", {}).get("neurons", ())
    return prepared, states, prepared.load_teacher(neurons), step


def read_metrics(run: epath.Path, student: str = "") -> list[dict[str, float]]:
    """Returns the rows of a run's metrics.jsonl; empty if there is no such file.

    Lines that are not JSON objects, such as a line that is still being written, and values that are
    not numbers are skipped. Renamed metrics have their current names.

    Args:
      run: work directory.
      student: one of several students; its metrics get the names that a single student's have, and
        the other students' metrics are left out.
    """
    file = metrics_file(run)
    if not file.is_file():
        return []
    limits.check_size(file)
    rows = [row for found in read_rows(file)[0] if "step" in (row := _numbers(found))]
    if not student:
        return rows
    common = {"step", "time"}
    return [
        {
            name.replace(f"/{student}/", "/", 1): value
            for name, value in row.items()
            if name in common or name.split("/")[1:2] == [student]
        }
        for row in rows
    ]


def _numbers(row: dict[str, Any]) -> dict[str, float]:
    """Returns the values of a row that are numbers."""
    return {
        name: value
        for name, value in row.items()
        if isinstance(value, float) or (isinstance(value, int) and abs(value) < 2**63)
    }


def collect(
    run: epath.Path,
    settings: DistillSettings,
    step: int,
    students: Mapping[str, Backbone],
    shown: int,
) -> Report:
    """Runs the models on a few images.

    Args:
      run: work directory.
      settings: settings of the run.
      step: step of the checkpoint.
      students: students by display name, including those of other runs.
      shown: number of images.

    Returns:
      the report, without a table of results.
    """
    prepared, states, teacher_params, step = restore(run, settings, step)
    mesh, network = prepared.any.mesh, prepared.students.teacher
    if network is None:
        raise InputError(f"run: {run} has no teacher to compare with ({settings.method_name})")
    train = open_source(settings.data, TRAIN)
    source = _test_or_train(settings, train)
    few, fitted = readable(evenly(source, shown)), readable(evenly(train, _FITTED))

    arch = network.spec.arch
    singers = trained_singers(prepared, states)
    last = arch.depth - 1
    layers = {layer for singer in singers.values() for layer in singer.teacher_layers}

    @functools.partial(jax.jit, out_shardings=parallel.gathered(mesh))
    def patches_of(params: Params, images: jax.Array) -> dict[str, Any]:
        features = network.merge(params).features(network.spec.prepare(images))
        prefix = arch.num_prefix_tokens
        found = {"teacher": {layer: features[layer] for layer in {*layers, last}}}
        for name, singer in singers.items():
            found[f"refined {name}"] = {
                layer: refine(singer.refiner[str(layer)], features[layer], prefix)
                for layer in singer.teacher_layers
            }
        return jax.tree.map(lambda x: x[:, prefix:].astype(jnp.float32), found)

    def run_on(images: Source) -> dict[str, dict[int, np.ndarray]]:
        return ImagePass(images, EvalTransform(prepared.image_size), unreadable=leave_out).compute(
            lambda batch: patches_of(teacher_params, batch["image"]), mesh
        )

    of_shown, of_fitted = run_on(few), run_on(fitted)
    target, target_fitted = of_shown["teacher"][last], of_fitted["teacher"][last]
    models = [ModelMaps("teacher", target, arch.grid, None)]
    for name, singer in singers.items():
        if last in singer.teacher_layers:
            tokens = of_shown[f"refined {name}"][last]
            cosine = cosine_to_teacher(tokens, target, None)
            label = f"teacher, refined for {name}" if name else "teacher, refined"
            models.append(ModelMaps(label, tokens, arch.grid, cosine))
    for name, backbone in students.items():
        tokens = patch_tokens(backbone, few)
        cosine = None
        if backbone.arch.grid == arch.grid:
            mapping = linear_map(patch_tokens(backbone, fitted), target_fitted)
            cosine = cosine_to_teacher(tokens, target, mapping)
        models.append(ModelMaps(name, tokens, backbone.arch.grid, cosine))
    norms = [
        LayerNorms(
            f"layer {layer}, {name}" if name else f"layer {layer}",
            np.linalg.norm(of_fitted["teacher"][layer], axis=-1).ravel(),
            np.linalg.norm(of_fitted[f"refined {name}"][layer], axis=-1).ravel(),
            np.asarray(singer.refiner[str(layer)].singular_values[...]),
            float(singer.refiner[str(layer)].threshold[...]),
            int(singer.refiner[str(layer)].null_dim[...]),
        )
        for name, singer in singers.items()
        for layer in singer.teacher_layers
    ]
    students_models = {
        name: own.distillation.student.spec.name for name, own in prepared.each.items()
    }
    return Report(
        f"{run.name}, step {step}",
        to_dict(settings),
        read_metrics(run),
        _pixels(few, prepared.image_size),
        models,
        norms,
        results={},
        summary=summary(settings, network.spec.name, students_models),
    )


def summary(settings: DistillSettings, teacher: str, students: Mapping[str, str]) -> dict[str, str]:
    """Returns the models, methods and data of a run, as the user named them.

    Args:
      settings: settings of the run.
      teacher: model of the teacher, if the user named only its weights.
      students: the same for each student.
    """

    def model(given: ModelSettings, found: str) -> str:
        return (given.model or found) + (f", weights {given.weights}" if given.weights else "")

    rows = {"teacher": model(settings.teacher, teacher)}
    for name, own in settings.each().items():
        label = f"student, {name}" if name else "student"
        rows[label] = f"{model(own.student, students[name])}; method: {own.method_name}"
    data = settings.data
    images = data.source + (f" in {data.path}" if data.path else "")
    rows["training images"] = images + (f", {data.image_size} pixels" if data.image_size else "")
    return rows


def _test_or_train(settings: DistillSettings, train: Source) -> Source:
    try:
        return open_source(settings.data, TEST)
    except InputError:  # a folder of unlabelled images has no test split
        return train


def trained_singers(prepared: RunSetup, states: Mapping[str, TrainState]) -> dict[str, Singer]:
    """Returns the method of each student that is trained with SiNGER."""
    found = {}
    for name, own in prepared.each.items():
        method = own.method_of(states[name])
        if isinstance(method, WeightedSum):
            method = method.methods.get("singer")
        if isinstance(method, Singer):
            found[name] = method
    return found


def _pixels(source: Source, size: int) -> UInt8[np.ndarray, "images size size 3"]:
    batches = eval_batches(source, EvalTransform(size), batch_size=len(source))
    with contextlib.closing(batches):
        return next(batches)["image"]


def column_order(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Returns the columns of several rows, in order of first occurrence."""
    return list(dict.fromkeys(column for row in rows for column in row))
