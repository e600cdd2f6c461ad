"""Several students of one teacher: each learns the same as in a separate run."""

import dataclasses
import functools
import re

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from singer_jax.config import settings_of
from singer_jax.errors import InputError
from singer_jax.models.params import leaves
from singer_jax.models.summary import features_flops
from singer_jax.platform import backends, parallel
from singer_jax.training.flops import step_flops
from singer_jax.training.program import compile_step, jit_step
from singer_jax.training.settings import StudentsSettings, StudentVariant
from singer_jax.training.setup import RunSetup, setup_students
from tests import tiny

# Methods, architectures, patch sizes, learning rates and seeds differ.
STUDENTS = {
    "singer": {"method": {"name": "singer", "nullspace": {"init": "official"}}},
    "fitnet": {"method": {"name": "fitnet"}, "optimizer": {"learning_rate": 3e-3}},
    "vitkd": {"method": {"name": "vitkd", "mimic_layers": (0,)}, "overrides": {"depth": 3}},
    "logits": {"method": {"name": "logit_kd"}, "overrides": {"embed_dim": 8}, "seed": 5},
    "coarse": {
        "method": {"name": "fitnet", "interpolate_patch_grid": True},
        "overrides": {"patch_size": 8},
    },
}


@pytest.fixture(scope="module")
def teacher_file(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("teacher")
    return str(tiny.write_teacher(folder / "teacher.safetensors", num_classes=10))


def together(
    teacher_file: str,
    students: dict,
    shape: tuple[int, int] = (1, 1),
    grad_accum_steps: int = 1,
) -> ConfigDict:
    config = tiny.config(teacher_file)
    config.students.update(students)
    config.mesh.data, config.mesh.fsdp = shape
    config.grad_accum_steps = grad_accum_steps
    return config


def prepare(config: ConfigDict) -> RunSetup:
    return setup_students(settings_of(config), examples=64, num_classes=10)


def batch_of(run: RunSetup, seed: int) -> dict:
    rng = np.random.default_rng(seed)
    batch = {
        "image": rng.integers(0, 256, (8, 16, 16, 3), dtype=np.uint8),
        "label": rng.integers(0, 10, 8).astype(np.int32),
    }
    return parallel.put_batch(batch, parallel.batch_sharding(run.any.mesh))


def train(run: RunSetup, sequential: bool = False) -> tuple[dict, list[dict]]:
    """Returns the states after five steps, and their metrics."""
    teacher = run.load_teacher()
    states = run.init_states(teacher)
    schedule = "sequential" if sequential else "parallel"
    batch = batch_of(run, 0)
    step = compile_step(run.students, run.any.mesh, states, teacher, batch, schedule).step
    history = []
    for number in range(5):
        states, metrics = step(states, teacher, batch_of(run, number), np.bool_(True))
        history.append(jax.device_get(metrics))
    return states, history


@functools.cache
def alone(
    teacher_file: str, name: str, shape: tuple[int, int] = (1, 1), grad_accum_steps: int = 1
) -> tuple[dict, list[dict]]:
    """Returns the state and metrics of a separate run of a student."""
    config = together(teacher_file, STUDENTS, shape, grad_accum_steps)
    own = settings_of(config).each()[name]
    return train(setup_students(own, examples=64, num_classes=10))


ALL = tuple(STUDENTS)


@pytest.mark.parametrize(
    ("names", "shape", "sequential", "grad_accum_steps"),
    [
        (("singer", "coarse"), (2, 2), True, 2),
        pytest.param(("singer", "vitkd", "coarse"), (1, 1), False, 1, marks=pytest.mark.slow),
        pytest.param(ALL, (1, 1), False, 1, marks=pytest.mark.slow),
        pytest.param(ALL, (1, 1), True, 1, marks=pytest.mark.slow),
        pytest.param(ALL, (2, 2), False, 1, marks=pytest.mark.slow),
        pytest.param(ALL, (2, 2), True, 2, marks=pytest.mark.slow),
    ],
)
def test_each_student_learns_the_same_as_in_a_separate_run(
    teacher_file, names, shape, sequential, grad_accum_steps
):
    students = {name: STUDENTS[name] for name in names}
    config = together(teacher_file, students, shape, grad_accum_steps)
    states, history = train(prepare(config), sequential)
    for name in names:
        own, expected = alone(teacher_file, name, shape, grad_accum_steps)
        for found, wanted in zip(history, expected, strict=True):
            assert set(found[name]) == set(wanted[""])
            for term, value in wanted[""].items():
                # Float32 rounding, of programs that may add in another order; as below.
                np.testing.assert_allclose(found[name][term], value, rtol=1e-4, err_msg=term)
        assert int(states[name].step) == 5
        for (keys, one), (_, other) in zip(
            leaves(states[name].params), leaves(own[""].params), strict=True
        ):
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6, err_msg=str(keys))


def test_shared_computations_run_once(teacher_file):
    """There is one forward pass of the teacher, and one decomposition of each layer."""
    two = {name: {"method": {"rank": rank}} for name, rank in (("a", 4), ("b", 2))}
    one = prepare(together(teacher_file, {"a": two["a"]}))
    both = prepare(together(teacher_file, two))
    assert both.students.teacher_reads == one.students.teacher_reads == (1, 2)

    def decompositions(run: RunSetup) -> int:
        students = {name: jax.eval_shape(own.init_student) for name, own in run.each.items()}
        return str(jax.make_jaxpr(run.make_states())(run.teacher, students)).count(" svd[")

    # The last two layers have the same reader, the last block.
    assert decompositions(both) == decompositions(one) == 1

    def teachers(run: RunSetup) -> int:
        teacher = step_flops(run.students, run.states, run.teacher, 8)
        learned = [RunSetup({"": own}) for own in run.each.values()]
        alone = sum(step_flops(r.students, r.states, r.teacher, 8) for r in learned)
        return (alone - teacher) // features_flops(run.teacher_model.network.spec.arch, 3)

    assert teachers(both) == 8  # images that no second pass has seen


def test_unread_features_are_not_kept(teacher_file):
    one = {"a": {"method": {"layers": (0,), "include_last_layer": False}}}
    assert prepare(together(teacher_file, one)).students.teacher_reads == (0, 1)


def test_a_non_finite_student_keeps_its_state_and_does_not_affect_the_others(teacher_file):
    # A learning rate at which the second step's loss is infinite.
    bad = {"method": {"name": "fitnet"}, "optimizer": {"name": "sgd", "learning_rate": 1e30}}
    run = prepare(together(teacher_file, {"singer": STUDENTS["singer"], "bad": bad}))
    states, history = train(run)
    assert not np.isfinite(history[-1]["bad"]["loss"])
    assert int(states["bad"].step) < int(states["singer"].step) == 5
    teacher = run.load_teacher()
    first = run.init_states(teacher)
    step = jit_step(run.students, run.any.mesh, first, teacher)
    for number in range(int(states["bad"].step)):
        first, _ = step(first, teacher, batch_of(run, number), np.bool_(True))
    for (keys, kept), (_, good) in zip(
        leaves(states["bad"].params), leaves(first["bad"].params), strict=True
    ):
        assert np.all(np.isfinite(kept)), keys
        np.testing.assert_array_equal(kept, good, err_msg=str(keys))
    own, _ = alone(teacher_file, "singer")
    for (keys, one), (_, other) in zip(
        leaves(states["singer"].params), leaves(own[""].params), strict=True
    ):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6, err_msg=str(keys))


@pytest.mark.parametrize(
    ("memory", "prefers", "words"),
    [
        (2**40, False, "2 students, parallel, peak memory .* of 1.02e\\+03 GiB per device$"),
        (1, False, "2 students, sequential, peak memory .*; parallel execution needs .* GiB"),
        (2**40, True, "2 students, sequential, peak memory [^;]* GiB$"),
    ],
)
def test_the_execution_suits_the_device_and_is_logged(
    teacher_file, monkeypatch, memory, prefers, words
):
    monkeypatch.setattr(parallel, "device_memory", lambda mesh: memory)
    chosen = dataclasses.replace(backends.choices("cpu"), sequential=prefers)
    monkeypatch.setattr(backends, "choices", lambda platform="": chosen)
    run = prepare(together(teacher_file, {"a": {}, "b": {"seed": 1}}))
    teacher, batch = run.teacher, batch_of(run, 0)
    program = compile_step(run.students, run.any.mesh, run.states, teacher, batch)
    assert re.match(words, program.description), program.description
    alone = RunSetup({"": run.each["a"]})
    program = compile_step(alone.students, run.any.mesh, alone.states, teacher, batch)
    assert not program.description


@pytest.mark.slow
def test_sequential_execution_takes_less_memory(teacher_file):
    same = {name: {"method": {"name": "fitnet"}, "seed": seed} for seed, name in enumerate("abcd")}
    run = prepare(together(teacher_file, same))
    arguments = (run.students, run.any.mesh, run.states, run.teacher, batch_of(run, 0))
    both = [compile_step(*arguments, schedule) for schedule in ("parallel", "sequential")]
    wide, narrow = (program.compiled.memory_analysis().temp_size_in_bytes for program in both)
    assert narrow < 0.7 * wide  # of four equal students; the features and gradients of all stay


@pytest.mark.parametrize(
    ("students", "words"),
    [
        ({"a": {"data": {"path": "x"}}}, r"students\.a\.data\.path: 'x'; give it once for the run"),
        ({"a": {"batch_size": 4}}, r"students\.a\.batch_size: 4; give it once for the run"),
        ({"a": {"rank": 4}}, r"unknown configuration key 'students\.a\.rank'"),
        ({"a": {"method": {"rank": 0}}}, r"students\.a\.method\.rank: 0; give"),
        ({"a/b": {"seed": 1}}, r"students: 'a/b' is not a valid name"),
        ({"-a": {"seed": 1}}, r"students: '-a' is not a valid name"),
        ({"teacher": {"seed": 1}}, r"students: 'teacher' is also the name of the teacher"),
        ({"Tiny": {}, "tiny": {}}, r"students: 'tiny' is also the name of the student 'Tiny'"),
        ({"execution": "both"}, r"unknown students\.execution 'both'"),
        ({"a": {"model": "vit_tiny"}}, r"students\.a: unknown model 'vit_tiny'"),
        ({"a": {"method": {"rank": 99}}}, r"students\.a: method\.rank: 99 is not in 1\.\.24"),
        (
            {"a": {"method": {"name": "logit_kd"}, "overrides": {"num_classes": 3}}},
            r"students\.a: the teacher .* has 10 classes, the student .* 3",
        ),
    ],
)
def test_invalid_students_are_named(teacher_file, students, words):
    with pytest.raises(InputError, match=f"^{words}"):
        prepare(together(teacher_file, students))


def test_a_student_cannot_take_the_name_of_a_key():
    with pytest.raises(InputError, match="'execution' is also the name of a key"):
        StudentsSettings({"execution": StudentVariant()})


def test_a_student_s_method_replaces_the_run_s_sum(teacher_file):
    config = together(teacher_file, {"a": {"method": {"name": "fitnet"}}, "b": {"seed": 1}})
    config.method.method_weights.singer, config.method.method_weights.logit_kd = 1.0, 0.5
    each = settings_of(config).each()
    assert each["a"].method_name == "fitnet" and each["b"].method_name == "singer + logit_kd"


def test_students_that_need_labels_and_have_none_are_named(teacher_file):
    config = together(teacher_file, {"a": {}, "b": {"method": {"name": "supervised"}}})
    with pytest.raises(InputError, match=r"^students\.b: the method needs labels"):
        setup_students(settings_of(config), examples=64, num_classes=0)
