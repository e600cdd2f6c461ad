"""Quantised 8-bit matmuls for models that are not trained (qwix)."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from singer_jax.errors import InputError

FORMATS = {"int8": jnp.int8, "fp8": jnp.float8_e4m3fn}
"""Number formats by the name in settings; fp8 has 4 exponent bits and 3 mantissa bits."""

Product = Callable[..., Array]
"""A function like `jax.lax.dot_general`, without batch dimensions."""


def check_installed(format: str) -> None:
    """Raises `InputError` if the library is not installed."""
    if importlib.util.find_spec("qwix") is None:
        raise InputError(
            f"teacher.precision: {format} needs qwix; pip install 'singer-jax[quantised]', "
            "or remove the setting"
        )


@functools.cache  # one object per format, because model graphs are compared
def product(format: str) -> Product:
    """Returns the matmul of tokens and a kernel in `format`, with the gradient of the float matmul.

    The quantisation is symmetric with scales from the largest absolute value. Each token and each
    output channel of the kernel has its own scale, so that an outlier token does not reduce the
    precision of other tokens. Sums are exact (int8) or in float32. The gradient of the tokens uses
    the unquantised kernel (a straight-through estimate); the kernel has no gradient.
    """
    return functools.partial(_dot_general, format)


def _dot_general(
    format: str,
    x: Float[Array, "..."],
    kernel: Float[Array, "..."],
    dimension_numbers: Any,
    precision: Any = None,
    out_sharding: Any = None,
) -> Float[Array, "..."]:
    """Computes the matmul with the arguments of `nnx.Linear`'s `dot_general`."""
    del precision, out_sharding  # `precision` is for float32 matmuls; `out_sharding` is not used
    return _product(x, kernel, format, dimension_numbers)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _product(x: Array, kernel: Array, format: str, dimension_numbers: Any) -> Array:
    import qwix

    def quantised(value: Array, summed: tuple[int, ...]) -> qwix.QArray:
        channels = [axis for axis in range(value.ndim) if axis not in summed]
        wide = value.astype(jnp.float32)  # the scales have this dtype
        return qwix.quantize(wide, FORMATS[format], channelwise_axes=channels)

    operands = map(quantised, (x, kernel), dimension_numbers[0])
    return qwix.dot_general(*operands, dimension_numbers).astype(x.dtype)


def _forward(x: Array, kernel: Array, format: str, dimension_numbers: Any) -> tuple[Array, Any]:
    return _product(x, kernel, format, dimension_numbers), (x, kernel)


def _backward(
    format: str, dimension_numbers: Any, kept: tuple[Array, Array], gradient: Array
) -> tuple[Array, Array]:
    x, kernel = kept

    def in_float(x: Array) -> Array:
        return jax.lax.dot_general(x, kernel, dimension_numbers)

    (of_x,) = jax.linear_transpose(in_float, x)(gradient)
    return of_x, jnp.zeros_like(kernel)


_product.defvjp(_forward, _backward)
