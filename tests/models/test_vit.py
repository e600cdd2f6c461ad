"""The vision transformer: single blocks, dtypes and sizes."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from flax import nnx

from singer_jax.errors import InputError
from singer_jax.models import zoo
from singer_jax.models.architecture import Architecture, ComputePolicy
from singer_jax.models.layers import ACTIVATIONS
from singer_jax.models.params import leaves
from singer_jax.models.vit import VisionTransformer
from singer_jax.models.weights import abstract_model, abstract_params

TINY = Architecture(
    img_size=(16, 24), patch_size=8, embed_dim=16, depth=3, num_heads=2, num_classes=5
)


def make(policy: ComputePolicy = ComputePolicy(), **changes: object) -> VisionTransformer:
    return VisionTransformer(dataclasses.replace(TINY, **changes), policy, rngs=nnx.Rngs(0))


@pytest.fixture
def images() -> jax.Array:
    return jax.random.normal(jax.random.key(1), (2, 16, 24, 3))


def test_features_are_the_chain_of_the_blocks(images):
    model = make()
    features = model.features(images)
    x = model.embed(images)
    assert x.shape == (2, 1 + 2 * 3, 16)
    for index, feature in enumerate(features):
        x = model.apply_block(index, x)
        np.testing.assert_array_equal(x, feature)
    np.testing.assert_array_equal(model.features(images, blocks=2)[-1], features[1])
    assert model(images).shape == (2, 5)
    assert make(num_classes=0)(images).shape == (2, 16)


def test_remat_changes_neither_values_nor_gradients(images):
    def loss_of(policy: ComputePolicy):
        graph, params = nnx.split(make(policy))
        return jax.value_and_grad(lambda p: jnp.sum(nnx.merge(graph, p)(images) ** 2))(params)

    (kept, kept_gradients), (again, gradients) = (
        loss_of(ComputePolicy()),
        loss_of(ComputePolicy(remat=True)),
    )
    np.testing.assert_allclose(kept, again, rtol=1e-6)
    # Float32 rounding in another order of additions.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        kept_gradients,
        gradients,
    )


def test_bfloat16_computes_and_stores_in_bfloat16_and_stays_close(images):
    policy = ComputePolicy(dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    low = make(policy)
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(low))} == {jnp.dtype(jnp.bfloat16)}
    feature = low.features(images)[-1]
    assert feature.dtype == jnp.bfloat16
    exact = make()
    nnx.update(exact, jax.tree.map(lambda x: x.astype(jnp.float32), nnx.state(low)))
    error = jnp.linalg.norm(feature.astype(jnp.float32) - exact.features(images)[-1])
    # bfloat16 keeps 8 bits (relative error 2^-9) and a few dozen operations follow each other.
    assert error < 0.03 * jnp.linalg.norm(exact.features(images)[-1])


# As `sum(p.numel() for p in timm.create_model(name).parameters())` prints them.
PARAMETERS = {
    "vit_tiny_patch16_224": 5_717_416,
    "vit_small_patch16_224": 22_050_664,
    "vit_base_patch16_224": 86_567_656,
    "vit_large_patch16_224": 304_326_632,
    "vit_huge_patch14_224": 630_764_800,
    "deit3_small_patch16_224": 22_059_496,
    "deit3_medium_patch16_224": 38_849_512,
    "deit3_base_patch16_224": 86_585_320,
    "deit3_large_patch16_224": 304_374_760,
    "vit_base_patch16_clip_224": 86_568_424,
    "vit_base_patch16_clip_quickgelu_224": 86_193_152,
    "vit_xsmall_patch16_clip_224": 8_277_504,
    "vit_small_patch14_dinov2": 22_056_192,
    "vit_base_patch14_dinov2": 86_579_712,
    "vit_large_patch14_dinov2": 304_367_616,
    "vit_giant_patch14_dinov2": 1_136_479_232,
    "vit_small_patch14_reg4_dinov2": 22_057_344,
    "vit_base_patch14_reg4_dinov2": 86_582_016,
    "vit_large_patch14_reg4_dinov2": 304_370_688,
    "vit_giant_patch14_reg4_dinov2": 1_136_483_840,
    "vit_small_patch16_dinov3": 21_586_944,
    "vit_small_plus_patch16_dinov3": 28_683_264,
    "vit_base_patch16_dinov3": 85_641_216,
    "vit_large_patch16_dinov3": 303_079_424,
    "vit_huge_plus_patch16_dinov3": 840_509_440,
    "vit_7b_patch16_dinov3": 6_716_030_976,
    "vit_small_patch16_dinov3_qkvb": 21_596_160,
    "vit_small_plus_patch16_dinov3_qkvb": 28_692_480,
    "vit_base_patch16_dinov3_qkvb": 85_659_648,
    "vit_large_patch16_dinov3_qkvb": 303_128_576,
    "vit_huge_plus_patch16_dinov3_qkvb": 840_591_360,
    "vit_base_patch16_siglip_224": 92_884_224,
    "vit_base_patch16_siglip_256": 92_930_304,
    "vit_base_patch16_siglip_384": 93_176_064,
    "vit_base_patch16_siglip_512": 93_520_128,
    "vit_large_patch16_siglip_256": 315_956_224,
    "vit_large_patch16_siglip_384": 316_283_904,
    "vit_so400m_patch14_siglip_224": 427_680_704,
    "vit_so400m_patch14_siglip_378": 428_225_600,
}


def test_models_have_the_parameters_of_timm():
    for name, expected in PARAMETERS.items():
        params = abstract_params(zoo.lookup(name).arch)
        assert sum(math.prod(leaf.shape) for _, leaf in leaves(params)) == expected, name


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("vit_tiny_patch16_224", {}),
        ("vit_small_patch16_rope_mixed_224", {"depth": 3}),
        ("vit_base_patch16_sapiens2", {"depth": 3, "num_kv_heads": (12, 6, 12)}),
    ],
)
def test_abstract_parameters_are_those_of_the_model(name, changes):
    arch = zoo.lookup(name, changes).arch
    assert abstract_params(arch) == abstract_model(arch, ComputePolicy())[1]


def test_lookup_takes_owner_tag_and_overrides():
    spec = zoo.lookup("timm/vit_tiny_patch16_224.augreg_in21k", {"img_size": 32, "depth": 2})
    assert (spec.name, spec.arch.img_size, spec.arch.depth) == ("vit_tiny_patch16_224", (32, 32), 2)


@pytest.mark.parametrize(
    ("model", "overrides", "message"),
    [
        ("vit_tinny_patch16_224", {}, "closest: vit_tiny_patch16_224"),
        ("vit_tiny_patch16_224", {"embed_dims": 3}, "closest: embed_dim"),
        ("vit_tiny_patch16_224", {"img_size": 33}, "not a multiple of patch_size 16"),
        ("vit_tiny_patch16_224", {"num_heads": 5}, "not a multiple of num_heads 5"),
    ],
)
def test_lookup_errors(model, overrides, message):
    with pytest.raises(InputError, match=message):
        zoo.lookup(model, overrides)


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
def test_activations_are_exact_in_bfloat16(activation):
    x = jnp.linspace(-6, 6, 400).astype(jnp.bfloat16)
    wide = np.asarray(x, np.float64)
    exact = {
        "gelu": wide * scipy.special.ndtr(wide),
        "quick_gelu": wide * scipy.special.expit(1.702 * wide),
    }[activation]
    found = np.asarray(jax.jit(ACTIVATIONS[activation])(x), np.float64)
    # Only the result is rounded: 2^-9 relative, and float32's cancellation of 1 + erf near -6.
    np.testing.assert_allclose(found, exact, rtol=2**-8, atol=1e-6)
