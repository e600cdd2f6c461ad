"""A step computes the same with any number of micro-batches, devices and processes."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from singer_jax.config import settings_of
from singer_jax.methods import METHODS
from singer_jax.models.params import leaves
from singer_jax.platform import parallel
from singer_jax.training.setup import setup_students
from tests import cli, tiny

SIZE = 8
OWN = {
    "singer": {"nullspace": {"init": "official"}},  # else its first update is zero
    "vitkd": {"mimic_layers": (0,)},
    "vitkd_official": {"mimic_layers": (0,), "loss_weights": {"mimic": 1.0, "generation": 1.0}},
}


@pytest.fixture(scope="module")
def teacher_file(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    return tiny.write_teacher(folder / "teacher.safetensors", num_classes=10)


def gradients(teacher_file: Path, grad_accum_steps: int, shape: tuple[int, int]) -> dict:
    """Returns gradients and losses of a student of each method on one batch."""
    config = tiny.config(teacher_file)
    for name in METHODS:
        method = {"name": name} | OWN.get(name, {})
        config.students[name] = {"method": method}
    config.grad_accum_steps = grad_accum_steps
    config.mesh.data, config.mesh.fsdp = shape
    run = setup_students(settings_of(config), examples=64, num_classes=10)
    rng = np.random.default_rng(0)
    batch = {
        "image": rng.integers(0, 256, (SIZE, 16, 16, 3), dtype=np.uint8),
        "label": rng.integers(0, 10, SIZE).astype(np.int32),
    }
    sharding = parallel.batch_sharding(run.any.mesh)
    batch = {key: parallel.put(value, sharding) for key, value in batch.items()}
    teacher = run.load_teacher()
    found = jax.jit(run.students.gradients)(run.init_states(teacher), teacher, batch, False)
    return {name: own.gradients | own.metrics for name, own in found.items()}


@pytest.fixture(scope="module")
def expected(teacher_file) -> dict:
    return gradients(teacher_file, 1, (1, 1))


@pytest.mark.slow
@pytest.mark.parametrize(("grad_accum_steps", "shape"), [(4, (1, 1)), (2, (2, 2))])
def test_micro_batches_and_devices_change_no_gradient_of_any_method(
    teacher_file, expected, grad_accum_steps, shape
):
    found = gradients(teacher_file, grad_accum_steps, shape)
    assert set(found) == set(METHODS)
    for method, trees in expected.items():
        pairs = zip(leaves(trees), leaves(found[method]), strict=True)
        for (keys, one), (_, other) in pairs:
            # Float32 sums in another order.
            np.testing.assert_allclose(
                one, other, rtol=1e-3, atol=1e-6, err_msg=f"{method}: {keys}"
            )


LOADING = """
import contextlib, json, sys, types
import jax
import numpy as np
from jax.experimental import multihost_utils
from singer_jax.platform import hosts, parallel
from singer_jax.config import settings_of
from singer_jax.data.registry import open_source
from singer_jax.training.batches import device_batches
from tests import tiny

given = dict(flag.removeprefix("--").split("=") for flag in sys.argv[1:])
if given:
    hosts.join(given["coordinator"], int(given["processes"]), int(given["process"]))
settings = settings_of(tiny.config("none"))
one = types.SimpleNamespace(mesh=parallel.make_mesh(), steps=9)
run = types.SimpleNamespace(any=one, image_size=8)
source = open_source(settings.data, "train")
found = []
with contextlib.closing(device_batches(settings, run, source, 3)) as batches:
    for _ in range(2):
        whole = multihost_utils.process_allgather(next(batches)[0], tiled=True)
        found.append([whole["label"].tolist(), whole["image"].astype(int).sum((1, 2, 3)).tolist()])
print(json.dumps(found))
"""


@pytest.mark.slow
def test_processes_read_the_rows_of_one_batch_in_its_order():
    def started(*flags: str) -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, "-c", LOADING, *flags],
            env=cli.environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    processes = [started(), *(started(*flags) for flags in cli.joining(2))]
    printed = []
    for process in processes:
        out, error = process.communicate(timeout=300)
        assert process.returncode == 0, error
        printed.append(json.loads(out.splitlines()[-1]))
    assert printed[0] == printed[1] == printed[2]
