"""Equality with recordings of timm (`benchmarks.record_timm`): features, names, input."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from benchmarks.record_timm import FOLDER, drawn, images
from singer_jax.errors import InputError
from singer_jax.models import zoo
from singer_jax.models.export_timm import to_hub_config
from singer_jax.models.timm_arguments import changed_arguments, current_names, stated_fields
from singer_jax.models.weights import (
    from_hub_config,
    load_model,
    spec_of_weights,
    to_timm,
)

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


def test_the_input_of_every_weights_tag_is_that_of_timm():
    known = {tag: given for tag, given in TAGS.items() if tag.split(".")[0] in zoo.MODELS}
    for tag, (size, mean, std, interpolation, crop_pct) in known.items():
        spec = zoo.lookup(f"timm/{tag}")
        found = [list(spec.arch.img_size), list(spec.mean), list(spec.std)]
        assert [*found, spec.interpolation, spec.crop_pct] == [
            size,
            mean,
            std,
            interpolation,
            crop_pct,
        ], tag


def test_nearly_all_weights_tags_are_of_known_models():
    tags = [tag for tag in TAGS if "." in tag]
    unknown = [tag for tag in tags if tag.split(".")[0] not in zoo.MODELS]
    assert len(tags) == 429 and len(unknown) <= 0.05 * len(tags)
    for tag in unknown:
        with pytest.raises(InputError, match="is not supported: "):
            zoo.lookup(tag)
    # timm's names, and the variants of its models that have none there.
    own = {name for name, spec in zoo.MODELS.items() if spec.timm_name != name}
    assert set(zoo.MODELS) - own <= {tag.split(".")[0] for tag in TAGS}
    assert {zoo.MODELS[name].timm_name for name in own} <= set(zoo.MODELS) - own


def test_every_model_in_another_size_comes_back_from_its_config():
    for name, spec in zoo.MODELS.items():
        sizes = {"depth": 2, "embed_dim": 24, "num_heads": 2, "init_values": 0.5}
        if spec.arch.num_kv_heads:
            sizes["num_kv_heads"] = (2, 1)
        made = zoo.lookup(name, sizes)
        stated = json.loads(json.dumps(to_hub_config(made)))
        found = from_hub_config(stated)
        assert found == dataclasses.replace(made, name=found.name), name


def test_arguments_without_effect_are_passed_over_and_others_named():
    base = zoo.MODELS["vit_base_patch16_224"].arch
    ignored = {"drop_path_rate": 0.1, "dynamic_img_size": True, "weight_init": "jax", "in_chans": 3}
    assert stated_fields(ignored, base) == {}
    for argument in ({"attn_layer": "diff"}, {"in_chans": 1}):
        with pytest.raises(InputError, match=next(iter(argument))):
            stated_fields(argument, base)
    eva = zoo.MODELS["vit_small_patch16_dinov3"].arch
    with pytest.raises(InputError, match="rope_rotate_half"):
        stated_fields({"rope_rotate_half": False}, eva)
    with pytest.raises(InputError, match=r"norm_eps .* no such argument"):
        changed_arguments(dataclasses.replace(base, norm_eps=1e-3), base)


def test_older_keys_are_those_of_timm_now():
    def names(model: str, *keys: str) -> list[str]:
        return list(current_names(dict.fromkeys(keys), zoo.MODELS[model].arch))

    masked = "mask_token", "lm_head.weight", "norm.weight", "rope.feat_cache", "blocks.0.gamma_1"
    assert names("eva02_tiny_patch14_224", *masked) == ["fc_norm.weight", "blocks.0.gamma_1"]
    assert names("vit_small_patch16_rope_mixed_224", "rope.freqs", "rope.t_x") == ["rope.freqs"]
    tables = "blocks.0.attn.relative_position_index", "blocks.0.gamma_1"
    assert names("beit_base_patch16_224", *tables) == ["blocks.0.gamma_1"]
    assert names("vit_base_patch16_224", "pre_logits.fc.weight", "norm.bias") == ["norm.bias"]


def test_the_pairing_of_rotated_channels_follows_the_rotary_positions():
    base = zoo.lookup("eva02_tiny_patch14_224").arch
    arch = dataclasses.replace(base, rope_type="dinov3", ref_feat_shape=None)
    arguments = changed_arguments(arch, base)
    assert arguments["rope_rotate_half"] is True
    assert stated_fields(arguments, base)["rope_type"] == "dinov3"
    del arguments["rope_rotate_half"]  # timm's own default is False
    with pytest.raises(InputError, match="rope_rotate_half"):
        stated_fields(arguments, base)
