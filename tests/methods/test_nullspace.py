"""Algebraic properties of the null space for random maps."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from singer_jax.methods import nullspace
from singer_jax.models.architecture import Architecture
from singer_jax.models.vit import VisionTransformer

EPS = float(jnp.finfo(jnp.float32).eps)
DIMS = (5, 12, 24)  # few shapes, so that each program is compiled once

decompose = jax.jit(nullspace.decompose)
projector = jax.jit(nullspace.projector, static_argnames="rank")
directions = jax.jit(nullspace.directions, static_argnames=("rank", "order"))
soft_filter = jax.jit(nullspace.soft_filter)


def random_map(dim: int, seed: int, decay: float) -> jax.Array:
    """Returns a map with singular values that fall from 1 by the factor `decay` each."""
    u, v = (
        np.linalg.qr(np.random.default_rng(seed + i).standard_normal((dim, dim)))[0] for i in (0, 1)
    )
    return jnp.asarray((u * decay ** np.arange(dim)) @ v, jnp.float32)


maps = st.builds(
    random_map,
    dim=st.sampled_from(DIMS),
    seed=st.integers(0, 10_000),
    decay=st.sampled_from([0.99, 0.8, 0.4, 0.1]),
)


def norm(x: jax.Array) -> float:
    return float(np.linalg.norm(np.asarray(x, np.float64)))


def product(a: jax.Array, b: jax.Array) -> np.ndarray:
    """Multiplies in float64, so that the check itself adds no rounding error."""
    return np.asarray(a, np.float64) @ np.asarray(b, np.float64)


@given(maps, st.integers(1, 4), st.floats(0, 1), st.integers(0, 100))
def test_a_projected_update_is_bounded_by_its_largest_singular_value(w, rank, quantile, seed):
    """Bound: ||D W|| <= (sigma_max(selected) + c eps sigma_1) ||D|| for D = F A B Q."""
    space = decompose(w)
    tau = nullspace.threshold_value(space, "quantile", quantile)
    q = projector(space, tau, rank=rank)
    update = product(jax.random.normal(jax.random.key(seed), (7, w.shape[0])), q)
    chosen = np.asarray(nullspace.selected(space, tau, rank))
    largest = float(np.asarray(space.values)[chosen].max())
    # Rounding: W, the SVD and U U^T are each off by at most a few dim * eps, relative to sigma_1.
    slack = 10 * w.shape[0] * EPS * float(space.values[0])
    assert norm(product(update, w)) <= (largest + slack) * norm(update)


@given(maps, st.floats(0, 1), st.integers(0, 100))
def test_a_softly_filtered_update_is_bounded_by_half_tau(w, quantile, seed):
    """Bound: ||(F^ - F) W|| <= tau / 2 ||F A B||."""
    space = decompose(w)
    tau = nullspace.threshold_value(space, "quantile", quantile)
    raw = jax.random.normal(jax.random.key(seed), (7, w.shape[0]))
    slack = 10 * w.shape[0] * EPS * float(space.values[0])
    filtered = product(raw, soft_filter(space, tau))
    assert norm(product(filtered, w)) <= (float(tau) / 2 + slack) * norm(raw)


@given(maps, st.integers(1, 4), st.floats(0, 0.5))
def test_the_projector_is_an_orthogonal_projector(w, rank, tau):
    space = decompose(w)
    q = np.asarray(projector(space, jnp.float32(tau), rank=rank))
    np.testing.assert_allclose(q, q.T, atol=1e-6)
    np.testing.assert_allclose(q @ q, q, atol=1e-5)
    below = int(nullspace.null_dim(space, jnp.float32(tau)))
    np.testing.assert_allclose(np.trace(q), max(below, rank), atol=1e-4)


@given(maps, st.integers(1, 6), st.sampled_from(["official", "most_null"]))
def test_directions_are_null_as_far_as_there_are_null_ones(w, rank, order):
    space = decompose(w)
    tau = nullspace.threshold_value(space, "quantile", 0.5)
    count = int(nullspace.null_dim(space, tau))
    rows = np.asarray(directions(space, tau, rank=rank, order=order, key=jax.random.key(0)))
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, rtol=1e-5)
    seen = np.linalg.norm(product(rows, w), axis=1)
    values = np.asarray(space.values)
    expected = values[len(values) - count :][:rank] if order == "official" else values[::-1][:rank]
    np.testing.assert_allclose(
        seen[: min(count, rank)], expected[: min(count, rank)], atol=1e-5 * values[0]
    )


def test_without_null_space_directions_are_random_unit_rows():
    space = decompose(jnp.eye(6))
    rows = directions(space, jnp.float32(0.5), rank=3, order="official", key=jax.random.key(0))
    other = directions(space, jnp.float32(0.5), rank=3, order="official", key=jax.random.key(1))
    np.testing.assert_allclose(jnp.linalg.norm(rows, axis=1), 1, rtol=1e-6)
    assert not np.allclose(rows, other)


@pytest.mark.parametrize(("inside", "expected"), [(True, 1.0), (False, 0.0)])
def test_energy_share_of_outliers_inside_and_outside_the_subspace(inside, expected):
    projection = jnp.diag(jnp.array([1.0, 0.0, 0.0]))
    direction = jnp.array([1.0, 0, 0]) if inside else jnp.array([0, 1.0, 0])
    patches = jnp.zeros((2, 5, 3)).at[:, 2].set(10 * direction)
    outliers = jnp.zeros((2, 5), bool).at[:, 2].set(True)
    assert nullspace.energy_share(projection, patches, outliers) == pytest.approx(expected)


def test_energy_share_without_outliers_is_zero_and_not_nan():
    share = nullspace.energy_share(jnp.eye(3), jnp.ones((2, 5, 3)), jnp.zeros((2, 5), bool))
    assert share == 0


def model(mlp_layer: str, **changes: object) -> VisionTransformer:
    """Returns two blocks with random norms and LayerScale, so that folding them in matters."""
    arch = Architecture(
        img_size=(8, 8),
        patch_size=4,
        embed_dim=12,
        depth=2,
        num_heads=2,
        mlp_layer=mlp_layer,
        init_values=0.5,
        num_classes=0,
        **changes,
    )
    made = nnx.jit(lambda: VisionTransformer(arch, rngs=nnx.Rngs(0)))()
    rng = np.random.default_rng(1)

    def moved(x: jax.Array) -> jax.Array:
        return jnp.asarray(np.asarray(x) + 0.3 * rng.standard_normal(x.shape), jnp.float32)

    nnx.update(made, jax.tree.map(moved, nnx.state(made)))
    return made


MLPS = ("mlp", "swiglu_packed", "swiglu")


@functools.cache
def plain(mlp: str) -> VisionTransformer:
    """Returns the model with this kind of MLP that the tests share and leave as it is."""
    return model(mlp)


THRESHOLDS = [("absolute", 0.5), ("quantile", 0.3), ("relative", 0.2), ("rank", 3)]


@pytest.mark.parametrize(("rule", "threshold"), THRESHOLDS)
@pytest.mark.parametrize("mlp", MLPS)
@settings(max_examples=5)  # of 12 and 36 cases each
@given(st.integers(0, 10_000))
def test_an_update_in_the_block_space_is_bounded_for_every_input_map(mlp, rule, threshold, seed):
    """Bound: ||(F^ - F) W_k|| for the input map of attention and for each of the MLP."""
    block = plain(mlp).blocks[1]
    space = decompose(nullspace.linear_map(plain(mlp), 0, "block"))
    tau = nullspace.threshold_value(space, rule, threshold)
    q = projector(space, tau, rank=2)
    update = product(np.random.default_rng(seed).standard_normal((5, 12)), q)
    largest = float(space.values[np.asarray(nullspace.selected(space, tau, 2))].max())
    slack = 10 * 12 * EPS * float(space.values[0])
    maps = [block.norm1.scale[...][:, None] * block.attn.qkv.kernel[...]]
    maps += [block.norm2.scale[...][:, None] * part for part in block.mlp.input_maps()]
    for w in maps:
        assert norm(product(update, w)) <= (largest + slack) * norm(update)


@pytest.mark.parametrize(("rule", "threshold"), THRESHOLDS)
@pytest.mark.parametrize("source", ("mlp", "mlp_norm", "block"))
@pytest.mark.parametrize("mlp", MLPS)
@settings(max_examples=5)  # of 12 and 36 cases each
@given(st.integers(0, 10_000))
def test_every_source_and_rule_keeps_its_guarantee(mlp, source, rule, threshold, seed):
    w = nullspace.linear_map(plain(mlp), 0, source)
    space = decompose(w)
    tau = nullspace.threshold_value(space, rule, threshold)
    raw = np.random.default_rng(seed).standard_normal((5, 12))
    slack = 10 * 12 * EPS * float(space.values[0])
    projected = product(raw, projector(space, tau, rank=2))
    largest = float(space.values[np.asarray(nullspace.selected(space, tau, 2))].max())
    assert norm(product(projected, w)) <= (largest + slack) * norm(projected)
    filtered = product(raw, soft_filter(space, tau))
    assert norm(product(filtered, w)) <= (float(tau) / 2 + slack) * norm(raw)


@pytest.mark.parametrize("mlp", MLPS)
def test_the_mlp_sources_are_the_mlp_without_its_activation(mlp):
    """Compares with applying the linear maps one after the other to a row vector."""
    block = plain(mlp).blocks[1].mlp
    scale, gamma = plain(mlp).blocks[1].norm2.scale[...], plain(mlp).blocks[1].ls2.gamma[...]
    a = np.random.default_rng(0).standard_normal((4, 12))
    second = block.fc2.kernel[...]
    for source, before, after in (("mlp", 1.0, 1.0), ("mlp_norm", scale, gamma)):
        expected = np.concatenate(
            [
                product(product(a * np.asarray(before), part), second) * np.asarray(after)
                for part in block.input_maps()
            ],
            axis=1,
        )
        w = nullspace.linear_map(plain(mlp), 0, source)
        np.testing.assert_allclose(product(a, w), expected, rtol=1e-4, atol=1e-5)


def test_norms_inside_the_mlp_count_only_where_norms_do():
    """In EVA-02 the norm of the hidden layer is between W1 and W2."""
    made = model("swiglu", scale_mlp_norm=True)
    block = made.blocks[1]
    inside, second = block.mlp.norm.scale[...][:, None], block.mlp.fc2.kernel[...]
    before, after = block.norm2.scale[...][:, None], block.ls2.gamma[...]
    maps = block.mlp.input_maps()
    for source, expected in (
        ("mlp", [product(part, second) for part in maps]),
        ("mlp_norm", [product(before * part, inside * second * after) for part in maps]),
    ):
        found = nullspace.linear_map(made, 0, source)
        np.testing.assert_allclose(found, np.concatenate(expected, 1), rtol=1e-4, atol=1e-5)


def test_the_null_space_of_a_post_norm_block_is_exact():
    """In post-norm models the guarantee is exact, because no norm precedes attention and MLP."""
    grouped = {"qkv_fused": False, "num_kv_heads": (2, 1)}
    made = model("mlp", post_norm=True, mlp_ratio=0.25, **grouped)
    block = made.blocks[1]
    for kernel in (block.attn.q_proj.kernel, block.attn.k_proj.kernel, block.attn.v_proj.kernel):
        kernel[...] = kernel[...].at[:3].set(0)
    block.mlp.fc1.kernel[...] = block.mlp.fc1.kernel[...].at[:3].set(0)
    space = decompose(nullspace.linear_map(made, 0, "block"))
    q = projector(space, nullspace.threshold_value(space, "rank", 3), rank=3)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 5, 12)), jnp.float32)
    update = 10 * product(np.random.default_rng(1).standard_normal((5, 12)), q)
    called = nnx.jit(type(block).__call__)
    unseen = called(block, x + update) - update
    np.testing.assert_allclose(unseen, called(block, x), rtol=1e-4, atol=1e-4)
    assert norm(update) > 1


def test_the_last_layer_is_read_by_its_own_block():
    last = nullspace.linear_map(plain("mlp"), 1, "mlp")
    np.testing.assert_array_equal(last, nullspace.linear_map(plain("mlp"), 0, "mlp"))


@pytest.mark.parametrize(
    ("rule", "threshold", "expected"),
    [
        ("absolute", 2.5, 2),
        ("quantile", 0.5, 2),
        ("relative", 0.6, 2),
        ("rank", 3, 3),
        ("rank", 4, 4),
        ("rank", 0, 0),
    ],
)
def test_threshold_types_select_the_expected_directions(rule, threshold, expected):
    space = nullspace.NullSpace(jnp.eye(4), jnp.array([4.0, 3.0, 2.0, 1.0]))
    tau = nullspace.threshold_value(space, rule, threshold)
    assert int(nullspace.null_dim(space, tau)) == expected
