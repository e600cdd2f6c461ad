"""Test-time registers: the activation of a few neurons, moved from the patches to an added token.

"Vision Transformers Don't Need Trained Registers", NeurIPS 2025 (arXiv 2506.08010): in the MLPs of
the blocks before the outliers appear, a few neurons fire at the patches that become outliers. The
token that is added starts at zero, was never trained, and is the first of the tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, UInt8

from singer_jax.settings.ranges import COUNT, Range
from singer_jax.settings.settings import Settings, setting

Neurons = Sequence[tuple[int, int]]
"""Block and position in the hidden layer of its MLP."""

NAME = "register_neurons"
"""Of the attribute of a `VisionTransformer`, and so of the parameters that no file holds."""


@dataclasses.dataclass(frozen=True)
class RegisterSettings(Settings):
    """Settings of the search for register neurons (`evaluation.cleaning`)."""

    images: int = setting(
        500, COUNT, "Number of training images on which the register neurons are searched for."
    )
    neurons: int = setting(
        50,
        COUNT,
        "Number of register neurons. The authors use 50 for DINOv2 ViT-L, 10 for OpenCLIP ViT-B.",
    )
    outlier: float = setting(
        3.0,
        Range(1, low_open=True),
        "Norm, as a multiple of the median patch norm, above which a patch is an outlier.",
    )


class RegisterNeurons(nnx.Variable):
    """[depth, hidden], 1 at each neuron whose activation is moved."""


def marked(neurons: Neurons, shape: tuple[int, int]) -> UInt8[np.ndarray, "depth hidden"]:
    """The value of `RegisterNeurons` for some neurons."""
    found = np.zeros(shape, np.uint8)
    for block, neuron in neurons:
        found[block, neuron] = 1
    return found


def move(
    hidden: Float[Array, "batch tokens hidden"], neurons: UInt8[Array, " hidden"], first_patch: int
) -> Float[Array, "batch tokens hidden"]:
    """The hidden layer with the activation of `neurons` moved from the patches to the first token.

    There it is the patches' maximum; where a gated MLP makes it negative, what is largest in
    absolute value. The patches get zero; the other prefix tokens keep theirs, as in the paper.

    Args:
      hidden: what an MLP's last map reads.
      neurons: 1 at those that are moved.
      first_patch: index of the first patch among the tokens.
    """
    patches = hidden[:, first_patch:]
    highest, lowest = (of(patches, axis=1, keepdims=True) for of in (jnp.max, jnp.min))
    most = jnp.where(highest >= -lowest, highest, lowest)
    token = jnp.arange(hidden.shape[1])[:, None]
    moved = jnp.where(token == 0, most, jnp.where(token < first_patch, hidden, 0))
    return jnp.where(neurons > 0, moved, hidden)
