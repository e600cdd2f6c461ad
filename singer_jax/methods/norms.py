"""Norms, cosines and quantiles of tokens; the quantiles are found without sorting."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

ARTIFACT = 3.0
"""Ratio to the median of the image above which a patch is an artifact (DINOv2's reach about 10)."""


def token_norms(tokens: Float[Array, "*axes dim"]) -> Float[Array, "*axes"]:
    """Returns the L2 norm of each token in float32, with a zero gradient at zero."""
    squared = jnp.sum(jnp.square(tokens.astype(jnp.float32)), axis=-1)
    return jnp.sqrt(jnp.maximum(squared, jnp.finfo(jnp.float32).tiny))


def unit(tokens: Float[Array, "*axes dim"]) -> Float[Array, "*axes dim"]:
    """Divides each token by its norm, in float32; zero stays zero."""
    return tokens.astype(jnp.float32) / token_norms(tokens)[..., None]


def _largest(norms: Float[Array, "batch patches"], count: int) -> Float[Array, "batch count"]:
    """Returns the `count` largest norms of each image in descending order, without a gradient.

    On a CPU it sorts. XLA's `top_k` gathers the images of all processes there, and two processes
    with several such gathers were seen to block each other: one waited in a gather, the other in a
    reduction inside a loop.
    """
    return jax.lax.platform_dependent(
        jax.lax.stop_gradient(norms),
        cpu=lambda x: -jnp.sort(-x, axis=1)[:, :count],
        default=lambda x: jax.lax.top_k(x, count)[0],
    )


def clip_threshold(
    norms: Float[Array, "batch patches"], quantile: float
) -> Float[Array, "batch 1"]:
    """Returns the norm to which `clip_norms` shortens the patches of each image."""
    above = norms.shape[1] - math.floor(quantile * (norms.shape[1] - 1))
    return _largest(norms, above)[:, -1:]


def clip_norms(
    patches: Float[Array, "batch patches dim"], quantile: float
) -> Float[Array, "batch patches dim"]:
    """Scales patches down to the image's quantile of patch norms if they exceed it, in float32.

    The quantile is the norm of a patch without interpolation (the lower of two neighbours), so that
    clipping twice equals clipping once. No gradient flows through the quantile.
    """
    norms = token_norms(patches)
    threshold = clip_threshold(norms, quantile)
    return patches.astype(jnp.float32) * jnp.minimum(1.0, threshold / norms)[..., None]


def outlier_threshold(
    norms: Float[Array, "batch patches"], quantile: float
) -> Float[Array, "batch 1"]:
    """Returns the quantile of each image's patch norms above which a token is an outlier.

    It interpolates linearly, as `jnp.quantile`, but only between two of the few largest norms,
    because sorting is slow on accelerators. It has no gradient.
    """
    position = quantile * (norms.shape[1] - 1)
    below = math.floor(position)
    upper_weight = position - below
    largest = _largest(norms, norms.shape[1] - below)
    lower, upper = largest[:, -1:], largest[:, max(largest.shape[1] - 2, 0), None]
    return (1 - upper_weight) * lower + upper_weight * upper


def image_medians(patches: Float[Array, "batch patches dim"]) -> Float[Array, "batch 1"]:
    """Returns the median patch norm of each image, at least the smallest normal number."""
    medians = outlier_threshold(token_norms(patches), 0.5)
    return jnp.maximum(medians, jnp.finfo(jnp.float32).tiny)


def is_outlier(
    norms: Float[Array, "batch patches"], quantile: float
) -> Bool[Array, "batch patches"]:
    """Returns True for each token that is an outlier of its image."""
    return norms > outlier_threshold(norms, quantile)


def is_ordinary(
    norms: Float[Array, "batch patches"], quantile: float
) -> Bool[Array, "batch patches"]:
    """Returns True for each token that is no outlier and at most `ARTIFACT` medians long.

    An image may have more artifacts than the share of outliers that the quantile leaves.
    """
    return ~is_outlier(norms, quantile) & (norms <= ARTIFACT * outlier_threshold(norms, 0.5))


def batch_quantile(values: Float[Array, "*axes"], quantile: float) -> Float[Array, ""]:
    """Returns the smallest value that at least the fraction `quantile` of all does not exceed.

    It is found by bisection on the bits of the values, which must not be negative. This takes a few
    sums over the global batch; sorting would gather the batch on every device.
    """
    bits = jax.lax.bitcast_convert_type(values.astype(jnp.float32), jnp.int32)
    wanted = max(1, math.ceil(quantile * values.size))
    bits_of_infinity = 0x7F800000

    def halve(_: int, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = low + (high - low) // 2
        enough = jnp.sum(bits <= middle) >= wanted
        return jnp.where(enough, low, middle + 1), jnp.where(enough, middle, high)

    bounds = (jnp.int32(0), jnp.int32(bits_of_infinity))
    found = jax.lax.fori_loop(0, 31, halve, bounds)[1]
    return jax.lax.bitcast_convert_type(found, jnp.float32)


def cosine_similarity_matrix(
    patches: Float[Array, "batch patches dim"],
) -> Float[Array, "batch patches patches"]:
    """Returns the cosine similarity of every two patch tokens of an image."""
    directions = unit(patches)
    return jnp.einsum("bpd,bqd->bpq", directions, directions)
