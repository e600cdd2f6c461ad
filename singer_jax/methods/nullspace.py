"""The left null space of the next block: which perturbations it does not see.

All in float32 at the highest matmul precision: the defaults of TPUs and TF32 would spoil singular
values near the threshold.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.lax import Precision
from jaxtyping import Array, Bool, Float, Int

from singer_jax.errors import InputError
from singer_jax.methods.jacobi import left_singular
from singer_jax.models.vit import VisionTransformer
from singer_jax.settings.ranges import NOT_NEGATIVE, POSITIVE, OneOf, optional
from singer_jax.settings.settings import Settings, setting

MAPS = ("mlp", "mlp_norm", "block")
SOURCES = (*MAPS, "calibrated")
RULES = ("quantile", "absolute", "relative", "rank")


@dataclasses.dataclass(frozen=True)
class NullSpaceSettings(Settings):
    """Where the null space comes from, and how a refiner uses it."""

    mode: str = setting(
        "project",
        OneOf(("project", "soft", "init", "random")),
        "the update is projected onto the null space, filtered softly, only started in it, or "
        "neither",
    )
    weight_matrix: str = setting(
        "mlp",
        OneOf(SOURCES),
        "the linear map that is decomposed (`methods.nullspace.linear_map`), or `calibrated`: the "
        "`rank` directions that hold the outliers of the first batches and that `mlp` sees least "
        "(`methods.calibration`)",
    )
    ridge: float = setting(
        1.0,
        POSITIVE,
        "of `calibrated`, relative to the mean squared singular value: the larger, the more the "
        "directions hold of the outliers, and the more is seen of them",
    )
    threshold_type: str = setting(
        "quantile", OneOf(RULES), "how `threshold` is read; `relative` is to the largest value"
    )
    threshold: float = setting(0.5, NOT_NEGATIVE, "below which a singular value counts as null")
    init: str | None = setting(
        None,
        optional(OneOf(("identity", "official"))),
        "of the refiner; None: identity, of `init` and `random` official",
    )
    direction_order: str = setting(
        "most_null",
        OneOf(("most_null", "official")),
        "which directions `init` starts from (`methods.nullspace.directions`)",
    )


class NullSpace(NamedTuple):
    """Left singular vectors (columns) and singular values of W; the values descend.

    There are as many directions as dimensions, or fewer where W is restricted to a subspace.
    """

    vectors: Float[Array, "dim directions"]
    values: Float[Array, " directions"]


def linear_map(model: VisionTransformer, layer: int, source: str) -> Float[Array, "dim out"]:
    """What reads layer `layer`, as one linear map W of row vectors: rows a pass it as a W.

    The reader is the next block, or block `layer` itself where it is the last.

    Args:
      model: the teacher.
      layer: the distilled block.
      source: `mlp` (the paper's): W1^T W2^T of the reader's MLP, for a gated one
        [W_gate^T W2^T | W_value^T W2^T]; biases, activation, norms (also one of the hidden layer,
        as in EVA-02) and LayerScale are ignored. `mlp_norm`: the same with the scales of all of
        these. `block`: the input maps of attention and MLP side by side, each behind its norm's
        scale, so that neither path sees a perturbation in the null space, up to the norms'
        centring and rescaling. Where the norms follow attention and MLP, nothing precedes them.
    """
    block = model.block(_reader(model, layer))

    def read(x: Array) -> Array:
        return x.astype(jnp.float32)

    first = [read(part) for part in block.mlp.input_maps()]
    before_attention, before_mlp = (read(scale)[:, None] for scale in block.input_scales())
    if source == "block":
        attention = [before_attention * read(part) for part in block.attn.input_maps()]
        return jnp.concatenate([*attention, *(before_mlp * part for part in first)], axis=1)
    second = read(block.mlp.output_map(norm=source == "mlp_norm"))
    if source == "mlp_norm":
        first = [before_mlp * part for part in first]
        layer_scale = block.scales()[1]
        second = second if layer_scale is None else second * read(layer_scale)
    maps = [jnp.matmul(part, second, precision=Precision.HIGHEST) for part in first]
    return jnp.concatenate(maps, axis=1)


def _reader(model: VisionTransformer, layer: int) -> int:
    return min(layer + 1, model.arch.depth - 1)


_once: contextvars.ContextVar[dict[Any, NullSpace] | None] = contextvars.ContextVar(
    "decomposed", default=None
)


@contextlib.contextmanager
def decomposing_once() -> Iterator[None]:
    """Within it `of_layer` decomposes each linear map once, of models that outlive it."""
    token = _once.set({})
    try:
        yield
    finally:
        _once.reset(token)


def of_layer(model: VisionTransformer, layer: int, source: str) -> NullSpace:
    """`decompose` of `linear_map`, whose arguments these are."""
    known = _once.get()
    if known is None:
        return decompose(linear_map(model, layer, source))
    key = (id(model), _reader(model, layer), source)
    if key not in known:
        known[key] = decompose(linear_map(model, layer, source))
    return known[key]


def decompose(linear_map: Float[Array, "dim out"]) -> NullSpace:
    """The singular value decomposition W = U S V^T without V; `out` is at least `dim`."""

    def library(matrix: Array) -> tuple[Array, Array]:
        return jnp.linalg.svd(matrix, full_matrices=False)[:2]

    return NullSpace(*jax.lax.platform_dependent(linear_map, tpu=left_singular, default=library))


def threshold_value(space: NullSpace, rule: str, threshold: float) -> Float[Array, ""]:
    """tau, below which a singular value counts as null.

    Args:
      space: of the layer.
      rule: how `threshold` is read: `absolute` is tau itself, `quantile` that quantile of the
        layer's values, `relative` that multiple of the largest, `rank` that many values, or all.
      threshold: the number.
    """
    if rule == "quantile":
        position = threshold * (len(space.values) - 1)
        return jnp.interp(position, jnp.arange(len(space.values)), space.values[::-1])
    if rule == "relative":
        return threshold * space.values[0]
    if rule == "rank":
        above = jnp.concatenate([2 * space.values[:1], space.values])
        return above[max(len(space.values) - int(threshold), 0)]
    return jnp.asarray(threshold, jnp.float32)


def check_threshold(rule: str, threshold: float, dim: int) -> None:
    """Raises `InputError` where a threshold is outside the range of its rule."""
    limit = {"quantile": 1, "relative": 1, "rank": dim}.get(rule)
    if limit is not None and threshold > limit:
        raise InputError(
            f"method.nullspace.threshold: {threshold} is not in 0..{limit}, the range of the rule "
            f"{rule}"
        )


def null_dim(space: NullSpace, tau: Float[Array, ""]) -> Int[Array, ""]:
    """How many singular values lie below tau."""
    return jnp.sum(space.values < tau)


def selected(space: NullSpace, tau: Float[Array, ""], rank: int) -> Bool[Array, " directions"]:
    """The directions of `projector`: those below tau, or the `rank` smallest if fewer are."""
    count = space.values.shape[0]
    return (space.values < tau) | (jnp.arange(count) >= count - rank)


def projector(space: NullSpace, tau: Float[Array, ""], rank: int) -> Float[Array, "dim dim"]:
    """Q = U_n U_n^T, the orthogonal projector on the `selected` directions."""
    return _weighted(space, selected(space, tau, rank).astype(jnp.float32))


def soft_filter(space: NullSpace, tau: Float[Array, ""]) -> Float[Array, "dim dim"]:
    """Q = U diag(tau^2 / (tau^2 + S^2)) U^T: what is seen less passes more."""
    tiny = jnp.finfo(jnp.float32).tiny  # a map without any singular value passes nothing
    return _weighted(space, tau**2 / jnp.maximum(tau**2 + space.values**2, tiny))


def _weighted(space: NullSpace, weights: Float[Array, " directions"]) -> Float[Array, "dim dim"]:
    return jnp.matmul(space.vectors * weights, space.vectors.T, precision=Precision.HIGHEST)


def directions(
    space: NullSpace, tau: Float[Array, ""], rank: int, order: str, key: jax.Array
) -> Float[Array, "rank dim"]:
    """`rank` unit rows to start a refiner from; random ones where fewer lie below tau.

    Args:
      space: of the layer.
      tau: directions with a smaller singular value count as null.
      rank: how many rows.
      order: `official` takes the first below tau in descending order of S, the least null ones
        (as the official code); `most_null` the smallest ones.
      key: for the random rows.
    """
    dim, last = space.vectors.shape[0], space.values.shape[0] - 1
    count = null_dim(space, tau)
    steps = jnp.arange(rank)
    index = last + 1 - count + steps if order == "official" else last - steps
    rows = space.vectors.T[jnp.clip(index, 0, last)]
    return jnp.where((steps < count)[:, None], rows, random_directions(key, rank, dim))


def random_directions(key: jax.Array, rank: int, dim: int) -> Float[Array, "rank dim"]:
    """Random unit rows."""
    rows = jax.random.normal(key, (rank, dim))
    return rows / jnp.linalg.norm(rows, axis=1, keepdims=True)


def deviations(
    patches: Float[Array, "batch patches dim"], outliers: Bool[Array, "batch patches"]
) -> Float[Array, "batch patches dim"]:
    """Each outlier's difference from the mean patch token of its image, in float32; else zero."""
    patches = patches.astype(jnp.float32)
    return jnp.where(outliers[..., None], patches - patches.mean(1, keepdims=True), 0.0)


def energy_share(
    projection: Float[Array, "dim dim"],
    patches: Float[Array, "batch patches dim"],
    outliers: Bool[Array, "batch patches"],
) -> Float[Array, ""]:
    """The share of the outlier tokens' energy that Q keeps: sum ||d Q||^2 / sum ||d||^2.

    d is a row of `deviations`. A projected update can only remove what lies in the subspace, so a
    small share says that it cannot remove much.
    """
    difference = deviations(patches, outliers)
    kept = jnp.sum(jnp.square(difference @ projection))
    return kept / jnp.maximum(jnp.sum(jnp.square(difference)), jnp.finfo(jnp.float32).tiny)
