"""Quantised matmuls: rounding errors, gradient, and a quantised teacher."""

import importlib.util

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import strategies as st

from singer_jax.config import settings_of
from singer_jax.errors import InputError
from singer_jax.models import quantised
from singer_jax.models.architecture import ComputePolicy
from singer_jax.models.vit import VisionTransformer
from singer_jax.models.weights import abstract_model, with_scales, without_scales
from singer_jax.models.zoo import lookup
from singer_jax.platform import parallel
from singer_jax.runs.checkpoints import fingerprint
from singer_jax.training.flops import parts_flops
from singer_jax.training.program import jit_step
from singer_jax.training.setup import setup_students
from tests import tiny

OVER_LAST = (((1,), (0,)), ((), ()))
FORMATS = quantised.FORMATS
# The largest error of one rounding, as a share of the largest value (int8) or of the value (fp8).
ROUNDING = {"int8": 0.5 / 127.5, "fp8": 2.0**-4}


def operands(seed: int, tokens: int, dim: int, outlier: float) -> tuple[jax.Array, jax.Array]:
    x, kernel = (
        jax.random.normal(key, shape)
        for key, shape in zip(
            jax.random.split(jax.random.key(seed)), ((tokens, dim), (dim, 5)), strict=True
        )
    )
    return x.at[0].mul(outlier), kernel


def norm(dim: int) -> tuple[jax.Array, jax.Array]:
    """Scale and bias of a norm that gives every value its largest size."""
    return jnp.full(dim, 3.0), jnp.full(dim, -0.5)


def matmul(format: str, x: jax.Array, kernel: jax.Array) -> jax.Array:
    if format == "int8":
        return quantised.int8_product(x, kernel, OVER_LAST)
    scales = quantised.fp8_scales(kernel, *norm(x.shape[-1]))
    return quantised.fp8_product(x, kernel, scales, OVER_LAST)


@hypothesis.settings(deadline=None, max_examples=20)
@hypothesis.given(
    st.integers(0, 1000), st.integers(1, 9), st.integers(1, 33), st.floats(1, 1e4), st.data()
)
def test_errors_are_those_of_rounding(seed, tokens, dim, outlier, data):
    """An outlier token does not change the error of other tokens."""
    format = data.draw(st.sampled_from(FORMATS))
    x, kernel = operands(seed, tokens, dim, outlier)
    if format == "fp8":  # its input comes from a norm
        x = nnx.RMSNorm(dim, rngs=nnx.Rngs(0))(x) * norm(dim)[0] + norm(dim)[1]
    found = matmul(format, x, kernel)
    wide, exact = np.abs(np.float64(x)), np.float64(x) @ np.float64(kernel)
    thick = np.abs(np.float64(kernel))
    share = ROUNDING[format]
    if format == "int8":
        of_x = share * wide.max(1, keepdims=True) * np.ones_like(wide)
        of_kernel = share * thick.max(0) * np.ones_like(thick)
    else:  # below the smallest normal number, 2^-6, steps are even
        scales = np.float64(quantised.fp8_scales(kernel, *norm(dim)))
        of_x, of_kernel = (
            share * np.maximum(each, scale * 2.0**-6)
            for each, scale in zip((wide, thick), scales, strict=True)
        )
    bound = of_x @ thick + wide @ of_kernel + of_x @ of_kernel
    assert np.all(np.abs(np.float64(found) - exact) <= 1.01 * bound + 1e-6 * wide @ thick)


@pytest.mark.parametrize("format", FORMATS)
def test_the_gradient_is_the_float_product_s(format):
    x, kernel = operands(0, 4, 8, 1.0)
    weights = jax.random.normal(jax.random.key(1), (4, 5))
    gradient = jax.grad(lambda x: jnp.sum(weights * matmul(format, x, kernel)))(x)
    np.testing.assert_allclose(gradient, weights @ kernel.T, rtol=1e-5)


@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
def test_no_input_of_an_fp8_product_is_larger_than_its_largest_number(norm):
    """The largest value after a norm is that of a token with a single channel."""
    dim = 64
    made = nnx.LayerNorm if norm == "layernorm" else nnx.RMSNorm
    layer = made(dim, epsilon=0.0, use_fast_variance=False, rngs=nnx.Rngs(0))
    layer.scale[...] = jax.random.normal(jax.random.key(0), dim)
    bias = getattr(layer, "bias", None)
    kernel = jax.random.normal(jax.random.key(1), (dim, 7))
    scales = quantised.fp8_scales(kernel, layer.scale[...], None if bias is None else bias[...])
    read = np.float64(layer(jnp.eye(dim)))
    limit = 448.0
    assert 0.4 * limit < np.abs(read / scales[0]).max() <= limit
    assert 0.4 * limit < np.abs(kernel / scales[1]).max() <= limit


def cosines(a: jax.Array, b: jax.Array) -> np.ndarray:
    a, b = np.float64(a), np.float64(b)
    return (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)


@pytest.mark.parametrize(
    "family",
    [
        "vit_small_patch16_224",
        pytest.param("vit_small_patch16_dinov3", marks=pytest.mark.slow),
        pytest.param("vit_giant_patch14_reg4_dinov2", marks=pytest.mark.slow),
        pytest.param("vit_base_patch16_siglip_224", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("format", FORMATS)
def test_features_of_a_model_with_outlier_tokens(family, format):
    """Tested with the choices of every backend; three patches are 100 times larger."""
    sizes = {"img_size": 32, "patch_size": 4, "embed_dim": 128, "depth": 4, "num_heads": 2}
    arch = lookup(family, sizes | {"num_classes": 0, "init_values": None}).arch
    images = jax.random.normal(jax.random.key(0), (2, 32, 32, 3))
    images = images.at[:, :4, 4:16].mul(100)

    def features(**policy):
        policy = ComputePolicy(**policy)
        graph, params = nnx.split(VisionTransformer(arch, policy, rngs=nnx.Rngs(0)))
        params = with_scales(nnx.to_pure_dict(params), abstract_model(arch, policy)[1])
        return jax.jit(lambda: nnx.merge(graph, params).features_at(images, (1, 3)))()

    exact = features()
    for backend, stacked in (("cpu", False), ("tpu", True), ("gpu", False)):
        found = features(quantised=format, backend=backend, stacked=stacked)
        for layer, expected in exact.items():
            near = cosines(expected, found[layer])
            assert np.median(near) >= {"int8": 0.999, "fp8": 0.997}[format], (backend, layer)
            assert np.percentile(near, 1) >= 0.99
            assert np.abs(near - 1).max() > 1e-7  # it was quantised


@pytest.fixture
def settings(tmp_path):
    config = tiny.config(tiny.write_teacher(tmp_path / "teacher.safetensors"))

    def of(precision: str | None):
        config.teacher.precision = precision
        return settings_of(config)

    return of


@pytest.mark.slow
def test_a_run_differs_in_the_teacher_s_features_alone(settings):
    """Null spaces and student are unchanged, losses are close, and 8-bit operations are counted.

    The teacher's fingerprint is that of its file, so that a run of an older version resumes.
    """
    batch = {
        "image": np.random.default_rng(0).integers(0, 256, (8, 16, 16, 3), np.uint8),
        "label": np.zeros(8, np.int32),
    }
    started, losses, counted, digests = {}, {}, {}, set()
    for precision in (None, *FORMATS):
        runs = setup_students(settings(precision), 64, 10)
        run, teacher = runs.any, runs.load_teacher()
        digests.add(fingerprint(without_scales(teacher)))
        state = runs.init_states(teacher)[""]
        started[precision] = jax.device_get(state)
        arguments = runs.students, runs.states, runs.teacher, 8
        counted[precision] = parts_flops(*arguments, quantised=True), parts_flops(*arguments)
        step = jit_step(run.distillation, run.mesh, state, teacher)
        on_devices = parallel.put_batch(batch, parallel.batch_sharding(run.mesh))
        for _ in range(3):
            state, metrics = step(state, teacher, on_devices, np.bool_(True))
        losses[precision] = jax.device_get(metrics)
    assert not sum(counted[None][0].values())
    assert len(digests) == 1
    for precision in FORMATS:
        jax.tree.map(np.testing.assert_array_equal, started[precision], started[None])
        for term in ("loss_kd", "loss_outlier", "loss_info"):
            near, exact = losses[precision][term], losses[None][term]
            assert near != exact
            np.testing.assert_allclose(near, exact, rtol=0.05, err_msg=term)
        eight_bits, every = counted[precision]
        assert every == counted[None][1]
        arch = run.distillation.teacher.spec.arch
        tokens, dim = arch.num_patches + 1, arch.embed_dim
        block = 2 * 8 * tokens * dim * (3 + arch.mlp_ratio) * dim
        assert eight_bits["teacher"] == arch.depth * block
        assert 0 < eight_bits["method"] < every["method"]


def test_a_missing_library_is_named(settings, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"teacher\.precision: int8 needs qwix; pip install"):
        setup_students(settings("int8"), 64, 10)
