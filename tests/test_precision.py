"""A run and a forward pass compute in the precision that they promise, and change no other one."""

import dataclasses
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.extend.core import jaxprs_in_params

import singer_jax
from singer_jax.config import settings_of
from singer_jax.jobs import distill, quickstart
from singer_jax.methods import jacobi
from singer_jax.platform import parallel
from tests import cli, tiny

ROOT = Path(__file__).parents[1]
HIGHEST = (jax.lax.Precision.HIGHEST, jax.lax.Precision.HIGHEST)


@pytest.fixture(autouse=True)
def default_precision() -> Iterator[None]:
    """The process's own precision is the backend's default."""
    with jax.default_matmul_precision(None):
        yield


def test_each_run_has_its_own_precision_and_leaves_the_process_as_it_was(monkeypatch, tmp_path):
    found = []

    def seen(settings: object, workdir: object) -> None:
        found.append((settings.precision, jax.config.jax_default_matmul_precision))

    monkeypatch.setattr(distill, "_distill", seen)
    settings = settings_of(tiny.config("none"))
    for precision in ("float32", "bfloat16", "float32"):
        singer_jax.distill(dataclasses.replace(settings, precision=precision), tmp_path)
        assert jax.config.jax_default_matmul_precision is None
    runs_of_both = quickstart.QuickstartSettings(
        teacher=dataclasses.replace(settings, precision="bfloat16"), distilled=settings
    )
    monkeypatch.setattr(quickstart, "load_backbone", lambda *args, **options: 1 / 0)
    with parallel.computing(), pytest.raises(ZeroDivisionError):  # after both runs
        quickstart.quickstart(runs_of_both, tmp_path)
    expected = {"float32": "highest", "bfloat16": None}
    assert len(found) == 5
    assert all(precision == expected[name] for name, precision in found)


def products(jaxpr: jax.extend.core.Jaxpr) -> Iterator[object]:
    """The precision of each matrix product and convolution."""
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("dot_general", "conv_general_dilated"):
            yield equation.params["precision"]
        for inner in jaxprs_in_params(equation.params):
            yield from products(inner)


@pytest.mark.parametrize("remat", [False, True])
def test_a_float32_model_and_its_gradient_are_computed_in_full(remat):
    model = singer_jax.create_model("vit_tiny_patch16_224", **tiny.TEACHER)
    model.policy = dataclasses.replace(model.policy, remat=remat)
    graph, params = nnx.split(model)
    images = np.zeros((2, 16, 16, 3), np.float32)

    def loss(params: object) -> jax.Array:
        return jnp.sum(nnx.merge(graph, params)(images))

    found = list(products(jax.make_jaxpr(jax.grad(loss))(params).jaxpr))
    assert len(found) > 3 * 6 and set(found) == {HIGHEST}


def test_a_bfloat16_model_leaves_its_products_to_the_backend():
    model = singer_jax.create_model("vit_tiny_patch16_224", precision="bfloat16", **tiny.TEACHER)
    jaxpr = jax.make_jaxpr(lambda images: model(images))(np.zeros((2, 16, 16, 3), np.float32))
    assert HIGHEST not in list(products(jaxpr.jaxpr))


def test_numbers_of_64_bits_change_nothing():
    matrix = np.random.default_rng(0).standard_normal((6, 9)).astype(np.float32)
    with jax.enable_x64(True):
        wide = jacobi.left_singular(matrix)
        with parallel.computing("float32"):
            assert jnp.asarray(np.zeros(2)).dtype == jnp.float32
        assert jnp.asarray(np.zeros(2)).dtype == jnp.float64
    for found, expected in zip(wide, jacobi.left_singular(matrix), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_a_backend_that_is_not_there_is_one_line(tmp_path):
    config = cli.write_config(tmp_path)
    command = [sys.executable, "-m", "singer_jax.main", f"--config={config}"]
    done = subprocess.run(
        [*command, f"--workdir={tmp_path / 'run'}"],
        env=cli.environment() | {"JAX_PLATFORMS": "nowhere"},
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2 and line.startswith("singer_jax: JAX_PLATFORMS: 'nowhere'")
