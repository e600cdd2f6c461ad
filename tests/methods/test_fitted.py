"""The update in closed form against iterative minimisation of its objective in float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from singer_jax.methods import fitted, nullspace
from singer_jax.methods.calibration import Moments
from singer_jax.methods.singer import Singer
from singer_jax.models.vit import VisionTransformer
from tests.methods.test_calibration import DIM, maps, with_outliers
from tests.methods.test_methods import STUDENT, TEACHER, settings
from tests.methods.test_nullspace import EPS, norm, product, random_map


@dataclasses.dataclass(frozen=True)
class Problem:
    """Tokens of a layer and the map W of its next block."""

    w: np.ndarray
    outliers: np.ndarray
    ordinary: np.ndarray
    added: float = 50.0

    @property
    def moments(self) -> Moments:
        parts = (product(x.T, x) for x in (self.outliers, self.ordinary))
        return Moments(*(jnp.asarray(x, jnp.float32) for x in (*parts, self.added)))

    def objective(self, update: np.ndarray) -> tuple[float, np.ndarray]:
        """Returns the objective of M as the module defines it, and its gradient."""
        scale = self.added / norm(self.ordinary @ self.w) ** 2
        rho = fitted.RIDGE * norm(self.ordinary) ** 2 / DIM
        left, moved = self.outliers + self.outliers @ update, self.ordinary @ update

        def seen(x: np.ndarray) -> float:
            return norm(x) ** 2 + scale * norm(x @ self.w) ** 2

        def back(x: np.ndarray) -> np.ndarray:
            return x + scale * x @ self.w @ self.w.T

        value = norm(left) ** 2 + seen(moved) + rho * seen(update)
        gradient = self.outliers.T @ left + self.ordinary.T @ back(moved) + rho * back(update)
        return value, 2 * gradient


def problem(seed: int, decay: float) -> Problem:
    """Returns a few outliers in two directions that W sees differently, and ordinary tokens."""
    rng = np.random.default_rng(seed)
    w = np.asarray(random_map(DIM, seed, decay), np.float64)
    along = 8 * rng.standard_normal((6, 2)) @ rng.standard_normal((2, DIM))
    return Problem(w, along + rng.standard_normal((6, DIM)), rng.standard_normal((40, DIM)))


def closed_form(own: Problem, count: int, rank: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns A, B and the basis of the `count` most null directions."""
    space = nullspace.decompose(jnp.asarray(own.w, jnp.float32))
    selected = jnp.arange(DIM) >= DIM - count
    down, up = fit(space, selected, jnp.asarray(own.w, jnp.float32), own.moments, rank=rank)
    basis = np.linalg.svd(own.w)[0][:, DIM - count :]
    return np.asarray(down, np.float64), np.asarray(up, np.float64), basis


fit = jax.jit(fitted.fitted_update, static_argnames="rank")


@pytest.mark.parametrize(("count", "rank"), [(5, 5), (3, 5), (12, 12), (9, 4)])
@pytest.mark.parametrize("seed", range(3))
def test_the_closed_form_is_where_descent_converges(seed, count, rank):
    """For more directions than the rank, the descent is inside the span of the rows of B."""
    own = problem(seed, 0.8)
    down, up, basis = closed_form(own, count, rank)
    if count > rank:
        basis = up.T

    def of_coordinates(flat: np.ndarray) -> tuple[float, np.ndarray]:
        value, gradient = own.objective(flat.reshape(DIM, -1) @ basis.T)
        return value, (gradient @ basis).ravel()

    start = np.zeros(DIM * basis.shape[1])
    options = {"maxiter": 20_000, "maxfun": 40_000, "ftol": 1e-15, "gtol": 1e-7}
    found = scipy.optimize.minimize(
        of_coordinates, start, jac=True, method="L-BFGS-B", options=options
    )
    descended = found.x.reshape(DIM, -1) @ basis.T
    value = own.objective(down @ up)[0]
    before = own.objective(np.zeros((DIM, DIM)))[0]
    assert found.fun < 0.99 * before
    assert value == pytest.approx(found.fun, rel=1e-4)
    np.testing.assert_allclose(down @ up, descended, atol=2e-3 * np.abs(descended).max())


@given(maps, st.integers(0, 1000), st.sampled_from([1, 4, 12]), st.sampled_from([3, 8]))
def test_the_fitted_update_lies_in_the_null_space(w, seed, count, rank):
    own = dataclasses.replace(problem(seed, 0.8), w=np.asarray(w, np.float64))
    down, up, _ = closed_form(own, count, rank)
    space = nullspace.decompose(w)
    outside = np.asarray(space.vectors, np.float64)[:, : DIM - count]
    assert norm(up @ outside) < 100 * DIM * EPS * max(norm(up), 1)
    used = min(count, rank)
    sizes = np.sort(np.linalg.norm(up, axis=1))[::-1]
    np.testing.assert_allclose(sizes[:used], 1, atol=1e-4)
    np.testing.assert_array_equal(sizes[used:], 0)
    unseen = up[np.linalg.norm(up, axis=1) > 0.5]
    np.testing.assert_allclose(unseen @ unseen.T, np.eye(used), atol=1e-4)
    # Never worse than no update, up to rounding.
    before = own.objective(np.zeros((DIM, DIM)))[0]
    assert own.objective(down @ up)[0] <= before * (1 + 1e-4)


def test_more_directions_than_the_rank_keep_those_with_most_outlier_energy():
    own = problem(0, 0.8)
    up = closed_form(own, DIM, 2)[1]
    leading = np.linalg.svd(own.outliers)[2][:2]
    assert norm(leading - leading @ up.T @ up) < 1e-2


@pytest.mark.parametrize("source", ["mlp", pytest.param("calibrated", marks=pytest.mark.slow)])
def test_a_fitted_refiner_removes_outliers_before_the_first_step(source):
    """The outliers lie along a direction that no other patch has."""
    teacher = VisionTransformer(TEACHER, rngs=nnx.Rngs(0))
    plain = nullspace.of_layer(teacher, 2, "mlp")
    seen = with_outliers(teacher, np.asarray(plain.vectors[:, 20]))
    own = settings(init="fitted", weight_matrix=source, rank=12, outlier_quantile=0.7)
    measured = jax.jit(lambda: Singer.measure(seen, own))()
    method = nnx.jit(lambda m: Singer(teacher, STUDENT, own, nnx.Rngs(0), m))(measured)
    metrics = {name: float(x) for name, x in method.diagnose(seen).items()}
    before = settings(weight_matrix=source, rank=12, outlier_quantile=0.7)
    plain = Singer(teacher, STUDENT, before, nnx.Rngs(0), measured).diagnose(seen)
    whole = float(plain["layer_2/left_of_outlier_medians"])
    assert metrics["layer_2/left_of_outlier_medians"] < 0.3 * whole
    # Most of the batch is ordinary and keeps most of its length.
    assert metrics["layer_2/refined_norm_median"] > 0.5 * metrics["layer_2/teacher_norm_median"]
    refiner = method.refiner["2"]
    up, q = np.asarray(refiner.up[...]), np.asarray(refiner.projection[...])
    np.testing.assert_allclose(up @ q, up, atol=1e-4)
    alive = np.linalg.norm(up, axis=1) + np.linalg.norm(refiner.down[...], axis=0)
    assert np.all(alive > 0.1)  # no component is without gradient


def test_a_teacher_without_response_or_ordinary_patches_gives_finite_updates():
    space, chosen = nullspace.decompose(jnp.asarray(random_map(DIM, 0, 0.5))), jnp.ones(DIM, bool)
    outliers = np.random.default_rng(0).standard_normal((6, DIM))
    for w, ordinary in ((np.zeros((DIM, DIM)), outliers), (np.eye(DIM), np.zeros((6, DIM)))):
        moments = Problem(w, outliers, ordinary).moments
        update = fitted.fitted_update(space, chosen, jnp.asarray(w, jnp.float32), moments, 4)
        assert all(np.isfinite(part).all() for part in update)
