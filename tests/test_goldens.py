"""Equality with numbers recorded from the official PyTorch code and from timm (goldens/README.md).

`SINGER_GOLDENS=DIR` runs the cases of another folder.
"""

import dataclasses
import functools
import json
import math
import os
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from singer_jax import methods
from singer_jax.config import default
from singer_jax.evaluation import depth as depths
from singer_jax.evaluation import heads, trainers
from singer_jax.evaluation.classification import Classification
from singer_jax.evaluation.segmentation import Segmentation
from singer_jax.methods import nullspace, vitkd
from singer_jax.methods.section import MethodSection
from singer_jax.methods.singer import SingerSettings
from singer_jax.models import zoo
from singer_jax.models.architecture import Architecture
from singer_jax.models.network import Network
from singer_jax.models.params import Params, from_leaves, leaves
from singer_jax.models.weights import load_model, timm_axes, timm_key, to_timm
from singer_jax.platform import parallel
from singer_jax.settings.settings import Settings, flatten, from_flat
from singer_jax.training.optimizer import (
    OptimizerSettings,
    ScheduleSettings,
    make_optimizer,
    make_schedule,
)
from singer_jax.training.program import jit_step
from singer_jax.training.step import Distillation

pytestmark = pytest.mark.optimized

FOLDER = Path(os.environ.get("SINGER_GOLDENS", Path(__file__).parent / "goldens"))

METHODS = {
    "singer": "singer",
    "fitvit": "fitnet",
    "vitkd": "vitkd",
    "vitkd_official": "vitkd_official",
}
FAMILIES = {"vit": "vit_tiny_patch16_224", "deit3": "deit3_tiny_patch16_224"}


# Variants of the methods' other cases, which run with `--all`.
SLOW = {
    f"distill_{name}"
    for name in ("fitnet_ce", "singer_deit3", "singer_no_null_space", "singer_padded")
} | {"distill_vitkd_official"}


def cases(kind: str) -> list:
    """The cases of a kind, found by listing the folder."""
    found = []
    for file in sorted(FOLDER.glob("*/case.json")):
        case = json.loads(file.read_text())
        if case["kind"] == kind:
            name = file.parent.name
            marks = pytest.mark.slow if name in SLOW else ()
            found.append(pytest.param(file.parent, case, id=name, marks=marks))
    return found


def assert_equal(case: dict, name: str, actual: object, expected: np.ndarray) -> None:
    """|x - y| <= atol + rtol |y|; an expected NaN is not compared."""
    actual, compared = np.asarray(actual), ~np.isnan(expected)
    assert actual.shape == expected.shape, name
    np.testing.assert_allclose(
        actual[compared],
        expected[compared],
        rtol=case.get("rtol", 0),
        atol=case.get("atol", 0),
        err_msg=name,
    )


def test_the_folder_holds_cases():
    assert len(list(FOLDER.glob("*/case.json"))) > 0


@pytest.mark.parametrize(("folder", "case"), cases("features"))
def test_features(folder: Path, case: dict):
    size = case["img_size"]
    overrides = case["overrides"] | {"img_size": size if isinstance(size, int) else tuple(size)}
    spec = zoo.lookup(case["timm_model"], overrides)
    graph, params = load_model(spec, folder / "weights.safetensors")
    model = nnx.merge(graph, params)
    expected = load_file(folder / "arrays.safetensors")
    images = jnp.asarray(expected.pop("images").transpose(0, 2, 3, 1))
    features = model.features(images)
    actual = {f"block.{index}": feature for index, feature in enumerate(features)}
    actual |= {"tokens": model.norm(features[-1]), "output": model(images)}
    assert set(actual) == set(expected)
    for name, values in expected.items():
        assert_equal(case, name, actual[name], values)


def network(folder: Path, case: dict, role: str) -> tuple[Network, Params]:
    """Teacher or student of a `distill` case; its images are already normalised."""
    sizes = dict(case[role])
    spec = zoo.lookup(FAMILIES[sizes.pop("family")], sizes)
    spec = dataclasses.replace(spec, mean=(0, 0, 0), std=(1 / 255,) * 3)
    graph, params = load_model(spec, folder / f"{role}.safetensors")
    return Network(spec, graph), params


def method_settings(case: dict) -> Settings:
    """The `paper` protocol with the settings of a `distill` case."""
    config = default("paper").method
    config.name = METHODS[case["method"]]
    config.layers = tuple(case["teacher_layers"])
    if case["method"] == "singer":
        config.rank, config.outlier_quantile = case["rank"], case["outlier_quantile"]
        config.nullspace.threshold = case["threshold"]
    if "mask_ratio" in case:
        config.mask_ratio = case["mask_ratio"]
        config.mimic_layers = tuple(case["mimic_teacher_layers"])
        kd = case["weights"]["kd"]
        config.loss_weights.mimic = kd * case.get("alpha", 1.0)
        config.loss_weights.generation = kd * case.get("beta", 1.0)
    else:
        config.loss_weights.update(case["weights"])
    return MethodSection().from_flat(SingerSettings(), flatten(config), "")


def recorded_parts(method: methods.Method, golden: dict[str, np.ndarray]) -> Params:
    """A method's parameters, trained or frozen, with the recorded values."""
    parts = nnx.to_pure_dict(nnx.state(method))
    ours = {timm_key(keys): (keys, leaf) for keys, leaf in leaves(parts)}
    assert set(golden) <= set(ours)
    trained = to_timm(nnx.to_pure_dict(nnx.state(method, nnx.Param)))
    assert set(trained) <= set(golden)
    return from_leaves(
        {
            ours[key][0]: jnp.asarray(value.transpose(np.argsort(timm_axes(*ours[key]))))
            for key, value in golden.items()
        }
    )


@pytest.mark.parametrize(("folder", "case"), cases("distill"))
def test_distill(folder: Path, case: dict, monkeypatch):
    expected = load_file(folder / "arrays.safetensors")
    teacher, teacher_params = network(folder, case, "teacher")
    student, student_params = network(folder, case, "student")
    of_method = method_settings(case)
    method = methods.make(teacher.merge(teacher_params), student.spec.arch, of_method, nnx.Rngs(0))
    layers = case.get("mimic_student_layers", []) + case["student_layers"]
    assert list(method.student_layers) == layers
    if case["method"] == "singer":
        check_null_spaces(case, teacher.merge(teacher_params), method, expected)
    recorded_method = load_file(folder / "method.safetensors")
    nnx.update(method, recorded_parts(method, recorded_method))

    settings = case["optimizer"]
    needs = methods.needs(of_method)
    distillation = Distillation(
        student=student,
        teacher=teacher,
        method=nnx.graphdef(method),
        optimizer=make_optimizer(
            OptimizerSettings(
                name=settings["name"],
                b1=settings["betas"][0],
                b2=settings["betas"][1],
                eps=settings["eps"],
                weight_decay=settings["weight_decay"],
            ),
            lambda step: settings["lr"],
        ),
        schedule=lambda step: settings["lr"],
        blocks=student.spec.arch.depth if needs.logits else max(method.student_layers) + 1,
        head=needs.logits,
        teacher_reads=method.teacher_reads,
    )
    mesh = parallel.make_mesh(1, 1)
    state, teacher_params = jax.device_put(
        (distillation.init(student_params, method), teacher_params), parallel.replicated(mesh)
    )

    def batch(step: int) -> dict:
        images = expected["images"][step].transpose(0, 2, 3, 1)
        return {"image": images, "label": expected["labels"][step].astype(np.int32)}

    def noise(step: int) -> None:
        """The recorded noise instead of random numbers; a new step is compiled with it."""
        if "mask_noise" in expected:
            recorded = jnp.asarray(expected["mask_noise"][step, 0])
            monkeypatch.setattr(vitkd, "masking_noise", lambda key, shape: recorded)
            jax.clear_caches()

    noise(0)
    _, gradients = jax.jit(distillation.gradients)(state, teacher_params, batch(0))
    actual = {f"grad.student.{k}": v for k, v in to_timm(gradients["student"]).items()}
    recorded = {name for name in expected if name.startswith("grad.")}
    # A tensor of the student without a recorded gradient must not have one here either.
    assert {name for name in recorded if name.startswith("grad.student")} == set(actual)
    actual |= {f"grad.{k}": v for k, v in to_timm(gradients["method"]).items()}
    for name in recorded:
        assert_equal(case, name, actual[name], expected[name])

    step_fn = jit_step(distillation, mesh, state, teacher_params)
    for step in range(case["steps"]):
        noise(step)
        state, metrics = step_fn(state, teacher_params, batch(step), True)
        if "loss_mimic" in metrics:
            metrics["loss_kd"] = metrics["loss_mimic"] + metrics["loss_generation"]
        for term in case["weights"]:
            name = f"loss.{term}.{step}"
            assert_equal(case, name, metrics[f"loss_{term}"], expected[name])
    final = to_timm(state.params["student"]) | to_timm(state.constants["student"])
    trained = to_timm(state.params["method"])
    frozen = to_timm(state.constants["method"])
    parts = trained | {name: value for name, value in frozen.items() if name in recorded_method}
    for part, values in (("student", final), ("method", parts)):
        golden = load_file(folder / f"{part}_final.safetensors")
        assert set(golden) == set(values)
        for name, value in golden.items():
            assert_equal(case, f"{part} after {case['steps']} steps: {name}", values[name], value)


def check_null_spaces(case: dict, teacher: object, method: methods.Method, expected: dict) -> None:
    for layer in case["teacher_layers"]:
        refiner = method.refiner[str(layer)]
        values = expected[f"singular_values.{layer}"]
        assert_equal(case, "singular values", refiner.singular_values[...], values)
        assert int(refiner.null_dim[...]) == expected[f"null_dim.{layer}"]
        space = nullspace.decompose(nullspace.linear_map(teacher, layer, "mlp"))
        projector = nullspace.projector(space, jnp.float32(case["threshold"]), rank=0)
        assert_equal(case, "projector", projector, expected[f"null_projector.{layer}"])


@pytest.mark.parametrize(("folder", "case"), cases("schedule"))
def test_schedule(folder: Path, case: dict):
    expected = load_file(folder / "arrays.safetensors")
    for number, settings in enumerate(case["schedules"]):
        of_schedule = {"name": settings["type"].lower()} | settings
        if "final_ratio" in settings:
            of_schedule["min_lr_ratio"] = settings["final_ratio"]
        per_epoch = -(-settings["num_examples"] // settings["batch_size"])
        assert per_epoch == settings["steps_per_epoch"]
        steps = settings["epochs"] * per_epoch
        schedule = make_schedule(
            from_flat(ScheduleSettings(), of_schedule), settings["lr"], steps, per_epoch
        )
        rates = [float(schedule(step)) for step in range(steps)]
        assert_equal(case, f"schedule {number}", np.array(rates), expected[f"lr.{number}"])


def probe_task(case: dict) -> heads.Task:
    if case["task"] == "classification":
        return Classification(case["num_classes"], case["token"])
    if case["task"] == "segmentation":
        return Segmentation(case["num_classes"], case["ignore_label"])
    # The recorded probe trains pixels without depth as the first bin.
    return depths.Depth(
        case["num_bins"], case["max_depth"], ignore_missing=False, drop_saturated=True
    )


def probe_labels(case: dict, labels: np.ndarray) -> np.ndarray:
    """Recorded depths are shares of the largest; ours are metres."""
    return labels * case["max_depth"] if case["task"] == "depth" else labels.astype(np.int32)


@pytest.mark.parametrize(("folder", "case"), cases("probe"))
def test_probe(folder: Path, case: dict):
    expected = load_file(folder / "arrays.safetensors")
    recorded = load_file(folder / "head.safetensors")
    weight = recorded["head.weight"]
    head = {
        "kernel": jnp.asarray(weight.reshape(len(weight), -1).T),
        "bias": jnp.asarray(recorded["head.bias"]),
    }
    task = probe_task(case)
    tokens, dim = expected["features"].shape[-2:]
    side = math.isqrt(tokens - 1)
    arch = Architecture(img_size=(side, side), patch_size=1, embed_dim=dim, num_heads=1)
    features_of = functools.partial(task.features, SimpleNamespace(arch=arch))
    options = trainers.SgdOptions(case["steps"], case["weight_decay"])
    step_fn = jax.jit(functools.partial(trainers.sgd_step, task, options=options))
    losses = []
    for step in range(case["steps"]):
        batch = trainers.FeatureBatch(
            features_of(jnp.asarray(expected["features"][step])),
            jnp.asarray(probe_labels(case, expected["labels"][step])),
        )
        head, loss = step_fn(head, batch, jnp.int32(step), jnp.float32(case["lr"]))
        losses.append(loss)
    assert_equal(case, "losses", np.array(losses), expected["losses"])
    final = load_file(folder / "head_final.safetensors")
    kernel = final["head.weight"].reshape(len(weight), -1).T
    assert_equal(case, "head", head["kernel"], kernel)
    assert_equal(case, "head", head["bias"], final["head.bias"])

    features = features_of(jnp.asarray(expected["eval_features"]))
    labels = probe_labels(case, expected["eval_labels"])
    logits = heads.apply_head(head, features)
    if case["task"] == "classification":
        assert_equal(case, "logits", logits, expected["eval_logits"])
    else:
        full = jax.vmap(lambda x: heads.upsample(x, labels.shape[1:]))(logits)
        assert_equal(case, "logits", full.transpose(0, 3, 1, 2), expected["eval_logits"])
    if case["task"] == "depth":
        for temperature, metrics in case["metrics_by_temperature"].items():
            depth = task.depth(full, float(temperature))
            recorded_depth = expected[f"eval_depth_{temperature.replace('.', '')}"]
            assert_equal(case, f"depth at {temperature}", depth, recorded_depth)
            everywhere = np.ones(labels.shape, bool)
            counts = depths.depth_counts(
                recorded_depth, labels, everywhere, case["max_depth"], task.drop_saturated
            )
            found = depths.depth_metrics(counts)
            for name, value in metrics.items():
                assert_equal(case, name, found[name], np.float32(value))
        return
    valid = np.ones(len(labels), bool)
    counts = jax.device_get(task.count(head, features, jnp.asarray(labels), valid))
    found = task.metrics(counts)
    for name, value in case["metrics"].items():  # shares; ours are percent
        assert_equal(case, name, found[name] / 100, np.float32(value))
