"""Frozen models for evaluation, loaded from a run's checkpoint or from any timm weights."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, UInt8, UInt32

from singer_jax.data.sources import Source
from singer_jax.errors import InputError
from singer_jax.evaluation.classification import Classification
from singer_jax.evaluation.heads import Task
from singer_jax.io.files import as_path
from singer_jax.models.architecture import Architecture, ComputePolicy
from singer_jax.models.inference import ImagePass
from singer_jax.models.network import ModelSettings, Network, resolve_model
from singer_jax.models.params import Params
from singer_jax.models.weight_files import WeightsFile, find_weights, read_hub_config
from singer_jax.models.weights import (
    abstract_model,
    from_hub_config,
    load_model,
)
from singer_jax.models.zoo import ModelSpec
from singer_jax.platform import parallel
from singer_jax.platform.memory import fitting
from singer_jax.runs.checkpoints import Checkpoints, checksum
from singer_jax.runs.workdir import checkpoints_folder, export_folder
from singer_jax.settings.ranges import COUNT, TEXT, optional
from singer_jax.settings.settings import Settings, setting

_MOST_IMAGES = 64  # per device and pass; enough to keep a device busy


class Examples(NamedTuple):
    """Features and labels of a split in its order, as arrays or memory-mapped files.

    With several views, row v x images + i holds view v of image i; view 0 is the centre crop.
    """

    features: Any
    labels: Any
    views: int = 1

    @property
    def images(self) -> int:
        return len(self.labels) // self.views

    def take(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns some rows, with the features in float32."""
        return np.asarray(self.features[index], np.float32), np.asarray(self.labels[index])


@dataclasses.dataclass(frozen=True)
class Backbone:
    """Network with its parameters on a mesh.

    Attributes:
      network: the network.
      params: its parameters.
      mesh: the devices that hold them.
      before_batch: called before each batch of an extraction; an exception that it raises ends the
        extraction.
    """

    network: Network
    params: Params
    mesh: Mesh
    before_batch: Callable[[], None] = lambda: None

    @property
    def image_size(self) -> int:
        """Side of the input images, in pixels."""
        return self.network.image_size

    @property
    def arch(self) -> Architecture:
        """Architecture of the network."""
        return self.network.spec.arch

    def digest(self) -> str:
        """Returns a digest of the parameters, the architecture and the compute policy."""
        described = repr((self.network.spec, self.network.merge(self.params).policy))
        sums = jax.device_get(_checksums(self.params))
        described = described + repr([int(value) for value in sums])
        return hashlib.blake2b(described.encode(), digest_size=16).hexdigest()

    def classification(self, classes: int, token: str | None) -> Classification:
        """Returns the task of classifying the model's features.

        Args:
          classes: number of labels.
          token: `cls`, `avg` or `pooled`; None: the class token if the model has one, else
            `pooled`.

        Raises:
          InputError: `token` is `cls` and the model has no class token.
        """
        token = token or ("cls" if self.arch.class_token else "pooled")
        if token == "cls" and not self.arch.class_token:
            raise InputError(
                f"probe.pooling: {self.network.spec.name} has no class token; set avg or pooled"
            )
        return Classification(classes, token)

    def features(
        self, params: Params, images: UInt8[Array, "batch height width 3"], task: Task
    ) -> Float[Array, "batch ..."]:
        """Returns the input of a task's head in float32; traceable."""
        model = self.network.merge(params)
        tokens = model.features(self.network.spec.prepare(images))[-1].astype(jnp.float32)
        return task.features(model, tokens).astype(jnp.float32)

    def images_at_once(self, task: Task) -> int:
        """Returns the number of images per device that fit into memory in a pass without gradients.

        The estimate counts the widest activations of a block in float32, and the features. If
        several processes read the features, every device holds those of all images.
        """
        arch = self.arch
        tokens = arch.num_prefix_tokens + math.prod(arch.grid)
        hidden = (6 + 2 * arch.mlp_ratio) * arch.embed_dim
        widest = tokens * (hidden + 2 * arch.num_heads * tokens) + 6 * math.prod(arch.img_size)
        image = jax.ShapeDtypeStruct((1, *arch.img_size, 3), jnp.uint8)
        features = jax.eval_shape(lambda *xs: self.features(*xs, task), self.params, image).size
        copies = self.mesh.size if jax.process_count() > 1 else 1
        return min(_MOST_IMAGES, fitting(self.mesh, 4 * (widest + copies * features)))

    def batches(self, task: Task, images: ImagePass) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yields features of a task and labels of every image, in order and each exactly once.

        Raises:
          RunError: an image cannot be read, and `images` does not leave it out.
          Exception: any exception of `before_batch`.
        """
        images = dataclasses.replace(images, before_batch=self.before_batch)
        return ((features, labels) for (features,), labels in _map([(self, task)], images))

    def extract(
        self,
        source: Source,
        task: Task,
        transform: Callable[..., Any],
        workers: int = 0,
        seed: int = 0,
        left_out: Callable[[np.ndarray], None] | None = None,
    ) -> Examples:
        """Returns all of `batches` in memory.

        Args:
          source: images of the split.
          task: task whose features are computed.
          transform: transform from an image to the model's input.
          workers: number of decoding processes.
          seed: seed of a random transform.
          left_out: called with the indices of unreadable images, which are left out; None: the
            first unreadable image raises.

        Raises:
          RunError: an image cannot be read.
          Exception: any exception of `before_batch`.
        """
        images = ImagePass(source, transform, workers, seed, left_out)
        features, labels = zip(*self.batches(task, images), strict=True)
        return Examples(np.concatenate(features), np.concatenate(labels))


def extract_each(
    backbones: Mapping[str, Backbone],
    source: Source,
    tasks: Mapping[str, Task],
    transform: Callable[[int], Callable[..., Any]],
    workers: int = 0,
    left_out: Callable[[np.ndarray], None] | None = None,
) -> dict[str, Examples]:
    """Returns `Backbone.extract` of several models by name.

    Models with the same image size share the decoded images.

    Args:
      backbones: models by name, on one mesh.
      source: images of the split.
      tasks: task of each model.
      transform: function from an image size to the transform for it.
      workers: as for `Backbone.extract`.
      left_out: as for `Backbone.extract`.

    Raises:
      RunError: as `Backbone.extract`.
    """
    found = {}
    for size in sorted({backbone.image_size for backbone in backbones.values()}):
        names = [name for name, backbone in backbones.items() if backbone.image_size == size]
        models = [(backbones[name], tasks[name]) for name in names]
        asked = models[0][0].before_batch
        images = ImagePass(source, transform(size), workers, 0, left_out, asked)
        parts, labels = zip(*_map(models, images), strict=True)
        every_label = np.concatenate(labels)
        for name, features in zip(names, zip(*parts, strict=True), strict=True):
            found[name] = Examples(np.concatenate(features), every_label)
    return found


def _map(
    models: Sequence[tuple[Backbone, Task]], images: ImagePass
) -> Iterator[tuple[list[np.ndarray], np.ndarray]]:
    """Yields, for each batch, the features of each model, and the labels."""
    mesh = models[0][0].mesh
    batch_size = min(own.images_at_once(task) for own, task in models) * mesh.size
    return images.map(
        lambda batch: [
            _features(own.network, task, mesh, own.params, batch["image"]) for own, task in models
        ],
        mesh,
        batch_size,
    )


@jax.jit
def _checksums(params: Params) -> list[UInt32[Array, ""]]:
    """Returns a checksum of each leaf, computed on the devices that hold it."""
    return [checksum(leaf) for leaf in jax.tree.leaves(params)]


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _features(
    network: Network, task: Task, mesh: Mesh, params: Params, images: Array
) -> Float[Array, "batch ..."]:
    """Computes features, compiled once for all backbones of a network."""
    features = Backbone(network, params, mesh).features(params, images, task)
    return jax.lax.with_sharding_constraint(features, parallel.gathered(mesh))


@dataclasses.dataclass(frozen=True)
class ModelSelection(Settings):
    """Settings that select a model: the student of a run, or weights."""

    run: str = setting("", TEXT, "Work directory of a run; its student is read.")
    student: str = setting("", TEXT, "Name of one of several students of `run`.")
    step: int | None = setting(
        None,
        optional(COUNT),
        "Step of the run's checkpoint. None: the newest checkpoint without corruption.",
    )
    weights: str = setting("", TEXT, "Weights to read: Hub repository or file.")
    model: str = setting(
        "",
        TEXT,
        "timm name of `weights`. Needed if neither the Hub name nor a config.json states it.",
    )
    weights_key: str = setting(
        "",
        TEXT,
        "Part of the weights file to load, such as `state_dict`. Empty: averaged weights first.",
    )


def resolve_weights(
    weights: str, model: str = "", weights_key: str = "", image_size: int | None = None
) -> tuple[ModelSpec, WeightsFile]:
    """Returns what the model of weights is, and its file, without reading a tensor.

    Args:
      weights, model, weights_key: as in `ModelSelection`.
      image_size: as for `models.network.resolve_model`.

    Raises:
      InputError: nothing there, or weights of another architecture.
    """
    if not model and "architecture" not in read_hub_config(find_weights(weights).parent):
        model = weights
    spec, file = resolve_model("model", ModelSettings(model, weights, {}, weights_key), image_size)
    assert file is not None  # since weights are given
    return spec, file


def load_backbone(
    mesh: Mesh,
    selected: ModelSelection,
    policy: ComputePolicy = ComputePolicy(),
    image_size: int | None = None,
) -> Backbone:
    """Loads a model for evaluation, from either a run or weights.

    Args:
      mesh: devices that hold the model.
      selected: the model; `weights` is used if `run` is empty.
      policy: dtypes of the model.
      image_size: as for `models.network.resolve_model`; a run's student keeps its own.

    Raises:
      InputError: neither `run` nor `weights` is given, nothing was found, the weights are of
        another architecture, or an image size is given for a run.
      RunError: every checkpoint of the run is corrupt.
    """
    if selected.run:
        if image_size is not None:
            exported = export_folder(as_path(selected.run), selected.student)
            raise InputError(f"image_size: a run's student keeps its size; load {exported}")
        return _of_run(mesh, selected, policy)
    if selected.step is not None:
        raise InputError(
            "step: needs a run, since only a run has checkpoints; give --config.run=DIR"
        )
    if not selected.weights:
        raise InputError(
            "nothing to evaluate: give --config.run=DIR or --config.weights=NAME_OR_FILE"
        )
    spec, file = resolve_weights(selected.weights, selected.model, selected.weights_key, image_size)
    graph, params = load_model(
        spec, file, policy, lambda abstract: parallel.tree_shardings(mesh, abstract)
    )
    return Backbone(Network(spec, graph), params, mesh)


def load_teacher(
    mesh: Mesh,
    settings: ModelSettings,
    image_size: int | None = None,
    normalisation: str = "model",
    policy: ComputePolicy = ComputePolicy(),
) -> Backbone:
    """Loads the teacher of a run with the run's settings.

    Args:
      mesh: devices that hold the teacher.
      settings: settings of the run's teacher.
      image_size: as for `models.network.resolve_model`.
      normalisation: as for `models.network.resolve_model`.
      policy: dtypes of the model.

    Raises:
      InputError: the weights are missing or of another architecture.
    """
    spec, path = resolve_model("teacher", settings, image_size, normalisation)
    place = functools.partial(parallel.tree_shardings, mesh)
    graph, params = load_model(spec, path, policy, place)
    return Backbone(Network(spec, graph), params, mesh)


def _of_run(mesh: Mesh, selected: ModelSelection, policy: ComputePolicy) -> Backbone:
    run, student = as_path(selected.run), selected.student
    if not checkpoints_folder(run).is_dir():
        raise InputError(f"run: {run} holds no checkpoints; give a work directory that does")
    with contextlib.closing(Checkpoints(run, read_only=True)) as checkpoints:
        step = checkpoints.step_to_read(selected.step)
        meta = checkpoints.meta(step)
        students = meta.get("students") or {"": meta["student"]}
        if student not in students:
            known = ", ".join(students) if "" not in students else "one student without a name"
            raise InputError(f"student: {student!r}, but {run} has {known}")
        spec = from_hub_config(students[student])
        graph, abstract = abstract_model(spec.arch, policy)
        abstract = parallel.with_shardings(mesh, abstract)
        params = checkpoints.restore_student(step, abstract, student)
    return Backbone(Network(spec, graph), params, mesh)
