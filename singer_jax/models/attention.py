"""Scaled dot-product attention: a JAX implementation, and cuDNN's kernel.

Axis names: batch, tokens, queries, heads.
"""

from __future__ import annotations

import functools
import logging

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

LOG = logging.getLogger("singer_jax")


def attend(
    query: Float[Array, "batch queries heads head_dim"],
    key: Float[Array, "batch tokens heads head_dim"],
    value: Float[Array, "batch tokens heads head_dim"],
    fused: bool = False,
    bias: Float[Array, "heads queries tokens"] | None = None,
    heads_first: bool = False,
) -> Float[Array, "batch queries heads head_dim"]:
    """Computes scaled dot-product attention, normalising after the product with `value`.

    This saves one pass over the tokens x tokens matrix compared with
    `jax.nn.dot_product_attention` (benchmarks/choices.py measures the gain).

    Args:
      query, key, value: outputs of the projections, with the heads in the third axis.
      fused: use cuDNN's kernel, which does not store that matrix. It supports neither float32 nor a
        bias.
      bias: bias that is added to the logits.
      heads_first: transpose the inputs and the result instead of the products
        (`backends.Choices.heads_first`).
    """
    if fused and query.dtype != jnp.float32 and bias is None:
        return _attend_by_cudnn(query, key, value)
    query = query * query.shape[-1] ** -0.5
    products = "bqhd,bkhd->bhqk", "bhqk,bkhd->bqhd"
    if heads_first:
        query, key, value = (x.swapaxes(1, 2) for x in (query, key, value))
        products = "bhqd,bhkd->bhqk", "bhqk,bhkd->bhqd"
    logits = jnp.einsum(products[0], query, key, preferred_element_type=jnp.float32)
    if bias is not None:
        logits += bias.astype(jnp.float32)
    weights = jnp.exp(logits - jax.lax.stop_gradient(logits.max(-1, keepdims=True)))
    mixed = jnp.einsum(
        products[1], weights.astype(value.dtype), value, preferred_element_type=jnp.float32
    )
    sums = weights.sum(-1, keepdims=True)
    if heads_first:
        return (mixed / sums).astype(value.dtype).swapaxes(1, 2)
    return (mixed / sums.swapaxes(1, 2)).astype(value.dtype)


@jax.custom_vjp
def _attend_by_cudnn(query: Array, key: Array, value: Array) -> Array:
    return jax.nn.dot_product_attention(query, key, value, implementation="cudnn")


def attend_padded(query: Array, key: Array, value: Array, implementation: str = "cudnn") -> Array:
    """Computes `attend` with cuDNN, padded to the even number of tokens that its gradient needs.

    The added tokens are masked.

    Args:
      query, key, value: arguments of `attend`.
      implementation: implementation argument of `jax.nn.dot_product_attention`.
    """
    batch, tokens = query.shape[:2]
    padded = [jnp.pad(x, ((0, 0), (0, tokens % 2), (0, 0), (0, 0))) for x in (query, key, value)]
    lengths = jnp.full(batch, tokens, jnp.int32)
    mixed = jax.nn.dot_product_attention(
        *padded,
        query_seq_lengths=lengths,
        key_value_seq_lengths=lengths,
        implementation=implementation,
    )
    return mixed[:, :tokens]


# The teacher's pass has no gradient and needs no padding.
_attend_by_cudnn.defvjp(
    lambda *heads: jax.vjp(attend_padded, *heads), lambda gradient_of, mixed: gradient_of(mixed)
)


@functools.cache
def has_fused_attention() -> bool:
    """Returns whether cuDNN's attention and its gradient compile here.

    They need a GPU of compute capability 8 or newer and a matching cuDNN library. To compile for a
    described GPU, without a GPU, the library is sufficient.
    """
    x = jax.ShapeDtypeStruct((2, 197, 3, 64), jnp.bfloat16)
    here = jax.default_backend() == "gpu"
    try:
        traced = jax.jit(jax.grad(lambda x: attend(x, x, x, fused=True).sum())).trace(x)
        if here:
            traced.lower().compile()
    except Exception as error:  # exceptions of many types from the library
        if here:
            reason = str(error).strip().splitlines()[0]
            LOG.warning("cuDNN's attention is not used: %s", reason)
        return False
    return True
