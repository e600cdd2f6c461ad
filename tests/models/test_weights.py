"""Loading and export of weights in the file formats that are in common use."""

import collections
import dataclasses
import json
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file

from singer_jax.errors import InputError, RunError
from singer_jax.models import zoo
from singer_jax.models.architecture import ComputePolicy
from singer_jax.models.checkpoint import SafetensorsTensor
from singer_jax.models.export_timm import export_timm, to_hub_config
from singer_jax.models.tensors import StoredTensor
from singer_jax.models.torch_file import TorchTensor
from singer_jax.models.vit import VisionTransformer
from singer_jax.models.weight_files import (
    find_weights,
    open_weights,
    read_hub_config,
)
from singer_jax.models.weights import from_hub_config, load_model, spec_of_weights, to_timm
from singer_jax.platform import parallel
from tests.models.torch_writer import write_torch_file

SIZES = {"img_size": 16, "patch_size": 4, "embed_dim": 8, "depth": 2, "num_heads": 2}


def spec(model: str = "deit3_small_patch16_224", **changes: object) -> zoo.ModelSpec:
    return zoo.lookup(model, SIZES | {"num_classes": 3} | changes)


def tensors(model: zoo.ModelSpec, seed: int = 0) -> dict[str, np.ndarray]:
    return to_timm(nnx.to_pure_dict(nnx.state(VisionTransformer(model.arch, rngs=nnx.Rngs(seed)))))


def test_export_and_load_keep_every_bit(tmp_path):
    model = spec()
    weights = tensors(model)
    export_timm(tmp_path, model, weights)
    stated = json.loads((tmp_path / "config.json").read_text())
    assert from_hub_config(stated) == model
    assert stated["architecture"] == "deit3_small_patch16_224"
    _, params = load_model(model, find_weights(str(tmp_path)))
    again = to_timm(params)
    assert set(again) == set(weights)
    assert all(np.array_equal(again[key], weights[key]) for key in weights)


def test_a_variant_is_exported_as_the_timm_model_it_derives_from():
    model = zoo.lookup("deit3_tiny_patch16_224")
    stated = to_hub_config(model)
    assert stated["architecture"] == "deit3_small_patch16_224"
    assert stated["model_args"] == {"embed_dim": 192, "num_heads": 3}
    assert from_hub_config(stated).arch == model.arch
    assert stated["variant"] == from_hub_config(stated).name == "deit3_tiny_patch16_224"
    for invalid in ("vit_large_patch16_224", "deit3_tiny", ["deit3_tiny_patch16_224"], None):
        assert from_hub_config(stated | {"variant": invalid}).name == "deit3_small_patch16_224"


@pytest.mark.parametrize("wrapped", ["", "model", "state_dict"])
def test_torch_files_are_read_without_torch(tmp_path, wrapped):
    model = spec()
    weights = tensors(model)
    content = collections.OrderedDict(weights)
    write_torch_file(
        tmp_path / "weights.pth", {wrapped: content, "epoch": 3} if wrapped else content
    )
    opened = open_weights(tmp_path / "weights.pth")
    assert set(opened) == set(weights)
    assert all(np.array_equal(opened[key].read(), weights[key]) for key in weights)


def test_published_deit3_and_parallel_keys_are_renamed(tmp_path):
    model = spec()
    published = {
        f"module.{key.replace('ls1.gamma', 'gamma_1').replace('ls2.gamma', 'gamma_2')}": value
        for key, value in tensors(model).items()
    }
    assert "module.blocks.0.gamma_1" in published
    write_torch_file(tmp_path / "weights.pth", published)
    _, params = load_model(model, tmp_path / "weights.pth")
    for key, value in to_timm(params).items():
        np.testing.assert_array_equal(value, tensors(model)[key], err_msg=key)


def test_a_unic_checkpoint_is_read_through_its_encoder(tmp_path):
    model = zoo.lookup(
        "unic_large_patch14_336", {"img_size": 28, "embed_dim": 8, "depth": 2, "num_heads": 2}
    )
    published = {"decoder.weight": np.ones(3, np.float32)}
    published["encoder.mask_token"] = np.ones(3, np.float32)
    for key, value in tensors(model).items():
        published[f"encoder.{key.replace('blocks.', 'blocks.0.')}"] = value
    write_torch_file(tmp_path / "unic.pth", {"model": published})
    _, params = load_model(model, tmp_path / "unic.pth")
    for key, value in to_timm(params).items():
        np.testing.assert_array_equal(value, tensors(model)[key], err_msg=key)


def test_weights_are_cast_to_the_parameter_dtype(tmp_path):
    model = spec()
    half = {key: value.astype(ml_dtypes.bfloat16) for key, value in tensors(model).items()}
    write_torch_file(tmp_path / "weights.pth", half)
    save_file(half, tmp_path / "weights.safetensors")
    for name in ("weights.pth", "weights.safetensors"):
        _, params = load_model(model, tmp_path / name, ComputePolicy(param_dtype=jnp.float32))
        for key, value in to_timm(params).items():
            assert value.dtype == np.float32
            np.testing.assert_array_equal(value, half[key].astype(np.float32))


class Hostile:
    def __reduce__(self):
        return os.system, ("touch /tmp/singer_jax_was_here",)


def test_a_pickle_that_runs_code_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "evil.pth", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"weight": Hostile()}))
    with pytest.raises(InputError, match=r"posix\.system.*refused.*safetensors"):
        open_weights(tmp_path / "evil.pth")
    assert not Path("/tmp/singer_jax_was_here").exists()


def test_one_error_names_the_first_wrong_keys_and_counts_the_others(tmp_path):
    model = spec()
    weights = tensors(model)
    del weights["norm.bias"], weights["blocks.1.mlp.fc1.weight"]
    weights["blocks.9.norm1.weight"] = np.ones(8, np.float32)
    weights["cls_token"] = np.ones((1, 2, 8), np.float32)
    save_file(weights, tmp_path / "weights.safetensors")
    with pytest.raises(InputError) as caught:
        load_model(model, tmp_path / "weights.safetensors")
    message = str(caught.value)
    assert "\n" not in message
    assert "missing: blocks.1.mlp.fc1.weight and 1 more" in message
    assert len(message.removeprefix(str(tmp_path))) <= 200
    assert "surplus: blocks.9.norm1.weight" in message
    assert "mis-shaped: 1" in message


def test_a_position_embedding_of_a_rectangle_is_not_resampled(tmp_path):
    model = spec()
    weights = tensors(model)
    weights["pos_embed"] = weights["pos_embed"][:, :12]  # 12 patches are no square
    save_file(weights, tmp_path / "weights.safetensors")
    with pytest.raises(InputError, match=r"mis-shaped: pos_embed is \[1, 12, 8\]"):
        load_model(model, tmp_path / "weights.safetensors")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.safetensors", b"\x00" * 40, "not a complete safetensors file"),
        ("a.pth", b"PK not really", "not a complete PyTorch file"),
        ("a.npz", b"", "is empty"),
        ("a.npz", b"something else", "is not a checkpoint: it begins with b'somethin'"),
    ],
)
def test_damaged_files_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        open_weights(tmp_path / name)


def test_a_truncated_safetensors_file_is_named(tmp_path):
    save_file(tensors(spec()), tmp_path / "a.safetensors")
    whole = (tmp_path / "a.safetensors").read_bytes()
    (tmp_path / "a.safetensors").write_bytes(whole[:-100])
    with pytest.raises(InputError, match="not a complete safetensors file"):
        open_weights(tmp_path / "a.safetensors")


def write_safetensors(path: Path, header: dict | bytes, data: bytes = b"") -> Path:
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + data)
    return path


def described(shape: object, dtype: str = "F32", end: int = 4) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [0, end]}


@pytest.mark.parametrize(
    "header",
    [
        b"[" * 100_000,
        b'{"a":' * 100_000,
        [],
        {"a": described([-1])},
        {"a": described([2], end=8)},
        {"a": described([2**62, 2**62])},
        {"a": described([0, 2**62], end=0), "b": described([1])},
        {"a": described([0] * 100, end=0), "b": described([1])},
        {"a": described([4], "F8_E4M3")},
        {"a": described([1, 1], "C64", 4)},
        {"two\nlines": described([1])},
        {"x" * 10_000: described([1])},
    ],
)
def test_a_hostile_safetensors_header_is_one_line(tmp_path, header):
    path = write_safetensors(tmp_path / "a.safetensors", header, bytes(4))
    with pytest.raises(InputError) as caught:
        for tensor in open_weights(path).values():
            tensor.read()
    assert len(str(caught.value).splitlines()) == 1 and len(str(caught.value)) < 1000


def test_a_head_that_is_a_single_number_is_mis_shaped(tmp_path):
    weights = tensors(spec()) | {"head.weight": np.zeros((), np.float32)}
    save_file(weights, tmp_path / "a.safetensors")
    found = spec_of_weights(spec(), tmp_path / "a.safetensors")
    with pytest.raises(InputError, match=r"surplus: head\.bias, head\.weight"):
        load_model(found, tmp_path / "a.safetensors")


def test_a_safetensors_file_that_is_gone_is_named(tmp_path):
    save_file(tensors(spec()), tmp_path / "a.safetensors")
    opened = open_weights(tmp_path / "a.safetensors")["norm.weight"]
    (tmp_path / "a.safetensors").unlink()
    with pytest.raises(InputError, match="not a complete safetensors file"):
        opened.read()


def test_the_same_export_is_the_same_bytes(tmp_path):
    """Without sorting, the library sometimes writes metadata in another order."""
    model, origin = spec(), {"method": "singer", "steps": 3, "file": "/where/\u00e9"}
    weights = tensors(model)
    for number in range(8):
        export_timm(tmp_path / str(number), model, weights, origin)
    files = [(tmp_path / str(n) / "model.safetensors") for n in range(8)]
    assert len({file.read_bytes() for file in files}) == 1
    with safe_open(files[0], framework="numpy") as file:
        assert json.loads(file.metadata()["singer_jax"]) == origin
    read = load_file(files[0])
    assert all(np.array_equal(read[key], value) for key, value in weights.items())


def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
    def save_file(*given: object, **named: object) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("singer_jax.models.write_safetensors.save_file", save_file)
    with pytest.raises(RunError, match=r"cannot write .*/model.safetensors: .* No space left"):
        export_timm(tmp_path, spec(), tensors(spec()))
    assert not list(tmp_path.iterdir())


def test_a_disk_that_returns_other_bits_is_noticed(tmp_path, monkeypatch):
    def save_changed(tensors: dict[str, np.ndarray], file: Path, metadata: dict[str, str]) -> None:
        save_file(tensors | {"norm.bias": tensors["norm.bias"] + 1}, file, metadata=metadata)

    monkeypatch.setattr("singer_jax.models.write_safetensors.save_file", save_changed)
    with pytest.raises(RunError, match=r"1 tensors read back differ .* norm.bias"):
        export_timm(tmp_path, spec(), tensors(spec()))
    assert not list(tmp_path.iterdir())


def test_the_input_that_a_config_json_states_is_exported_again(tmp_path):
    model = dataclasses.replace(
        spec(), interpolation="bicubic", crop_pct=0.95, mean=(0.1, 0.2, 0.3)
    )
    export_timm(tmp_path, model, tensors(model))
    stated = json.loads((tmp_path / "config.json").read_text())
    assert json.loads(json.dumps(to_hub_config(from_hub_config(stated)))) == stated
    assert spec_of_weights(spec(), tmp_path / "model.safetensors") == model


def test_classes_and_statistics_come_from_the_file(tmp_path):
    model = spec()
    export_timm(tmp_path, model, tensors(model))
    config = json.loads((tmp_path / "config.json").read_text())
    config["pretrained_cfg"]["mean"] = [0.1, 0.2, 0.3]
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = spec_of_weights(spec(num_classes=1000), tmp_path / "model.safetensors")
    assert found.arch.num_classes == 3
    assert found.mean == (0.1, 0.2, 0.3)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"[1]", "its content is not a JSON object"),
        (b"{", "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b'{"architecture": 3}', "architecture: 3"),
        (b'{"num_classes": -1}', "num_classes: -1; give an integer >= 0"),
        (b'{"num_classes": true}', "num_classes: True"),
        (b'{"model_args": [1]}', "model_args is not a JSON object"),
        (b'{"pretrained_cfg": "x"}', "pretrained_cfg is not a JSON object"),
        (b'{"pretrained_cfg": {"mean": [1, 2]}}', "pretrained_cfg.mean: [1, 2]; give a tuple of 3"),
        (b'{"pretrained_cfg": {"std": [0, 1, 1]}}', "pretrained_cfg.std"),
        (b'{"pretrained_cfg": {"mean": [NaN, 1, 1]}}', "pretrained_cfg.mean"),
        (b'{"pretrained_cfg": {"input_size": [3, 224]}}', "pretrained_cfg.input_size"),
    ],
)
def test_invalid_config_json_is_a_one_line_error(tmp_path, content, words):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(InputError) as caught:
        read_hub_config(tmp_path)
    message = str(caught.value)
    assert words in message and "config.json" in message and len(message.splitlines()) == 1


@pytest.mark.parametrize(
    "arguments", [{"depth": "2"}, {"depth": 10**9}, {"img_size": [16]}, {"mlp_ratio": None}]
)
def test_model_arguments_of_a_config_json_are_checked(arguments):
    stated = to_hub_config(spec())
    stated["model_args"] |= arguments
    with pytest.raises(InputError, match=next(iter(arguments))):
        from_hub_config(stated)


def test_empty_parts_of_a_config_json_are_as_if_absent(tmp_path):
    (tmp_path / "config.json").write_text('{"pretrained_cfg": null, "model_args": null}')
    assert not any(read_hub_config(tmp_path).values())


def fake_hub(cache: Path, repo: str, files: dict[str, bytes]) -> None:
    """Creates a Hugging Face cache that contains a repository."""
    folder = cache / f"models--{repo.replace('/', '--')}"
    snapshot = folder / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("0" * 40)
    for name, content in files.items():
        (snapshot / name).write_bytes(content)


def test_a_config_that_is_not_in_the_cache_is_fetched(tmp_path, monkeypatch):
    fake_hub(tmp_path, "ann/mine", {"model.safetensors": b"", "preprocessor_config.json": b"{}"})
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    asked = []

    def fetch(repo: str, name: str) -> str:
        asked.append(name)
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fetch)
    assert find_weights("ann/mine").name == "model.safetensors"
    assert asked == ["config.json"]


def test_a_cached_hub_name_works_without_network(tmp_path):
    model = spec()
    export_timm(tmp_path / "export", model, tensors(model))
    files = {path.name: path.read_bytes() for path in (tmp_path / "export").iterdir()}
    fake_hub(tmp_path / "hub", "timm/deit3_tiny.test", files)
    code = (
        "from singer_jax.models.weight_files import find_weights, read_hub_config\n"
        "path = find_weights('deit3_tiny.test')\n"
        "print(path.name, read_hub_config(path.parent)['num_classes'])\n"
        "find_weights('somebody/something')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == ["model.safetensors", "3"]
    assert "InputError" in done.stderr
    assert f"not in the cache {tmp_path / 'hub'}" in done.stderr


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize(
    ("name", "kind"), [("a.safetensors", SafetensorsTensor), ("a.pth", TorchTensor)]
)
def test_weights_land_in_their_sharding_and_are_read_once(
    tmp_path, monkeypatch, name, kind, stacked
):
    """Each of several hosts reads only the parts that its devices hold."""
    model, mesh, policy = spec(), parallel.make_mesh(2, 2), ComputePolicy(stacked=stacked)
    weights, parts, whole = tensors(model), [], kind.read
    if kind is SafetensorsTensor:
        save_file(weights, tmp_path / name)
    else:
        write_torch_file(tmp_path / name, weights)
    _, expected = load_model(model, tmp_path / name, policy)

    def read(tensor: StoredTensor, part: tuple[slice, ...] = ()) -> np.ndarray:
        parts.append(whole(tensor, part))
        return parts[-1]

    monkeypatch.setattr(kind, "read", read)
    _, params = load_model(
        model,
        tmp_path / name,
        policy,
        shardings=lambda abstract: parallel.tree_shardings(mesh, abstract),
    )
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    block = params["blocks"] if stacked else params["blocks"][0]
    kernel = block["attn"]["qkv"]["kernel"]
    assert kernel.sharding.spec[-2:] == (None, "fsdp")
    assert kernel.addressable_shards[0].data.shape[-2:] == (8, 12)
    assert sum(part.nbytes for part in parts) == sum(array.nbytes for array in weights.values())
    assert (24, 8) not in {part.shape for part in parts}  # qkv, which lies in two halves
