"""Calibrated directions: their outlier energy and the next block's response, for random maps."""

import jax
import numpy as np
import pytest
import scipy.linalg
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from singer_jax import methods
from singer_jax.errors import InputError
from singer_jax.methods import WeightedSumSettings, calibration, nullspace
from singer_jax.methods.base import ModelFeatures
from singer_jax.methods.nullspace import NullSpace
from singer_jax.methods.singer import Singer, is_outlier, token_norms
from singer_jax.models.vit import VisionTransformer
from tests.methods.test_methods import STUDENT, TEACHER, settings
from tests.methods.test_nullspace import EPS, norm, product, random_map

DIM = 12  # one shape, so that each program is compiled once
RANK, EPSILON = 3, 0.1

maps = st.builds(
    random_map,
    dim=st.just(DIM),
    seed=st.integers(0, 10_000),
    decay=st.sampled_from([0.99, 0.8, 0.4, 0.1]),
)


def random_covariance(seed: int, tokens: int) -> np.ndarray:
    """Covariances of outliers that prefer some directions; singular if the outliers are few."""
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((tokens, DIM)) * rng.gamma(1.0, size=DIM)
    return rows.T @ rows


covariances = st.builds(
    random_covariance, seed=st.integers(0, 10_000), tokens=st.sampled_from([1, 2, 50])
)


@jax.jit
def calibrated(w: jax.Array, covariance: jax.Array) -> NullSpace:
    return calibration.calibrated(nullspace.decompose(w), w, covariance, RANK, EPSILON)


@pytest.mark.parametrize("seed", range(5))
def test_the_span_is_that_of_the_top_generalised_eigenvectors(seed):
    w, covariance = random_map(DIM, seed, 0.8), random_covariance(seed, 50)
    found = calibrated(w, covariance.astype(np.float32))
    seen = product(w, w.T)
    seen += EPSILON * np.trace(seen) / DIM * np.eye(DIM)
    held = covariance + calibration.FLOOR * np.trace(covariance) / DIM * np.eye(DIM)
    vectors = scipy.linalg.eigh(held, seen)[1]
    angle = scipy.linalg.subspace_angles(vectors[:, -RANK:], np.asarray(found.vectors, np.float64))
    assert angle.max() < 1e-4  # float32, over gaps of at least some per cent


@given(maps, covariances, st.floats(0, 1), st.sampled_from(nullspace.RULES), st.integers(0, 100))
def test_calibrated_spaces_keep_the_bounds_of_any_null_space(w, covariance, threshold, rule, seed):
    """Bounds: ||D W|| <= (max(S_n) + c eps sigma_1) ||D|| projected, tau / 2 ||F A B|| filtered."""
    space = calibrated(w, covariance.astype(np.float32))
    np.testing.assert_allclose(product(space.vectors.T, space.vectors), np.eye(RANK), atol=1e-5)
    assert np.all(np.diff(space.values) <= 0)
    tau = nullspace.threshold_value(space, rule, threshold)
    raw = np.random.default_rng(seed).standard_normal((7, DIM))
    # Rounding: as for the whole of W, and E and E R are off by as much again.
    slack = 20 * DIM * EPS * np.linalg.norm(w, 2)
    chosen = np.asarray(nullspace.selected(space, tau, 2))
    projected = product(raw, nullspace.projector(space, tau, 2))
    largest = float(np.asarray(space.values)[chosen].max())
    assert norm(product(projected, w)) <= (largest + slack) * norm(projected)
    filtered = product(raw, nullspace.soft_filter(space, tau))
    assert norm(product(filtered, w)) <= (float(tau) / 2 + slack) * norm(raw)


@given(maps)
def test_without_outliers_the_smallest_singular_directions_remain(w):
    found = calibrated(w, np.zeros((DIM, DIM), np.float32))
    plain = nullspace.decompose(w)
    # Rounding: what lies far below the root of e counts as seen alike.
    alike = np.sqrt(EPSILON * np.mean(np.square(plain.values)))
    assert float(found.values[0]) <= 1.001 * float(plain.values[-RANK]) + 0.01 * alike


@pytest.fixture(scope="module")
def teacher() -> VisionTransformer:
    return VisionTransformer(TEACHER, rngs=nnx.Rngs(0))


def with_outliers(teacher: VisionTransformer, direction: np.ndarray) -> ModelFeatures:
    """Returns features with a long vector along one direction added to every fifth patch."""
    features = dict(
        enumerate(teacher.features(jax.random.normal(jax.random.key(2), (6, 16, 16, 3))))
    )
    added = np.zeros((17, 1), np.float32)
    added[1::5] = 30
    return ModelFeatures(teacher, {layer: x + added * direction for layer, x in features.items()})


def test_calibration_finds_a_synthetic_artifact(teacher):
    """The artifact's direction is not in the null space of the next block's weights."""
    plain = nullspace.of_layer(teacher, 3, "mlp")
    seen = with_outliers(teacher, np.asarray(plain.vectors[:, 12]))
    own = settings(weight_matrix="calibrated", rank=2)

    @jax.jit
    def projection(covariance: jax.Array) -> jax.Array:
        found = {layer: covariance for layer in ("2", "3")}
        return Singer(teacher, STUDENT, own, nnx.Rngs(0), found).refiner["3"].projection[...]

    patches = seen.features[3][:, 1:]
    outliers = is_outlier(token_norms(patches), own.outlier_quantile)
    by_weights = nullspace.projector(plain, nullspace.threshold_value(plain, "rank", 2), 2)
    shares = [
        float(nullspace.energy_share(q, patches, outliers))
        for q in (projection(Singer.measure(seen, own)["3"]), by_weights)
    ]
    assert shares[0] > 0.95 and shares[1] < 0.1


def test_a_smaller_ridge_removes_less_energy_and_perturbs_less(teacher):
    """The artifact spans directions to which the next block is very or little sensitive."""
    plain, w = nullspace.of_layer(teacher, 3, "mlp"), nullspace.linear_map(teacher, 3, "mlp")
    direction = np.asarray(plain.vectors[:, [0, 8, 16]].sum(axis=1)) / np.sqrt(3)
    covariance = np.outer(direction, direction)
    held, seen = [], []
    for epsilon in (1e-2, 1.0, 1e2):
        found = calibration.calibrated(plain, w, covariance, 1, epsilon)
        held.append(norm(product(direction, found.vectors)))
        seen.append(float(found.values[0]))
    assert held[0] < held[1] < held[2] and held[2] > 0.99
    assert seen[0] < seen[1] < seen[2]


def test_covariances_of_outliers_are_additive(teacher):
    seen = with_outliers(teacher, np.ones(24) / np.sqrt(24))
    own = settings(weight_matrix="calibrated")
    patches = np.asarray(seen.features[3], np.float64)[:, 1:]
    expected = np.zeros((24, 24))
    for image in patches:
        norms = np.linalg.norm(image, axis=1)
        for token in image[norms > np.quantile(norms, own.outlier_quantile)]:
            difference = token - image.mean(axis=0)
            expected += np.outer(difference, difference)
    halves = [
        Singer.measure(ModelFeatures(teacher, {k: x[part] for k, x in seen.features.items()}), own)[
            "3"
        ]
        for part in (slice(4), slice(4, None))
    ]
    np.testing.assert_allclose(sum(halves), expected, rtol=1e-4, atol=1e-4 * expected.max())


def test_a_sum_of_methods_passes_measurements_on(teacher):
    seen = with_outliers(teacher, np.ones(24) / np.sqrt(24))
    alone = settings(weight_matrix="calibrated")
    own = WeightedSumSettings(((1.0, alone), (1.0, settings(name="fitnet"))))
    found = methods.measure(seen, own)
    assert methods.needs(own).measured and set(found) == {"singer"}
    summed = methods.make(teacher, STUDENT, own, nnx.Rngs(0), found)
    single = Singer(teacher, STUDENT, alone, nnx.Rngs(0), found["singer"])
    np.testing.assert_array_equal(
        summed.methods["singer"].refiner["3"].projection[...],
        single.refiner["3"].projection[...],
    )


def test_missing_measurements_are_a_one_line_error(teacher):
    assert not methods.needs(settings()).measured
    with pytest.raises(InputError, match="calibrated needs `measured`"):
        Singer(teacher, STUDENT, settings(weight_matrix="calibrated"), nnx.Rngs(0))
