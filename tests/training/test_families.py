"""A few real training steps at a tiny size for every kind of model and every method."""

import jax
import numpy as np
import pytest

from singer_jax.config import settings_of
from singer_jax.platform import parallel
from singer_jax.training.program import jit_step
from singer_jax.training.setup import RunSetup, setup_students
from tests import tiny

# Together they have every part in which blocks can differ; plain blocks are those of the methods'
# tests, registers and LayerScale those of the teacher of another family.
KINDS: dict[str, dict[str, object]] = {
    # Query, key and value apart, heads that share the latter, their norms, RMSNorm; rotary
    # positions; norms inside attention and MLP, gate and value apart.
    "vit_base_patch16_sapiens2": {
        "scale_attn_norm": True,
        "scale_mlp_norm": True,
        "mlp_layer": "swiglu",
    },
    # Relative positions, no bias of the keys; gate and value in one, no biases elsewhere.
    "beit_base_patch16_224": {"mlp_layer": "swiglu_packed", "proj_bias": False},
    # A distillation token; norms behind attention and MLP; learned rotary positions.
    "deit_tiny_distilled_patch16_224": {"post_norm": True, "rope_type": "mixed"},
}


def run_of(tmp_path, model: str, method: str = "singer", **changes: object) -> RunSetup:
    # The giant's own ratio gives the tiny student an odd hidden width.
    sizes: dict[str, object] = {"mlp_ratio": 4.0} | KINDS.get(model, {})
    shared = {"num_kv_heads": (2, 1, 2)} if "sapiens2" in model else {}
    teacher = tiny.write_teacher(
        tmp_path / "teacher.safetensors", model, num_classes=10, **sizes, **shared
    )
    config = tiny.config(teacher, method)
    config.teacher.overrides.update(sizes | shared)
    config.student.overrides.update(sizes | ({"num_kv_heads": (2, 1)} if shared else {}))
    config.teacher.model = config.student.model = model
    config.optimizer.learning_rate = 1e-2
    config.update_from_flattened_dict(changes)
    return setup_students(settings_of(config), examples=8, num_classes=10)


def losses(run: RunSetup, steps: int = 5, size: int = 16) -> list[float]:
    """Returns the losses of training steps on one fixed batch."""
    teacher = run.load_teacher()
    state = run.init_states(teacher)[""]
    step_fn = jit_step(run.any.distillation, run.any.mesh, state, teacher)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (8, size, size, 3), dtype=np.uint8)
    batch = {"image": images, "label": np.arange(8, dtype=np.int32)}
    batch = parallel.put_batch(batch, parallel.batch_sharding(run.any.mesh))
    found = []
    for _ in range(steps):
        state, metrics = step_fn(state, teacher, batch, True)
        found.append(float(metrics["loss"]))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("model", KINDS)
def test_every_kind_learns_with_singer(tmp_path, model):
    """The run is sharded, so the sharding rules must fit every parameter."""
    found = losses(run_of(tmp_path, model, **{"mesh.data": 1, "mesh.fsdp": 2}), steps=3)
    assert np.all(np.isfinite(found)) and found[-1] < found[0]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["vitkd_official", "singer+logit_kd"])
def test_other_methods_learn(tmp_path, method):
    changes: dict[str, object] = {"method.mimic_layers": (0,)}
    if "+" in method:
        changes |= {f"method.method_weights.{name}": 0.5 for name in method.split("+")}
    run = run_of(tmp_path, "vit_tiny_patch16_224", method.split("+")[0], **changes)
    found = losses(run)
    assert np.all(np.isfinite(found)) and found[-1] < found[0]


@pytest.mark.parametrize("method", ["singer", pytest.param("vitkd", marks=pytest.mark.slow)])
def test_a_teacher_of_another_family_patch_and_input_size_teaches(tmp_path, method):
    """A DINOv2-like teacher has 24 pixels and 6 x 6 patches, the student 16 pixels and 4 x 4."""
    model = "vit_small_patch14_reg4_dinov2"
    size = {"img_size": 24, "patch_size": 4}
    teacher = tiny.write_teacher(tmp_path / "teacher.safetensors", model, **size)
    config = tiny.config(teacher, method)
    config.teacher.model = model
    config.teacher.overrides.update(size)
    config.method.interpolate_patch_grid = True
    config.method.mimic_layers = (0,)
    config.optimizer.learning_rate = 1e-2
    run = setup_students(settings_of(config), examples=8, num_classes=0)
    assert run.image_size == 24
    found = losses(run, size=24)
    assert np.all(np.isfinite(found)) and found[-1] < found[0]


def test_a_large_teacher_is_never_whole_on_one_device(tmp_path):
    run = run_of(tmp_path, "vit_giant_patch14_dinov2", **{"mesh.data": 2, "mesh.fsdp": 4})
    teacher = run.load_teacher()
    devices = {
        shard.device for leaf in jax.tree.leaves(teacher) for shard in leaf.addressable_shards
    }
    assert len(devices) == 8
    kernel = teacher["blocks"][0]["mlp"]["fc1"]["kernel"]
    assert kernel.addressable_shards[0].data.shape[1] == kernel.shape[1] // 4
