"""The analytic count of a step's operations against that of the CPU compiler."""

import jax
import jax.numpy as jnp
import pytest

from benchmarks.make_inputs import write_blank_weights
from singer_jax import methods
from singer_jax.config import settings_of
from singer_jax.models.zoo import MODELS
from singer_jax.training import flops
from singer_jax.training.setup import RunSetup, setup_students
from tests import tiny

# One of each architecture, at its real width; a teacher is one block deep.
FAMILIES = (
    "vit_base_patch16_224",
    "beit_base_patch16_224",
    "vit_base_patch16_clip_quickgelu_224",
    "eva02_base_patch16_clip_224",
    "vit_giant_patch14_dinov2",
    "vit_small_plus_patch16_dinov3_qkvb",
    "vit_base_patch16_siglip_224",
)


def prepare(folder, family: str, method: str = "singer", **changes: object) -> RunSetup:
    with_head = method in ("logit_kd", "supervised")
    overrides = {"depth": 2, "num_classes": 10 if with_head else 0}
    if "siglip" not in family:
        overrides["img_size"] = 8 * MODELS[family].arch.patch_size
    config = tiny.config("", method)
    config.teacher.model = config.student.model = family
    config.teacher.overrides, config.student.overrides = dict(overrides), dict(overrides)
    config.teacher.weights = str(write_blank_weights(folder / "t.safetensors", family, **overrides))
    config.method.mimic_layers = (0,)
    config.update_from_flattened_dict(changes)
    return setup_students(settings_of(config), examples=64, num_classes=10)


def counted_by_xla(run: RunSetup, images: int) -> float:
    """Returns XLA's count of the operations of a micro-batch: teacher, loss and gradients."""
    size, distillation = run.image_size, run.any.distillation
    batch = {
        "image": jax.ShapeDtypeStruct((images, size, size, 3), jnp.uint8),
        "label": jax.ShapeDtypeStruct((images,), jnp.int32),
    }

    def gradients(state, teacher, batch):
        features = distillation.teach(teacher, batch)
        return jax.value_and_grad(distillation.loss, has_aux=True)(
            state.params, state.constants, teacher, features, batch, jax.random.key(0)
        )

    return jax.jit(gradients).lower(run.any.state, run.teacher, batch).cost_analysis()["flops"]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_count_is_that_of_the_compiler_for_every_family(tmp_path, family):
    run = prepare(tmp_path, family)
    counted = flops.step_flops(run.students, run.states, run.teacher, 4)
    assert counted == pytest.approx(counted_by_xla(run, 4), rel=0.03)


@pytest.mark.parametrize("method", [name for name in methods.METHODS if name != "singer"])
def test_the_count_is_that_of_the_compiler_for_every_method(tmp_path, method):
    run = prepare(tmp_path, "vit_base_patch16_224", method)
    counted = flops.step_flops(run.students, run.states, run.teacher, 4)
    assert counted == pytest.approx(counted_by_xla(run, 4), rel=0.03)


def test_recomputed_blocks_count_again(tmp_path):
    run = prepare(tmp_path, "vit_base_patch16_224", **{"student.remat": True})
    counted = flops.step_flops(run.students, run.states, run.teacher, 4)
    assert counted == pytest.approx(counted_by_xla(run, 4), rel=0.03)
    plain = prepare(tmp_path, "vit_base_patch16_224")
    assert counted > 1.1 * flops.step_flops(plain.students, plain.states, plain.teacher, 4)


def test_micro_batches_count_together(tmp_path):
    whole = prepare(tmp_path, "vit_base_patch16_224")
    parts = prepare(tmp_path, "vit_base_patch16_224", grad_accum_steps=4)
    one, four = (
        flops.step_flops(run.students, run.states, run.teacher, 8) for run in (whole, parts)
    )
    # What does not depend on the batch, the projection of B, is done in each.
    assert one <= four < 1.01 * one


def test_a_loop_counts_as_often_as_it_runs():
    def function(x):
        return jax.lax.scan(lambda x, _: (x @ x, None), x, length=5)[0]

    assert flops.count(function, jnp.ones((7, 7))) == 5 * 2 * 7**3
    with pytest.raises(ValueError, match="unknown length"):
        flops.count(
            lambda x, n: jax.lax.fori_loop(0, n, lambda _, x: x @ x, x), jnp.ones((7, 7)), 3
        )


def test_parts_of_a_step(tmp_path):
    """FitNet's student costs as much as its features; the optimiser multiplies no matrices."""
    run = prepare(tmp_path, "vit_base_patch16_224", "fitnet")
    parts = flops.parts_flops(run.students, run.states, run.teacher, 4)
    assert set(parts) == {"teacher", "student", "method"}
    # The teacher's blocks, and the student's equal ones with two more passes for the gradients;
    # none for that of the images.
    assert 2.8 < parts["student"] / parts["teacher"] <= 3
    assert 0 < parts["method"] < 0.3 * parts["student"]
