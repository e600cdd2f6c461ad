"""The threshold type `energy` and the measures of removal, for random maps and outliers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from singer_jax import methods
from singer_jax.errors import InputError
from singer_jax.methods import calibration, nullspace, removal, singer
from singer_jax.methods.calibration import OutlierStatistics
from singer_jax.methods.norms import clip_norms
from singer_jax.methods.singer import Singer
from singer_jax.models.vit import VisionTransformer
from tests.methods.test_calibration import DIM, RANK, covariances, maps, with_outliers
from tests.methods.test_methods import BATCH, STUDENT, TEACHER, forward, settings
from tests.methods.test_nullspace import norm, product


@pytest.fixture(scope="module")
def teacher() -> VisionTransformer:
    return VisionTransformer(TEACHER, rngs=nnx.Rngs(0))


def statistics(covariance: np.ndarray) -> OutlierStatistics:
    """Returns statistics of 20 outliers in 5 images with the mean median norm 2."""
    numbers = [jnp.float32(x) for x in (20, 5, 10)]
    return OutlierStatistics(jnp.asarray(covariance, jnp.float32), *numbers)


@jax.jit
def chosen(w: jax.Array, covariance: jax.Array, limit: jax.Array) -> nullspace.NullSpace:
    return calibration.energy(nullspace.decompose(w), statistics(covariance), limit)


@jax.jit
def calibrated(w: jax.Array, covariance: jax.Array, limit: jax.Array) -> nullspace.NullSpace:
    seen = nullspace.decompose(w)
    return calibration.calibrated_by_energy(seen, w, statistics(covariance), RANK, limit)


def left_by(basis: np.ndarray, covariance: np.ndarray) -> float:
    """Returns r_n of the span of orthonormal columns, from its definition, in float64."""
    outside = np.eye(DIM) - product(basis, basis.T)
    return np.sqrt(max(np.trace(outside @ covariance), 0) / 20) / 2


def unclipped(own: singer.SingerSettings) -> singer.SingerSettings:
    """Returns the settings without clipping of the target."""
    match = dataclasses.replace(own.match, norm_clip_quantile=1.0)
    return dataclasses.replace(own, match=match)


limits = st.floats(0.02, 1.2)  # relative to the length of an outlier


@given(maps, covariances, limits)
def test_energy_chooses_the_fewest_directions_that_reach_the_limit(w, covariance, share):
    whole = left_by(np.zeros((DIM, 1)), covariance)
    limit = share * whole
    space = chosen(w, covariance, limit)
    count = int(space.chosen)
    residuals = [left_by(space.vectors[:, DIM - n :], covariance) for n in range(DIM + 1)]
    assert np.all(np.diff(residuals) <= 1e-6 * whole)  # monotone in n
    # Rounding: a share of the energy, whose root is taken.
    slack = 2e-3 * whole
    assert float(space.left) == pytest.approx(residuals[count], abs=slack)
    assert residuals[count] <= limit + slack
    assert count == 1 or residuals[count - 1] > limit - slack
    tau = nullspace.threshold_value(space, "energy", limit)
    selected = np.asarray(nullspace.selected(space, tau, 4))
    assert (
        selected.sum() == count == int(nullspace.null_dim(space, tau)) and selected[-count:].all()
    )


@given(maps, covariances, limits)
def test_calibrated_energy_takes_the_smallest_ridge_and_rank_or_says_what_is_left(
    w, covariance, share
):
    whole = left_by(np.zeros((DIM, 1)), covariance)
    limit, slack = share * whole, 2e-3 * whole
    space = calibrated(w, covariance, limit)
    count, ridge = int(space.chosen), float(space.ridge)
    vectors = np.asarray(space.vectors, np.float64)
    np.testing.assert_allclose(product(vectors.T, vectors), np.eye(RANK), atol=1e-5)
    assert float(space.left) == pytest.approx(
        left_by(vectors[:, RANK - count :], covariance), abs=slack
    )
    # The values of the chosen ones are those of W in their span, descending.
    used = np.asarray(space.values)[RANK - count :]
    inside = np.linalg.svd(product(vectors[:, RANK - count :].T, w), compute_uv=False)
    np.testing.assert_allclose(used, inside, atol=1e-4 * np.linalg.norm(w, 2))
    alone = {
        e: calibration.calibrated(nullspace.decompose(w), w, jnp.float32(covariance), RANK, e)
        for e in calibration.RIDGES[::3]
    }
    each = {e: left_by(np.asarray(own.vectors), covariance) for e, own in alone.items()}
    if float(space.left) <= limit:
        assert all(left > limit - slack for e, left in each.items() if e < 0.99 * ridge)
    else:
        assert all(left > limit - slack for left in each.values())
        assert float(space.left) <= min(each.values()) + slack and count == RANK


def test_energy_takes_one_direction_where_there_is_no_outlier():
    space = chosen(jnp.eye(DIM), np.zeros((DIM, DIM)), 0.5)
    assert (int(space.chosen), float(space.left)) == (1, 0)


@pytest.mark.parametrize("source", ["mlp", "calibrated"])
def test_removal_reaches_what_energy_promises(teacher, source):
    """The measured length is that of the first batch, on which the subspace was chosen."""
    seen = with_outliers(teacher, np.ones(24, np.float32) / np.sqrt(24))
    own = settings(threshold_type="energy", threshold=1.0, weight_matrix=source, rank=12)
    measured = jax.jit(lambda: Singer.measure(seen, own))()
    method = nnx.jit(lambda m: Singer(teacher, STUDENT, own, nnx.Rngs(0), m))(measured)
    metrics = {name: float(x) for name, x in method.diagnose(seen).items()}
    left = float(method.refiner["2"].left[...])
    assert left <= 1.0 < metrics["layer_2/outlier_medians"]
    # Here the medians are averaged over the same images.
    assert metrics["layer_2/left_at_best_medians"] == pytest.approx(left, rel=1e-2)
    line = next(text for _, text in method.report(metrics) if text.startswith("teacher layer 2"))
    assert f"leave {left:.2f} medians of an outlier of the first batches, limit 1" in line
    best, whole = (metrics[f"layer_2/{n}_medians"] for n in ("left_at_best", "outlier"))
    assert f"left of an outlier at best: {best:.1f} medians of {whole:.1f}" in line
    assert "removal changes what the next block adds to ordinary patches by" in line
    assert "(svd)" in line and ("ridge" in line) == (source == "calibrated")


def test_a_limit_that_no_subspace_reaches_is_a_warning(teacher):
    rng = np.random.default_rng(0)
    seen = with_outliers(teacher, rng.standard_normal((6, 17, 24)).astype(np.float32))
    own = settings(threshold_type="energy", threshold=0.1, weight_matrix="calibrated", rank=2)
    method = Singer(teacher, STUDENT, own, nnx.Rngs(0), Singer.measure(seen, own))
    metrics = {name: float(x) for name, x in method.diagnose(seen).items()}
    warnings = [text for level, text in method.report(metrics) if level > 20]
    assert any("no subspace leaves at most 0.1 medians, 2 directions leave" in x for x in warnings)


def test_a_small_subspace_that_reaches_the_limit_is_no_warning(teacher):
    """Without artifacts, few directions are enough, which hold little of the outliers' energy."""
    seen = forward(teacher, jax.random.normal(jax.random.key(2), (3, 16, 16, 3)))
    own = settings(threshold_type="energy", threshold=2.0)
    method = Singer(teacher, STUDENT, own, nnx.Rngs(0), Singer.measure(seen, own))
    metrics = {name: float(x) for name, x in method.diagnose(seen).items()}
    assert metrics["layer_2/outlier_energy_share"] < singer.SMALL_SHARE
    assert not any("holds only" in text for _, text in method.report(metrics))


def test_the_price_is_the_change_of_the_next_block(teacher):
    seen = with_outliers(teacher, np.ones(24, np.float32) / np.sqrt(24))
    own = unclipped(settings(threshold_type="rank", threshold=24))  # the whole space
    method = Singer(teacher, STUDENT, own, nnx.Rngs(0))
    metrics = method.diagnose(seen)
    # The refiner starts at the identity.
    assert float(metrics["layer_2/next_block_change"]) == pytest.approx(0, abs=1e-5)
    features = np.asarray(seen.features[2], np.float64)
    patches = features[:, 1:]
    norms = np.linalg.norm(patches, axis=2)
    outliers = norms > np.quantile(norms, 0.8, axis=1, keepdims=True)
    # Some of the artifacts are not among the outliers.
    ordinary = ~outliers & (norms <= 3 * np.median(norms, axis=1, keepdims=True))
    assert ordinary.sum() < (~outliers).sum()
    cleaned = features.copy()
    cleaned[:, 1:][outliers] = np.broadcast_to(patches.mean(1, keepdims=True), patches.shape)[
        outliers
    ]
    before, after = (
        (np.asarray(seen.next_block(2, jnp.float32(x)), np.float64) - x)[:, 1:][ordinary]
        for x in (features, cleaned)
    )
    expected = norm(after - before) / norm(before)
    assert float(metrics["layer_2/removal_change"]) == pytest.approx(expected, rel=1e-3)
    assert "layer_3/removal_change" not in metrics  # no block reads the last features
    shares = np.linalg.norm(patches - patches.mean(1, keepdims=True), axis=2)[outliers]
    medians = np.median(norms, axis=1).mean()
    assert float(metrics["layer_2/outlier_medians"]) == pytest.approx(
        np.sqrt(np.mean(shares**2)) / medians, rel=1e-4
    )
    assert float(metrics["layer_2/left_of_outlier_medians"]) == pytest.approx(
        np.sqrt(np.mean(norms[outliers] ** 2)) / medians, rel=1e-4
    )
    warnings = [text for level, text in method.report(metrics) if level > 20]
    dear = [layer for layer in (2,) if float(metrics[f"layer_{layer}/removal_change"]) > 0.1]
    assert len([x for x in warnings if "norm_clip_quantile=0.9 leaves" in x]) == len(dear)
    clipped = clip_norms(jnp.asarray(patches), removal.CLIP_QUANTILE)
    longest = np.linalg.norm(clipped, axis=2).max(1).mean()
    assert float(metrics["layer_2/clipped_medians"]) == pytest.approx(longest / medians, rel=1e-4)


def test_a_dear_removal_is_a_warning_that_names_clipping(teacher):
    own = unclipped(settings())
    method = Singer(teacher, STUDENT, own, nnx.Rngs(0))
    seen = forward(teacher, jax.random.normal(jax.random.key(2), (3, 16, 16, 3)))
    metrics = {name: float(x) for name, x in method.diagnose(seen).items()}
    metrics |= {"layer_2/removal_change": removal.LARGEST_CHANGE + 0.05}
    warnings = [text for level, text in method.report(metrics) if level > 20]
    assert any("by 15% (limit 10%)" in x and "target_space=final_norm" in x for x in warnings)
    assert all(len(text) <= 200 for text in warnings)
    clipping = dataclasses.replace(own.match, norm_clip_quantile=0.9)
    method = Singer(teacher, STUDENT, dataclasses.replace(own, match=clipping), nnx.Rngs(0))
    warnings = [text for level, text in method.report(metrics) if level > 20]
    assert any("by 15% (limit 10%); the target is clipped already" in x for x in warnings)


def scaled(seen: methods.ModelFeatures, factor: float) -> methods.ModelFeatures:
    """Returns features of which each, and what each block adds, is `factor` times as large."""

    class Scaled(methods.ModelFeatures):
        def next_block(self, layer, x):
            return factor * seen.next_block(layer, x / factor)

    return Scaled(seen.model, {layer: factor * x for layer, x in seen.features.items()})


@pytest.mark.parametrize("scale", ["relative", "absolute"])
def test_relative_losses_do_not_depend_on_the_teachers_scale(teacher, scale):
    seen = with_outliers(teacher, np.ones(24, np.float32) / np.sqrt(24))
    own = settings(loss_scale=scale, init="official", layers=(1, 2), include_last_layer=False)
    method = Singer(teacher, STUDENT, own, nnx.Rngs(0))
    student = forward(VisionTransformer(STUDENT, rngs=nnx.Rngs(1)), jnp.zeros((6, 16, 16, 3)))
    small, large = (method.loss(scaled(seen, x), student, BATCH) for x in (1.0, 100.0))
    for term in ("outlier", "info"):
        assert float(small[term]) > 0
        expected = 1 if scale == "relative" else 1e4
        assert float(large[term] / small[term]) == pytest.approx(expected, rel=1e-3)


def test_the_relative_information_loss_is_that_of_its_definition():
    rng = np.random.default_rng(0)
    seen, following, features = (rng.standard_normal((3, 5, 4)) for _ in range(3))
    expected = np.mean(
        [
            np.mean((s - f) ** 2) / np.mean((f - x) ** 2)
            for s, f, x in zip(seen, following, features, strict=True)
        ]
    )
    found = singer.relative_info_loss(*map(jnp.float32, (seen, following, features)))
    assert float(found) == pytest.approx(expected, rel=1e-5)


@given(maps, st.integers(1, 11))
def test_both_decompositions_span_the_same_subspaces(w, count):
    svd, jacobi = (nullspace.decompose(w, how) for how in ("svd", "jacobi"))
    np.testing.assert_allclose(svd.values, jacobi.values, atol=1e-5)
    gap = float(svd.values[-count - 1] - svd.values[-count])
    if gap < 1e-3:
        return  # Directions with almost equal values span nothing certain.
    ours, theirs = (np.asarray(x.vectors, np.float64)[:, -count:] for x in (svd, jacobi))
    # Davis and Kahan: the sine of the angle is at most the error over the gap.
    assert np.linalg.norm(ours - theirs @ (theirs.T @ ours), 2) < 3e-6 / gap


def test_auto_is_what_runs_on_the_platform():
    assert nullspace.decomposition_on("tpu", "auto") == "jacobi"
    assert {nullspace.decomposition_on(x, "auto") for x in ("cpu", "gpu")} == {"svd"}
    assert nullspace.decomposition_on("cpu", "jacobi") == "jacobi"
    lowered = jax.jit(nullspace.decompose, static_argnums=1)
    matrix = jnp.eye(4)
    assert "svd" in lowered.lower(matrix, "auto").compile().as_text().lower()
    assert "svd" not in lowered.lower(matrix, "jacobi").compile().as_text().lower()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"threshold_type": "energy"}, "threshold_type: energy needs `measured`"),
        ({"init": "fitted"}, "init: fitted needs `measured`"),
        ({"init": "fitted", "mode": "soft"}, "fitted needs mode project, not soft"),
    ],
)
def test_settings_without_what_they_need_are_one_line(teacher, keys, message):
    assert methods.needs(settings(**keys)).measured
    with pytest.raises(InputError, match=message):
        Singer(teacher, STUDENT, settings(**keys), nnx.Rngs(0))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"threshold_type": "energy", "mode": "soft"}, "energy needs mode project, not soft"),
        ({"threshold_type": "rank"}, "threshold_type rank needs an integer >= 1"),
    ],
)
def test_contradictory_settings_are_one_line(teacher, keys, message):
    with pytest.raises(InputError, match=message):
        Singer(teacher, STUDENT, settings(**keys), nnx.Rngs(0))
