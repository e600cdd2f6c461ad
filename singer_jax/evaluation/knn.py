"""Weighted k-nearest-neighbour classification of frozen features."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from singer_jax.evaluation.backbone import Examples

_CHUNK = 2**28  # similarities in memory at once


def knn_top1(
    bank: Examples,
    queries: Examples,
    *,
    classes: int,
    k: int = 20,
    temperature: float = 0.07,
) -> float:
    """Share of queries whose class gets the largest vote of their `k` nearest in the bank.

    A neighbour votes exp(cosine similarity / temperature) for its class.

    Args:
      bank: of the training split.
      queries: of the test split.
      classes: number of labels.
      k: neighbours that vote.
      temperature: the smaller, the more the nearest count.
    """
    k = min(k, len(bank.labels))
    values, correct = _unit(jnp.asarray(bank.features)), 0
    step = max(1, _CHUNK // len(bank.labels))
    for start in range(0, len(queries.labels), step):
        chunk = slice(start, start + step)
        query = _unit(jnp.asarray(queries.features[chunk]))
        predicted = _predict(values, jnp.asarray(bank.labels), query, classes, k, temperature)
        correct += int(jnp.sum(predicted == queries.labels[chunk]))
    return correct / len(queries.labels)


def _unit(features: Float[Array, "images dim"]) -> Float[Array, "images dim"]:
    norms = jnp.linalg.norm(features, axis=1, keepdims=True)
    return features / jnp.maximum(norms, jnp.finfo(features.dtype).tiny)


@functools.partial(jax.jit, static_argnums=(3, 4, 5))
def _predict(
    bank: Float[Array, "bank dim"],
    bank_labels: Int[Array, " bank"],
    queries: Float[Array, "queries dim"],
    classes: int,
    k: int,
    temperature: float,
) -> Int[Array, " queries"]:
    similarity, index = jax.lax.top_k(queries @ bank.T, k)
    votes = (
        jax.nn.one_hot(bank_labels[index], classes)
        * jnp.exp((similarity - 1) / temperature)[..., None]
    )
    return jnp.argmax(votes.sum(axis=1), axis=1)
