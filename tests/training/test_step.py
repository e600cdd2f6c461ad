"""The training step: sharding, precision, and the guarantee after real steps."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from singer_jax.config import settings_of
from singer_jax.methods import nullspace
from singer_jax.models.params import leaves
from singer_jax.platform import parallel
from singer_jax.training.program import jit_step
from singer_jax.training.setup import RunSetup, setup_students
from tests import tiny


@pytest.fixture(scope="module")
def teacher_file(tmp_path_factory) -> str:
    return str(tiny.write_teacher(tmp_path_factory.mktemp("teacher") / "teacher.safetensors"))


def prepare(teacher_file: str, **changes: object) -> RunSetup:
    config = tiny.config(teacher_file)
    config.update_from_flattened_dict(changes)
    return setup_students(settings_of(config), examples=64, num_classes=10)


def batch_of(run: RunSetup, size: int = 8, seed: int = 0) -> dict:
    rng = np.random.default_rng(seed)
    batch = {
        "image": rng.integers(0, 256, (size, 16, 16, 3), dtype=np.uint8),
        "label": rng.integers(0, 10, size).astype(np.int32),
    }
    return parallel.put_batch(batch, parallel.batch_sharding(run.any.mesh))


def loss_and_gradients(run: RunSetup) -> tuple[dict, dict]:
    teacher = run.load_teacher()
    state = run.init_states(teacher)[""]
    return jax.jit(run.any.distillation.gradients)(state, teacher, batch_of(run))


@functools.cache
def on_one_device(teacher_file: str, method: str) -> tuple[dict, dict]:
    """Returns the metrics and gradients of a method, which several tests compare with."""
    changes = {"method.name": method, "method.nullspace.init": "official"}
    return loss_and_gradients(prepare(teacher_file, **changes))


@pytest.mark.parametrize(("data", "fsdp"), [pytest.param(8, 1, marks=pytest.mark.slow), (4, 2)])
@pytest.mark.parametrize("method", ["singer", "fitnet"])
def test_eight_devices_give_the_loss_and_gradients_of_one(teacher_file, method, data, fsdp):
    changes = {"method.name": method, "method.nullspace.init": "official"}
    metrics, gradients = on_one_device(teacher_file, method)
    many = prepare(teacher_file, **changes, **{"mesh.data": data, "mesh.fsdp": fsdp})
    kernel = many.any.state.params["student"]["blocks"][0]["attn"]["qkv"]["kernel"]
    assert kernel.sharding.spec == jax.sharding.PartitionSpec(None, "fsdp")
    assert kernel.sharding.shard_shape(kernel.shape)[1] == kernel.shape[1] // fsdp
    sharded_metrics, sharded_gradients = loss_and_gradients(many)
    # Float32 sums in another order.
    np.testing.assert_allclose(metrics["loss"], sharded_metrics["loss"], rtol=1e-5)
    for (keys, one), (_, other) in zip(leaves(gradients), leaves(sharded_gradients), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-6, err_msg=str(keys))


def test_bfloat16_stays_close_and_keeps_the_student_in_float32(teacher_file):
    changes = {"method.nullspace.init": "official"}
    exact, _ = on_one_device(teacher_file, "singer")
    run = prepare(teacher_file, **changes, precision="bfloat16")
    teacher = run.load_teacher()
    assert {leaf.dtype for _, leaf in leaves(teacher)} == {jnp.dtype(jnp.bfloat16)}
    assert {leaf.dtype for _, leaf in leaves(run.any.state.params)} == {jnp.dtype(jnp.float32)}
    metrics, gradients = loss_and_gradients(run)
    assert {leaf.dtype for _, leaf in leaves(gradients)} == {jnp.dtype(jnp.float32)}
    # The rounding of every activation to 8 bits.
    for term in ("loss_kd", "loss_outlier", "loss_info"):
        np.testing.assert_allclose(metrics[term], exact[term], rtol=0.05)


def train(run: RunSetup, steps: int) -> tuple[object, object, list[dict]]:
    teacher = run.load_teacher()
    state = run.init_states(teacher)[""]
    step_fn = jit_step(run.any.distillation, run.any.mesh, state, teacher)
    history = []
    for step in range(steps):
        state, metrics = step_fn(state, teacher, batch_of(run, seed=step), True)
        history.append(metrics)
    return state, teacher, history


@pytest.mark.parametrize(
    ("use", "rule", "threshold"),
    [
        ("project", "quantile", 0.5),
        pytest.param("project", "absolute", 0.05, marks=pytest.mark.slow),
        ("soft", "quantile", 0.5),
    ],
)
def test_the_null_space_guarantee_holds_after_real_steps(teacher_file, use, rule, threshold):
    changes = {
        "method.nullspace.mode": use,
        "method.nullspace.threshold_type": rule,
        "method.nullspace.threshold": threshold,
        "optimizer.learning_rate": 0.05,
    }
    run = prepare(teacher_file, **changes)
    state, teacher, _ = train(run, 4)
    method = nnx.merge(
        run.any.distillation.method, state.params["method"], state.constants["method"]
    )
    model = run.any.distillation.teacher.merge(teacher)
    rng = np.random.default_rng(0)
    for layer in method.teacher_layers:
        refiner = method.refiner[str(layer)]
        w = nullspace.linear_map(model, layer, "mlp")
        space = nullspace.decompose(w)
        tau = nullspace.threshold_value(space, rule, threshold)
        patches = rng.standard_normal((2, 16, 24)).astype(np.float32)
        raw = np.asarray(patches @ refiner.down[...] @ refiner.up[...], np.float64)
        update = np.asarray(refiner.update(patches), np.float64)
        assert np.linalg.norm(update) > 0  # training has moved it
        seen = np.linalg.norm(update @ np.asarray(w, np.float64))
        sigma = np.asarray(space.values, np.float64)
        slack = 10 * len(sigma) * np.finfo(np.float32).eps * sigma[0]
        if use == "soft":
            assert seen <= (float(tau) / 2 + slack) * np.linalg.norm(raw)
        else:
            largest = sigma[np.asarray(nullspace.selected(space, tau, 4))].max()
            assert seen <= (largest + slack) * np.linalg.norm(update)


def test_parameters_without_gradient_are_not_updated(teacher_file):
    changes = {
        "method.layers": (0,),
        "method.include_last_layer": False,
        "optimizer.weight_decay": 0.5,
    }
    run = prepare(teacher_file, **changes)
    before = run.any.init_student()
    state, _, _ = train(run, 2)
    untouched = {keys for keys, _ in leaves(state.constants["student"])}
    assert {keys[:2] for keys in untouched if keys[0] == "blocks"} == {("blocks", 1)}
    assert {keys[0] for keys in untouched} == {"blocks", "norm"}
    initial = dict(leaves(before))
    for keys, leaf in leaves(state.constants["student"]):
        np.testing.assert_array_equal(leaf, initial[keys])
    for keys, leaf in leaves(state.params["student"]):
        assert not np.array_equal(leaf, initial[keys]), keys


@pytest.mark.parametrize("method", ["singer", "fitnet", "supervised"])
def test_every_trained_parameter_has_a_gradient(teacher_file, method):
    _, gradients = on_one_device(teacher_file, method)
    for keys, leaf in leaves(gradients):
        if keys[-2:] == ("qkv", "bias"):
            continue  # its key part has no effect on attention
        assert float(jnp.abs(leaf).max()) > 0, keys


def test_the_loss_falls_and_the_state_is_donated(teacher_file):
    run = prepare(teacher_file, **{"optimizer.learning_rate": 1e-2})
    teacher = run.load_teacher()
    first = run.init_states(teacher)[""]
    step_fn = jit_step(run.any.distillation, run.any.mesh, first, teacher)
    batch = batch_of(run)
    state, metrics = step_fn(first, teacher, batch, True)
    assert first.params["student"]["cls_token"].is_deleted()
    assert not teacher["cls_token"].is_deleted()
    losses = [float(metrics["loss"])]
    for _ in range(5):
        state, metrics = step_fn(state, teacher, batch, True)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0]
    assert int(state.step) == 6


def test_clipping_bounds_the_update(teacher_file):
    changes = {"optimizer.name": "sgd", "optimizer.momentum": 0.0, "optimizer.weight_decay": 0.0}
    changes |= {"optimizer.learning_rate": 1.0, "optimizer.max_grad_norm": 1e-3}
    run = prepare(teacher_file, **changes)
    before = run.init_states(run.load_teacher())[""].params
    state, _, history = train(run, 1)
    moved = optax.tree.norm(jax.tree.map(jnp.subtract, state.params, before))
    assert float(history[0]["grad_norm"]) > 1e-2
    np.testing.assert_allclose(moved, 1e-3, rtol=0.05)  # float32 differences of larger numbers


def test_the_student_and_its_start_do_not_depend_on_the_mesh(teacher_file):
    one = prepare(teacher_file).any.init_student()
    many = prepare(teacher_file, **{"mesh.data": 4, "mesh.fsdp": 2}).any.init_student()
    for (keys, a), (_, b) in zip(leaves(one), leaves(many), strict=True):
        np.testing.assert_array_equal(a, b, err_msg=str(keys))
