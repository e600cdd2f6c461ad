"""Equality with timm, which `benchmarks.record_timm` has recorded: features, names, input."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from benchmarks.record_timm import FOLDER, drawn, images
from singer_jax.models import zoo
from singer_jax.models.timm_arguments import stated_fields
from singer_jax.models.weights import load_model, spec_of_weights, to_timm

pytestmark = pytest.mark.optimized

CASES = json.loads((FOLDER / "cases.json").read_text())
TAGS = json.loads((FOLDER / "tags.json").read_text())


@pytest.fixture(scope="module")
def recorded() -> dict[str, np.ndarray]:
    return load_file(FOLDER / "features.safetensors")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_features_and_output_are_those_of_timm(tmp_path, recorded, case):
    base = zoo.MODELS[case["model"]].arch
    fields = stated_fields(case["arguments"], base)
    spec = zoo.lookup(case["model"], fields)
    weights = drawn(case["shapes"])
    save_file(weights, tmp_path / "model.safetensors")
    assert spec_of_weights(spec, tmp_path / "model.safetensors").arch == spec.arch
    graph, params = load_model(spec, tmp_path / "model.safetensors")
    model = nnx.merge(graph, params)
    taken = jnp.asarray(images(case["arguments"]["img_size"]))
    features = model.features(taken)
    found = {f"block.{index}": feature for index, feature in enumerate(features)}
    found["output"] = model(taken)
    expected = {
        key.split("/")[1]: value
        for key, value in recorded.items()
        if key.split("/")[0] == case["name"]
    }
    assert set(found) == set(expected)
    for key, value in expected.items():
        np.testing.assert_allclose(found[key], value, rtol=1e-5, atol=1e-5, err_msg=key)
    # Out again: timm's names, and the same bits where nothing was resampled.
    back = to_timm(params)
    assert set(back) == set(weights)
    for key, value in back.items():
        if value.shape == weights[key].shape:
            np.testing.assert_array_equal(value, weights[key], err_msg=key)
