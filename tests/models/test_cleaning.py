"""Test-time registers and averaging over views in a model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from singer_jax.methods import ModelFeatures
from singer_jax.models import registers
from singer_jax.models.architecture import ComputePolicy
from singer_jax.models.layers import Block
from singer_jax.models.shift_average import averaged, views
from singer_jax.models.vit import VisionTransformer
from singer_jax.models.zoo import lookup
from tests import tiny

PLAIN, ROTARY = "vit_tiny_patch16_224", "vit_small_plus_patch16_dinov3_qkvb"
BEIT = "beit_base_patch16_224"


def build(clean: str | None = None, family: str = PLAIN, **policy: object) -> VisionTransformer:
    """Builds a model of 4 x 6 patches, with equal random weights for all removal methods."""
    sizes = tiny.TEACHER | {"img_size": (16, 24), "embed_dim": 32, "init_values": None}
    arch = lookup(family, sizes | {"num_classes": 0}).arch
    model = VisionTransformer(
        arch, ComputePolicy(artifact_removal=clean, **policy), rngs=nnx.Rngs(0)
    )
    if clean == "registers":
        shape = model.register_neurons[...].shape
        neurons = [(0, 3), (1, 5), (1, 90), (2, 1)]
        model.register_neurons[...] = jnp.asarray(registers.marked(neurons, shape))
    return model


@pytest.fixture(scope="module")
def images() -> jax.Array:
    return jax.random.normal(jax.random.key(0), (2, 16, 24, 3))


def test_activations_move_from_the_patches_to_the_first_token():
    hidden = np.random.default_rng(0).standard_normal((2, 7, 5)).astype(np.float32)
    hidden[..., 3] = -np.abs(hidden[..., 3])  # as a gated MLP may have it
    neurons = np.array([0, 1, 0, 1, 0], np.uint8)
    found = registers.move(jnp.asarray(hidden), jnp.asarray(neurons), first_patch=3)
    expected = hidden.copy()
    for image in range(2):
        for neuron in (1, 3):
            patches = hidden[image, 3:, neuron]
            expected[image, 0, neuron] = patches.min() if neuron == 3 else patches.max()
            expected[image, 3:, neuron] = 0
    np.testing.assert_array_equal(found, expected)


def test_registers_add_one_token_that_is_removed_from_features(images):
    """Compares with single blocks in which the hidden layer of each gated MLP is changed."""
    model, plain = build("registers", ROTARY), build(None, ROTARY)
    found = jax.jit(lambda: model.features(images))()
    expected = jax.eval_shape(plain.features, images)
    assert [x.shape for x in found] == [x.shape for x in expected]
    x = jnp.concatenate([jnp.zeros((2, 1, 32)), plain.embed(images)], axis=1)
    for index, block in enumerate(plain.blocks):
        first = 1 + plain.arch.num_prefix_tokens
        chosen = np.flatnonzero(model.register_neurons[...][index])

        def move(hidden, chosen=chosen, first=first):
            patches = np.asarray(hidden[:, first:, chosen])
            largest = np.take_along_axis(patches, np.abs(patches).argmax(1)[:, None], axis=1)
            hidden = hidden.at[:, :1, chosen].set(largest)
            return hidden.at[:, first:, chosen].set(0)

        x = block(x, plain._rotation(index), move)
        np.testing.assert_allclose(found[index], x[:, 1:], rtol=1e-5, atol=1e-5)


def test_an_added_token_has_no_relative_position(images):
    """In Beit without moved neurons, the added token changes other tokens by attention alone."""
    plain, model = build(None, BEIT), build("registers", BEIT)
    model.register_neurons[...] = jnp.zeros_like(model.register_neurons[...])
    attention = plain.blocks[0].attn
    tokens = plain.arch.num_prefix_tokens + plain.arch.num_patches
    kernel = attention.relative_position_bias_table
    kernel[...] = jax.random.normal(jax.random.key(1), kernel.shape)
    bias, padded = attention._bias(tokens), attention._bias(tokens + 1)
    np.testing.assert_array_equal(padded[:, 1:, 1:], bias)
    assert not np.any(padded[:, 0]) and not np.any(padded[:, :, 0])
    assert model.features(images)[-1].shape == plain.features(images)[-1].shape


@pytest.mark.parametrize(
    "clean", [pytest.param("registers", marks=pytest.mark.slow), "shift_average"]
)
def test_every_way_to_compute_gives_the_same_features(images, clean):
    expected = jax.jit(lambda: build(clean, backend="cpu").features(images))()
    for policy in ({"backend": "tpu", "stacked": True}, {"backend": "gpu"}):
        graph, params = nnx.split(build(clean, **policy))
        found = jax.jit(lambda p, g=graph: nnx.merge(g, p).features_at(images, (0, 2)))(params)
        for layer, feature in found.items():
            np.testing.assert_allclose(feature, expected[layer], rtol=1e-4, atol=1e-5)
    low = build(clean, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    exact = build(clean)
    wide = jax.tree.map(lambda x, like: x.astype(like.dtype), nnx.state(low), nnx.state(exact))
    nnx.update(exact, wide)
    found, expected = (jax.jit(lambda m=m: m.features_at(images, (2,))[2])() for m in (low, exact))
    assert found.dtype == jnp.bfloat16
    # bfloat16 keeps 8 bits, and a few dozen operations follow each other.
    error = jnp.linalg.norm(found.astype(jnp.float32) - expected)
    assert error < 0.03 * jnp.linalg.norm(expected)


def test_an_added_token_goes_with_its_feature_into_the_next_block(images):
    """The info loss of an unchanged feature is therefore 0, as without artifact removal."""
    model = build("registers")
    teacher = ModelFeatures.of_streams(model, model.streams_at(images, (0, 1)))
    assert teacher.features[0].shape == (2, 1 + 24, 32)
    np.testing.assert_array_equal(teacher.next_block(0, teacher.features[0]), teacher.features[1])


def test_without_a_cleaner_the_program_is_the_chain_of_the_blocks(images):
    graph, params = nnx.split(build(backend="cpu"))

    def chain(params):
        model = nnx.merge(graph, params)
        x, found = model.embed(images), []
        for block in model.blocks:
            x = Block.__call__(block, x)
            found.append(x)
        return tuple(map(jax.lax.stop_gradient, found))

    def features(params):
        return tuple(nnx.merge(graph, params).streams_at(images, (0, 1, 2)).values())

    assert str(jax.make_jaxpr(features)(params)) == str(jax.make_jaxpr(chain)(params))


def test_averaging_what_moves_with_the_image_changes_nothing(images):
    arch = build().arch

    def colours(images):  # of each patch, behind a prefix token
        patches = images.reshape(2, 4, 4, 6, 4, 3).mean((2, 4)).reshape(2, 24, 3)
        return jnp.concatenate([images.mean((1, 2))[:, None] * 0 + 7, patches], axis=1)

    np.testing.assert_allclose(averaged(colours, images, arch), colours(images), rtol=1e-5)


def test_the_average_is_that_of_a_loop_over_views_and_patches(images):
    plain, size = build(), 4
    features = jax.jit(lambda images: plain.features(images, 2))
    total, count = np.zeros((2, 25, 32)), np.zeros(25)
    for down, right, flipped in views((4, 6)):
        seen = np.zeros_like(images)
        for row, column in np.ndindex(16, 24):
            source = np.clip([row - down * size, column - right * size], 0, [15, 23])
            seen[:, row, column] = images[:, *source]
        feature = features(jnp.asarray(seen[:, :, ::-1] if flipped else seen))[1]
        total[:, 0] += feature[:, 0]
        count[0] += 1
        for row, column in np.ndindex(4, 6):
            r, c = row + down, column + right
            if 0 <= r < 4 and 0 <= c < 6:
                at = r * 6 + (5 - c if flipped else c)
                total[:, 1 + row * 6 + column] += feature[:, 1 + at]
                count[1 + row * 6 + column] += 1
    assert count.min() >= 4 and count[0] == len(views((4, 6)))
    found = build("shift_average").features(images, 2)[1]
    np.testing.assert_allclose(found, total / count[:, None], rtol=1e-4, atol=1e-5)
