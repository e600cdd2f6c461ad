"""Tests of linearised blocks against samples of the real ones, and of their singular defects."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from singer_jax.evaluation.singular_defects import linearise, median_angle, singular_defect
from tests.methods.test_nullspace import MLPS, norm, plain


@pytest.mark.parametrize("mlp", MLPS)
def test_the_mlp_is_its_least_squares_map_of_normal_tokens(mlp):
    """The sampled regression follows the paper; scale and centring are applied by hand."""
    block = plain(mlp).blocks[1]
    tokens = np.random.default_rng(0).standard_normal((20_000, 12)).astype(np.float32)
    tokens = np.concatenate([tokens, -tokens])  # the even part of the MLP adds no noise
    outputs = np.asarray(jax.jit(block.mlp)(tokens), np.float64)
    regressed = np.linalg.lstsq(tokens, outputs - outputs.mean(axis=0))[0]
    scale, gamma = block.norm2.scale[...], block.ls2.gamma[...]
    expected = (np.eye(12) - 1 / 12) @ np.diag(scale) @ regressed @ np.diag(gamma)
    found = np.asarray(linearise(block)[1])
    assert norm(found - expected) < 0.03 * norm(expected)  # samples


@pytest.mark.parametrize("mlp", MLPS)
def test_attention_of_one_token_to_itself_is_value_and_projection(mlp):
    block = plain(mlp).blocks[1]
    token = np.random.default_rng(0).standard_normal((1, 1, 12)).astype(np.float32)
    token -= token.mean()
    token /= token.std()  # so that the norm is its scale alone
    zero = block.norm1.bias[...][None, None]
    added = (block.attn(block.norm1(token)) - block.attn(zero)) * block.ls1.gamma[...]
    np.testing.assert_allclose(token @ linearise(block)[0], added, rtol=1e-4, atol=1e-5)


def test_the_defect_is_what_any_token_becomes_in_a_block_that_writes_one_direction():
    model = nnx.clone(plain("mlp"))
    direction = np.random.default_rng(1).standard_normal(12)
    direction /= np.linalg.norm(direction)
    kernel = model.blocks[0].mlp.fc2.kernel
    reads = np.random.default_rng(2).standard_normal(kernel.shape[0])
    kernel[...] = jnp.asarray(100 * np.outer(reads, direction), jnp.float32)
    model.blocks[0].ls2.gamma[...] = jnp.ones(12)
    cosine = abs(float(np.dot(singular_defect(model, 0), direction)))
    assert cosine > 0.999
    # A later block moves it.
    assert abs(float(np.dot(singular_defect(model, 1), direction))) < cosine


@pytest.mark.parametrize(("degrees", "sign"), [(0, 1), (30, -1), (90, 1)])
def test_the_angle_is_that_of_most_outliers_to_the_line(degrees, sign):
    patches = np.zeros((3, 5, 4))
    outlier = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    patches[:2, 1, :2] = sign * 7 * np.array(outlier)
    patches[2, 1, 2] = 7  # one that is no artifact
    outliers = np.zeros((3, 5), bool)
    outliers[:, 1] = True
    found = median_angle(jnp.asarray(patches), jnp.asarray(outliers), jnp.eye(4)[0])
    assert found == pytest.approx(degrees, abs=0.05)
    assert median_angle(jnp.asarray(patches), jnp.zeros((3, 5), bool), jnp.eye(4)[0]) == 90
