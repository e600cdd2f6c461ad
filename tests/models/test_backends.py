"""The implementation choices of every backend give equal results on the CPU."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from singer_jax.models.architecture import ComputePolicy
from singer_jax.models.attention import attend, attend_padded
from singer_jax.models.params import leaves
from singer_jax.models.vit import VisionTransformer
from singer_jax.models.weights import load_model
from singer_jax.models.zoo import lookup
from singer_jax.platform import parallel
from tests import tiny

PLATFORMS = ("tpu", "gpu")
FAMILIES = {
    "vit_tiny_patch16_224": {},
    "beit_base_patch16_224": {"init_values": 0.5},
    "vit_small_patch16_rope_mixed_224": {"init_values": 0.5},
    "vit_small_patch16_dinov3": {"embed_dim": 32, "init_values": 0.5},
    "vit_giant_patch14_reg4_dinov2": {"init_values": 0.5},
    "eva02_base_patch16_clip_224": {},
}
# Relative positions, and rotary ones with registers.
FEW = {"beit_base_patch16_224", "vit_small_patch16_dinov3"}
assert set(FAMILIES) >= FEW


def build(family: str, **policy: object) -> VisionTransformer:
    spec = lookup(family, tiny.TEACHER | {"num_classes": 0, "depth": 4} | FAMILIES[family])
    return VisionTransformer(spec.arch, ComputePolicy(**policy), rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def images() -> jax.Array:
    return jax.random.normal(jax.random.key(0), (3, 16, 16, 3))


@pytest.mark.parametrize(
    "family",
    [pytest.param(name, marks=() if name in FEW else pytest.mark.slow) for name in FAMILIES],
)
def test_features_and_gradients_do_not_depend_on_the_backend(family, images):
    def measured(platform: str, remat: bool = False):
        graph, params = nnx.split(build(family, backend=platform, remat=remat))

        @jax.jit
        @jax.value_and_grad
        def loss(params):
            features = nnx.merge(graph, params).features(images, 3)
            return sum(jnp.mean(jnp.sin(feature)) for feature in features)

        value, gradient = loss(params)
        return value, dict(leaves(nnx.to_pure_dict(gradient)))

    value, gradient = measured("cpu")
    for platform, remat in (("tpu", False), ("tpu", True), ("gpu", False)):
        other_value, other_gradient = measured(platform, remat)
        np.testing.assert_allclose(other_value, value, rtol=1e-5, atol=1e-6)
        for keys, expected in gradient.items():
            # Sums in another order, over 3 x 17 tokens.
            np.testing.assert_allclose(
                other_gradient[keys], expected, rtol=1e-4, atol=1e-6, err_msg=f"{platform} {keys}"
            )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "layers",
    [
        pytest.param((3,), marks=pytest.mark.slow),
        pytest.param((0, 2), marks=pytest.mark.slow),
        (1, 2, 3),
    ],
)
def test_features_at_some_blocks_are_those_features(family, layers, images):
    graph, params = nnx.split(build(family, backend="cpu"))
    expected = nnx.merge(graph, params).features(images)
    for platform, stacked in (("tpu", False), ("tpu", True)):
        # Built alike, so that both hold the same numbers.
        graph, params = nnx.split(build(family, backend=platform, stacked=stacked))
        found = jax.jit(lambda p, g=graph: nnx.merge(g, p).features_at(images, layers))(params)
        assert set(found) == set(layers)
        for layer, feature in found.items():
            np.testing.assert_allclose(feature, expected[layer], rtol=1e-4, atol=1e-5)


def test_stacked_parameters_are_read_from_the_same_file(tmp_path, images):
    file = tiny.write_teacher(tmp_path / "teacher.safetensors")
    spec = lookup("vit_tiny_patch16_224", tiny.TEACHER | {"num_classes": 0})
    graph, params = load_model(spec, file, ComputePolicy(backend="cpu"))
    expected = nnx.merge(graph, params)
    mesh = parallel.make_mesh(2, 2)
    policy = ComputePolicy(backend="tpu", stacked=True)
    graph, params = load_model(
        spec, file, policy, lambda abstract: parallel.tree_shardings(mesh, abstract)
    )
    kernel = params["blocks"]["attn"]["qkv"]["kernel"]
    assert kernel.shape == (spec.arch.depth, 24, 72)
    assert kernel.sharding.shard_shape(kernel.shape) == (spec.arch.depth, 24, 36)
    model = nnx.merge(graph, params)
    for index in range(spec.arch.depth):
        tokens = expected.embed(images)
        np.testing.assert_allclose(
            model.apply_block(index, tokens),
            expected.apply_block(index, tokens),
            rtol=1e-4,
            atol=1e-5,
        )
    np.testing.assert_allclose(model(images), expected(images), rtol=1e-4, atol=1e-5)


def test_repr_of_a_model_does_not_depend_on_the_backend():
    plain = ComputePolicy()
    assert repr(dataclasses.replace(plain, backend="tpu", stacked=True)) == repr(plain)


def test_attention_of_an_odd_number_of_tokens_is_that_of_the_padded_one():
    """The token that cuDNN's gradient needs is masked, as query and as key."""
    heads = jax.random.normal(jax.random.key(0), (3, 2, 17, 3, 8))

    def total(attention, *heads):
        return jnp.sum(jnp.sin(attention(*heads)))

    def padded(*heads):
        return attend_padded(*heads, implementation="xla")

    expected = jax.grad(total, argnums=(1, 2, 3))(attend, *heads)
    found = jax.grad(total, argnums=(1, 2, 3))(padded, *heads)
    np.testing.assert_allclose(padded(*heads), attend(*heads), rtol=1e-5, atol=1e-6)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)  # sums in another order


def bfloat16_features(images, **policy: object) -> np.ndarray:
    half = {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16}
    graph, params = nnx.split(build("vit_tiny_patch16_224", **half, **policy))
    (found,) = jax.jit(lambda p: nnx.merge(graph, p).features_at(images, (3,)))(params).values()
    return np.asarray(found, np.float32)


@pytest.mark.parametrize("approximate", [False, True])
def test_a_frozen_model_in_bfloat16_does_not_depend_on_the_backend(images, approximate):
    """A GPU multiplies with slices of the kernel, and writes the approximate GELU differently."""
    expected = bfloat16_features(images, backend="cpu", approximate_gelu=approximate)
    found = bfloat16_features(images, backend="gpu", approximate_gelu=approximate)
    np.testing.assert_allclose(found, expected, rtol=0.02, atol=0.02)


def test_the_approximate_gelu_is_that_of_gelu_tanh(images):
    arch = build("vit_tiny_patch16_224").arch
    tanh = dataclasses.replace(arch, act_layer="gelu_tanh")
    found = {}
    for name, own, policy in (
        ("exact", arch, ComputePolicy()),
        ("approximate", arch, ComputePolicy(approximate_gelu=True)),
        ("tanh", tanh, ComputePolicy()),
    ):
        model = VisionTransformer(own, policy, rngs=nnx.Rngs(0))
        found[name] = np.asarray(model.features(images)[-1])
    np.testing.assert_array_equal(found["approximate"], found["tanh"])
    assert 0 < np.abs(found["approximate"] - found["exact"]).max() < 1e-3
