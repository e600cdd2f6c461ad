"""Subspaces that are chosen by the outliers of a few batches.

The null space of the weights alone need not hold the artifacts, so the outliers of a few batches
are measured. `calibrated` finds the directions that hold them and to which the next block is least
sensitive. The threshold type `energy` chooses the smallest subspace that holds enough of them.
Everything is computed in float32 at the highest matmul precision, as in `methods.nullspace`.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.lax import Precision
from jaxtyping import Array, Bool, Float

from singer_jax.methods import nullspace
from singer_jax.methods.base import ModelFeatures
from singer_jax.methods.norms import image_medians, is_ordinary, is_outlier, token_norms
from singer_jax.methods.nullspace import NullSpace, NullSpaceSettings
from singer_jax.models.vit import VisionTransformer

# Added to the covariance, relative to its mean eigenvalue. It is about the rounding error at the
# width of a ViT-L. If the outliers span fewer directions than requested, it selects the directions
# to which the next block is least sensitive instead of arbitrary ones.
FLOOR = 1e-4

# The ridges that `energy` tries for `calibrated`, from the least sensitive directions to the
# principal directions of the outliers.
RIDGES = (1e-3, 1e-2, 1e-1, 1.0, 1e1, 1e2, 1e3)

_product = functools.partial(jnp.matmul, precision=Precision.HIGHEST)


class Moments(NamedTuple):
    """Sums for `methods.fitted` over all images.

    Attributes:
      outlier, ordinary: Sums of x^T x over the patches x that `norms.is_outlier` and
        `norms.is_ordinary` select.
      added: Sum of the squares of what the next block adds to ordinary patches; after the last
        block, of these patches themselves.
    """

    outlier: Float[Array, "dim dim"]
    ordinary: Float[Array, "dim dim"]
    added: Float[Array, ""]


class OutlierStatistics(NamedTuple):
    """Sums over the patches of all images; those of several batches are added.

    Attributes:
      covariance: Sum of d^T d over the rows d of `nullspace.deviations`.
      outliers, images: Numbers of outlier patches and of images.
      medians: Sum over the images of the median patch norm.
      moments: Sums for `init=fitted`; None for other settings.
    """

    covariance: Float[Array, "dim dim"]
    outliers: Float[Array, ""]
    images: Float[Array, ""]
    medians: Float[Array, ""]
    moments: Moments | None = None

    def length(self, energy: Float[Array, "*axes"]) -> Float[Array, "*axes"]:
        """Returns the root mean square over the outliers of a sum of squares, in median norms."""
        tiny = jnp.finfo(jnp.float32).tiny
        median = jnp.maximum(self.medians / jnp.maximum(self.images, 1), tiny)
        return jnp.sqrt(jnp.maximum(energy, 0) / jnp.maximum(self.outliers, 1)) / median


def outlier_covariance(
    patches: Float[Array, "batch patches dim"], outliers: Bool[Array, "batch patches"]
) -> Float[Array, "dim dim"]:
    """Returns the sum of d^T d over the rows d of `nullspace.deviations`; batches are added."""
    rows = nullspace.deviations(patches, outliers).reshape(-1, patches.shape[-1])
    return _product(rows.T, rows)


def outlier_statistics(
    patches: Float[Array, "batch patches dim"], outliers: Bool[Array, "batch patches"]
) -> OutlierStatistics:
    """Returns the statistics of the patches of a batch, without `moments`."""
    medians = image_medians(patches)
    return OutlierStatistics(
        outlier_covariance(patches, outliers),
        jnp.sum(outliers, dtype=jnp.float32),
        jnp.float32(len(patches)),
        jnp.sum(medians),
    )


def moments(teacher: ModelFeatures, layer: int, quantile: float) -> Moments:
    """Returns the moments of a batch after a block; `quantile` is that of the masks."""
    prefix, last = teacher.model.arch.num_prefix_tokens, teacher.model.arch.depth - 1
    patches = teacher.features[layer][:, prefix:].astype(jnp.float32)
    norms = token_norms(patches)
    masks = (is_outlier(norms, quantile), is_ordinary(norms, quantile))
    outliers, ordinary = (
        jnp.where(mask[..., None], patches, 0).reshape(-1, patches.shape[-1]) for mask in masks
    )
    added = patches
    if layer < last:
        added = teacher.features[layer + 1][:, prefix:].astype(jnp.float32) - patches
    return Moments(
        _product(outliers.T, outliers),
        _product(ordinary.T, ordinary),
        jnp.sum(jnp.square(jnp.where(masks[1][..., None], added, 0))),
    )


def linear_map(
    model: VisionTransformer, layer: int, settings: NullSpaceSettings
) -> Float[Array, "dim out"]:
    """Returns the map W of a layer for any `weight_matrix`; that of `calibrated` is `mlp`."""
    source = settings.weight_matrix
    return nullspace.linear_map(model, layer, "mlp" if source == "calibrated" else source)


def of_layer(
    model: VisionTransformer,
    layer: int,
    settings: NullSpaceSettings,
    rank: int,
    statistics: OutlierStatistics | None,
) -> NullSpace:
    """Returns the null space of a layer for any `weight_matrix` and `threshold_type`.

    For `calibrated` it is the result of the function `calibrated` for the map `mlp`. For `energy`
    it is that of `energy` or `calibrated_by_energy`.

    Args:
      model: The teacher.
      layer: The distilled block.
      settings: Settings with the weight matrix, the threshold, the ridge and the decomposition.
      rank: Number of calibrated directions, for `energy` the largest.
      statistics: Statistics of the layer's outliers; None if neither of both is chosen.
    """
    how, by_energy = settings.decomposition, settings.threshold_type == "energy"
    if settings.weight_matrix != "calibrated":
        space = nullspace.of_layer(model, layer, settings.weight_matrix, how)
        return energy(space, statistics, settings.threshold) if by_energy else space
    seen = nullspace.of_layer(model, layer, "mlp", how)
    w = linear_map(model, layer, settings)
    if by_energy:
        return calibrated_by_energy(seen, w, statistics, rank, settings.threshold, how)
    return calibrated(seen, w, statistics.covariance, rank, settings.ridge, how)


def energy(space: NullSpace, statistics: OutlierStatistics, limit: float) -> NullSpace:
    """Chooses the fewest directions, the most null first, that hold enough of the outliers.

    With C the sum of d^T d over N outliers (`OutlierStatistics`), P_n the projector onto the last n
    directions and m the mean of the images' median patch norms,

      r_n = sqrt(tr((I - P_n) C) / N) / m

    is the root mean square length of an outlier beside its image's mean patch that no update inside
    the subspace can remove, in median norms. It does not increase with n. The smallest n of at
    least 1 with r_n <= `limit` is chosen, or all directions if there is none; `left` is r_n.

    Args:
      space: All directions, in descending order of their singular values.
      statistics: Statistics of the outliers.
      limit: Largest length that is left, in median patch norms.
    """
    vectors = space.vectors[:, ::-1]
    chosen, left = _fewest(vectors, statistics, limit)
    return space._replace(chosen=chosen, left=left)


def calibrated(
    seen: NullSpace,
    linear_map: Float[Array, "dim out"],
    covariance: Float[Array, "dim dim"],
    rank: int,
    epsilon: float,
    decomposition: str = "auto",
) -> NullSpace:
    """Restricts W to the `rank` directions with the largest ratio of outlier energy to response.

    They are the span of the top generalised eigenvectors v of C v = lambda (W W^T + e I) v. The
    first maximises v^T C v / (||v^T W||^2 + e ||v||^2). Each further one maximises it among those
    that are orthogonal to the previous ones in the metric of the right side. A large e selects the
    principal directions of the outliers, regardless of the next block. A small e selects the
    directions to which the next block is least sensitive, regardless of their outlier energy.

    With E an orthonormal basis of the span and E^T W = R S V^T, the vectors are the columns of
    U = E R and the values are S. `projector` and `soft_filter` keep the bounds that they have
    without calibration: a row D = A U_n^T in the span of selected columns has D W = A S_n V_n^T and
    ||A|| = ||D||, so ||D W|| <= max(S_n) ||D||; and the filter times S never exceeds tau / 2. In
    float32, E, its product with W, and R each add a few dim * eps, relative to the largest singular
    value of all of W.

    Args:
      seen: The decomposition of W (`decompose`).
      linear_map: W.
      covariance: C, the positive semidefinite covariance of the outliers, on any scale.
      rank: Number of directions.
      epsilon: e relative to the mean squared singular value of W.
      decomposition: Algorithm of the decompositions.
    """
    roots = _roots(covariance, decomposition)
    basis = _basis(seen, roots, epsilon, rank, decomposition)
    within = nullspace.decompose(_product(basis.T, linear_map), decomposition)
    return NullSpace(_product(basis, within.vectors), within.values)


def calibrated_by_energy(
    seen: NullSpace,
    linear_map: Float[Array, "dim out"],
    statistics: OutlierStatistics,
    rank: int,
    limit: float,
    decomposition: str = "auto",
) -> NullSpace:
    """Chooses the smallest ridge, and for it the fewest directions, that hold enough outliers.

    The ridges are tried in the order of `RIDGES`. For each, the directions are those of
    `calibrated`, in descending order of lambda, at most `rank`; their number is chosen as in
    `energy`. The first ridge that reaches the limit is taken. If none does, it is the one that
    leaves the least, with `rank` directions.

    The result has `rank` directions, of which the last `chosen` span the subspace and have the
    singular values of W in it. The others are not used; their singular values are replaced by twice
    the largest one of W, so that they come first.

    Args:
      seen: The decomposition of W (`decompose`).
      linear_map: W.
      statistics: Statistics of the outliers.
      rank: Largest number of directions.
      limit: Largest length that is left, in median patch norms.
      decomposition: Algorithm of the decompositions.
    """
    roots, ridges = _roots(statistics.covariance, decomposition), jnp.asarray(RIDGES)
    dim = len(seen.vectors)

    def unfinished(carry: tuple[Array, ...]) -> Array:
        tried, _, _, left, _ = carry
        return (tried < len(ridges)) & (left > limit)

    def attempt(carry: tuple[Array, ...]) -> tuple[Array, ...]:
        tried, *best = carry
        basis = _basis(seen, roots, ridges[tried], rank, decomposition)
        chosen, left = _fewest(basis, statistics, limit)
        found = (basis, chosen, left, ridges[tried])
        better = left < best[2]
        return tried + 1, *(
            jnp.where(better, new, old) for new, old in zip(found, best, strict=True)
        )

    start = (jnp.zeros((dim, rank)), jnp.int32(rank), jnp.float32(jnp.inf), jnp.float32(0))
    _, basis, chosen, left, ridge = jax.lax.while_loop(unfinished, attempt, (jnp.int32(0), *start))
    unused = jnp.where(seen.values[0] > 0, 2 * seen.values[0], 1) * (jnp.arange(rank) >= chosen)
    used = jnp.where((jnp.arange(rank) < chosen)[:, None], _product(basis.T, linear_map), 0)
    within = nullspace.decompose(jnp.concatenate([used, jnp.diag(unused)], axis=1), decomposition)
    return NullSpace(_product(basis, within.vectors), within.values, chosen, left, ridge)


def _fewest(
    vectors: Float[Array, "dim directions"], statistics: OutlierStatistics, limit: float
) -> tuple[Array, Array]:
    """Returns the number of the first orthonormal vectors that leave at most `limit`, and r_n."""
    covariance = statistics.covariance
    held = jnp.maximum(jnp.sum(vectors * _product(covariance, vectors), axis=0), 0)
    # Rounding must not let a larger subspace seem to leave more.
    left = statistics.length(jax.lax.cummin(jnp.trace(covariance) - jnp.cumsum(held)))
    chosen = jnp.minimum(jnp.sum(left > limit) + 1, len(held)).astype(jnp.int32)
    return chosen, left[chosen - 1]


def _roots(covariance: Float[Array, "dim dim"], decomposition: str) -> Float[Array, "dim dim"]:
    """Returns the columns of C^(1/2), with the floor, in the basis of its eigenvectors."""
    held = nullspace.decompose(covariance, decomposition)
    return held.vectors * jnp.sqrt(_relative(held.values) + FLOOR)


def _basis(
    seen: NullSpace,
    roots: Float[Array, "dim dim"],
    epsilon: float | Float[Array, ""],
    rank: int,
    decomposition: str,
) -> Float[Array, "dim rank"]:
    """Returns an orthonormal basis; its first n columns span the top n vectors of `calibrated`."""
    whitening = 1 / jnp.sqrt(_relative(seen.values**2) + epsilon)
    # Left singular vectors of G^(-1/2) C^(1/2), in the basis of W's: half the digits of the range
    # of lambda are lost by those of G^(-1/2) C G^(-1/2).
    half = whitening[:, None] * _product(seen.vectors.T, roots)
    found = nullspace.decompose(half, decomposition).vectors[:, :rank]
    return jnp.linalg.qr(_product(seen.vectors, whitening[:, None] * found))[0]


def _relative(values: Float[Array, " dim"]) -> Float[Array, " dim"]:
    """Divides values by their mean; zeros stay zero."""
    return values / jnp.maximum(jnp.mean(values), jnp.finfo(jnp.float32).tiny)
