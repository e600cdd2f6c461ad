"""Measures the gain from this project's attention and from the compiler options on this machine.

  python -m benchmarks.choices --model vit_small_patch16_224 --batch 16

The forward and backward pass of a model is compiled once for each choice: with the defaults, with
`jax.nn.dot_product_attention`, and without one of the compiler options of `platform.backends`. The
choices are timed in turn.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.results import report
from singer_jax.models import layers
from singer_jax.models.vit import VisionTransformer
from singer_jax.models.zoo import lookup
from singer_jax.platform import backends


def library_attention(query: Any, key: Any, value: Any, fused: bool = False) -> jax.Array:
    """Computes `layers.attend` with the function of JAX."""
    return jax.nn.dot_product_attention(query, key, value)


def main(arguments: argparse.Namespace) -> None:
    """Times every choice and reports the table."""
    model = VisionTransformer(lookup(arguments.model).arch, rngs=nnx.Rngs(0))
    graph, params = nnx.split(model)
    images = np.random.default_rng(0).standard_normal((arguments.batch, 224, 224, 3))
    images = jnp.asarray(images, jnp.float32)

    def compiled(options: dict[str, str] | None, attend: Callable = layers.attend) -> Any:
        def loss(params: Any, images: jax.Array) -> jax.Array:
            return jnp.mean(jnp.square(nnx.merge(graph, params).features(images)[-1]))

        with mock.patch.object(layers, "attend", attend):
            step = jax.jit(jax.value_and_grad(loss), compiler_options=options)
            return step.lower(params, images).compile()

    options = dict(backends.choices().compiler_options)
    choices = {"default": compiled(options)}
    choices["jax.nn.dot_product_attention"] = compiled(options, library_attention)
    for left_out in options:
        others = {name: value for name, value in options.items() if name != left_out}
        choices[f"without {left_out}"] = compiled(others or None)
    times: dict[str, list[float]] = {name: [] for name in choices}
    for number in range(1 + arguments.rounds):
        for name, step in choices.items():
            start = time.perf_counter()
            jax.block_until_ready(step(params, images))
            if number:
                times[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in times.items()}
    rows = [
        {
            "choice": name,
            "median s": f"{median:.3f}",
            "min..max": f"{min(times[name]):.3f}..{max(times[name]):.3f}",
            "ratio": f"{median / medians['as it is']:.2f}",
        }
        for name, median in medians.items()
    ]
    report(
        f"Forward and backward of {arguments.model}, batch {arguments.batch}, float32",
        f"python -m benchmarks.choices --model {arguments.model} --batch {arguments.batch}",
        rows,
        jax.devices()[0].device_kind,
        ("jax", "flax"),
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="vit_small_patch16_224")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=7)
    main(parser.parse_args())
