"""Programs of a training run compile for a TPU, in bounded time, without one (package libtpu).

Real widths, small depths, a few images: what a compiler refuses, or takes minutes for, shows here.
The seconds of each program are in the summary of the test run.
"""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import Mesh

from benchmarks.make_inputs import write_blank_weights
from benchmarks.topology import tpu_mesh
from singer_jax import parallel
from singer_jax.methods import nullspace
from singer_jax.training import checkpoints
from singer_jax.training.setup import Setup, setup
from singer_jax.training.step import jit_step
from tests import tiny

TEACHER, SMALL, STUDENT = (f"vit_{size}_patch16_224" for size in ("large", "small", "tiny"))
IMAGES = 16  # on four chips


@pytest.fixture(scope="module")
def chips() -> Mesh:
    return tpu_mesh()


def prepare(
    folder, mesh: Mesh, method: str = "singer", teacher: str = TEACHER, **changes: object
) -> Setup:
    overrides = {"depth": 4, "num_classes": 1000}
    config = tiny.config("", method)
    config.teacher.model, config.student.model = teacher, STUDENT
    config.teacher.overrides = dict(overrides)
    config.student.overrides = overrides | {"depth": 3}
    config.teacher.weights = str(
        write_blank_weights(folder / "t.safetensors", teacher, **overrides)
    )
    config.method.rank, config.method.quantile = 64, 0.97
    config.method.mimic_layers = (0,)
    config.precision, config.batch_size = "bfloat16", IMAGES
    config.update_from_flattened_dict(changes)
    return setup(config, examples=1000, num_classes=1000, mesh=mesh)


def batch_of(run: Setup, size: int = IMAGES) -> dict[str, jax.ShapeDtypeStruct]:
    split = parallel.batch_sharding(run.mesh)
    shape = (size, run.image_size, run.image_size, 3)
    return {
        "image": jax.ShapeDtypeStruct(shape, jnp.uint8, sharding=split),
        "label": jax.ShapeDtypeStruct(shape[:1], jnp.int32, sharding=split),
    }


def test_a_training_step(tmp_path, chips, compiles):
    run = prepare(tmp_path, chips, "vitkd", SMALL)
    step = jit_step(run.distillation, run.mesh, run.state, run.teacher)
    logged = jax.ShapeDtypeStruct((), jnp.bool_, sharding=parallel.replicated(chips))
    compiles(600, step, run.state, run.teacher, batch_of(run), logged)


def test_the_initial_state_with_its_null_spaces(tmp_path, chips, compiles):
    run = prepare(tmp_path, chips)
    student = jax.tree.map(
        lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at),
        jax.eval_shape(run.draw_student),
        parallel.tree_shardings(chips, jax.eval_shape(run.draw_student)),
    )
    compiles(60, run.draw_student)
    compiles(180, run.make_state, run.teacher, student)


def test_the_checksums_of_a_checkpoint(tmp_path, chips, compiles):
    compiles(60, checkpoints._checksums, prepare(tmp_path, chips).state)


@pytest.mark.parametrize("source", ["mlp", "mlp_norm", "block"])
def test_a_null_space(tmp_path, chips, compiles, source):
    run = prepare(tmp_path, chips)

    def space(teacher):
        model = run.distillation.teacher.merge(teacher)
        return nullspace.decompose(nullspace.linear_map(model, 2, source))

    compiles(120, jax.jit(space), run.teacher)
