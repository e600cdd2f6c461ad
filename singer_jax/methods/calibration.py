"""Directions that hold a teacher's outliers and that the next block hardly sees.

The null space of the weights alone need not hold the artifacts; a few batches say where they lie.
All in float32 at the highest matmul precision, as in `methods.nullspace`.
"""

from __future__ import annotations

import functools

import jax.numpy as jnp
from jax.lax import Precision
from jaxtyping import Array, Bool, Float

from singer_jax.methods import nullspace
from singer_jax.methods.nullspace import NullSpace, NullSpaceSettings
from singer_jax.models.vit import VisionTransformer

# Added to the covariance, relative to its mean eigenvalue; about its rounding at the width of a
# ViT-L. Where the outliers span fewer directions than are asked for, those that are seen least
# follow instead of arbitrary ones.
FLOOR = 1e-4

_product = functools.partial(jnp.matmul, precision=Precision.HIGHEST)


def outlier_covariance(
    patches: Float[Array, "batch patches dim"], outliers: Bool[Array, "batch patches"]
) -> Float[Array, "dim dim"]:
    """The sum of d^T d over the rows d of `nullspace.deviations`; those of batches add up."""
    rows = nullspace.deviations(patches, outliers).reshape(-1, patches.shape[-1])
    return _product(rows.T, rows)


def of_layer(
    model: VisionTransformer,
    layer: int,
    settings: NullSpaceSettings,
    rank: int,
    covariance: Float[Array, "dim dim"] | None,
) -> NullSpace:
    """The space of any source; of `calibrated` as `calibrated` of the map `mlp`.

    Args:
      model: the teacher.
      layer: the distilled block.
      settings: source and epsilon.
      rank: the number of calibrated directions.
      covariance: of the layer's outliers; None where nothing is calibrated.
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
    """W restricted to the `rank` directions with the most outlier energy for what is seen of them.

    They are the span of the top generalised eigenvectors v of C v = lambda (W W^T + e I) v: the
    first maximises v^T C v / (||v^T W||^2 + e ||v||^2), each further one the same among those that
    are orthogonal to the ones before in the metric of the right side. Large e: the principal
    directions of the outliers, however much is seen of them. Small e: what is hardly seen, however
    little it holds of them.

    With E an orthonormal basis of the span and E^T W = R S V^T, the vectors are the columns of
    U = E R and the values are S. `projector` and `soft_filter` keep the bounds that they have
    without calibration: a row D = A U_n^T in the span of selected columns has D W = A S_n V_n^T and
    ||A|| = ||D||, so ||D W|| <= max(S_n) ||D||; and the filter times S never exceeds tau / 2. In
    float32, E, its product with W, and R each add a few dim * eps, relative to the largest singular
    value of all of W.

    Args:
      seen: `decompose` of W.
      linear_map: W.
      covariance: C, of the outliers, on any scale; positive semidefinite.
      rank: how many directions.
      epsilon: e over the mean of W W^T's diagonal, that of the squared singular values.
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
    """Over their mean; zeros of zeros."""
    return values / jnp.maximum(jnp.mean(values), jnp.finfo(jnp.float32).tiny)
