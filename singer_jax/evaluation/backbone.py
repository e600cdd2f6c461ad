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
from etils import epath
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, UInt8, UInt32

from singer_jax.data.loader import ImageBatch, eval_batches
from singer_jax.data.sources import Source
from singer_jax.errors import InputError
from singer_jax.evaluation.classification import Classification
from singer_jax.evaluation.heads import Task
from singer_jax.io.files import as_path
from singer_jax.models.architecture import Architecture, ComputePolicy
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
from singer_jax.runs.workdir import checkpoints_folder

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

    def rows(self, batch_size: int) -> np.ndarray:
        """Returns the rows of a batch that this process reads."""
        return parallel.local_rows(parallel.batch_sharding(self.mesh), batch_size)

    def put(self, batch: ImageBatch, batch_size: int) -> dict[str, jax.Array]:
        """Puts images, labels and `valid` of this process's `rows` of a batch onto the mesh."""
        given = {key: batch[key] for key in ("image", "label", "valid")}
        return parallel.put_rows(given, parallel.batch_sharding(self.mesh), batch_size)

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

    def batches(
        self,
        source: Source,
        task: Task,
        transform: Callable[..., Any],
        workers: int = 0,
        seed: int = 0,
        left_out: Callable[[np.ndarray], None] | None = None,
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yields features and labels of every image of a split, in order and each exactly once.

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
        each = _batches_of_each([self], source, [task], transform, workers, seed, left_out)
        return (batch for (batch,) in each)

    def extract(
        self,
        source: Source,
        task: Task,
        transform: Callable[..., Any],
        workers: int = 0,
        seed: int = 0,
        left_out: Callable[[np.ndarray], None] | None = None,
    ) -> Examples:
        """Returns all of `batches` in memory."""
        batches = self.batches(source, task, transform, workers, seed, left_out)
        features, labels = zip(*batches, strict=True)
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
      workers: as for `Backbone.batches`.
      left_out: as for `Backbone.batches`.

    Raises:
      RunError: as `Backbone.batches`.
    """
    found = {}
    for size in sorted({backbone.image_size for backbone in backbones.values()}):
        names = [name for name, backbone in backbones.items() if backbone.image_size == size]
        of_size, its_tasks = ([by_name[name] for name in names] for by_name in (backbones, tasks))
        given = (of_size, source, its_tasks, transform(size), workers)
        features: dict[str, list[np.ndarray]] = {name: [] for name in names}
        labels = []
        for batches in _batches_of_each(*given, left_out=left_out):
            labels.append(batches[0][1])
            for name, (of_batch, _) in zip(names, batches, strict=True):
                features[name].append(of_batch)
        every_label = np.concatenate(labels)
        for name in names:
            found[name] = Examples(np.concatenate(features.pop(name)), every_label)
    return found


def _batches_of_each(
    backbones: Sequence[Backbone],
    source: Source,
    tasks: Sequence[Task],
    transform: Callable[..., Any],
    workers: int = 0,
    seed: int = 0,
    left_out: Callable[[np.ndarray], None] | None = None,
) -> Iterator[list[tuple[np.ndarray, np.ndarray]]]:
    """Yields, for each batch, one pair of features and labels per model, as `Backbone.batches`."""
    first = backbones[0]
    sizes = [own.images_at_once(task) for own, task in zip(backbones, tasks, strict=True)]
    batch_size = min(sizes) * first.mesh.size
    batches = eval_batches(
        source,
        transform,
        batch_size=batch_size,
        workers=workers,
        strict=left_out is None,
        seed=seed,
        rows=first.rows(batch_size),
    )
    pending: list[Any] = []  # batch on the devices while the previous one is copied to the host
    with contextlib.closing(batches):
        for batch in batches:
            first.before_batch()
            replaced = batch["unreadable"] >= 0  # a replacement would be scored as this image
            if replaced.any():
                left_out(batch["unreadable"][batch["valid"] & replaced])
                batch = batch | {"valid": batch["valid"] & ~replaced}
            put = first.put(batch, batch_size)
            computed = [
                _examples(own.network, task, own.mesh, own.params, put)
                for own, task in zip(backbones, tasks, strict=True)
            ]
            if pending:
                yield [_select(*arrays) for arrays in pending]
            pending = computed
    yield [_select(*arrays) for arrays in pending]


@jax.jit
def _checksums(params: Params) -> list[UInt32[Array, ""]]:
    """Returns a checksum of each leaf, computed on the devices that hold it."""
    return [checksum(leaf) for leaf in jax.tree.leaves(params)]


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _examples(
    network: Network, task: Task, mesh: Mesh, params: Params, batch: dict[str, Array]
) -> tuple[Float[Array, "batch ..."], Array, Bool[Array, " batch"]]:
    """Computes features, labels and `valid`, compiled once for all backbones of a network.

    Each device processes its own images. With several processes, every process gets all results.
    """
    features = Backbone(network, params, mesh).features(params, batch["image"], task)
    several = jax.process_count() > 1
    sharding = parallel.replicated(mesh) if several else parallel.batch_sharding(mesh)
    found = (features, batch["label"], batch["valid"])
    return jax.lax.with_sharding_constraint(found, sharding)


def _select(features: Array, labels: Array, valid: Array) -> tuple[np.ndarray, np.ndarray]:
    chosen = np.asarray(valid)
    return np.asarray(features)[chosen], np.asarray(labels)[chosen]


def resolve_weights(
    weights: str, model: str = "", weights_key: str = ""
) -> tuple[ModelSpec, WeightsFile]:
    """Returns what the model of weights is, and its file, without reading a tensor.

    Args:
      weights, model, weights_key: as for `load_backbone`.

    Raises:
      InputError: nothing there, or weights of another architecture.
    """
    if not model and "architecture" not in read_hub_config(find_weights(weights).parent):
        model = weights
    spec, file = resolve_model("model", ModelSettings(model, weights, {}, weights_key))
    assert file is not None  # since weights are given
    return spec, file


def load_backbone(
    mesh: Mesh,
    *,
    run: str = "",
    weights: str = "",
    model: str = "",
    weights_key: str = "",
    student: str = "",
    step: int | None = None,
    policy: ComputePolicy = ComputePolicy(),
) -> Backbone:
    """Loads a model for evaluation, from either a run or weights.

    Args:
      mesh: devices that hold the model.
      run: work directory whose student is loaded.
      weights: Hub repository or weight file; used if `run` is empty.
      model: timm name of `weights`; needed if neither the Hub name nor a `config.json` beside the
        file states it.
      weights_key: part of the weights file, as in `ModelSettings`.
      student: name of the student, if the run has several.
      step: step of the run's checkpoint; None: as `Checkpoints.step_to_read`.
      policy: dtypes of the model.

    Raises:
      InputError: neither `run` nor `weights` is given, nothing was found, or the weights are of
        another architecture.
      RunError: every checkpoint of the run is corrupt.
    """
    if run:
        return _of_run(mesh, as_path(run), student, step, policy)
    if step is not None:
        raise InputError(
            "step: needs a run, since only a run has checkpoints; give --config.run=DIR"
        )
    if not weights:
        raise InputError(
            "nothing to evaluate: give --config.run=DIR or --config.weights=NAME_OR_FILE"
        )
    spec, file = resolve_weights(weights, model, weights_key)
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


def _of_run(
    mesh: Mesh, run: epath.Path, student: str, step: int | None, policy: ComputePolicy
) -> Backbone:
    if not checkpoints_folder(run).is_dir():
        raise InputError(f"run: {run} holds no checkpoints; give a work directory that does")
    with contextlib.closing(Checkpoints(run, read_only=True)) as checkpoints:
        step = checkpoints.step_to_read(step)
        meta = checkpoints.meta(step)
        students = meta.get("students") or {"": meta["student"]}
        if student not in students:
            told = ", ".join(students) if "" not in students else "one student without a name"
            raise InputError(f"student: {student!r}, but {run} has {told}")
        spec = from_hub_config(students[student])
        graph, abstract = abstract_model(spec.arch, policy)
        abstract = parallel.with_shardings(mesh, abstract)
        params = checkpoints.restore_student(step, abstract, student)
    return Backbone(Network(spec, graph), params, mesh)
