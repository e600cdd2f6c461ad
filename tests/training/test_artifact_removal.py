"""The removal of outliers: the neurons that are found, and the effect on features."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from singer_jax.data.images import EvalTransform
from singer_jax.data.loader import eval_batches
from singer_jax.data.sources import TRAIN, DigitsSource, evenly
from singer_jax.errors import InputError
from singer_jax.models import registers
from singer_jax.models.architecture import ComputePolicy
from singer_jax.models.network import Network
from singer_jax.models.registers import RegisterSettings
from singer_jax.models.weights import abstract_model, load_model
from singer_jax.models.zoo import lookup
from singer_jax.platform import parallel
from singer_jax.training.artifact_removal import (
    artifact_removal_lines,
    describe_artifact_removal,
    find_register_neurons,
)
from tests import outlier_teacher

SPEC = lookup("vit_tiny_patch16_224", outlier_teacher.SIZES | {"num_classes": 0})
IMAGES = evenly(DigitsSource(TRAIN), 20)  # on several devices the last batch is not full


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teachers")
    return {
        "outliers": outlier_teacher.write_teacher(folder / "outliers.safetensors"),
        "clean": outlier_teacher.write_teacher(folder / "clean.safetensors", 0.0),
    }


def load(file, mesh, **policy):
    graph, params = load_model(
        SPEC,
        file,
        ComputePolicy(**policy),
        lambda abstract: parallel.tree_shardings(mesh, abstract),
    )
    return Network(SPEC, graph), params


@pytest.mark.parametrize(
    ("devices", "policy"),
    [
        (1, {}),
        (2, {"backend": "tpu", "stacked": True}),
        (1, {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16}),
    ],
    ids=["float32", "stacked", "bfloat16"],
)
def test_registers_take_the_outliers_and_leave_the_class_token(files, devices, policy):
    mesh = parallel.make_mesh(devices)
    before, clean = (load(files[name], mesh, **policy) for name in ("outliers", "clean"))
    neurons = find_register_neurons(*before, mesh, IMAGES, RegisterSettings(neurons=2))
    assert neurons == list(outlier_teacher.NEURONS)

    graph, abstract = abstract_model(
        SPEC.arch, ComputePolicy(artifact_removal="registers", **policy)
    )
    marked = registers.marked(neurons, abstract[registers.NAME].shape)
    put = parallel.put(marked, parallel.replicated(mesh))
    after = Network(SPEC, graph), before[1] | {registers.NAME: put}
    layers = range(SPEC.arch.depth)
    # The same teacher without outliers says what its class token should be.
    spoilt, found = (
        describe_artifact_removal(clean, which, mesh, IMAGES, layers) for which in (before, after)
    )
    block = outlier_teacher.NEURONS[0][0]
    for layer in map(str, layers):
        if int(layer) >= block:
            assert spoilt[layer]["after"]["max"] > 30 * spoilt[layer]["after"]["median"]
        assert found[layer]["after"]["max"] < 2 * found[layer]["after"]["median"]
        assert found[layer]["class_token"]["moved"] < 0.05
        if int(layer) > block:  # the class token has seen the outliers
            moved = [each[layer]["class_token"]["moved"] for each in (found, spoilt)]
            assert moved[0] < moved[1] / 2
    lines = artifact_removal_lines({"by": "registers", "neurons": neurons, "layers": found})
    assert lines[0] == "teacher cleaned by registers: block/neuron 1/70 1/11"
    assert lines[1 + block].startswith("teacher layer 1, cleaned: patch norms median")


def test_norms_and_class_tokens_are_those_of_numpy(files):
    """The effect of shift averaging; the padding of the batch counts nowhere."""
    mesh = parallel.make_mesh(1)
    before = load(files["outliers"], mesh)
    graph, _ = abstract_model(SPEC.arch, ComputePolicy(artifact_removal="shift_average"))
    few = evenly(DigitsSource(TRAIN), 3)
    found = describe_artifact_removal(before, (Network(SPEC, graph), before[1]), mesh, few, (2,))[
        "2"
    ]

    pixels = next(eval_batches(few, EvalTransform(32), batch_size=3))["image"]
    seen = SPEC.prepare(jnp.asarray(pixels))
    was, now = (
        np.float64(jax.jit(lambda p, n=network: n.merge(p).features(seen)[2])(before[1]))
        for network in (before[0], Network(SPEC, graph))
    )
    for when, feature in (("before", was), ("after", now)):
        norms = np.linalg.norm(feature[:, 1:], axis=-1)
        expected = {"median": np.median(norms), "p99": np.quantile(norms, 0.99), "max": norms.max()}
        assert found[when] == pytest.approx(expected, rel=1e-4)
    was, now = was[:, 0], now[:, 0]
    lengths = np.linalg.norm(was, axis=1)
    cosine = (was * now).sum(1) / lengths / np.linalg.norm(now, axis=1)
    moved = np.linalg.norm(now - was, axis=1) / lengths
    expected = {"cosine": cosine.mean(), "moved": moved.mean()}
    assert found["class_token"] == pytest.approx(expected, rel=1e-4)


def test_what_cannot_be_found_is_said(files):
    mesh = parallel.make_mesh(1)
    few = evenly(DigitsSource(TRAIN), 4)
    with pytest.raises(InputError, match=r"no patch of 4 images has more than 3 times the median"):
        find_register_neurons(*load(files["clean"], mesh), mesh, few, RegisterSettings())
    with pytest.raises(InputError, match=r"neurons: 500, but the blocks that make .* have 192"):
        settings = RegisterSettings(neurons=500)
        find_register_neurons(*load(files["outliers"], mesh), mesh, few, settings)
