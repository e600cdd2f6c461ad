"""Singular defect of a stack of blocks: the direction that the linearised blocks amplify most.

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

_NODES = np.linspace(-8, 8, 257, dtype=np.float32)  # nodes for a standard normal variable
_WEIGHTS = np.exp(-(_NODES**2) / 2) / np.exp(-(_NODES**2) / 2).sum()


def singular_defect(model: VisionTransformer, layer: int) -> Float[Array, " dim"]:
    """Returns the unit output direction that the linearised blocks 0 to `layer` amplify most.

    With row vectors, each block is (I + A)(I + M) (`linearise`), and the direction is the leading
    right singular vector of their product. The paper uses columns, for which it is the left one.
    """
    stack = jnp.eye(model.arch.embed_dim)
    for index in range(layer + 1):
        for step in linearise(model.block(index)):
            stack = stack + _product(stack, step)
        stack = stack / jnp.max(jnp.abs(stack))  # only the direction matters, not the scale
    return nullspace.decompose(stack.T).vectors[:, 0]


def linearise(block: Block) -> tuple[Float[Array, "dim dim"], Float[Array, "dim dim"]]:
    """Returns A and M: the updates of attention and MLP as linear maps of row vectors.

    A LayerNorm becomes its centring and its scale, with tokens taken to have unit variance. An
    RMSNorm and the norms inside attention and MLP become their scales. Every token attends to
    itself alone. The MLP's hidden layer becomes the least-squares linear map on standard normal
    tokens. Biases are dropped.
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
    """Returns the least-squares linear map B from a token to the MLP's hidden layer h.

    B minimises E ||h(x) - h0 - x B||^2. For standard normal x, B = E[x^T h(x)]. For a hidden unit
    f(x w + b) and z = x w / ||w||, this is E[z f] w / ||w||. For silu(g) v with two such maps, the
    part of v along g is weighted by E[z silu(g) v] in the same way, and the rest of its map by
    E[silu(g)].
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
    along = jnp.sum(gate * value, axis=0) / size  # component of v per unit of z
    gates = jax.nn.silu(inputs)
    with_gate = mean(_NODES[:, None] * gates * (biases[1] + _NODES[:, None] * along))
    return gate * with_gate / size + (value - gate * along / size) * mean(gates)


def median_angle(
    patches: Float[Array, "batch patches dim"],
    outliers: Bool[Array, "batch patches"],
    direction: Float[Array, " dim"],
) -> float:
    """Returns the median angle in degrees, 0 to 90, between outlier tokens and a unit direction.

    The angle is that of each token's `nullspace.deviations`. The median is taken over tokens,
    because some outliers of a quantile are no artifacts. Unrelated directions in many dimensions
    give nearly 90; without outliers the result is 90.
    """
    rows = np.asarray(nullspace.deviations(patches, outliers), np.float64)[np.asarray(outliers)]
    if not len(rows):
        return 90.0
    norms = np.maximum(np.linalg.norm(rows, axis=1), np.finfo(np.float32).tiny)
    cosines = np.abs(rows @ np.asarray(direction, np.float64)) / norms
    return float(np.degrees(np.median(np.arccos(np.minimum(cosines, 1)))))


def _read(x: Array) -> Float[Array, "..."]:
    return x.astype(jnp.float32)
