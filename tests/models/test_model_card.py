"""Model cards: the front matter for the Hub, the text for users, and no local paths."""

import dataclasses

import pytest
import yaml

from singer_jax.models.model_card import model_card
from singer_jax.models.provenance import origin
from tests.interop.cases import spec_of

FORMATS = ["timm", "onnx", "stablehlo", "singer_jax"]
ON_THE_HUB = {
    "model": "vit_large_patch16_224",
    "weights": "timm/vit_large.augreg",
    "file": "/home/ann/.cache/huggingface/hub/models--timm/snapshots/0123/model.safetensors",
    "sha256": "ab" * 32,
    "revision": "0123",
}
LOCAL = ON_THE_HUB | {"weights": "/home/ann/mine.pth", "file": "/home/ann/mine.pth"}
LOCAL["revision"] = None


def front_matter(card: str) -> dict[str, object]:
    """Returns the front matter, which the Hub reads."""
    before, text, _ = card.split("---\n", 2)
    assert before == ""
    return yaml.safe_load(text)


def test_a_card_names_bases_method_and_data_and_leaves_the_licence():
    data = {"source": "imagenet2012", "batch_size": 1024}
    weights = {"teacher": ON_THE_HUB, "student": {"model": "vit_tiny_patch16_224"}}
    card = model_card(spec_of("vit"), origin(weights, "", "singer", 20_000, data), FORMATS)
    found = front_matter(card)
    assert found["base_model"] == ["timm/vit_large.augreg"]
    assert (found["library_name"], found["pipeline_tag"]) == ("timm", "image-feature-extraction")
    assert "license" not in found and "# license: choose one" in card
    for part in (
        "`singer`",
        "20,000",
        "20,480,000 seen (20,000 steps of 1,024), from `imagenet2012`",
        "random",
    ):
        assert part in card
    for part in ('"local-dir:PATH", pretrained=True', "model.onnx", "features.stablehlo"):
        assert part in card
    assert "32 x 32 pixels" in card and "0.5, 0.5, 0.5" in card and "bicubic, crop_pct 0.9" in card


@pytest.mark.parametrize("found", [ON_THE_HUB, LOCAL])
def test_a_card_shows_no_folder_of_the_machine(found):
    data = {"source": "photos", "batch_size": 8}
    weights = {"teacher": found, "student": found}
    for made_from in (origin(weights, "", "fitnet", 3, data), {"weights": found}):
        card = model_card(spec_of("vit"), made_from, FORMATS)
        assert "/home" not in card and "ab" * 32 in card
        assert ("base_model" in front_matter(card)) == (found is ON_THE_HUB)


def test_a_name_can_neither_break_the_front_matter_nor_the_page():
    odd = ON_THE_HUB | {"weights": 'a/b"\\: `x`'}
    spec = dataclasses.replace(spec_of("vit with a head"), name="x")
    card = model_card(spec, {"weights": odd}, ["huggingface"])
    found = front_matter(card)
    assert found["base_model"] == ['a/b"\\: `x`']
    assert found["library_name"] == "transformers"
    assert found["pipeline_tag"] == "image-classification"
    assert "`a/b\"\\: 'x'`" in card


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({}, "the output of the final norm"),
        ({"global_pool": "avg", "fc_norm": True}, "the output of the last block, without a norm"),
        ({"final_norm": False}, "the output of the last block, without a norm"),
    ],
)
def test_a_card_says_which_norm_the_hidden_state_has(fields, words):
    spec = spec_of("vit")
    spec = dataclasses.replace(spec, arch=dataclasses.replace(spec.arch, **fields))
    card = " ".join(model_card(spec, {}, ["onnx"]).split())
    assert f"`last_hidden_state` is {words}" in card
