"""The program of a step that leaves the diagnostics to a program of their own, as on a GPU."""

import dataclasses

import jax
import numpy as np
import pytest

from singer_jax.platform import backends
from singer_jax.training.program import compile_step
from tests import tiny
from tests.training.test_students import batch_of, prepare, together

STUDENTS = {
    "singer": {"method": {"name": "singer", "nullspace": {"init": "official"}}},
    "fitnet": {"method": {"name": "fitnet"}},
}


@pytest.fixture(scope="module")
def teacher_file(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("teacher")
    return str(tiny.write_teacher(folder / "teacher.safetensors", num_classes=10))


@pytest.fixture(scope="module")
def train(teacher_file):
    """Returns a function that trains three steps, and returns metrics and the last states."""

    def trained(separate: bool, logged: tuple[bool, ...]) -> tuple[list[dict], dict]:
        choices = dataclasses.replace(backends.choices("cpu"), separate_diagnostics=separate)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(backends, "choices", lambda platform="": choices)
            run = prepare(together(teacher_file, STUDENTS, grad_accum_steps=2))
            teacher, batch = run.load_teacher(), batch_of(run, 0)
            states = run.init_states(teacher)
            arguments = (run.students, run.any.mesh, states, teacher, batch, "parallel")
            step = compile_step(*arguments).step
            rows = []
            for number, flag in enumerate(logged):
                states, metrics = step(states, teacher, batch_of(run, number), np.bool_(flag))
                rows.append(jax.device_get({name: dict(metrics[name]) for name in metrics}))
        return rows, states

    return trained


@pytest.fixture(scope="module")
def separate(train) -> tuple[list[dict], dict]:
    return train(True, (True, False, True))


@pytest.mark.slow
def test_the_metrics_are_those_of_a_program_with_a_branch(train, separate):
    expected, _ = train(False, (True, False, True))
    for row, wanted in zip(separate[0], expected, strict=True):
        for name, own in wanted.items():
            assert set(row[name]) == set(own)
            for key, value in own.items():
                np.testing.assert_allclose(row[name][key], value, rtol=1e-5, atol=1e-7, err_msg=key)


def test_diagnostics_are_zero_in_other_steps(separate):
    first, second, _ = (row["singer"] for row in separate[0])
    names = [name for name in first if name.endswith("teacher_norm_median")]
    assert names and all(first[name] > 0 and second[name] == 0 for name in names)


def test_a_run_does_not_depend_on_which_steps_are_logged(train, separate):
    _, states = train(True, (False, False, False))
    pairs = zip(jax.tree.leaves(states), jax.tree.leaves(separate[1]), strict=True)
    assert all(np.array_equal(one, other) for one, other in pairs)
