"""The left null space of the next block: perturbations that do not change its output.

Everything is computed in float32 at the highest matmul precision. The defaults of TPUs and TF32 are
too inaccurate for singular values near the threshold.
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
RULES = ("quantile", "absolute", "relative", "rank", "energy")
DECOMPOSITIONS = ("auto", "svd", "jacobi")


@dataclasses.dataclass(frozen=True)
class NullSpaceSettings(Settings):
    """Settings of the null space and of its use in a refiner."""

    mode: str = setting(
        "project",
        OneOf(("project", "soft", "init", "random")),
        "Use of the null space: `project` projects the refiner's update onto it, `soft` attenuates "
        "the other directions, `init` uses it only for initialisation, `random` ignores it.",
    )
    weight_matrix: str = setting(
        "mlp",
        OneOf(SOURCES),
        "Linear map of the next block that is decomposed (`methods.nullspace.linear_map`). "
        "`calibrated`: the `rank` directions that hold the outliers of the first batches and to "
        "which `mlp` is least sensitive (`methods.calibration`).",
    )
    ridge: float = setting(
        1.0,
        POSITIVE,
        "Ridge of `calibrated`, relative to the mean squared singular value. A larger value "
        "removes more outlier energy but perturbs the next block more.",
    )
    threshold_type: str = setting(
        "quantile",
        OneOf(RULES),
        "Interpretation of `threshold`: a quantile of the singular values, an absolute value, a "
        "multiple of the largest singular value, or the number of directions. `energy`: the "
        "subspace is the smallest one that can shorten the outliers of the first batches to "
        "`threshold` median patch norms (`methods.calibration`).",
    )
    threshold: float = setting(
        0.5,
        NOT_NEGATIVE,
        "Threshold below which singular values count as null. For `energy`: the length that an "
        "outlier keeps at most beside its image's mean patch, in median patch norms.",
    )
    init: str | None = setting(
        None,
        optional(OneOf(("identity", "official", "fitted"))),
        "Initialisation of the refiner: `identity` starts without an update, `official` as in "
        "the official code, `fitted` with the update in closed form that removes the outliers of "
        "the first batches (`methods.fitted`). None: `official` for the modes `init` and `random`, "
        "else `identity`.",
    )
    direction_order: str = setting(
        "most_null",
        OneOf(("most_null", "official")),
        "Directions from which the mode `init` starts (`methods.nullspace.directions`).",
    )
    decomposition: str = setting(
        "auto",
        OneOf(DECOMPOSITIONS),
        "Algorithm of the singular value decomposition: `svd` is jnp.linalg.svd, `jacobi` "
        "one-sided Jacobi rotations (`methods.jacobi`), which a TPU compiles faster. `auto`: "
        "`jacobi` on a TPU, else `svd`.",
    )


class NullSpace(NamedTuple):
    """Left singular vectors (columns) and descending singular values of W.

    There are as many directions as dimensions, or fewer if W is restricted to a subspace.

    Attributes:
      vectors, values: The singular vectors and values.
      chosen: Number of directions, counted from the last, that the threshold type `energy` chooses;
        None for the other types.
      left: Root mean square length of an outlier outside the chosen directions, in median patch
        norms; None if nothing is chosen.
      ridge: The chosen ridge of `calibrated`; None if it is that of the settings.
    """

    vectors: Float[Array, "dim directions"]
    values: Float[Array, " directions"]
    chosen: Int[Array, ""] | None = None
    left: Float[Array, ""] | None = None
    ridge: Float[Array, ""] | None = None


def linear_map(model: VisionTransformer, layer: int, source: str) -> Float[Array, "dim out"]:
    """Returns the linear map W that approximates the block reading `layer`; it maps rows a to a W.

    The reading block is the next one, or block `layer` itself if it is the last.

    Args:
      model: The teacher.
      layer: The distilled block.
      source: `mlp` (as in the paper): W1^T W2^T of the block's MLP, for a gated MLP
        [W_gate^T W2^T | W_value^T W2^T]; biases, activation, norms (also one of the hidden layer,
        as in EVA-02) and LayerScale are ignored. `mlp_norm`: the same with the scales of the norms
        and LayerScale. `block`: the input maps of attention and MLP side by side, each after the
        scale of its norm, so that a perturbation in the null space changes neither path, up to the
        norms' centring and rescaling. In post-norm models no scale precedes the maps.
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
    """Makes `of_layer` decompose each linear map once; the models must outlive the context."""
    token = _once.set({})
    try:
        yield
    finally:
        _once.reset(token)


def of_layer(
    model: VisionTransformer, layer: int, source: str, decomposition: str = "auto"
) -> NullSpace:
    """Returns `decompose(linear_map(...))`; the arguments are those of these functions."""
    known = _once.get()
    if known is None:
        return decompose(linear_map(model, layer, source), decomposition)
    key = (id(model), _reader(model, layer), source, decomposition)
    if key not in known:
        known[key] = decompose(linear_map(model, layer, source), decomposition)
    return known[key]


def decompose(linear_map: Float[Array, "dim out"], decomposition: str = "auto") -> NullSpace:
    """Returns the singular value decomposition W = U S V^T without V.

    Args:
      linear_map: W; `out` is at least `dim`.
      decomposition: `svd`, `jacobi`, or `auto`, for which `decomposition_on` says which runs.
    """

    def library(matrix: Array) -> tuple[Array, Array]:
        return jnp.linalg.svd(matrix, full_matrices=False)[:2]

    if decomposition == "svd":
        return NullSpace(*library(linear_map))
    if decomposition == "jacobi":
        return NullSpace(*left_singular(linear_map))
    return NullSpace(*jax.lax.platform_dependent(linear_map, tpu=left_singular, default=library))


def decomposition_on(platform: str, decomposition: str) -> str:
    """Returns the decomposition that runs on a `device.platform`: `svd` or `jacobi`."""
    if decomposition == "auto":
        return "jacobi" if platform == "tpu" else "svd"
    return decomposition


def threshold_value(space: NullSpace, rule: str, threshold: float) -> Float[Array, ""]:
    """Returns tau, the value below which a singular value counts as null.

    Args:
      space: Null space of the layer.
      rule: Interpretation of `threshold`: `absolute` is tau itself, `quantile` a quantile of the
        layer's values, `relative` a multiple of the largest value, `rank` a number of values, at
        most all; `energy` takes the number `space.chosen`.
      threshold: The threshold.
    """
    if rule == "quantile":
        position = threshold * (len(space.values) - 1)
        return jnp.interp(position, jnp.arange(len(space.values)), space.values[::-1])
    if rule == "relative":
        return threshold * space.values[0]
    if rule in ("rank", "energy"):
        above = jnp.concatenate([2 * space.values[:1], space.values])
        count = space.chosen if rule == "energy" else min(int(threshold), len(space.values))
        return above[len(space.values) - count]
    return jnp.asarray(threshold, jnp.float32)


def check_threshold(rule: str, threshold: float, dim: int) -> None:
    """Checks that a threshold lies in the range of its rule.

    Raises:
      InputError: The threshold is out of range.
    """
    limit = {"quantile": 1, "relative": 1, "rank": dim}.get(rule)
    if limit is not None and threshold > limit:
        raise InputError(
            f"method.nullspace.threshold: {threshold} is not in 0..{limit}, the range of "
            f"threshold_type {rule}"
        )
    if rule == "rank" and (threshold < 1 or threshold != int(threshold)):
        raise InputError(
            f"method.nullspace.threshold: {threshold}; threshold_type rank needs an integer >= 1"
        )


def null_dim(space: NullSpace, tau: Float[Array, ""]) -> Int[Array, ""]:
    """Returns the number of chosen directions, or else of singular values below tau."""
    return jnp.sum(space.values < tau) if space.chosen is None else space.chosen


def selected(space: NullSpace, tau: Float[Array, ""], rank: int) -> Bool[Array, " directions"]:
    """Selects the directions of `projector`.

    They are the chosen ones, or else all below tau, but at least the `rank` smallest.
    """
    count = space.values.shape[0]
    if space.chosen is not None:
        return jnp.arange(count) >= count - space.chosen
    return (space.values < tau) | (jnp.arange(count) >= count - rank)


def projector(space: NullSpace, tau: Float[Array, ""], rank: int) -> Float[Array, "dim dim"]:
    """Returns Q = U_n U_n^T, the orthogonal projector onto the `selected` directions."""
    return _weighted(space, selected(space, tau, rank).astype(jnp.float32))


def soft_filter(space: NullSpace, tau: Float[Array, ""]) -> Float[Array, "dim dim"]:
    """Returns Q = U diag(tau^2 / (tau^2 + S^2)) U^T, which attenuates large singular values."""
    tiny = jnp.finfo(jnp.float32).tiny  # the filter of a zero map is zero, not NaN
    return _weighted(space, tau**2 / jnp.maximum(tau**2 + space.values**2, tiny))


def _weighted(space: NullSpace, weights: Float[Array, " directions"]) -> Float[Array, "dim dim"]:
    return jnp.matmul(space.vectors * weights, space.vectors.T, precision=Precision.HIGHEST)


def directions(
    space: NullSpace, tau: Float[Array, ""], rank: int, order: str, key: jax.Array
) -> Float[Array, "rank dim"]:
    """Returns `rank` unit rows to initialise a refiner; random ones if fewer lie below tau.

    Args:
      space: Null space of the layer.
      tau: Directions with a smaller singular value count as null.
      rank: Number of rows.
      order: `official` takes the largest singular values below tau (as the official code);
        `most_null` takes the smallest ones.
      key: Key for the random rows.
    """
    dim, last = space.vectors.shape[0], space.values.shape[0] - 1
    count = null_dim(space, tau)
    steps = jnp.arange(rank)
    index = last + 1 - count + steps if order == "official" else last - steps
    rows = space.vectors.T[jnp.clip(index, 0, last)]
    return jnp.where((steps < count)[:, None], rows, random_directions(key, rank, dim))


def random_directions(key: jax.Array, rank: int, dim: int) -> Float[Array, "rank dim"]:
    """Returns random unit rows."""
    rows = jax.random.normal(key, (rank, dim))
    return rows / jnp.linalg.norm(rows, axis=1, keepdims=True)


def deviations(
    patches: Float[Array, "batch patches dim"], outliers: Bool[Array, "batch patches"]
) -> Float[Array, "batch patches dim"]:
    """Returns each outlier's difference from its image's mean patch token, zero for others."""
    patches = patches.astype(jnp.float32)
    return jnp.where(outliers[..., None], patches - patches.mean(1, keepdims=True), 0.0)


def energy_share(
    projection: Float[Array, "dim dim"],
    patches: Float[Array, "batch patches dim"],
    outliers: Bool[Array, "batch patches"],
) -> Float[Array, ""]:
    """Returns the share of the outlier tokens' energy that Q keeps: sum ||d Q||^2 / sum ||d||^2.

    d is a row of `deviations`. A projected update can only remove energy inside the subspace, so
    it cannot remove much if the share is small.
    """
    difference = deviations(patches, outliers)
    kept = jnp.sum(jnp.square(jnp.matmul(difference, projection, precision=Precision.HIGHEST)))
    return kept / jnp.maximum(jnp.sum(jnp.square(difference)), jnp.finfo(jnp.float32).tiny)
