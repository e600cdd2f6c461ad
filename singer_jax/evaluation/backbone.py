"""A frozen model to be measured: from a run's checkpoint or from any timm weights, alike."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, UInt8

from singer_jax import parallel
from singer_jax.data.loader import ImageBatch, eval_batches
from singer_jax.data.sources import Source
from singer_jax.errors import InputError, unknown
from singer_jax.evaluation.heads import Classification, Task
from singer_jax.models.params import Params
from singer_jax.models.vit import Architecture, Numerics
from singer_jax.models.weight_files import find_weights, read_hub_config
from singer_jax.models.weights import (
    abstract_model,
    from_hub_config,
    load_model,
    spec_of_weights,
)
from singer_jax.models.zoo import lookup
from singer_jax.training.checkpoints import Checkpoints
from singer_jax.training.step import Network

TOKENS = ("cls", "avg", "pooled")
_BATCH_PER_DEVICE = 64


class Examples(NamedTuple):
    """Features and labels of a split, in its order: arrays, or memory-mapped files.

    With several views, view v of image i is at v x images + i; view 0 is the centre crop.
    """

    features: Any
    labels: Any
    views: int = 1

    @property
    def images(self) -> int:
        return len(self.labels) // self.views

    def take(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Some rows, features in float32."""
        return np.asarray(self.features[index], np.float32), np.asarray(self.labels[index])


@dataclasses.dataclass(frozen=True)
class Backbone:
    """A network with its parameters on a mesh."""

    network: Network
    params: Params
    mesh: Mesh

    @property
    def image_size(self) -> int:
        """Side of the images it takes, in pixels."""
        return self.network.image_size

    @property
    def arch(self) -> Architecture:
        """What it is."""
        return self.network.spec.arch

    def digest(self) -> str:
        """Of its parameters, of what it is and of how it computes."""
        described = repr((self.network.spec, self.network.merge(self.params).numerics))
        digest = hashlib.blake2b(described.encode(), digest_size=16)
        for leaf in jax.tree.leaves(self.params):
            digest.update(np.ascontiguousarray(leaf))
        return digest.hexdigest()

    def classification(self, classes: int, token: str | None) -> Classification:
        """The task of classifying its features.

        Args:
          classes: number of labels.
          token: `cls`, `avg` or `pooled`; None: the class token where there is one, else `pooled`.

        Raises:
          InputError: unknown token, or the class token of a model that has none.
        """
        token = token or ("cls" if self.arch.class_token else "pooled")
        if token not in TOKENS:
            raise unknown("probe.token", token, TOKENS)
        if token == "cls" and not self.arch.class_token:
            raise InputError(
                f"probe.token: {self.network.spec.name} has no class token; take avg or pooled"
            )
        return Classification(classes, token)

    def features(
        self, params: Params, images: UInt8[Array, "batch height width 3"], task: Task
    ) -> Float[Array, "batch ..."]:
        """What the head of a task reads, in float32; traceable."""
        model = self.network.merge(params)
        tokens = model.features(self.network.prepare(images))[-1].astype(jnp.float32)
        return task.features(model, tokens).astype(jnp.float32)

    def put(self, batch: ImageBatch) -> dict[str, jax.Array]:
        """The images and labels of a batch that every process holds, onto the mesh."""
        sharding = parallel.batch_sharding(self.mesh)
        return {key: parallel.put(batch[key], sharding) for key in ("image", "label")}

    def batches(
        self,
        source: Source,
        task: Task,
        transform: Callable[..., Any],
        workers: int = 0,
        seed: int = 0,
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Features and labels of every image of a split in order, each exactly once, in batches.

        Raises:
          RunError: an image cannot be read.
        """
        compute = functools.partial(_features, self.network, task, self.mesh)
        batches = eval_batches(
            source,
            transform,
            batch_size=_BATCH_PER_DEVICE * self.mesh.size,
            workers=workers,
            strict=True,  # a replaced image would be scored as another
            seed=seed,
        )
        pending = None  # the device works on a batch while the one before is taken away
        with contextlib.closing(batches):
            for batch in batches:
                valid = batch["valid"]
                computed = compute(self.params, self.put(batch)["image"])
                if pending:
                    yield _select(*pending)
                pending = (computed, batch["label"], valid)
        yield _select(*pending)

    def extract(
        self,
        source: Source,
        task: Task,
        transform: Callable[..., Any],
        workers: int = 0,
        seed: int = 0,
    ) -> Examples:
        """All of `batches` in memory."""
        batches = self.batches(source, task, transform, workers, seed)
        features, labels = zip(*batches, strict=True)
        return Examples(np.concatenate(features), np.concatenate(labels))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _features(
    network: Network, task: Task, mesh: Mesh, params: Params, images: UInt8[Array, "batch ..."]
) -> Float[Array, "batch ..."]:
    """`Backbone.features`, compiled once for all backbones of a network, on every device."""
    features = Backbone(network, params, mesh).features(params, images, task)
    return jax.lax.with_sharding_constraint(features, parallel.replicated(mesh))


def _select(
    features: jax.Array, labels: np.ndarray, valid: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    return np.asarray(features)[valid], labels[valid]


def load_backbone(
    mesh: Mesh,
    *,
    run: str = "",
    weights: str = "",
    model: str = "",
    step: int | None = None,
    numerics: Numerics = Numerics(),
) -> Backbone:
    """The model to measure.

    Args:
      mesh: where it lives.
      run: a work directory: the student of its latest checkpoint; or else
      weights: a hub name or file, and
      model: its timm name, where neither the hub name nor a `config.json` beside the file says it.
      step: of the checkpoint of a run; None: the latest.
      numerics: dtypes of the model.

    Raises:
      InputError: nothing given, nothing there, or weights of another architecture.
    """
    if run:
        return _of_run(mesh, Path(run).expanduser(), step, numerics)
    if not weights:
        raise InputError(
            "nothing to evaluate: give --config.run=DIR or --config.weights=NAME_OR_FILE"
        )
    path = find_weights(weights)
    stated = read_hub_config(path.parent)
    if not model and "architecture" in stated:
        spec = from_hub_config(stated)
    else:
        spec = spec_of_weights(lookup(model or weights), path)
    graph, params = load_model(
        spec, path, numerics, lambda abstract: parallel.tree_shardings(mesh, abstract)
    )
    return Backbone(Network(spec, graph), params, mesh)


def _of_run(mesh: Mesh, run: Path, step: int | None, numerics: Numerics) -> Backbone:
    if not (run / "checkpoints").is_dir():
        raise InputError(f"run: {run} holds no checkpoints")
    with contextlib.closing(Checkpoints(run, read_only=True)) as checkpoints:
        finished = checkpoints.manager.all_steps()
        if not finished:
            raise InputError(f"run: {run} has no finished checkpoint yet")
        if step is not None and step not in finished:
            raise InputError(f"step: {run} holds checkpoints {sorted(finished)}, not {step}")
        step = max(finished) if step is None else step
        spec = from_hub_config(checkpoints.meta(step)["student"])
        graph, abstract = abstract_model(spec.arch, numerics)
        params = checkpoints.restore_student(step, parallel.with_shardings(mesh, abstract))
    return Backbone(Network(spec, graph), params, mesh)
