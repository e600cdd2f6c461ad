"""Exports a model as a self-contained StableHLO program, which runs without this package."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from singer_jax.models.network import Network
from singer_jax.models.params import Params

_PLATFORMS = ("cpu", "cuda", "tpu")


def features_program(network: Network, params: Params) -> bytes:
    """Returns a model with its parameters as a self-contained StableHLO program (`jax.export`).

    `jax.export.deserialize(data).call(images)` takes uint8 images [batch, height, width, 3] of any
    batch size and returns `tokens`, the raw output of the last block [batch, tokens, dim], and
    `pooled`, the input of the head [batch, dim], both in float32. It runs on CPU, GPU and TPU.
    """
    params = jax.tree.map(np.asarray, params)
    return exported(network, lambda images: tokens_and_pooled(network, params, images)).serialize()


def tokens_and_pooled(network: Network, params: Params, images: jax.Array) -> dict[str, jax.Array]:
    """Returns the function that the program computes."""
    model = network.merge(params)
    tokens = model.features(network.spec.prepare(images))[-1]
    found = {"tokens": tokens, "pooled": model.pooled(tokens)}
    return {name: value.astype(jnp.float32) for name, value in found.items()}


def exported(network: Network, function: Callable, *arguments: Any) -> jax.export.Exported:
    """Exports a function of abstract arguments, the last of which is a batch of any size."""
    (batch,) = jax.export.symbolic_shape("batch")
    images = jax.ShapeDtypeStruct((batch, *network.spec.arch.img_size, 3), jnp.uint8)
    return jax.export.export(jax.jit(function), platforms=_PLATFORMS)(*arguments, images)
