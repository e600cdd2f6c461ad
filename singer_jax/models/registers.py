"""Test-time registers: activations of a few neurons are moved from patches to an added token.

"Vision Transformers Don't Need Trained Registers", NeurIPS 2025 (arXiv 2506.08010): in the MLPs of
the blocks before the outliers appear, a few neurons are active at the patches that become outliers.
The added token starts at zero, is not trained, and is the first of the tokens.
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
"""Pairs of a block and a position in the hidden layer of its MLP."""

NAME = "register_neurons"
"""Name of the attribute of a `VisionTransformer`, a parameter that no weights file contains."""


@dataclasses.dataclass(frozen=True)
class RegisterSettings(Settings):
    """Settings of the search for register neurons (`training.artifact_removal`)."""

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
    """Mask [depth, hidden] with 1 at each neuron whose activation is moved."""


def marked(neurons: Neurons, shape: tuple[int, int]) -> UInt8[np.ndarray, "depth hidden"]:
    """Returns the mask `RegisterNeurons` for some neurons."""
    found = np.zeros(shape, np.uint8)
    for block, neuron in neurons:
        found[block, neuron] = 1
    return found


def move(
    hidden: Float[Array, "batch tokens hidden"], neurons: UInt8[Array, " hidden"], first_patch: int
) -> Float[Array, "batch tokens hidden"]:
    """Moves the activation of `neurons` in a hidden layer from the patches to the first token.

    The first token gets the value of the patch with the largest absolute value, which may be
    negative in a gated MLP. Patches get zero; other prefix tokens are unchanged, as in the paper.

    Args:
      hidden: hidden layer of an MLP.
      neurons: 1 at each neuron whose activation is moved.
      first_patch: index of the first patch among the tokens.
    """
    patches = hidden[:, first_patch:]
    highest, lowest = (of(patches, axis=1, keepdims=True) for of in (jnp.max, jnp.min))
    most = jnp.where(highest >= -lowest, highest, lowest)
    token = jnp.arange(hidden.shape[1])[:, None]
    moved = jnp.where(token == 0, most, jnp.where(token < first_patch, hidden, 0))
    return jnp.where(neurons > 0, moved, hidden)
