"""Checkpoints of other libraries: features equal those that each library computes itself.

`benchmarks/record_foreign.py` recorded them.
"""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from singer_jax.errors import InputError
from singer_jax.models.network import ModelSettings, resolve_model
from singer_jax.models.weight_files import open_weights, read_hub_config, read_input
from singer_jax.models.weights import load_model

RECORDED = Path(__file__).parent / "foreign"
# The format that each recording is recognised as; empty: its keys are timm's own.
FORMATS = {
    "hf_vit": "transformers' ViTModel",
    "hf_vit_classes": "transformers' ViTModel",
    "hf_deit": "transformers' DeiTModel",
    "hf_dinov2": "transformers' Dinov2Model",
    "hf_dinov2_swiglu": "transformers' Dinov2Model",
    "hf_dinov2_registers": "transformers' Dinov2WithRegistersModel",
    "hf_dinov3": "transformers' DINOv3ViTModel",
    "hf_dinov3_gated": "transformers' DINOv3ViTModel",
    "hf_clip_vision": "transformers' CLIPVisionModel",
    "hf_clip": "transformers' CLIPVisionModel",
    "hf_siglip": "transformers' SiglipVisionModel",
    "hf_siglip2": "transformers' Siglip2VisionModel",
    "open_clip": "open_clip's visual tower",
    "open_clip_quickgelu": "open_clip's visual tower",
    "meta_dinov2": "Meta's DINOv2",
    "meta_dinov2_chunked": "Meta's DINOv2",
    "meta_dinov2_registers": "Meta's DINOv2",
    "meta_dinov2_swiglu": "Meta's DINOv2",
    "meta_dinov3": "Meta's DINOv3",
    "meta_dinov3_swiglu": "Meta's DINOv3",
    "mae": "MAE",
    "ibot": "",
    "flax_augreg": "the Flax release of ViT",
}


def settings(folder: Path) -> ModelSettings:
    """Returns the settings of a recording."""
    recorded = json.loads((folder / "model.json").read_text())
    file = folder / recorded["file"] if recorded["file"] else folder
    return ModelSettings(recorded["model"], str(file), recorded["overrides"])


def test_every_recording_is_tested():
    assert set(FORMATS) == {folder.parent.name for folder in RECORDED.glob("*/model.json")}


@pytest.mark.parametrize("name", FORMATS)
def test_features_equal_those_of_the_library(name):
    spec, file = resolve_model("teacher", settings(RECORDED / name))
    assert open_weights(file).taken.format == FORMATS[name]
    model = nnx.merge(*load_model(spec, file))
    with np.load(RECORDED / "images.npz") as images, jax.default_matmul_precision("highest"):
        found = model.features(images["arr_0"])
    with np.load(RECORDED / name / "features.npz") as expected:
        for ours, theirs in zip(found, expected.values(), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def copied(tmp_path: Path, name: str, **changed: np.ndarray | None) -> Path:
    """Copies a recording's folder with tensors changed or, if None, removed."""
    folder = tmp_path / name
    folder.mkdir()
    for file in ("config.json", "model.json"):
        (folder / file).write_text((RECORDED / name / file).read_text())
    tensors = load_file(RECORDED / name / "model.safetensors") | changed
    kept = {key: value for key, value in tensors.items() if value is not None}
    save_file(kept, folder / "model.safetensors")
    return folder


def refused(given: ModelSettings) -> str:
    """Returns the error for weights that do not fit."""
    with pytest.raises(InputError) as caught:
        spec, file = resolve_model("teacher", given)
        load_model(spec, file)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_wrong_variant_names_the_format_and_the_first_difference(tmp_path):
    lacking = copied(tmp_path, "hf_vit", **{"encoder.layer.1.layernorm_after.bias": None})
    message = refused(settings(lacking))
    assert "of transformers' ViTModel," in message and "missing: blocks.1.norm2.bias" in message
    assert len(message.replace(str(tmp_path), "")) <= 200
    more = {"encoder.layer.0.something.weight": np.zeros(2, np.float32)}
    message = refused(settings(copied(tmp_path, "hf_dinov2", **more)))
    assert "surplus: encoder.layer.0.something.weight" in message
    one = {"encoder.layer.0.attention.attention.key.weight": np.zeros((16, 8), np.float32)}
    message = refused(settings(copied(tmp_path, "hf_deit", **one)))
    assert "transformers' DeiTModel" in message and "cannot be joined" in message
    wrong = ModelSettings(
        "vit_base_patch14_reg4_dinov2", str(RECORDED / "hf_dinov2"),
        {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2},
    )  # fmt: skip
    assert "of transformers' Dinov2Model," in refused(wrong)


@pytest.mark.parametrize(
    ("name", "key", "value", "words"),
    [
        ("hf_vit", "hidden_act", "mish", "hidden_act 'mish'"),
        ("hf_vit", "hidden_size", "16", "hidden_size: '16'"),
        ("hf_vit", "num_channels", 1, "num_channels: 1"),
        ("hf_dinov3", "rope_theta", 10_000.0, "rope_theta: 10000.0"),
        ("hf_dinov3", "key_bias", True, "biases"),
        ("hf_siglip2", "num_patches", 15, "not a square number"),
        ("hf_vit", "model_type", "swin", "model_type 'swin'; known: clip,"),
    ],
)
def test_a_config_of_transformers_without_counterpart_is_one_line(
    tmp_path, name, key, value, words
):
    folder = copied(tmp_path, name)
    config = json.loads((folder / "config.json").read_text()) | {key: value}
    (folder / "config.json").write_text(json.dumps(config))
    message = refused(settings(folder))
    assert words in message and len(message.replace(str(tmp_path), "")) <= 200


def test_statistics_of_the_input_come_from_the_preprocessor(tmp_path):
    folder = copied(tmp_path, "hf_vit")
    spec, _ = resolve_model("teacher", settings(folder))
    assert spec.mean == (0.5, 0.5, 0.5)
    stated = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    (folder / "preprocessor_config.json").write_text(json.dumps(stated))
    spec, _ = resolve_model("teacher", settings(folder))
    assert (spec.mean, spec.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))


def test_a_vision_config_that_says_only_what_differs_has_the_defaults_of_its_class(tmp_path):
    config = {"model_type": "siglip", "vision_config": {"image_size": 384}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    stated = read_hub_config(tmp_path)
    assert stated["architecture"] == "vit_base_patch16_siglip_224"
    arguments = stated["model_args"]
    assert (arguments["img_size"], arguments["embed_dim"], arguments["depth"]) == (384, 768, 12)
    assert arguments["act_layer"] == "gelu_tanh"


def test_dinov3_without_biases_takes_a_file_whose_biases_are_zero(tmp_path):
    zero = {
        f"layer.{block}.attention.{name}_proj.bias": np.zeros(16, np.float32)
        for block in range(2)
        for name in "qv"
    }
    folder = copied(tmp_path, "hf_dinov3", **zero)
    sizes = json.loads((RECORDED / "meta_dinov3" / "model.json").read_text())["overrides"]
    given = ModelSettings("vit_base_patch16_dinov3", str(folder), sizes)
    spec, file = resolve_model("teacher", given)
    assert not spec.arch.qkv_bias and load_model(spec, file)
    given = ModelSettings("vit_base_patch16_dinov3", str(RECORDED / "hf_dinov3"), sizes)
    assert "surplus: blocks.0.attn.q_bias" in refused(given)


def test_periods_of_another_rope_are_refused(tmp_path):
    content = open_weights(RECORDED / "meta_dinov3" / "weights.pth")
    tensors = {key: tensor.read() for key, tensor in content.items()}
    tensors["storage_tokens"] = tensors.pop("reg_token")
    tensors["rope_embed.periods"] = 1000.0 ** (np.arange(2, dtype=np.float32) / 2)
    save_file(tensors, tmp_path / "a")
    with pytest.raises(InputError, match=r"Meta's DINOv3: rope_embed\.periods differ from those"):
        open_weights(tmp_path / "a")


def test_rope_periods_of_another_head_width_are_refused():
    recorded = json.loads((RECORDED / "meta_dinov3" / "model.json").read_text())
    heads = recorded["overrides"] | {"num_heads": 2 * recorded["overrides"]["num_heads"]}
    heads |= {"embed_dim": recorded["overrides"]["embed_dim"]}
    given = ModelSettings(recorded["model"], str(RECORDED / "meta_dinov3" / "weights.pth"), heads)
    assert "rope_embed.periods has" in refused(given)


def test_rope_periods_are_few_floats(tmp_path):
    content = dict(open_weights(RECORDED / "meta_dinov3" / "weights.pth"))
    tensors = {key: tensor.read() for key, tensor in content.items()}
    for periods in (np.ones(2000, np.float32), np.ones(2, np.int32)):
        save_file(tensors | {"rope_embed.periods": periods}, tmp_path / "a.safetensors")
        with pytest.raises(InputError, match=r"rope_embed\.periods"):
            open_weights(tmp_path / "a.safetensors")


def test_a_representation_layer_of_flax_is_said_to_be_left_out(tmp_path):
    arrays = dict(np.load(RECORDED / "flax_augreg" / "augreg.npz"))
    arrays |= {"pre_logits/kernel": np.zeros((4, 4)), "head/kernel": np.zeros((4, 2))}
    np.savez(tmp_path / "a.npz", **arrays)
    left_out = open_weights(tmp_path / "a.npz").taken.left_out
    assert {"pre_logits/kernel", "head/kernel"} <= set(left_out)


def test_what_a_config_states_wins_over_a_named_model_but_not_over_overrides(tmp_path):
    folder = copied(tmp_path, "hf_clip_vision")
    changed = {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-4}
    config = json.loads((folder / "config.json").read_text()) | changed
    (folder / "config.json").write_text(json.dumps(config))
    sizes = {
        "img_size": config["image_size"],
        "patch_size": config["patch_size"],
        "embed_dim": config["hidden_size"],
        "depth": config["num_hidden_layers"],
        "num_heads": config["num_attention_heads"],
        "mlp_ratio": config["intermediate_size"] / config["hidden_size"],
    }
    given = ModelSettings("vit_base_patch16_clip_224", str(folder), sizes)
    spec, _ = resolve_model("teacher", given)
    assert spec.arch.act_layer == "quick_gelu"
    assert spec.arch.norm_eps == config["layer_norm_eps"]
    given = ModelSettings("vit_base_patch16_clip_224", str(folder), sizes | {"act_layer": "gelu"})
    assert resolve_model("teacher", given)[0].arch.act_layer == "gelu"


def test_a_config_of_an_unknown_model_does_not_block_a_named_one(tmp_path, caplog):
    folder = copied(tmp_path, "hf_vit")
    stated = json.loads((folder / "config.json").read_text())
    sizes = {"img_size": stated["image_size"], "patch_size": stated["patch_size"], "depth": 2}
    sizes |= {"embed_dim": stated["hidden_size"], "num_heads": stated["num_attention_heads"]}
    sizes["mlp_ratio"] = stated["intermediate_size"] / stated["hidden_size"]
    (folder / "config.json").write_text(json.dumps(stated | {"model_type": "vit_msn"}))
    given = ModelSettings("vit_tiny_patch16_224", str(folder), sizes)
    assert resolve_model("teacher", given) and "passed over" in caplog.text
    square = {"model_type": "vit_mae", "patch_size": [stated["patch_size"]] * 2}
    (folder / "config.json").write_text(json.dumps(stated | square))
    assert resolve_model("teacher", settings(folder))[0].arch.patch_size == stated["patch_size"]


def test_a_preprocessor_states_the_whole_input_and_nothing_is_assumed(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}))
    assert not {"mean", "std"} & set(read_hub_config(tmp_path)["pretrained_cfg"])

    def stated(**content: object) -> dict[str, object]:
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(content))
        return read_input(tmp_path)

    sizes = {"size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224}}
    assert stated(resample=2, **sizes) == {"interpolation": "bilinear", "crop_pct": 0.875}
    assert stated(size=224) == {"crop_pct": 1.0}
    half = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    unscaled = {"mean": [0.0] * 3, "std": [1.0] * 3}
    assert stated(do_normalize=False, **half) == unscaled
    found = stated(rescale_factor=1 / 127.5, **half)  # to 0..2
    assert found == {"mean": pytest.approx([0.25] * 3), "std": pytest.approx([0.25] * 3)}
    assert stated(rescale_factor=1 / 255) == {}
