"""A frozen model to be measured: from a run's checkpoint or from any timm weights, alike."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, UInt8

from singer_jax import parallel
from singer_jax.data.images import EvalTransform
from singer_jax.data.loader import ImageBatch, eval_batches
from singer_jax.data.sources import Source
from singer_jax.errors import InputError, unknown
from singer_jax.models.params import Params
from singer_jax.models.vit import Numerics
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


class Features(NamedTuple):
    """One feature vector and label for each image of a split, in its order."""

    values: Float[Array, "images dim"]
    labels: Int[Array, " images"]


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
    def dim(self) -> int:
        """Width of its features."""
        return self.network.spec.arch.embed_dim

    def tokens(
        self, params: Params, images: UInt8[Array, "batch height width 3"]
    ) -> Float[Array, "batch tokens dim"]:
        """The raw output of the last block, in float32; traceable."""
        model = self.network.merge(params)
        return model.features(self.network.prepare(images))[-1].astype(jnp.float32)

    def choose_token(self, token: str | None) -> str:
        """The configured token, or for None the class token where there is one, else `pooled`.

        Raises:
          InputError: unknown token, or the class token of a model that has none.
        """
        has_class = self.network.spec.arch.class_token
        token = token or ("cls" if has_class else "pooled")
        if token not in TOKENS:
            raise unknown("probe.token", token, TOKENS)
        if token == "cls" and not has_class:
            raise InputError(
                f"probe.token: {self.network.spec.name} has no class token; take avg or pooled"
            )
        return token

    def pooled(
        self, params: Params, images: UInt8[Array, "batch height width 3"], token: str
    ) -> Float[Array, "batch dim"]:
        """One feature an image, in float32; traceable.

        Args:
          params: of the network.
          images: of its size.
          token: the raw class token of the last block (`cls`), the mean of its raw patch tokens
            (`avg`), or what the model's own head reads (`pooled`).
        """
        tokens = self.tokens(params, images)
        if token == "pooled":
            return self.network.merge(params).pooled(tokens).astype(jnp.float32)
        prefix = self.network.spec.arch.num_prefix_tokens
        return tokens[:, 0] if token == "cls" else tokens[:, prefix:].mean(axis=1)

    def put(self, batch: ImageBatch) -> dict[str, jax.Array]:
        """The images and labels of a batch, onto the mesh."""
        examples = {key: batch[key] for key in ("image", "label")}
        return parallel.put_batch(examples, parallel.batch_sharding(self.mesh))

    def extract(self, source: Source, token: str | None, workers: int = 0) -> Features:
        """Centre-crop features of every image of a split, each exactly once.

        Raises:
          InputError: as `choose_token`.
        """
        token = self.choose_token(token)
        pooled = jax.jit(lambda params, images: self.pooled(params, images, token))
        batches = eval_batches(
            source,
            EvalTransform(self.image_size),
            batch_size=_BATCH_PER_DEVICE * self.mesh.size,
            workers=workers,
        )
        values, labels = [], []
        with contextlib.closing(batches):
            for batch in batches:
                valid = batch["valid"]
                labels.append(batch["label"][valid])
                values.append((pooled(self.params, self.put(batch)["image"]), valid))
                if len(values) > 1:  # while the device works on the last batch
                    values[-2] = _select(*values[-2])
        values[-1] = _select(*values[-1])
        return Features(jnp.concatenate(values), jnp.concatenate(labels))


def _select(values: jax.Array, valid: np.ndarray) -> np.ndarray:
    return np.asarray(values)[valid]


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
    with contextlib.closing(Checkpoints(run)) as checkpoints:
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
