"""The methods: initialisation, matching of layers, and the parameters that gradients reach."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from singer_jax import methods
from singer_jax.config import default
from singer_jax.errors import InputError
from singer_jax.methods import WeightedSumSettings, singer
from singer_jax.methods.base import (
    Batch,
    LayerSettings,
    ModelFeatures,
    distilled_layers,
    match_layers,
)
from singer_jax.methods.section import MethodSection
from singer_jax.models.architecture import Architecture
from singer_jax.models.vit import VisionTransformer
from singer_jax.settings.settings import Settings, flatten

TEACHER = Architecture(
    img_size=(16, 16), patch_size=4, embed_dim=24, depth=4, num_heads=2, num_classes=0
)
STUDENT = Architecture(
    img_size=(16, 16), patch_size=4, embed_dim=12, depth=3, num_heads=2, num_classes=5
)


def settings(protocol: str = "recommended", **keys: object) -> Settings:
    """Returns settings of a method; keys of its null space are given without their section."""
    config = default(protocol).method
    config.rank, config.outlier_quantile = 4, 0.8
    for key, value in keys.items():
        within = config.nullspace if key in config.nullspace else config
        within[key] = value
    return MethodSection().from_flat(singer.SingerSettings(), flatten(config), "")


@pytest.fixture(scope="module")
def teacher() -> VisionTransformer:
    return VisionTransformer(TEACHER, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def student() -> VisionTransformer:
    return VisionTransformer(STUDENT, rngs=nnx.Rngs(1))


@pytest.fixture(scope="module")
def images() -> jax.Array:
    return jax.random.normal(jax.random.key(2), (3, 16, 16, 3))


def forward(model: VisionTransformer, images: jax.Array) -> ModelFeatures:
    return ModelFeatures(model, dict(enumerate(model.features(images))))


BATCH = Batch(jnp.zeros(3, jnp.int32), jax.random.key(0))


def patches_of(features: jax.Array) -> jax.Array:
    return features[:, 1:]


@pytest.mark.parametrize("use", ["project", "soft"])
def test_projected_refiners_start_at_the_identity(teacher, images, use):
    method = singer.Singer(teacher, STUDENT, settings(mode=use), nnx.Rngs(0))
    features = teacher.features(images)[2]
    refined = singer.refine(method.refiner["2"], features, 1)
    np.testing.assert_array_equal(refined, features)


def test_the_official_start_doubles_the_null_components(teacher, images):
    method = singer.Singer(teacher, STUDENT, settings("paper", threshold=10.0), nnx.Rngs(0))
    refiner, patches = method.refiner["2"], patches_of(teacher.features(images)[2])
    directions = refiner.up[...]
    refined = patches + refiner.update(patches)
    np.testing.assert_allclose(refined @ directions.T, 2 * patches @ directions.T, atol=1e-4)


def test_prefix_tokens_pass_unchanged(teacher, images):
    method = singer.Singer(teacher, STUDENT, settings("paper"), nnx.Rngs(0))
    features = teacher.features(images)[2]
    refined = singer.refine(method.refiner["2"], features, 1)
    np.testing.assert_array_equal(refined[:, 0], features[:, 0])
    assert not np.allclose(refined[:, 1:], features[:, 1:])


def test_identical_features_have_no_info_loss(teacher, student, images):
    method = singer.Singer(teacher, STUDENT, settings(), nnx.Rngs(0))
    terms = method.loss(forward(teacher, images), forward(student, images), BATCH)
    # The last layer compares its similarities with those of the layer before it.
    last, before = (patches_of(teacher.features(images)[layer]) for layer in (3, 2))
    difference = singer.cosine_similarity_matrix(last) - singer.cosine_similarity_matrix(before)
    np.testing.assert_allclose(terms["info"], jnp.mean(difference**2) / 2, rtol=1e-4)


def test_one_distilled_layer_is_compared_with_itself(teacher, student, images):
    method = singer.Singer(teacher, STUDENT, settings(layers=()), nnx.Rngs(0))
    assert method.teacher_layers == (3,)
    terms = method.loss(forward(teacher, images), forward(student, images), BATCH)
    assert terms["info"] == 0
    assert jnp.isfinite(terms["outlier"])


@given(st.integers(0, 10_000), st.sampled_from([2, 9, 30]), st.floats(0.01, 0.99))
def test_outlier_loss_equals_its_definition(seed, patches, quantile):
    norms = np.random.default_rng(seed).gamma(2.0, size=(3, patches)).astype(np.float32)
    threshold = np.quantile(norms, quantile, axis=1, keepdims=True)
    above = norms > threshold
    expected = np.mean((norms - threshold)[above] ** 2) if above.any() else 0.0
    actual = singer.outlier_loss(jnp.asarray(norms), quantile)
    np.testing.assert_allclose(actual, expected, rtol=1e-3, atol=1e-6)


@given(st.integers(0, 10_000), st.sampled_from([1, 9, 30]), st.floats(0.01, 0.99))
def test_the_outlier_threshold_and_its_loss_are_those_of_the_sorted_quantile(seed, patches, q):
    norms = jnp.asarray(np.random.default_rng(seed).gamma(2.0, size=(3, patches)), jnp.float32)
    expected = jnp.quantile(norms, q, axis=1, keepdims=True)
    # jnp.quantile takes the position in float32: 1e-7 x 40 patches x the distance of two norms.
    np.testing.assert_allclose(singer.outlier_threshold(norms, q), expected, rtol=1e-4)

    def by_sorting(norms):
        threshold = jax.lax.stop_gradient(expected)
        outlier = norms > threshold
        squared = jnp.square(jnp.where(outlier, norms - threshold, 0.0))
        return jnp.sum(squared) / jnp.maximum(jnp.sum(outlier), 1)

    gradient = jax.grad(singer.outlier_loss)(norms, q)
    np.testing.assert_allclose(gradient, jax.grad(by_sorting)(norms), rtol=1e-3, atol=1e-3)


@given(st.integers(0, 10_000), st.sampled_from([1, 40, 300]), st.floats(0.001, 1.0))
def test_the_batch_quantile_is_a_number_of_the_batch_at_its_rank(seed, size, quantile):
    values = np.random.default_rng(seed).gamma(2.0, size=size).astype(np.float32)
    values[::7] = values[0]  # equal ones
    found = float(singer.batch_quantile(jnp.asarray(values), quantile))
    assert found == np.sort(values)[max(1, math.ceil(quantile * size)) - 1]


def test_equal_norms_have_neither_outlier_loss_nor_nan_gradient():
    def loss(tokens):
        return singer.outlier_loss(singer.token_norms(tokens), 0.9)

    for tokens in (jnp.ones((2, 6, 3)), jnp.zeros((2, 6, 3))):
        value, gradient = jax.value_and_grad(loss)(tokens)
        assert value == 0
        np.testing.assert_array_equal(gradient, 0)


def test_gradients_reach_student_adapter_and_refiner_but_no_constant(teacher, student, images):
    method = singer.Singer(teacher, STUDENT, settings("paper"), nnx.Rngs(0))
    graph, parts, constants = nnx.split(method, nnx.Param, methods.FrozenVariable)
    student_graph, student_params = nnx.split(student)

    def loss(parts, student_params):
        own = nnx.merge(student_graph, student_params)
        terms = nnx.merge(graph, parts, constants).loss(
            forward(teacher, images), forward(own, images), BATCH
        )
        return sum(terms.values())

    of_parts, of_student = jax.jit(jax.grad(loss, argnums=(0, 1)))(parts, student_params)
    for leaf in jax.tree.leaves(of_parts):
        assert float(jnp.abs(leaf).max()) > 0
    assert float(jnp.abs(of_student["patch_embed"]["proj"]["kernel"][...]).max()) > 0


def test_fitnet_with_cross_entropy_of_weight_zero_reaches_the_head(teacher, student, images):
    weightless = settings("paper", name="fitnet")
    assert methods.needs(weightless).logits and not methods.needs(weightless).labels
    method = methods.make(teacher, STUDENT, weightless, nnx.Rngs(0))
    terms = method.loss(forward(teacher, images), forward(student, images), BATCH)
    assert terms["ce"] == 0
    assert not methods.needs(settings(name="fitnet")).logits


@pytest.mark.parametrize(
    ("rule", "layers", "teacher_depth", "student_depth", "expected"),
    [
        ("official", (17, 23), 24, 12, (8, 11)),  # the published ViT-L -> ViT-Ti
        ("last_to_last", (17, 23), 24, 12, (8, 11)),
        ("official", (8, 11), 12, 12, (7, 10)),  # the student's last block stays untrained
        ("last_to_last", (8, 11), 12, 12, (8, 11)),
        ("last_to_last", (0, 1, 2), 3, 3, (0, 1, 2)),
        ("last_to_last", (5, 6, 7), 8, 4, (1, 2, 3)),  # (2, 1, 3) is as near
    ],
)
def test_layers_are_matched(rule, layers, teacher_depth, student_depth, expected):
    assert match_layers(rule, layers, teacher_depth, student_depth) == expected


@given(st.integers(1, 24), st.integers(1, 24), st.data())
def test_last_block_learns_from_the_last_block(teacher_depth, student_depth, data):
    count = data.draw(st.integers(1, min(teacher_depth, student_depth)))
    others = data.draw(st.sets(st.integers(0, teacher_depth - 1), max_size=count - 1))
    layers = sorted(others | {teacher_depth - 1})
    matched = match_layers("last_to_last", layers, teacher_depth, student_depth)
    assert matched[-1] == student_depth - 1
    assert list(matched) == sorted(set(matched))


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ((4,), "4 is out of range, the teacher has blocks 0 to 3"),
        ((0, 0), "distinct"),
        ((2, 1), "ascending"),
        ((0, 1, 2), "4 distilled layers, but the student has only 3 blocks"),
    ],
)
def test_invalid_layers_are_named(layers, message):
    with pytest.raises(InputError, match=message):
        distilled_layers(LayerSettings(layers=layers), (0.75,), TEACHER, STUDENT)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("threshold", 1.5, r"1.5 is not in 0..1, the range of threshold_type quantile"),
        ("rank", 25, "method.rank: 25 is not in 1..24"),
    ],
)
def test_settings_that_do_not_fit_the_teacher_are_named(teacher, key, value, message):
    with pytest.raises(InputError, match=message):
        singer.Singer(teacher, STUDENT, settings(**{key: value}), nnx.Rngs(0))


def test_the_report_warns_where_there_is_no_null_space(teacher, student, images):
    method = singer.Singer(
        teacher, STUDENT, settings(threshold_type="absolute", threshold=0.0), nnx.Rngs(0)
    )
    metrics = method.diagnose(forward(teacher, images))
    lines = [line for _, line in method.report(metrics)]
    assert any("teacher layer 2: 0 of 24 singular values" in line for line in lines)
    assert any("layer 2 has no null space" in line and "smallest" in line for line in lines)
    assert any("share of the outliers' energy inside the subspace" in line for line in lines)


@pytest.mark.parametrize("name", ["vitkd", "vitkd_official"])
@pytest.mark.parametrize("protocol", ["recommended", "paper"])
def test_the_generator_is_trained_or_frozen(teacher, student, images, name, protocol):
    of_method = settings(protocol, name=name, mimic_layers=(0,))
    method = methods.make(teacher, STUDENT, of_method, nnx.Rngs(0))
    trained = {path[0] for path, _ in nnx.to_flat_state(nnx.state(method, nnx.Param))}
    saved = {path[0] for path, _ in nnx.to_flat_state(nnx.state(method, methods.FrozenVariable))}
    generating = {"generator", "mask_token"}
    adapting = {"adapter"} if name == "vitkd" else {"mimic", "align"}
    if protocol == "recommended":
        assert trained == generating | adapting and not saved
    else:
        frozen = generating if name == "vitkd" else generating | adapting
        assert saved == frozen and trained == (generating | adapting) - frozen
    terms = method.loss(forward(teacher, images), forward(student, images), BATCH)
    assert all(float(value) > 0 for value in terms.values())


def test_masking_differs_from_step_to_step(teacher, student, images):
    of_method = settings(name="vitkd", mimic_layers=(0,))
    method = methods.make(teacher, STUDENT, of_method, nnx.Rngs(0))
    seen = (forward(teacher, images), forward(student, images))
    losses = [
        float(method.loss(*seen, Batch(BATCH.labels, jax.random.key(step)))["generation"])
        for step in (0, 0, 1)
    ]
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize("layers", [(3,), (-1,), (0, 1, 2)])
def test_vitkd_layers_that_cannot_work_are_named(teacher, layers):
    """Block 3 is the last; with three mimicked blocks the student has none to generate from."""
    with pytest.raises(InputError, match=r"^(method|ViTKDSettings)\.mimic_layers"):
        of_method = settings(name="vitkd", mimic_layers=layers)
        methods.make(teacher, STUDENT, of_method, nnx.Rngs(0))


def test_logit_kd_is_the_divergence_at_its_temperature(images):
    heads = dataclasses.replace(TEACHER, num_classes=5)
    teacher = VisionTransformer(heads, rngs=nnx.Rngs(0))
    student = VisionTransformer(STUDENT, rngs=nnx.Rngs(1))
    method = methods.make(teacher, STUDENT, settings(name="logit_kd"), nnx.Rngs(0))
    terms = method.loss(forward(teacher, images), forward(student, images), BATCH)
    taught, own = (
        scipy.special.softmax(np.asarray(model(images), np.float64) / 4, axis=1)
        for model in (teacher, student)
    )
    expected = 16 * np.mean(np.sum(taught * np.log(taught / own), axis=1))
    # Differences of log-probabilities near 1.6 cancel in float32: 16 x 1e-7 x 1.6.
    np.testing.assert_allclose(terms["kd"], expected, rtol=1e-5, atol=3e-6)
    terms = method.loss(forward(teacher, images), forward(teacher, images), BATCH)
    np.testing.assert_allclose(terms["kd"], 0, atol=1e-6)


def test_a_sum_is_its_methods_times_their_weights(teacher, student, images):
    parts = ((1.0, settings()), (0.25, settings(name="fitnet")))
    both = methods.make(teacher, STUDENT, WeightedSumSettings(parts), nnx.Rngs(0))
    seen = (forward(teacher, images), forward(student, images), BATCH)
    terms = both.loss(*seen)
    singly = both.methods["singer"].loss(*seen)
    fitnet = both.methods["fitnet"].loss(*seen)
    expected = {f"singer_{name}": value for name, value in singly.items()}
    expected |= {f"fitnet_{name}": 0.25 * value for name, value in fitnet.items()}
    assert {name: float(x) for name, x in terms.items()} == pytest.approx(
        {name: float(x) for name, x in expected.items()}
    )
    assert any("fitnet: layer mapping" in line for _, line in both.report(both.diagnose(seen[0])))
    assert set(both.student_layers) >= set(both.methods["fitnet"].student_layers)


def test_cross_entropy_of_weight_zero_ignores_labels(teacher, images):
    """A head with fewer classes than the data, or with none, has no effect."""
    student = VisionTransformer(dataclasses.replace(STUDENT, num_classes=2), rngs=nnx.Rngs(1))
    method = methods.make(teacher, STUDENT, settings("paper", name="fitnet"), nnx.Rngs(0))
    batch = Batch(jnp.array([0, 5, 999]), jax.random.key(0))
    terms = method.loss(forward(teacher, images), forward(student, images), batch)
    assert terms["ce"] == 0 and jnp.isfinite(terms["kd"])
