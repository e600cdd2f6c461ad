"""Calibrated runs: measurements before the first step on any devices, not repeated on resume."""

import jax
import numpy as np
import pytest

from singer_jax import main
from singer_jax.config import settings_of
from singer_jax.errors import InputError
from singer_jax.platform import hosts, parallel
from singer_jax.training import calibration
from singer_jax.training.setup import RunSetup, setup_students
from tests import cli, tiny


@pytest.fixture(scope="module")
def teacher_file(tmp_path_factory) -> str:
    return str(tiny.write_teacher(tmp_path_factory.mktemp("teacher") / "teacher.safetensors"))


def configuration(teacher_file: str, **changes: object):
    config = tiny.config(teacher_file)
    config.method.nullspace.weight_matrix = "calibrated"
    config.update_from_flattened_dict(changes)
    return config


def prepare(teacher_file: str, **changes: object) -> RunSetup:
    settings = settings_of(configuration(teacher_file, **changes))
    return setup_students(settings, examples=64, num_classes=10)


def measured(run: RunSetup) -> dict:
    batches = (
        parallel.put_batch(
            {"image": np.random.default_rng(seed).integers(0, 256, (8, 16, 16, 3), np.uint8)},
            parallel.batch_sharding(run.any.mesh),
        )
        for seed in range(2)
    )
    return calibration.measure(run, run.load_teacher(), batches)


def test_devices_and_micro_batches_change_nothing(teacher_file):
    expected = measured(prepare(teacher_file))[""]["singer"]
    assert set(expected) == {"1", "2"} and expected["2"].covariance.shape == (24, 24)
    many = {"mesh.data": 2, "mesh.fsdp": 2, "grad_accum_steps": 2}
    found = measured(prepare(teacher_file, **many))[""]["singer"]
    for one, known in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert one.sharding.is_fully_replicated
        # Float32 sums in another order.
        np.testing.assert_allclose(one, known, atol=1e-5 * float(abs(known).max()))


def test_each_student_measures_for_itself(teacher_file):
    config = configuration(teacher_file)
    config.students.update(
        {
            "plain": {"method": {"nullspace": {"weight_matrix": "mlp"}}},
            "wide": {"method": {"rank": 6}},
            "strict": {"method": {"outlier_quantile": 0.9}},
        }
    )
    run = setup_students(settings_of(config), examples=64, num_classes=10)
    found = measured(run)
    assert set(found) == {"wide", "strict"}
    several, alone = found["wide"]["singer"]["2"], measured(prepare(teacher_file))[""]
    jax.tree.map(np.testing.assert_array_equal, several, alone["singer"]["2"])
    states = run.init_states(run.load_teacher(), found)
    counts = {
        name: state.constants["method"]["refiner"]["2"]["singular_values"].shape[0]
        for name, state in states.items()
    }
    assert counts == {"plain": 24, "wide": 6, "strict": 4}


def test_without_measurements_it_does_not_start(teacher_file):
    run = prepare(teacher_file)
    with pytest.raises(InputError, match="needs `measured`"):
        run.init_states(run.load_teacher())


@pytest.mark.slow
def test_a_resumed_run_ends_with_the_same_bits_and_measures_once(
    teacher_file, tmp_path, monkeypatch
):
    config = configuration(teacher_file)
    assert main.run(config, tmp_path / "whole") == 0
    with monkeypatch.context() as patch:
        patch.setattr(hosts, "stop_after", lambda step: step == 3)
        assert main.run(config, tmp_path / "stopped") == 75

    def never(*arguments: object) -> None:
        raise AssertionError("Q is in the checkpoint")

    monkeypatch.setattr(calibration, "measure", never)
    assert main.run(config, tmp_path / "stopped") == 0
    cli.assert_same_student(tmp_path / "stopped", tmp_path / "whole")
