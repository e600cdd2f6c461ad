"""Left singular vectors by one-sided Jacobi rotations: a small program for any accelerator.

At the width of a ViT-L a TPU's compiler needs minutes for `jnp.linalg.svd`
(`python -m benchmarks.compiled --parts`) and seconds for this program. Unlike the eigenvectors of
W W^T, it resolves singular values down to rounding (Demmel and Veselic, "Jacobi's method is more
accurate than QR", 1992). Rotations and sums are elementwise float32, which no backend computes in
lower precision.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.lax import Precision
from jaxtyping import Array, Float

_MOST_SWEEPS = 30
_TOLERANCE = 10 * float(jnp.finfo(jnp.float32).eps)  # cosine of the angle between two rows


def left_singular(
    matrix: Float[Array, "dim out"],
) -> tuple[Float[Array, "dim dim"], Float[Array, " dim"]]:
    """Returns U (columns) and descending S of W = U S V^T in float32; `out` is at least `dim`.

    A second pass on U^T W, whose rows are almost orthogonal, removes the rounding error that the
    many rotations of the first pass have accumulated.
    """
    dim = matrix.shape[0]
    matrix = jnp.pad(matrix.astype(jnp.float32), ((0, dim % 2), (0, 0)))

    def refine(_: int, vectors: Array) -> Array:
        turned = jnp.matmul(vectors, matrix, precision=Precision.HIGHEST)
        return _orthogonal(jnp.matmul(_rotations(turned), vectors, precision=Precision.HIGHEST))

    vectors = jax.lax.fori_loop(0, 2, refine, jnp.eye(len(matrix), dtype=jnp.float32))
    rows = jnp.matmul(vectors, matrix, precision=Precision.HIGHEST)
    values, order = jax.lax.top_k(jnp.linalg.norm(rows, axis=1), dim)
    return vectors[order, :dim].T, values


def _rotations(matrix: Float[Array, "dim out"]) -> Float[Array, "dim dim"]:
    """Returns the orthogonal matrix whose product with `matrix` has orthogonal rows.

    A sweep pairs every two rows once, in the order of a round-robin tournament: half of the rows
    are paired with the other half, all pairs rotate at once, and between two rounds all rows but
    the first move by one position.
    """
    dim, out = matrix.shape
    seated = jnp.concatenate([matrix, jnp.eye(dim, dtype=matrix.dtype)], axis=1).reshape(
        2, dim // 2, out + dim
    )

    def meet(_: int, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        (upper, lower), worst = carry
        upper, lower, cosine = _rotate(upper, lower, out)
        moved = jnp.concatenate([upper[:1], lower[:1], upper[1:]])
        lower = jnp.concatenate([lower[1:], moved[-1:]])
        return jnp.stack([moved[:-1], lower]), jnp.maximum(worst, cosine)

    def sweep(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        seated, _, sweeps = carry
        seated, worst = jax.lax.fori_loop(0, dim - 1, meet, (seated, jnp.float32(0)))
        return seated, worst, sweeps + 1

    def unfinished(carry: tuple[Array, Array, Array]) -> Array:
        return (carry[1] > _TOLERANCE) & (carry[2] < _MOST_SWEEPS)

    start = (seated, jnp.float32(1), jnp.int32(0))
    return jax.lax.while_loop(unfinished, sweep, start)[0].reshape(dim, -1)[:, out:]


def _rotate(
    upper: Float[Array, "pairs columns"], lower: Float[Array, "pairs columns"], out: int
) -> tuple[Float[Array, "pairs columns"], Float[Array, "pairs columns"], Float[Array, ""]]:
    """Rotates each pair of rows until their first `out` columns are orthogonal.

    Returns:
      The rotated rows, and the largest cosine of the angle between two rows before the rotation.
    """
    a, b = upper[:, :out], lower[:, :out]
    products = jnp.sum(a * b, axis=1)
    upper_size, lower_size = jnp.sum(a * a, axis=1), jnp.sum(b * b, axis=1)
    sizes = jnp.sqrt(upper_size) * jnp.sqrt(lower_size)
    cosines = jnp.where(sizes > 0, jnp.abs(products) / jnp.where(sizes > 0, sizes, 1), 0)
    turns = cosines > _TOLERANCE / 10
    zeta = (lower_size - upper_size) / jnp.where(turns, 2 * products, 1)
    tangent = jnp.where(zeta < 0, -1, 1) / (jnp.abs(zeta) + jnp.sqrt(1 + zeta * zeta))
    tangent = jnp.where(turns, tangent, 0)[:, None]
    cosine = 1 / jnp.sqrt(1 + tangent * tangent)
    return (
        cosine * (upper - tangent * lower),
        cosine * (lower + tangent * upper),
        jnp.max(cosines),
    )


def _orthogonal(matrix: Float[Array, "dim dim"]) -> Float[Array, "dim dim"]:
    """Returns the nearest orthogonal matrix to an almost orthogonal one (a Newton step)."""
    gram = jnp.matmul(matrix, matrix.T, precision=Precision.HIGHEST)
    return 1.5 * matrix - 0.5 * jnp.matmul(gram, matrix, precision=Precision.HIGHEST)
