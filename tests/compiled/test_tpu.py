"""Programs of a training run compile for a TPU, in bounded time, without one (package libtpu).

Real widths, small depths, a few images: what a compiler refuses, or takes minutes for, shows here.
The seconds of each program are in the summary of the test run.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from benchmarks.make_inputs import write_blank_weights
from benchmarks.topology import tpu_mesh
from singer_jax.config import settings_of
from singer_jax.data.registry import make_source
from singer_jax.data.sources import TRAIN
from singer_jax.methods import calibration as directions
from singer_jax.methods import fitted, nullspace
from singer_jax.platform import parallel
from singer_jax.runs import checkpoints
from singer_jax.training import calibration
from singer_jax.training.program import jit_step
from singer_jax.training.setup import RunSetup, setup_students
from singer_jax.training.validation_losses import ValidationLosses
from tests import tiny
from tests.compiled.compiling import Compile

pytestmark = [pytest.mark.optimized, pytest.mark.slow]

TEACHER, SMALL, STUDENT = (f"vit_{size}_patch16_224" for size in ("large", "small", "tiny"))
IMAGES = 16  # on four chips


@pytest.fixture(scope="module")
def chips() -> Mesh:
    return tpu_mesh()


def prepare(folder, mesh: Mesh, *arguments: str, **changes: object) -> RunSetup:
    return prepare_all(folder, mesh, {}, *arguments, **changes)


def prepare_all(
    folder,
    mesh: Mesh,
    students: dict,
    method: str = "singer",
    teacher: str = TEACHER,
    **changes: object,
) -> RunSetup:
    overrides = {"depth": 4, "num_classes": 1000}
    config = tiny.config("", method)
    config.teacher.model, config.student.model = teacher, STUDENT
    config.teacher.overrides = dict(overrides)
    config.student.overrides = overrides | {"depth": 3}
    config.teacher.weights = str(
        write_blank_weights(folder / "t.safetensors", teacher, **overrides)
    )
    config.method.rank, config.method.outlier_quantile = 64, 0.97
    config.method.mimic_layers = (0,)
    config.precision, config.batch_size = "bfloat16", IMAGES
    config.students.update(students)
    config.update_from_flattened_dict(changes)
    return setup_students(settings_of(config), examples=1000, num_classes=1000, mesh=mesh)


def batch_of(run: RunSetup, size: int = IMAGES) -> dict[str, jax.ShapeDtypeStruct]:
    split = parallel.batch_sharding(run.any.mesh)
    shape = (size, run.image_size, run.image_size, 3)
    return {
        "image": jax.ShapeDtypeStruct(shape, jnp.uint8, sharding=split),
        "label": jax.ShapeDtypeStruct(shape[:1], jnp.int32, sharding=split),
    }


def compile_step(compiles: Compile, at_most: float, run: RunSetup) -> str:
    """The text of the compiled step."""
    step = jit_step(run.any.distillation, run.any.mesh, run.any.state, run.teacher)
    logged = jax.ShapeDtypeStruct((), jnp.bool_, sharding=parallel.replicated(run.any.mesh))
    program = compiles(at_most, step, run.any.state, run.teacher, batch_of(run), logged)
    return program.compiled.as_text()


METHODS = {
    "singer": TEACHER,
    "fitnet": SMALL,
    "vitkd": SMALL,
    "vitkd_official": SMALL,
    "logit_kd": SMALL,
    "supervised": SMALL,
}


@pytest.mark.parametrize("method", METHODS)
def test_a_training_step(tmp_path, chips, compiles: Compile, method):
    run = prepare(tmp_path, chips, method, METHODS[method])
    text = compile_step(compiles, 240, run)
    # Chips share sums, not images.
    assert "all-reduce" in text
    assert "all-gather" not in text and "all-to-all" not in text


def test_a_step_with_everything_on(tmp_path, compiles: Compile):
    """Split parameters, micro-batches, rematerialisation, four methods, two grids, a space."""
    run = prepare(
        tmp_path,
        tpu_mesh(fsdp=2),
        teacher="vit_small_patch16_dinov3",
        **{
            "teacher.overrides": {"depth": 4},
            "method.method_weights.singer": 1.0,
            "method.method_weights.fitnet": 0.5,
            "method.method_weights.relational": 0.5,
            "method.method_weights.pooled": 0.5,
            "method.interpolate_patch_grid": True,
            "method.match.target_space": "standardised",
            "method.match.loss": "cosine_smooth_l1",
            "method.match.norm_clip_quantile": 0.97,
            "student.remat": True,
            "grad_accum_steps": 2,
        },
    )
    assert run.any.distillation.teacher.image_size != run.any.distillation.student.image_size
    assert "all-gather" in compile_step(compiles, 300, run)


@pytest.mark.parametrize("clean", ["registers", "shift_average"])
def test_a_cleaned_teacher(tmp_path, chips, compiles: Compile, clean):
    """Its blocks are a loop over stacked parameters."""
    run = prepare(tmp_path, chips, "fitnet", SMALL, **{"teacher.artifact_removal": clean})
    assert run.teacher_model.policy.stacked
    split = parallel.batch_sharding(chips)
    teach = jax.jit(run.any.distillation.teach, out_shardings=split)
    text = compiles(120, teach, run.teacher, batch_of(run)).compiled.as_text()
    assert "all-gather" not in text and "all-reduce" not in text  # each chip its own images


def test_students_one_by_one_take_little_more_memory_than_one(tmp_path, chips, compiles: Compile):
    several = {name: {"seed": seed} for seed, name in enumerate("abc")}
    run = prepare_all(tmp_path, chips, several, "fitnet", SMALL)
    logged = jax.ShapeDtypeStruct((), jnp.bool_, sharding=parallel.replicated(chips))
    took = {}
    for which in (run, RunSetup({"a": run.each["a"]})):
        students = dataclasses.replace(which.students, sequential=True)
        step = jit_step(students, chips, which.states, which.teacher)
        batch = batch_of(run, 512)
        program = compiles(180, step, which.states, which.teacher, batch, logged)
        took[len(which.each)] = program.temporary_gib
    assert took[3] < 1.3 * took[1]  # the target


def test_the_held_out_losses(tmp_path, chips, compiles: Compile):
    run = prepare(tmp_path, chips, teacher=SMALL)
    losses = ValidationLosses(run, make_source("digits", "", TRAIN), IMAGES)
    key = jax.eval_shape(lambda: jax.random.key(0))
    key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=parallel.replicated(chips))
    compiles(120, losses.losses, {"": run.any.state}, run.teacher, batch_of(run), key)


def test_the_initial_state_with_its_null_spaces(tmp_path, chips, compiles: Compile):
    run = prepare(tmp_path, chips)
    student = jax.tree.map(
        lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at),
        jax.eval_shape(run.any.draw_student, np.uint32(0)),
        parallel.tree_shardings(chips, jax.eval_shape(run.any.draw_student, np.uint32(0))),
    )
    compiles(60, run.any.draw_student, np.uint32(0))
    compiles(180, run.make_states(), run.teacher, {"": student})


def test_what_is_measured_of_the_first_batches(tmp_path, chips, compiles: Compile):
    changes = {"method.nullspace.weight_matrix": "calibrated"}
    run = prepare_all(tmp_path, chips, {}, teacher=SMALL, **changes)
    everywhere = parallel.replicated(chips)
    totals = {
        "": jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), run.any.measured
        )
    }
    compiles(120, calibration.jit_add(run), totals, run.teacher, batch_of(run))


@pytest.mark.parametrize("threshold_type", ["quantile", "energy"])
def test_a_calibrated_null_space(tmp_path, chips, compiles: Compile, threshold_type):
    run = prepare(tmp_path, chips, teacher=SMALL)
    settings = nullspace.NullSpaceSettings(
        weight_matrix="calibrated", threshold_type=threshold_type
    )

    def space(teacher, statistics):
        model = run.any.distillation.teacher.merge(teacher)
        return directions.of_layer(model, 2, settings, 64, statistics)

    everywhere = parallel.replicated(chips)
    statistics = directions.OutlierStatistics((384, 384), (), (), ())
    statistics = directions.OutlierStatistics(
        *(jax.ShapeDtypeStruct(x, jnp.float32, sharding=everywhere) for x in statistics[:4])
    )
    compiles(120, jax.jit(space, out_shardings=everywhere), run.teacher, statistics)


def test_a_fitted_refiner(chips, compiles: Compile):
    def shaped(*shape: int, dtype: type = jnp.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=parallel.replicated(chips))

    square = shaped(384, 384)
    space, moments = (
        nullspace.NullSpace(square, shaped(384)),
        directions.Moments(square, square, shaped()),
    )
    update = jax.jit(fitted.fitted_update, static_argnums=4)
    compiles(120, update, space, shaped(384, dtype=jnp.bool_), square, moments, 64)


def test_the_checksums_of_a_checkpoint(tmp_path, chips, compiles: Compile):
    compiles(60, checkpoints._checksums, prepare(tmp_path, chips).states[""])


@pytest.mark.parametrize("source", ["mlp", "mlp_norm", "block"])
def test_a_null_space(tmp_path, chips, compiles: Compile, source):
    run = prepare(tmp_path, chips)

    def space(teacher):
        model = run.any.distillation.teacher.merge(teacher)
        return nullspace.decompose(nullspace.linear_map(model, 2, source))

    compiles(120, jax.jit(space), run.teacher)
