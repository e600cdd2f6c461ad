"""Runs whose teacher is cleaned: what they say, how they go on, what a step of them computes."""

import json
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from singer_jax import main
from singer_jax.config import settings_of
from singer_jax.platform import parallel
from singer_jax.training import artifact_removal, flops
from singer_jax.training.program import jit_step
from singer_jax.training.setup import RunSetup, setup_students
from tests import outlier_teacher, tiny

CLEANERS = ("registers", "shift_average")


@pytest.fixture(scope="module")
def teacher_file(tmp_path_factory):
    return outlier_teacher.write_teacher(tmp_path_factory.mktemp("teacher") / "teacher.safetensors")


@pytest.fixture
def config(teacher_file):
    """Of steps whose batches are all the same to the teacher: 64 patches of 32 pixels."""
    config = tiny.config(teacher_file)
    config.teacher.overrides = dict(outlier_teacher.SIZES)
    config.student.overrides.img_size = 32
    config.teacher.registers.images, config.teacher.registers.neurons = 16, 2
    config.steps = 4
    return config


@pytest.mark.slow
@pytest.mark.parametrize("clean", ["registers", "shift_average"])
def test_a_resumed_run_keeps_the_neurons_that_it_found(
    config, tmp_path, monkeypatch, capsys, clean
):
    config.teacher.artifact_removal = clean
    assert main.run(config, tmp_path / "whole") == 0
    found = json.loads((tmp_path / "whole" / "weights.json").read_text())["teacher"]["clean"]
    expected = [list(pair) for pair in outlier_teacher.NEURONS] if clean == "registers" else []
    assert found["by"] == clean and found["neurons"] == expected
    shift_down = found["layers"]["2"]["before"]["max"] / found["layers"]["2"]["after"]["max"]
    assert shift_down > (30 if clean == "registers" else 1)

    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "4")
    shutil.rmtree(tmp_path / "again" / "student")
    for name in ("find_register_neurons", "describe_artifact_removal"):  # only a first start's
        monkeypatch.delattr(artifact_removal, name)
    assert main.run(config, tmp_path / "again") == 0
    whole, again = (
        load_file(tmp_path / name / "student" / "model.safetensors") for name in ("whole", "again")
    )
    for name, tensor in whole.items():
        np.testing.assert_array_equal(again[name], tensor)
    exported = json.loads((tmp_path / "again" / "student" / "config.json").read_text())
    assert exported["singer_jax"]["teacher"]["clean"] == found

    capsys.readouterr()
    config.teacher.artifact_removal = None
    assert main.run(config, tmp_path / "again") == 2
    assert f"teacher.artifact_removal: '{clean}' -> None" in capsys.readouterr().err


def prepare(config, clean, **changes: object) -> RunSetup:
    config.update_from_flattened_dict({"teacher.artifact_removal": clean} | changes)
    return setup_students(settings_of(config), 64, 10)


def batch_of(run: RunSetup) -> dict:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (8, 32, 32, 3), dtype=np.uint8)
    batch = {"image": images, "label": np.zeros(8, np.int32)}
    return parallel.put_batch(batch, parallel.batch_sharding(run.any.mesh))


@pytest.mark.slow
def test_a_step_of_two_students_on_several_devices_with_a_quantised_teacher(config):
    """Where a refiner changes nothing, as it starts, the info loss of registers is 0."""
    config.method.layers, config.method.include_last_layer = (1,), False
    config.students.a = {"method": {"name": "fitnet"}}
    config.students.b = {}
    metrics = {}
    for data, fsdp in ((1, 1), (2, 2)):
        changes = {"mesh.data": data, "mesh.fsdp": fsdp, "teacher.precision": "int8"}
        run = prepare(config, "registers", **changes)
        teacher = run.load_teacher(outlier_teacher.NEURONS)
        states = run.init_states(teacher)
        step = jit_step(run.students, run.any.mesh, states, teacher)
        metrics[data] = jax.device_get(step(states, teacher, batch_of(run), np.bool_(True))[1])
    for name, one in metrics[1].items():
        for term, value in one.items():
            # Float32 sums in another order, which int8 may round to the next step.
            np.testing.assert_allclose(metrics[2][name][term], value, rtol=1e-2, atol=1e-6)
    assert metrics[1]["b"]["loss_info"] == 0


@pytest.mark.parametrize("clean", [None, *CLEANERS])
def test_operations_are_those_of_the_program(config, clean):
    run = prepare(config, clean)
    counted = flops.parts_flops(run.students, run.states, run.teacher, 8)["teacher"]
    assert counted == flops.count(run.students.teach, run.teacher, batch_of(run))
    tokens = 64 + 1 + (clean == "registers")
    dim, depth, patch = 24, 4, 48
    block = tokens * 12 * dim**2 + 2 * tokens**2 * dim
    once = 2 * 8 * (64 * patch * dim + depth * block)
    assert counted == (10 if clean == "shift_average" else 1) * once
