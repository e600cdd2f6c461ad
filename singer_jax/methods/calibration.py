"""Directions that hold a teacher's outliers and to which the next block is least sensitive.

The null space of the weights alone need not hold the artifacts, so the outliers of a few batches
are measured. Everything is computed in float32 at the highest matmul precision, as in
`methods.nullspace`.
"""

from __future__ import annotations

import functools

import jax.numpy as jnp
from jax.lax import Precision
from jaxtyping import Array, Bool, Float

from singer_jax.methods import nullspace
from singer_jax.methods.nullspace import NullSpace, NullSpaceSettings
from singer_jax.models.vit import VisionTransformer

# Added to the covariance, relative to its mean eigenvalue. It is about the rounding error at the
# width of a ViT-L. If the outliers span fewer directions than requested, it selects the directions
# to which the next block is least sensitive instead of arbitrary ones.
FLOOR = 1e-4

_product = functools.partial(jnp.matmul, precision=Precision.HIGHEST)


def outlier_covariance(
    patches: Float[Array, "batch patches dim"], outliers: Bool[Array, "batch patches"]
) -> Float[Array, "dim dim"]:
    """Returns the sum of d^T d over the rows d of `nullspace.deviations`; batches are added."""
    rows = nullspace.deviations(patches, outliers).reshape(-1, patches.shape[-1])
    return _product(rows.T, rows)


def of_layer(
    model: VisionTransformer,
    layer: int,
    settings: NullSpaceSettings,
    rank: int,
    covariance: Float[Array, "dim dim"] | None,
) -> NullSpace:
    """Returns the null space of a layer for any `weight_matrix`.

    For `calibrated` it is the result of the function `calibrated` for the map `mlp`.

    Args:
      model: The teacher.
      layer: The distilled block.
      settings: Settings with the weight matrix and the ridge.
      rank: Number of calibrated directions.
      covariance: Covariance of the layer's outliers; None without calibration.
    """
    if settings.weight_matrix != "calibrated":
        return nullspace.of_layer(model, layer, settings.weight_matrix)
    seen = nullspace.of_layer(model, layer, "mlp")
    linear_map = nullspace.linear_map(model, layer, "mlp")
    return calibrated(seen, linear_map, covariance, rank, settings.ridge)


def calibrated(
    seen: NullSpace,
    linear_map: Float[Array, "dim out"],
    covariance: Float[Array, "dim dim"],
    rank: int,
    epsilon: float,
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
    """
    held = nullspace.decompose(covariance)
    roots = jnp.sqrt(_relative(held.values) + FLOOR)
    whitening = 1 / jnp.sqrt(_relative(seen.values**2) + epsilon)
    # Left singular vectors of G^(-1/2) C^(1/2), in the basis of W's: half the digits of the range
    # of lambda are lost by those of G^(-1/2) C G^(-1/2).
    half = whitening[:, None] * _product(seen.vectors.T, held.vectors * roots)
    found = nullspace.decompose(half).vectors[:, :rank]
    basis = jnp.linalg.qr(_product(seen.vectors, whitening[:, None] * found))[0]
    within = nullspace.decompose(_product(basis.T, linear_map))
    return NullSpace(_product(basis, within.vectors), within.values)


def _relative(values: Float[Array, " dim"]) -> Float[Array, " dim"]:
    """Divides values by their mean; zeros stay zero."""
    return values / jnp.maximum(jnp.mean(values), jnp.finfo(jnp.float32).tiny)
