"""Statistics of the teacher's tokens in the state of a run, and programs with all target spaces."""

import shutil

import jax
import numpy as np
import pytest

from singer_jax import main
from singer_jax.config import settings_of
from singer_jax.models.params import leaves
from singer_jax.platform import parallel
from singer_jax.training.program import jit_step
from singer_jax.training.setup import RunSetup, setup_students
from tests import cli, tiny

STANDARDISED = {"method.match.target_space": "standardised", "method.match.norm_clip_quantile": 0.8}


@pytest.fixture(scope="module")
def teacher_file(tmp_path_factory) -> str:
    return str(tiny.write_teacher(tmp_path_factory.mktemp("teacher") / "teacher.safetensors"))


def prepare(teacher_file: str, method: str, students: dict | None = None, **keys) -> RunSetup:
    config = tiny.config(teacher_file, method)
    config.students.update(students or {})
    config.update_from_flattened_dict(STANDARDISED | keys)
    return setup_students(settings_of(config), examples=64, num_classes=10)


def batch_of(run: RunSetup, seed: int = 0) -> dict:
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (8, 16, 16, 3), dtype=np.uint8)
    batch = {"image": image, "label": np.zeros(8, np.int32)}
    return parallel.put_batch(batch, parallel.batch_sharding(run.any.mesh))


def after_two_steps(run: RunSetup) -> dict:
    teacher = run.load_teacher()
    states = run.init_states(teacher)
    step = jit_step(run.students, run.any.mesh, states, teacher)
    for seed in range(2):
        states, _ = step(states, teacher, batch_of(run, seed), np.bool_(True))
    return states


@pytest.mark.slow
def test_micro_batches_devices_and_students_measure_what_one_does(teacher_file):
    """There are two students, one with a sum of methods, four devices and two micro-batches."""
    students = {
        "tokens": {},
        "sum": {"method": {"method_weights": {"fitnet": 1.0, "relational": 1.0}}},
    }
    several = prepare(
        teacher_file, "fitnet", students, grad_accum_steps=2, **{"mesh.data": 2, "mesh.fsdp": 2}
    )
    found = after_two_steps(several)
    of_sum = found["sum"].constants["method"]["methods"]
    alone = after_two_steps(prepare(teacher_file, "fitnet"))[""].constants["method"]
    expected = dict(leaves(alone))
    assert {keys[-1] for keys in expected} == {"batches", "mean", "variance"}
    for own in (found["tokens"].constants["method"], of_sum["fitnet"]):
        measured = dict(leaves(own))
        assert set(measured) == set(expected)
        for keys, value in expected.items():
            # Float32 sums in another order; a first variance loses digits to the squared mean.
            np.testing.assert_allclose(measured[keys], value, rtol=1e-4, atol=1e-5)
            assert keys[-1] != "batches" or value == 2


def test_nothing_is_measured_where_no_statistics_are_asked_for(teacher_file):
    run = prepare(teacher_file, "fitnet", **{"method.match.target_space": "l2"})
    assert not run.any.state.constants["method"]


@pytest.mark.slow
def test_a_resumed_run_ends_with_the_same_bits(teacher_file, tmp_path):
    config = tiny.config(teacher_file, "singer")
    config.update_from_flattened_dict(STANDARDISED)
    config.steps = 4
    assert main.run(config, tmp_path / "whole") == 0
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "4")
    shutil.rmtree(tmp_path / "again" / "student")
    assert main.run(config, tmp_path / "again") == 0
    cli.assert_same_student(tmp_path / "whole", tmp_path / "again")


def test_no_step_of_an_accelerator_sorts(teacher_file):
    """Sorting is slow on accelerators; the few largest norms of an image are found by `top_k`."""
    terms = {
        f"method.method_weights.{name}": 1.0
        for name in ("singer", "fitnet", "relational", "pooled")
    }
    run = prepare(teacher_file, "singer", **terms)
    traced = jax.jit(run.students.step).trace(run.states, run.teacher, batch_of(run))
    text = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert "stablehlo.sort" not in text and "top_k" in text
