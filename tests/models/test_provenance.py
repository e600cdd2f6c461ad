"""Provenance of weights, which must agree with the content of the file."""

import hashlib
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from singer_jax import main
from singer_jax.config import export
from singer_jax.errors import InputError
from singer_jax.models.provenance import describe, provenance
from singer_jax.models.weight_files import find_weights
from singer_jax.models.weights import abstract_params, check_weights, to_timm
from singer_jax.models.zoo import lookup
from tests import tiny


def test_provenance_of_a_file_has_hash_size_and_grid(tmp_path):
    file = tiny.write_teacher(tmp_path / "teacher.safetensors")
    tensors = load_file(file)
    spec = lookup("vit_tiny_patch16_224", tiny.TEACHER | {"num_classes": 0, "img_size": 24})
    found = provenance(spec, "given", file)
    assert found["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert found["tensors"] == len(tensors)
    assert found["parameters"] == sum(value.size for value in tensors.values())
    assert found["position_embeddings"] == "resampled from 4 x 4 to 6 x 6"
    line = describe(found)
    for part in (str(file), found["sha256"], f"{found['parameters']:,}", "mean 0.5/0.5/0.5"):
        assert part in line
    assert json.loads(json.dumps(found)) == found
    same = provenance(lookup("vit_tiny_patch16_224", tiny.TEACHER), "given", file)
    assert same["position_embeddings"] is None


def test_provenance_of_random_weights():
    found = provenance(lookup("vit_tiny_patch16_224", {}), "", None)
    assert "random weights" in describe(found) and "sha256" not in found


def test_a_hub_name_states_its_revision(tmp_path, monkeypatch):
    revision = "0123456789abcdef0123456789abcdef01234567"
    cache = tmp_path / "models--timm--mine"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text(revision)
    (cache / "snapshots" / revision).mkdir(parents=True)
    tiny.write_teacher(cache / "snapshots" / revision / "model.safetensors")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    file = find_weights("timm/mine")
    found = provenance(lookup("vit_tiny_patch16_224", tiny.TEACHER), "timm/mine", file)
    assert found["revision"] == revision and f"revision {revision}" in describe(found)
    assert found["weights"] == "timm/mine"


def test_run_logs_provenance_and_export_contains_it(tmp_path, caplog):
    teacher = tiny.write_teacher(tmp_path / "teacher.safetensors")
    config = tiny.config(teacher)
    config.steps = 1
    with caplog.at_level("INFO", "singer_jax"):
        assert main.run(config, tmp_path / "run") == 0
    sha256 = hashlib.sha256(Path(teacher).read_bytes()).hexdigest()
    assert (
        f"sha256 {sha256}" in caplog.text and "student: vit_tiny_patch16_224: random" in caplog.text
    )
    written = json.loads((tmp_path / "run" / "weights.json").read_text())
    assert written["teacher"]["sha256"] == sha256
    student = tmp_path / "run" / "student"
    described = json.loads((student / "config.json").read_text())["singer_jax"]
    assert described["teacher"] == written["teacher"] and described["steps"] == 1
    with safe_open(student / "model.safetensors", framework="numpy") as file:
        origin = json.loads(file.metadata()["singer_jax"])
    digest = hashlib.sha256((student / "model.safetensors").read_bytes()).hexdigest()
    assert described == origin | {"sha256": digest}
    # The job export says it too, also after the teacher's file has been replaced.
    tensors = load_file(teacher)
    save_file({key: value + 1 for key, value in tensors.items()}, teacher)
    assert main.run(config, tmp_path / "run") == 0  # nothing is left to train
    assert json.loads((tmp_path / "run" / "weights.json").read_text()) == written
    exported = export()
    exported.formats = ("timm",)
    (student / "config.json").unlink()
    assert main.run(exported, tmp_path / "run") == 0
    assert json.loads((student / "config.json").read_text())["singer_jax"] == described
    # The export is the weights of a next run like any other.
    config.student.weights, config.student.overrides = str(student), {}
    config.student.model = ""
    assert main.run(config, tmp_path / "next") == 0
    again = json.loads((tmp_path / "next" / "weights.json").read_text())["student"]
    assert again["file"] == str(student / "model.safetensors")
    assert (
        again["sha256"] == hashlib.sha256((student / "model.safetensors").read_bytes()).hexdigest()
    )


def test_resampled_relative_positions_are_told(tmp_path):
    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 8, "depth": 1, "num_heads": 2}
    stored = lookup("beit_base_patch16_224", sizes | {"num_classes": 0})
    abstract = abstract_params(stored.arch)
    tensors = to_timm(jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), abstract))
    save_file(tensors, tmp_path / "a.safetensors")
    assert provenance(stored, "a", tmp_path / "a.safetensors")["position_embeddings"] is None
    larger = lookup("beit_base_patch16_224", sizes | {"num_classes": 0, "img_size": 24})
    found = provenance(larger, "a", tmp_path / "a.safetensors")
    assert found["position_embeddings"] == "resampled from 4 x 4 to 6 x 6"
    table = "blocks.0.attn.relative_position_bias_table"
    save_file(tensors | {table: np.zeros((36 + 3, 2), np.float32)}, tmp_path / "a.safetensors")
    with pytest.raises(InputError, match="relative_position_bias_table is"):
        check_weights(larger, tmp_path / "a.safetensors")


def test_what_a_model_does_not_take_is_told(tmp_path):
    file = tiny.write_teacher(tmp_path / "teacher.safetensors")
    save_file(load_file(file) | {"mask_token": np.zeros((1, 1, 4), np.float32)}, file)
    found = provenance(lookup("vit_tiny_patch16_224", tiny.TEACHER), "given", Path(file))
    assert "left out: mask_token" in found["taken"]
