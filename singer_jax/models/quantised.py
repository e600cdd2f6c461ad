"""Quantised 8-bit matmuls for models that are not trained.

int8 has a scale for each token and each output channel (qwix). fp8 has one scale for the input and
one for the kernel, both known before the step, so that a GPU's matmul reads and writes 8-bit
numbers without a pass that searches for the largest value.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from singer_jax.errors import InputError

FORMATS = ("int8", "fp8")
"""Number formats; fp8 has 4 exponent bits and 3 mantissa bits."""

_FP8 = jnp.float8_e4m3fn
_LARGEST_FP8 = float(jnp.finfo(_FP8).max)


def check_installed(format: str) -> None:
    """Raises `InputError` if the format needs a library that is not installed."""
    if format == "int8" and importlib.util.find_spec("qwix") is None:
        raise InputError(
            "teacher.precision: int8 needs qwix; pip install 'singer-jax[quantised]', or remove "
            "the setting"
        )


def int8_product(
    x: Float[Array, "..."],
    kernel: Float[Array, "..."],
    dimension_numbers: Any,
) -> Float[Array, "..."]:
    """Computes the matmul of tokens and a kernel in int8.

    The quantisation is symmetric with scales from the largest absolute value. Each token and each
    output channel of the kernel has its own scale, so that an outlier token does not reduce the
    precision of other tokens. Sums are exact. The gradient of the tokens uses the unquantised
    kernel (a straight-through estimate); the kernel has no gradient. Arguments are those of
    `jax.lax.dot_general`, without batch dimensions.
    """
    return _quantised(_int8_product, x, kernel, None, dimension_numbers)


def fp8_product(
    x: Float[Array, "..."],
    kernel: Float[Array, "..."],
    scales: Float[Array, "2"],
    dimension_numbers: Any,
) -> Float[Array, "..."]:
    """Computes the matmul of tokens and a kernel in fp8, with the gradient of `int8_product`.

    Args:
      x: tokens.
      kernel: kernel, or a part of it.
      scales: scales of tokens and kernel from `fp8_scales`. Larger values than they allow are
        replaced by the largest number of the format.
      dimension_numbers: axes as for `jax.lax.dot_general`, without batch dimensions.
    """
    return _quantised(_fp8_product, x, kernel, scales, dimension_numbers)


def fp8_scales(
    kernel: Float[Array, "*blocks dim out"],
    scale: Float[Array, "*blocks dim"],
    bias: Float[Array, "*blocks dim"] | None,
) -> Float[Array, "*blocks 2"]:
    """Returns the scales of a normalised input and of the kernel that reads it.

    They are powers of two. No value exceeds the largest number of the format: LayerNorm and RMSNorm
    divide by the root mean square of `dim` values, so none is larger than sqrt(dim) after it.

    Args:
      kernel: kernel of the linear map.
      scale, bias: parameters of the norm before it.
    """
    bound = jnp.abs(scale.astype(jnp.float32)) * scale.shape[-1] ** 0.5
    if bias is not None:
        bound += jnp.abs(bias.astype(jnp.float32))
    largest = bound.max(-1), jnp.abs(kernel.astype(jnp.float32)).max((-2, -1))
    exponents = jnp.frexp(jnp.stack(largest, axis=-1) / _LARGEST_FP8)[1]
    return jnp.ldexp(jnp.float32(1), exponents)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 4))
def _quantised(
    product: Callable[..., Array], x: Array, kernel: Array, scales: Array | None, dims: Any
) -> Array:
    return product(x, kernel, scales, dims)


def _int8_product(x: Array, kernel: Array, scales: None, dimension_numbers: Any) -> Array:
    import qwix

    def quantised(value: Array, summed: tuple[int, ...]) -> qwix.QArray:
        channels = [axis for axis in range(value.ndim) if axis not in summed]
        wide = value.astype(jnp.float32)  # the scales have this dtype
        return qwix.quantize(wide, jnp.int8, channelwise_axes=channels)

    operands = map(quantised, (x, kernel), dimension_numbers[0])
    return qwix.dot_general(*operands, dimension_numbers).astype(x.dtype)


@functools.partial(jax.jit, static_argnums=3)
def _fp8_product(x: Array, kernel: Array, scales: Array, dimension_numbers: Any) -> Array:
    def rounded(value: Array, scale: Array) -> Array:
        # On a GPU XLA replaces the product and the conversions before it by a product in fp8.
        scaled = jnp.clip(value.astype(jnp.float32) / scale, -_LARGEST_FP8, _LARGEST_FP8)
        return scaled.astype(_FP8).astype(value.dtype) * scale.astype(value.dtype)

    operands = (rounded(value, scale) for value, scale in zip((x, kernel), scales, strict=True))
    return jax.lax.dot_general(*operands, dimension_numbers)


FP8_PRODUCT = _fp8_product.__name__
"""Name of the function in a traced program whose matmul is computed in fp8."""


def _forward(
    product: Callable[..., Array], x: Array, kernel: Array, scales: Array | None, dims: Any
) -> tuple[Array, Any]:
    return product(x, kernel, scales, dims), (x, kernel, scales)


def _backward(
    product: Callable[..., Array], dims: Any, kept: tuple[Any, ...], gradient: Array
) -> tuple[Array, Array, Array | None]:
    x, kernel, scales = kept

    def in_float(x: Array) -> Array:
        return jax.lax.dot_general(x, kernel, dims)

    (of_x,) = jax.linear_transpose(in_float, x)(gradient)
    return of_x, jnp.zeros_like(kernel), None if scales is None else jnp.zeros_like(scales)


_quantised.defvjp(_forward, _backward)
