"""Exports a model as a self-contained StableHLO program, which runs without this package."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from singer_jax.errors import RunError
from singer_jax.models.network import Network
from singer_jax.models.params import Params

_PLATFORMS = ("cpu", "cuda", "tpu")
# Largest difference from the model over its largest value; products may be of 16 bits.
_TOLERANCE = 1e-2


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


def check_program(program: bytes, network: Network, params: Params) -> None:
    """Runs a program of `features_program`, as others would, and compares it with the model.

    Raises:
      RunError: the program returns something else.
    """
    params = jax.tree.map(np.asarray, params)
    shape = (1, *network.spec.arch.img_size, 3)
    images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    expected = jax.jit(lambda images: tokens_and_pooled(network, params, images))(images)
    found = jax.export.deserialize(bytearray(program)).call(images)
    names = sorted(expected)
    if sorted(found) == names:
        difference = largest_difference(
            *([each[name] for name in names] for each in (found, expected))
        )
    else:
        difference = float("inf")
    if not difference <= _TOLERANCE:
        raise RunError(
            f"{network.spec.name}: its StableHLO program differs from the model by "
            f"{difference:.2g} of the largest value; nothing is written, report it"
        )


def largest_difference(
    found: Sequence[np.ndarray | jax.Array], expected: Sequence[jax.Array]
) -> float:
    """Returns the largest difference over the largest value of an output; NaN where one is NaN."""
    return float(np.max([_difference(*pair) for pair in zip(found, expected, strict=True)]))


def _difference(found: np.ndarray | jax.Array, expected: jax.Array) -> float:
    if found.shape != expected.shape:
        return float("inf")
    found, expected = np.asarray(found), np.asarray(expected)
    return float(np.abs(found - expected).max() / np.maximum(np.abs(expected).max(), 1e-6))
