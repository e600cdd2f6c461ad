"""What the report of a run shows, computed from its checkpoint: tokens, norms, singular values."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx
from jaxtyping import Float, UInt8

from singer_jax import parallel
from singer_jax.checkpoints import Checkpoints
from singer_jax.data.images import EvalTransform
from singer_jax.data.loader import eval_batches
from singer_jax.data.registry import make_source
from singer_jax.data.sources import TEST, TRAIN, Source, evenly
from singer_jax.errors import InputError
from singer_jax.evaluation.backbone import load_backbone
from singer_jax.evaluation.patches import cosine_to_teacher, linear_map, patch_tokens
from singer_jax.methods.singer import Singer, refine
from singer_jax.methods.weighted_sum import WeightedSum
from singer_jax.models.params import Params
from singer_jax.settings import to_dict
from singer_jax.training.setup import DistillSettings, Setup, setup
from singer_jax.training.step import TrainState

_FITTED = 256  # training images that the maps to the teacher's features are fitted on


@dataclasses.dataclass(frozen=True)
class ModelMaps:
    """One model's patch tokens on the shown images.

    Attributes:
      name: of the model.
      tokens: of its last block.
      grid: rows and columns of patches.
      cosine: similarity of each patch to the teacher's; None for the teacher itself, and where
        the grids differ.
    """

    name: str
    tokens: Float[np.ndarray, "images patches dim"]
    grid: tuple[int, int]
    cosine: Float[np.ndarray, "images patches"] | None


@dataclasses.dataclass(frozen=True)
class LayerNorms:
    """Patch norms of a distilled layer, before and after refinement, and its null space."""

    layer: int
    before: Float[np.ndarray, " patches"]
    after: Float[np.ndarray, " patches"]
    singular_values: Float[np.ndarray, " dim"]
    threshold: float
    null_dim: int


@dataclasses.dataclass(frozen=True)
class Report:
    """Everything that a page shows.

    Attributes:
      title: of the run.
      config: as nested dicts.
      rows: of metrics.jsonl.
      images: as the models saw them.
      models: teacher, refined teacher, student, baselines.
      layers: of a method with refiners.
      results: rows of numbers by name, with the names of the columns; published ones included.
      note: below the results.
    """

    title: str
    config: dict[str, Any]
    rows: list[dict[str, float]]
    images: UInt8[np.ndarray, "images height width 3"]
    models: list[ModelMaps]
    layers: list[LayerNorms]
    results: dict[str, dict[str, float | None]]
    note: str = ""


def restore(
    run: epath.Path, settings: DistillSettings
) -> tuple[Setup, TrainState, Params | None, int]:
    """A run as it is at its latest checkpoint: setup, state, the teacher's parameters, the step.

    Raises:
      InputError: no finished checkpoint.
    """
    source = make_source(settings.data.source, settings.data.path, TRAIN)
    # On the devices that are here, not those of the training.
    settings = dataclasses.replace(
        settings,
        mesh=parallel.MeshSettings(),
        batch_size=jax.device_count() * settings.accumulation,
    )
    prepared = setup(settings, len(source), source.num_classes)
    with contextlib.closing(Checkpoints(run, read_only=True)) as checkpoints:
        step = checkpoints.latest_step()
        if step is None:
            raise InputError(f"run: {run} has no finished checkpoint yet")
        state = checkpoints.restore(step, prepared.state)
    return prepared, state, prepared.load_teacher(), step


def read_metrics(run: epath.Path) -> list[dict[str, float]]:
    """The rows of a run's metrics.jsonl; none where there is no such file."""
    file = run / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def collect(
    run: epath.Path,
    settings: DistillSettings,
    baselines: dict[str, epath.Path],
    shown: int,
    results: dict[str, dict[str, float | None]],
    note: str = "",
) -> Report:
    """Runs the models on a few images.

    Args:
      run: the work directory.
      settings: of the run.
      baselines: other runs whose students are shown beside, by name.
      shown: how many images.
      results: rows of the results table.
      note: below it.
    """
    prepared, state, teacher_params, step = restore(run, settings)
    mesh, network = prepared.mesh, prepared.distillation.teacher
    if network is None:
        raise InputError(f"run: {run} has no teacher to compare with ({settings.method_name})")
    train = make_source(settings.data.source, settings.data.path, TRAIN)
    source = _test_or_train(settings, train)
    few, fitted = evenly(source, shown), evenly(train, _FITTED)

    arch = network.spec.arch
    method = nnx.merge(
        prepared.distillation.method, state.params["method"], state.constants["method"]
    )
    singer = _singer_of(method)
    last = arch.depth - 1
    layers = singer.teacher_layers if singer else ()

    @functools.partial(jax.jit, out_shardings=parallel.replicated(mesh))
    def patches_of(params: Params, images: jax.Array) -> dict[str, dict[int, jax.Array]]:
        features = network.merge(params).features(network.spec.prepare(images))
        prefix = arch.num_prefix_tokens
        found = {"teacher": {layer: features[layer] for layer in {*layers, last}}}
        if singer:
            found["refined"] = {
                layer: refine(singer.refiner[str(layer)], features[layer], prefix)
                for layer in layers
            }
        return jax.tree.map(lambda x: x[:, prefix:].astype(jnp.float32), found)

    def run_on(images: Source) -> dict[str, dict[int, np.ndarray]]:
        sharding, batch_size = parallel.batch_sharding(mesh), 8 * mesh.size
        batches = eval_batches(
            images,
            EvalTransform(prepared.image_size),
            batch_size=batch_size,
            rows=parallel.local_rows(sharding, batch_size),
        )
        parts = []
        with contextlib.closing(batches):
            for batch in batches:
                put = parallel.put_rows(batch["image"], sharding, batch_size)
                parts.append(jax.device_get(patches_of(teacher_params, put)))
        # What is left over is the padding of the last batch.
        return jax.tree.map(lambda *xs: np.concatenate(xs)[: len(images)], *parts)

    of_shown, of_fitted = run_on(few), run_on(fitted)
    target, target_fitted = of_shown["teacher"][last], of_fitted["teacher"][last]
    models = [ModelMaps("teacher", target, arch.grid, None)]
    if singer and last in layers:
        tokens = of_shown["refined"][last]
        cosine = cosine_to_teacher(tokens, target, None)
        models.append(ModelMaps("teacher, refined", tokens, arch.grid, cosine))
    students = {f"student, {settings.method_name}": run} | baselines
    for name, folder in students.items():
        backbone = load_backbone(mesh, run=str(folder))
        tokens = patch_tokens(backbone, few)
        cosine = None
        if backbone.arch.grid == arch.grid:
            mapping = linear_map(patch_tokens(backbone, fitted), target_fitted)
            cosine = cosine_to_teacher(tokens, target, mapping)
        models.append(ModelMaps(name, tokens, backbone.arch.grid, cosine))
    norms = [
        LayerNorms(
            layer,
            np.linalg.norm(of_fitted["teacher"][layer], axis=-1).ravel(),
            np.linalg.norm(of_fitted["refined"][layer], axis=-1).ravel(),
            np.asarray(singer.refiner[str(layer)].singular_values[...]),
            float(singer.refiner[str(layer)].threshold[...]),
            int(singer.refiner[str(layer)].null_dim[...]),
        )
        for layer in layers
    ]
    return Report(
        f"{settings.method_name}: {network.spec.name} to "
        f"{prepared.distillation.student.spec.name}, step {step}",
        to_dict(settings),
        read_metrics(run),
        _pixels(few, prepared.image_size),
        models,
        norms,
        results,
        note,
    )


def _test_or_train(settings: DistillSettings, train: Source) -> Source:
    try:
        return make_source(settings.data.source, settings.data.path, TEST)
    except InputError:  # a folder of unlabelled images has no test split
        return train


def _singer_of(method: Any) -> Singer | None:
    if isinstance(method, WeightedSum):
        method = method.methods.get("singer")
    return method if isinstance(method, Singer) else None


def _pixels(source: Source, size: int) -> UInt8[np.ndarray, "images size size 3"]:
    batches = eval_batches(source, EvalTransform(size), batch_size=len(source))
    with contextlib.closing(batches):
        return next(batches)["image"]


def column_order(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The columns of several rows, in the order in which they first occur."""
    return list(dict.fromkeys(column for row in rows for column in row))
