"""A refiner's update in closed form, from which training starts (`method.nullspace.init=fitted`).

The update x -> x + x M of a patch token x may have any matrix M whose rows lie in the span of
orthonormal directions u_1 .. u_r: x M = sum_j (x . m_j) u_j^T, with one column m_j of A for each
row u_j^T of B. Over the first batches it minimises

  sum over outlier patches |x + x M|^2 + sum over ordinary patches |x M J|^2 + rho |M J|^2

where J = [I, k W] is the linearised next block: its output is the stream, which the update changes
by x M, plus what the block adds, which it changes by about k x M W. W is the linear map whose
decomposition gave the null space. The factor k gives k x W the mean square of what the block adds
to ordinary patches (after the last block, that of the patches themselves), because the norm before
the block, its activation and LayerScale, which W ignores, change its scale. Every token counts
once: the weights of the losses do not enter. The information loss of training is also taken over
the outliers, but there it only keeps what the first term removes.

Choose the u_j such that u_i^T W W^T u_j = 0 for i != j, and let g_j = 1 + k^2 |u_j^T W|^2. With the
sums C of x^T x over the outliers and D over the ordinary patches, the objective is

  const + sum_j (u_j + m_j)^T C (u_j + m_j) + g_j m_j^T (D + rho I) m_j

because the u_j are orthonormal and their images under J orthogonal. Each m_j appears in one term,
which is convex. Its gradient vanishes at

  m_j = -(C + g_j (D + rho I))^-1 C u_j.

If the null space has at most `rank` directions, the u_j are its singular vectors, and the result is
the minimum over all updates inside the null space. If it has more, let E hold the `rank`
eigenvectors of P C P with the most outlier energy, P the projector. The u_j are the columns of E R,
with R the eigenvectors of E^T W W^T E. The result is then the minimum over all updates inside the
span of E, but not over all updates of this rank inside the null space.
"""

from __future__ import annotations

import functools

import jax.numpy as jnp
from jax.lax import Precision
from jaxtyping import Array, Bool, Float

from singer_jax.methods import nullspace
from singer_jax.methods.calibration import Moments
from singer_jax.methods.nullspace import NullSpace

# rho relative to the mean eigenvalue of D. It is about the rounding error at the width of a ViT-L.
RIDGE = 1e-4

_product = functools.partial(jnp.matmul, precision=Precision.HIGHEST)


def fitted_update(
    space: NullSpace,
    selected: Bool[Array, " directions"],
    linear_map: Float[Array, "dim out"],
    moments: Moments,
    rank: int,
    decomposition: str = "auto",
) -> tuple[Float[Array, "dim rank"], Float[Array, "rank dim"]]:
    """Returns A and B of the update in closed form (see the module).

    If fewer than `rank` directions are selected, the other columns of A and rows of B are zero.

    Args:
      space: Null space of the layer.
      selected: Mask of the directions that the update may use.
      linear_map: W.
      moments: Sums over the first batches.
      rank: Rank of the update.
      decomposition: Algorithm of the decompositions.
    """
    rows, response = _directions(space, selected, moments, rank, decomposition)
    response_of_ordinary = jnp.sum(_product(moments.ordinary, linear_map) * linear_map)
    scale = jnp.where(response_of_ordinary > 0, moments.added / _positive(response_of_ordinary), 0)
    weights = 1 + scale * response

    # With D + rho I = H^T H and H^-T C H^-1 = V diag(t) V^T, m_j is a sum over V's columns.
    kept = nullspace.decompose(moments.ordinary, decomposition)
    held = nullspace.decompose(moments.outlier, decomposition)
    # The outliers' floor matters only if all ordinary patches are zero.
    floor = RIDGE * jnp.mean(kept.values) + 1e-12 * jnp.mean(held.values)
    roots = jnp.sqrt(_positive(kept.values + floor))
    # Singular vectors of the root of C keep half of the digits that those of C would lose.
    half = _product(kept.vectors.T, held.vectors * jnp.sqrt(held.values)) / roots[:, None]
    turned = nullspace.decompose(half, decomposition)
    energy = jnp.square(turned.values)[:, None]
    whitened = _product(kept.vectors.T, rows.T) * roots[:, None]
    shrunk = energy / (energy + weights) * _product(turned.vectors.T, whitened)
    down = -_product(kept.vectors, _product(turned.vectors, shrunk) / roots[:, None])
    return down, rows


def _directions(
    space: NullSpace,
    selected: Bool[Array, " directions"],
    moments: Moments,
    rank: int,
    decomposition: str,
) -> tuple[Float[Array, "rank dim"], Float[Array, " rank"]]:
    """Returns u_j, zero where fewer directions are selected, and the squares |u_j^T W|^2."""
    count, dim = len(space.values), len(space.vectors)
    inside = jnp.where(selected, space.vectors, 0)
    energy = _product(inside.T, _product(moments.outlier, inside))
    # Selected directions without outlier energy come before the others.
    energy += jnp.diag(selected * _positive(1e-6 * jnp.trace(energy) / count))
    found = nullspace.decompose(energy, decomposition).vectors[:, :rank]
    used = jnp.arange(found.shape[1]) < jnp.sum(selected)
    found = jnp.where(selected[:, None] & used, found, 0)

    response = found.T * space.values
    apart = jnp.where(space.values[0] > 0, 2 * space.values[0], 1)  # above all singular values
    apart_columns = jnp.diag(jnp.where(used, 0, apart))
    turned = nullspace.decompose(jnp.concatenate([response, apart_columns], 1), decomposition)
    used = turned.values < 0.75 * apart
    rows = jnp.where(used, _product(space.vectors, _product(found, turned.vectors)), 0).T
    missing = rank - len(rows)
    rows = jnp.concatenate([rows, jnp.zeros((missing, dim), rows.dtype)])
    return rows, jnp.pad(jnp.where(used, jnp.square(turned.values), 0), (0, missing))


def _positive(values: Float[Array, "*axes"]) -> Float[Array, "*axes"]:
    return jnp.maximum(values, jnp.finfo(jnp.float32).tiny)
