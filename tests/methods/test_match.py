"""Spaces, losses and clipping against direct NumPy, and their properties for all inputs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from singer_jax import methods
from singer_jax.methods import losses, match, singer
from singer_jax.methods.base import Batch, ModelFeatures
from singer_jax.methods.match import SPACES, Comparison, MatchSettings
from singer_jax.methods.norms import clip_norms, token_norms
from singer_jax.methods.nullspace import NullSpaceSettings
from singer_jax.methods.tokens import match_tokens
from singer_jax.methods.vitkd import ViTKDSettings
from singer_jax.models.architecture import Architecture
from singer_jax.models.vit import VisionTransformer

TEACHER = Architecture(
    img_size=(16, 16), patch_size=4, embed_dim=24, depth=3, num_heads=2, num_classes=0
)
STUDENT = dataclasses.replace(TEACHER, embed_dim=12, depth=2)
BATCH = Batch(key=jax.random.key(0))


def forward(model: VisionTransformer, images: jax.Array) -> ModelFeatures:
    return ModelFeatures(model, dict(enumerate(model.features(images))))


@pytest.fixture(scope="module")
def seen() -> tuple[ModelFeatures, ModelFeatures]:
    """Features of teacher and student; the teacher's final norm has scales and biases."""
    images = jax.random.normal(jax.random.key(2), (3, 16, 16, 3))
    teacher = VisionTransformer(TEACHER, rngs=nnx.Rngs(0))
    teacher.norm.scale[...] += jax.random.normal(jax.random.key(3), (24,))
    teacher.norm.bias[...] += jax.random.normal(jax.random.key(4), (24,))
    return forward(teacher, images), forward(VisionTransformer(STUDENT, rngs=nnx.Rngs(1)), images)


def norms(x: np.ndarray) -> np.ndarray:
    return np.linalg.norm(x, axis=-1, keepdims=True)


def standardised(x: np.ndarray, by: np.ndarray) -> np.ndarray:
    """Standardises class token and patches separately, with the statistics of `by`."""
    result = np.empty_like(x)
    for rows in (slice(0, 1), slice(1, None)):
        result[:, rows] = (x[:, rows] - by[:, rows].mean((0, 1))) / by[:, rows].std((0, 1))
    return result


def in_space(space: str, x: np.ndarray, teacher: VisionTransformer, by: np.ndarray) -> np.ndarray:
    if space == "final_norm":
        centred = x - x.mean(-1, keepdims=True)
        scaled = centred / np.sqrt(np.square(centred).mean(-1, keepdims=True) + TEACHER.norm_eps)
        return scaled * np.asarray(teacher.norm.scale[...]) + np.asarray(teacher.norm.bias[...])
    return {"residual": x, "l2": x / norms(x), "standardised": standardised(x, by)}[space]


def loss_of(name: str, prediction: np.ndarray, target: np.ndarray) -> float:
    difference = np.abs(prediction - target)
    cosine = np.sum(prediction * target, -1, keepdims=True) / norms(prediction) / norms(target)
    smooth = np.where(difference < 1, difference**2 / 2, difference - 1 / 2).mean()
    return {
        "mse": np.mean(difference**2),
        "cosine": np.mean(1 - cosine),
        "smooth_l1": smooth,
        "cosine_smooth_l1": 0.5 * np.mean(1 - cosine) + 0.5 * smooth,
    }[name]


@pytest.mark.parametrize("loss", losses.LOSSES)
@pytest.mark.parametrize("space", SPACES)
def test_each_space_and_loss_equals_numpy(seen, space, loss):
    teacher, _ = seen
    settings = MatchSettings(target_space=space, loss=loss)
    compare = Comparison(settings, match_tokens(STUDENT, TEACHER, False), (1,))
    compare.absorb(compare.observe(teacher))
    predicted = 2 * jax.random.normal(jax.random.key(5), teacher.features[1].shape)
    features, ours = (np.asarray(x, np.float64) for x in (teacher.features[1], predicted))
    if space == "l2":
        ours = ours / norms(ours)
    expected = loss_of(loss, ours, in_space(space, features, teacher.model, features))
    # Float32; a first batch's mean square minus its squared mean cancels some digits of a class
    # token that hardly changes.
    np.testing.assert_allclose(compare(predicted, teacher, 1), expected, rtol=1e-3)


def test_tokens_are_not_transformed_by_default(seen):
    compare = Comparison(MatchSettings(), match_tokens(STUDENT, TEACHER, False), (1,))
    assert compare.target(seen[0], 1) is seen[0].features[1]
    assert not jax.tree.leaves(nnx.state(compare))


@pytest.mark.parametrize("space", SPACES)
def test_singer_compares_refined_tokens_and_its_refiner_learns_through_the_space(seen, space):
    teacher, student = seen
    settings = singer.SingerSettings(
        rank=4,
        layers=(1,),
        match=MatchSettings(target_space=space, loss="smooth_l1"),
        nullspace=NullSpaceSettings(mode="random"),
    )
    method = methods.make(teacher.model, STUDENT, settings, nnx.Rngs(0))
    method.absorb(method.observe(teacher))
    graph, parts, constants = nnx.split(method, nnx.Param, methods.FrozenVariable)

    def kd(parts):
        return nnx.merge(graph, parts, constants).loss(*seen, BATCH)["kd"]

    value, gradient = jax.value_and_grad(kd)(parts)
    expected = 0.0
    for layer, own in zip(method.teacher_layers, method.student_layers, strict=True):
        features = teacher.features[layer]
        refined = singer.refine(method.refiner[str(layer)], features, 1)
        predicted = method.adapter[str(own)](student.features[own])
        x, by, ours = (np.asarray(x, np.float64) for x in (refined, features, predicted))
        ours = ours / norms(ours) if space == "l2" else ours
        expected += loss_of("smooth_l1", ours, in_space(space, x, teacher.model, by)) / 2
    np.testing.assert_allclose(value, expected, rtol=1e-3)  # as above
    for refiner in gradient["refiner"].values():
        assert all(float(jnp.abs(leaf).max()) > 0 for leaf in jax.tree.leaves(refiner))


def test_vitkd_mimics_in_the_target_space_and_generates_in_the_residual(seen):
    teacher, student = seen
    plain, l2 = (
        methods.make(
            teacher.model,
            STUDENT,
            ViTKDSettings(
                mimic_layers=(0,), match=MatchSettings(target_space=space, loss="cosine")
            ),
            nnx.Rngs(0),
        )
        for space in ("residual", "final_norm")
    )
    (own, _), features = l2.student_layers, np.asarray(teacher.features[0], np.float64)
    predicted = np.asarray(l2.adapter[str(own)](student.features[own]), np.float64)
    target = in_space("final_norm", features, teacher.model, features)
    terms = l2.loss(*seen, BATCH)
    np.testing.assert_allclose(terms["mimic"], loss_of("cosine", predicted, target), rtol=1e-5)
    assert terms["generation"] == plain.loss(*seen, BATCH)["generation"]
    assert terms["mimic"] != plain.loss(*seen, BATCH)["mimic"]


def arrays(seed: int, patches: int) -> np.ndarray:
    """Returns patches of two images, some with huge norms."""
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(2, patches, 5)) * rng.gamma(1.0, 5.0, (2, patches, 1))).astype("f4")


@given(st.integers(0, 10_000), st.sampled_from((2, 9)), st.sampled_from((0.01, 0.6, 0.99)))
def test_clipping_scales_down_to_the_quantile_and_is_idempotent(seed, patches, quantile):
    x = arrays(seed, patches)
    before = norms(x)[..., 0]
    threshold = np.quantile(before, quantile, axis=1, keepdims=True, method="lower")
    once = np.asarray(clip_norms(jnp.asarray(x), quantile))
    after = norms(once)[..., 0]
    np.testing.assert_allclose(after, np.minimum(before, threshold), rtol=1e-5)
    kept = before < threshold
    np.testing.assert_array_equal(once[kept], x[kept])
    np.testing.assert_allclose(once * before[..., None], x * after[..., None], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(clip_norms(jnp.asarray(once), quantile), once, rtol=1e-6)


def test_class_tokens_and_registers_are_not_clipped(seen):
    settings = MatchSettings(norm_clip_quantile=0.5)
    compare = Comparison(settings, match_tokens(STUDENT, TEACHER, False), (1,))
    features = seen[0].features[1].at[:, 0].multiply(100)
    target = compare.target(seen[0], 1, features)
    np.testing.assert_array_equal(target[:, 0], features[:, 0])
    assert float(token_norms(target[:, 1:]).max()) < float(token_norms(features[:, 1:]).max())


@given(st.integers(0, 10_000), st.floats(1e-3, 1e3))
def test_l2_is_invariant_to_the_scale_of_either_side(seed, scale):
    tokens = match_tokens(STUDENT, TEACHER, False)
    compare = Comparison(MatchSettings(target_space="l2"), tokens, ())
    target, predicted = (jnp.asarray(arrays(seed + side, 17)) for side in (0, 1))
    teacher = ModelFeatures(None, {0: target})
    found = compare(predicted, teacher, 0)
    np.testing.assert_allclose(compare(scale * predicted, teacher, 0), found, rtol=1e-4)
    np.testing.assert_allclose(compare(predicted, teacher, 0, scale * target), found, rtol=1e-4)
    # |u - v|^2 = 2 (1 - cos) of unit vectors, over five elements.
    expected = 2 / 5 * losses.cosine_distance(predicted, target)
    np.testing.assert_allclose(found, expected, rtol=1e-4)


@given(st.integers(0, 10_000))
def test_smooth_l1_is_quadratic_near_zero_and_linear_elsewhere(seed):
    near = jnp.asarray(np.random.default_rng(seed).uniform(-1, 1, (4, 6)), jnp.float32)
    far = near + 2 * jnp.sign(near)
    zero = jnp.zeros_like(near)
    square, found = losses.mean_squared_error(near, zero), losses.smooth_l1(near, zero)
    np.testing.assert_allclose(found, square / 2, rtol=1e-5)
    np.testing.assert_allclose(losses.smooth_l1(zero, far), jnp.mean(jnp.abs(far)) - 0.5, rtol=1e-5)


def test_zero_tokens_have_finite_gradients():
    zero = jnp.zeros((1, 2, 3))
    for loss in losses.LOSSES.values():
        assert np.all(np.isfinite(jax.grad(loss)(zero, jnp.ones_like(zero))))
    assert np.all(np.isfinite(jax.grad(lambda x: clip_norms(x, 0.5).sum())(zero)))


def test_statistics_are_those_of_the_first_batches_together(monkeypatch):
    monkeypatch.setattr(match, "MEASURED_BATCHES", 3)
    rng = np.random.default_rng(0)
    batches = rng.normal(3, 2, (5, 4, 6, 8)).astype("f4")  # of 4 images, 2 prefix tokens, 4 patches
    batches[:, :, 0] += 50
    statistics = match.Statistics(2, 8)
    for batch in batches:
        statistics.absorb(statistics.observe(jnp.asarray(batch)))
    first = batches[:3].reshape(12, 6, 8).astype(np.float64)
    by_kind = [first[:, 0], first[:, 1], first[:, 2:].reshape(-1, 8)]
    mean, deviation = (np.stack([f(rows, 0) for rows in by_kind]) for f in (np.mean, np.std))
    row = [0, 1, 2, 2, 2, 2]
    expected = (batches[4] - mean[row]) / deviation[row]
    found = statistics.standardise(jnp.asarray(batches[4]))
    # A squared mean of 2,800 in float32 leaves four digits of a variance of 4 to the first batch.
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)
    assert float(statistics.batches[...]) == 3


def test_a_channel_that_never_changes_stays_finite():
    statistics = match.Statistics(0, 2)
    tokens = jnp.stack([jnp.full((2, 3), 7.0), jnp.zeros((2, 3))], axis=-1)
    statistics.absorb(statistics.observe(tokens))
    np.testing.assert_allclose(statistics.standardise(tokens), 0, atol=1e-3)
