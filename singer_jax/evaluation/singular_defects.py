"""Where a stack of blocks, taken as linear maps, would send every token: its singular defect.

"SINDER: Repairing the Singular Defects of DINOv2", ECCV 2024, finds that the outlier tokens of a
vision transformer point along the leading left singular vector of its linearised blocks.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.lax import Precision
from jaxtyping import Array, Bool, Float

from singer_jax.methods import nullspace
from singer_jax.models.layers import Block, Mlp, SwiGLU
from singer_jax.models.vit import VisionTransformer

_product = functools.partial(jnp.matmul, precision=Precision.HIGHEST)

_NODES = np.linspace(-8, 8, 257, dtype=np.float32)  # of a standard normal number
_WEIGHTS = np.exp(-(_NODES**2) / 2) / np.exp(-(_NODES**2) / 2).sum()


def singular_defect(model: VisionTransformer, layer: int) -> Float[Array, " dim"]:
    """The unit direction that blocks 0 to `layer`, linearised, amplify most, in their output.

    Each block is (I + A)(I + M) of row vectors (`linearise`), and the direction is the leading
    right singular vector of their product: left where tokens are columns, as in the paper.
    """
    stack = jnp.eye(model.arch.embed_dim)
    for index in range(layer + 1):
        for step in linearise(model.block(index)):
            stack = stack + _product(stack, step)
        stack = stack / jnp.max(jnp.abs(stack))  # only its direction matters, not its growth
    return nullspace.decompose(stack.T).vectors[:, 0]


def linearise(block: Block) -> tuple[Float[Array, "dim dim"], Float[Array, "dim dim"]]:
    """A and M: what attention and MLP add to a token, as maps of row vectors without constants.

    A LayerNorm is its centring and its scale: tokens are taken to have unit variance. An RMSNorm
    and the norms inside attention and MLP are their scales alone. Every token attends to itself
    alone. The MLP's hidden layer is the linear map of least squares on standard normal tokens.
    """
    dim = block.norm1.scale.shape[0]
    centring = jnp.eye(dim) - 1 / dim if isinstance(block.norm1, nnx.LayerNorm) else jnp.eye(dim)

    def between(before: Array, inner: Array, outer: Array, after: Array | None) -> Array:
        first = jnp.eye(dim) if block.post_norm else centring
        whole = _product(_product(first * _read(before), inner), _read(outer))
        whole = _product(whole, centring) if block.post_norm else whole
        return whole if after is None else whole * _read(after)

    value, hidden = _read(block.attn.value_map()), _hidden(block.mlp)
    before, after = block.input_scales(), block.scales()
    return (
        between(before[0], value, block.attn.output_map(), after[0]),
        between(before[1], hidden, block.mlp.output_map(norm=True), after[1]),
    )


def _hidden(mlp: Mlp) -> Float[Array, "dim hidden"]:
    """From a token to the MLP's hidden layer h: the minimum over B of E ||h(x) - h0 - x B||^2.

    For standard normal x it is B = E[x^T h(x)]. Of a hidden unit f(x w + b), with z = x w / ||w||,
    that is E[z f] w / ||w||. Of silu(g) v of two such maps, the part of v that goes with g is
    weighted by E[z silu(g) v] likewise, and the rest of its map by E[silu(g)].
    """
    maps = [_read(part) for part in mlp.input_maps()]
    layers = (mlp.fc1_g, mlp.fc1_x) if isinstance(mlp, SwiGLU) else (mlp.fc1,)
    if layers[0].bias is None:
        biases = [jnp.zeros(part.shape[1]) for part in maps]
    else:
        biases = jnp.split(jnp.concatenate([_read(part.bias[...]) for part in layers]), len(maps))
    gate, bias = maps[0], biases[0]
    size = jnp.maximum(jnp.linalg.norm(gate, axis=0), jnp.finfo(jnp.float32).tiny)
    inputs = bias + _NODES[:, None] * size

    def mean(values: Float[Array, "nodes hidden"]) -> Float[Array, " hidden"]:
        return jnp.sum(_WEIGHTS[:, None] * values, axis=0)

    if isinstance(mlp, Mlp):
        return gate * mean(_NODES[:, None] * mlp.activation(inputs)) / size
    value = maps[1]
    along = jnp.sum(gate * value, axis=0) / size  # of v, per unit of z
    gates = jax.nn.silu(inputs)
    with_gate = mean(_NODES[:, None] * gates * (biases[1] + _NODES[:, None] * along))
    return gate * with_gate / size + (value - gate * along / size) * mean(gates)


def median_angle(
    patches: Float[Array, "batch patches dim"],
    outliers: Bool[Array, "batch patches"],
    direction: Float[Array, " dim"],
) -> float:
    """The angle in degrees, 0 to 90, between outlier tokens and the line of a unit direction.

    Of each token's `nullspace.deviations`, and the median over tokens: some outliers of a quantile
    are no artifacts. Nearly 90 in many dimensions where they have nothing to do with each other,
    and 90 without outliers.
    """
    rows = np.asarray(nullspace.deviations(patches, outliers), np.float64)[np.asarray(outliers)]
    if not len(rows):
        return 90.0
    norms = np.maximum(np.linalg.norm(rows, axis=1), np.finfo(np.float32).tiny)
    cosines = np.abs(rows @ np.asarray(direction, np.float64)) / norms
    return float(np.degrees(np.median(np.arccos(np.minimum(cosines, 1)))))


def _read(x: Array) -> Float[Array, "..."]:
    return x.astype(jnp.float32)
