"""Weighted k-nearest-neighbour classification of frozen features."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from singer_jax.evaluation.backbone import Examples
from singer_jax.platform import parallel
from singer_jax.platform.memory import fitting
from singer_jax.platform.sharded_rows import spread


def knn_top1(
    bank: Examples,
    queries: Examples,
    *,
    classes: int,
    k: int = 20,
    temperature: float = 0.07,
    mesh: Mesh | None = None,
) -> float:
    """Returns the share of queries that weighted kNN classifies correctly.

    Each of the `k` nearest neighbours votes exp(cosine similarity / temperature) for its class. The
    bank is split over the devices. Each device finds the `k` nearest of its part, and the nearest
    of all parts are merged.

    Args:
      bank: features and labels of the training split; only the first view is used.
      queries: features and labels of the test split.
      classes: number of labels.
      k: number of neighbours that vote.
      temperature: temperature of the votes; a smaller one favours the nearest neighbours.
      mesh: devices over which the bank is split; default: one device.
    """
    mesh = mesh or parallel.make_mesh(1)
    k = min(k, bank.images)
    values, labels = (spread(mesh, rows, bank.images) for rows in (bank.features, bank.labels))
    values = _unit(values)
    asked, correct = len(queries.labels), 0
    # Memory for a query's similarities to a device's part, and for a copy that sorting needs.
    step = min(asked, fitting(mesh, 2 * 4 * len(labels) / mesh.size))
    vote = _Vote(bank.images, classes, k, temperature)
    for start in range(0, asked, step):
        chunk = np.resize(np.arange(start, min(start + step, asked)), step)
        predicted = _predict(mesh, vote, values, labels, queries.take(chunk)[0])
        valid = min(step, asked - start)
        correct += np.sum((np.asarray(predicted) == queries.labels[chunk])[:valid])
    return float(correct / asked)


@jax.jit
def _unit(features: Float[Array, "images dim"]) -> Float[Array, "images dim"]:
    features = features.astype(jnp.float32)
    norms = jnp.linalg.norm(features, axis=1, keepdims=True)
    return features / jnp.maximum(norms, jnp.finfo(features.dtype).tiny)


@dataclasses.dataclass(frozen=True)
class _Vote:
    """How the neighbours vote; rows of the bank from `images` on are padding."""

    images: int
    classes: int
    k: int
    temperature: float


@functools.partial(jax.jit, static_argnums=(0, 1))
def _predict(
    mesh: Mesh,
    vote: _Vote,
    bank: Float[Array, "bank dim"],
    bank_labels: Int[Array, " bank"],
    queries: Float[Array, "queries dim"],
) -> Int[Array, " queries"]:
    """Returns the class of each query."""
    axes = mesh.axis_names
    whole, part = (s.spec for s in (parallel.replicated(mesh), parallel.batch_sharding(mesh)))

    def of_device(bank: Array, labels: Array, queries: Array) -> tuple[Array, Array]:
        row = jax.lax.axis_index(axes) * len(bank) + jnp.arange(len(bank))
        similarity = jnp.where(row < vote.images, queries @ bank.T, -jnp.inf)
        nearest, index = jax.lax.top_k(similarity, min(vote.k, len(bank)))
        return nearest, labels[index]

    split = jax.sharding.PartitionSpec(None, *part)
    similarity, labels = jax.shard_map(
        of_device, mesh=mesh, in_specs=(part, part, whole), out_specs=(split, split)
    )(bank, bank_labels, _unit(queries))
    candidates = jax.lax.with_sharding_constraint((similarity, labels), parallel.replicated(mesh))
    similarity, index = jax.lax.top_k(candidates[0], vote.k)
    labels = jnp.take_along_axis(candidates[1], index, axis=1)
    weights = jnp.exp((similarity - 1) / vote.temperature)
    votes = jax.nn.one_hot(labels, vote.classes) * weights[..., None]
    return jnp.argmax(votes.sum(axis=1), axis=1)
