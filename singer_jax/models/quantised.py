"""Products of matrices in 8 bits, for models that are not trained (qwix)."""

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
"""By the name that a setting gives them; fp8 has 4 bits of exponent and 3 of mantissa."""

Product = Callable[..., Array]
"""As `jax.lax.dot_general`, without batch dimensions."""


def check_installed(format: str) -> None:
    """Raises an `InputError` where the library is missing."""
    if importlib.util.find_spec("qwix") is None:
        raise InputError(
            f"teacher.precision: {format} needs qwix; pip install 'singer-jax[quantised]', "
            "or leave the setting away"
        )


@functools.cache  # one object a format: a model's graph is compared with it
def product(format: str) -> Product:
    """The product of tokens and a kernel in `format`, with the gradient of the float product.

    Symmetric, with scales from the largest absolute value: of a token over all that is summed, so
    that a token of huge norm costs the others nothing, and of an output channel of the kernel.
    Sums are exact (int8) or float32. The tokens' gradient takes the kernel as it is (a
    straight-through estimate); the kernel has none.
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
    """Takes the arguments by which `nnx.Linear` calls its `dot_general`."""
    del precision, out_sharding  # the first is of float32 products; the second is never given
    return _product(x, kernel, format, dimension_numbers)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _product(x: Array, kernel: Array, format: str, dimension_numbers: Any) -> Array:
    import qwix

    def quantised(value: Array, summed: tuple[int, ...]) -> qwix.QArray:
        channels = [axis for axis in range(value.ndim) if axis not in summed]
        wide = value.astype(jnp.float32)  # whose type the scales have
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
