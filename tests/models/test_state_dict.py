"""Selection of the model in a checkpoint: nesting, averaged weights and prefixes."""

import json
import os
import pickle
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from singer_jax.errors import InputError
from singer_jax.models import zoo
from singer_jax.models.network import ModelSettings, resolve_model
from singer_jax.models.provenance import describe, provenance
from singer_jax.models.weight_files import WeightsFile, find_weights, open_weights
from singer_jax.models.weights import check_weights, load_model, model_arguments, to_timm
from tests import tiny
from tests.models.torch_writer import (
    piece,
    state_dict,
    tensor,
    write_archive,
    write_legacy_file,
    write_torch_file,
)

KEYS = ("cls_token", "patch_embed.proj.weight", "blocks.0.norm1.weight", "head.weight")


def state(value: float = 1.0, prefix: str = "") -> dict[str, np.ndarray]:
    """Returns enough tensors to be recognised as a model, each filled with one value."""
    return {prefix + key: np.full((2, 2), value, np.float32) for key in KEYS}


HEAD = {"head.mlp.0.weight": np.zeros((4, 2), np.float32)}
# Content of a checkpoint; part, prefix and value of what is taken of it.
NESTED = {
    "plain": (state(), "", "", 1),
    "state_dict": ({"state_dict": state(), "epoch": 3}, "state_dict", "", 1),
    "two deep": ({"a": {"model": state()}}, "a.model", "", 1),
    "an unusual name": ({"my_weights": state(), "lr": 0.1}, "my_weights", "", 1),
    "timm": ({"state_dict": state(), "state_dict_ema": state(2)}, "state_dict_ema", "", 2),
    "DeiT": ({"model": state(), "model_ema": state(2)}, "model_ema", "", 2),
    "DINO": (
        {
            "student": state(1, "module.backbone.") | {f"module.{k}": HEAD[k] for k in HEAD},
            "teacher": state(2, "backbone.") | HEAD,
        },
        "teacher",
        "backbone.",
        2,
    ),
    "DINOv2": (
        {"model": state(1, "student.backbone.") | state(2, "teacher.backbone.") | HEAD},
        "model",
        "teacher.backbone.",
        2,
    ),
    "swa": ({"state_dict": state(), "swa_model": state(2, "module.")}, "swa_model", "module.", 2),
    "ema_model": ({"model": state(), "ema_model": state(2)}, "ema_model", "", 2),
    "a teacher without student": ({"model": state(), "teacher": state(2)}, "model", "", 1),
    "Lightning": ({"state_dict": state(1, "model.")}, "state_dict", "model.", 1),
    "open_clip": ({"state_dict": state(1, "module.visual.trunk.")}, "state_dict", None, 1),
    "compiled": (state(1, "module._orig_mod."), "", "module._orig_mod.", 1),
    "any prefix": (state(1, "my.own_encoder."), "", "my.own_encoder.", 1),
}


@pytest.mark.parametrize("name", NESTED)
def test_model_is_found_in_training_checkpoints(tmp_path, name):
    content, part, prefix, value = NESTED[name]
    write_torch_file(tmp_path / "a.ckpt", content)
    found = open_weights(tmp_path / "a.ckpt")
    assert found.taken.part == part
    assert prefix is None or found.taken.prefix == prefix
    assert set(found) == set(KEYS)
    assert all((each.read() == value).all() for each in found.values())


def test_prefix_is_removed_in_safetensors_too(tmp_path):
    save_file(state(1, "module.visual.trunk.") | HEAD, tmp_path / "weights")
    found = open_weights(tmp_path / "weights")
    assert set(found) == set(KEYS)
    assert str(found.taken) == ("prefix module.visual.trunk. removed, left out: head.mlp.0.weight")


def test_weights_key_names_another_part(tmp_path):
    write_torch_file(tmp_path / "a.pth", NESTED["DINO"][0])
    for key in ("student", "student.module.backbone"):
        found = open_weights(WeightsFile(tmp_path / "a.pth", key))
        assert found.taken.part == "student" and (found["cls_token"].read() == 1).all()
    with pytest.raises(InputError, match=r"'pupil'; its parts: student\.module"):
        open_weights(WeightsFile(tmp_path / "a.pth", "pupil"))


def test_of_several_unknown_models_none_is_guessed(tmp_path):
    write_torch_file(tmp_path / "a.pth", {"one": state(), "two": state(2)})
    with pytest.raises(InputError, match=r"several models: one, two; .*weights_key"):
        open_weights(tmp_path / "a.pth")
    assert (open_weights(WeightsFile(tmp_path / "a.pth", "two"))["cls_token"].read() == 2).all()


# Objects beside a state dict, as operations of a pickle.
BESIDE = {
    "a size": b"ctorch\nSize\n(" + piece((1, 2)) + b"tR",
    "a counter": b"ccollections\nCounter\n(" + piece({"a": 1}) + b"tR",
    "a defaultdict": b"ccollections\ndefaultdict\n(c__builtin__\ndict\ntR(" + piece("x") + b"Nu",
    "a device": b"ctorch\ndevice\n(" + piece("cpu") + b"tR",
    "a dtype": b"ctorch\nfloat32\n",
    "a NumPy scalar": b"cnumpy._core.multiarray\nscalar\n(cnumpy\ndtype\n(" + piece("f8")
    + b"\x89\x88tR(K\x03N" + b"tbc_codecs\nencode\n(" + piece("x" * 8) + piece("latin1") + b"tRtR",
    "a path": b"cpathlib\nPosixPath\n(" + piece("/") + piece("x") + b"tR",
    "a list of objects": b"](cos\nsystem\n(" + piece("true") + b"tRe",
    "an object with items": b"cmy\nDict\n)R(" + piece("x") + b"Nu",
    "an object with a state": b"cmy\nClass\n)\x81}" + piece("x") + b"Nsb",
}  # fmt: skip


@pytest.mark.parametrize("name", BESIDE)
def test_objects_beside_the_state_dict_are_passed_over_and_never_made(tmp_path, monkeypatch, name):
    monkeypatch.setattr(os, "system", lambda _: pytest.fail("was run"))
    tensors = b"}(" + piece("w") + tensor() + b"u"
    pickled = b"\x80\x02}(" + piece("other") + BESIDE[name] + piece("model") + tensors + b"u."
    found = open_weights(write_archive(tmp_path / "a.pth", pickled))
    assert found.taken.part == "model" and found["w"].read().shape == (2, 3)


def test_parameters_and_tensors_of_newer_torch_are_read(tmp_path):
    wrapped = b"ctorch._utils\n_rebuild_parameter_with_state\n(" + tensor() + b"\x88N}tR"
    untyped = tensor(kind=b"ctorch.storage\nUntypedStorage\n", elements=24)
    typed = untyped.replace(b"_v2", b"_v3")[:-2] + b"ctorch\nfloat32\ntR"
    halves = untyped.replace(b"_v2", b"_v3")[:-2] + b"ctorch\nfloat8_e4m3fn\ntR"
    items = b"".join(
        piece(key) + value for key, value in zip("abc", (wrapped, typed, halves), strict=True)
    )
    found = open_weights(write_archive(tmp_path / "a.pth", b"\x80\x02}(" + items + b"u."))
    numbers = np.frombuffer(bytes(range(24)), np.float32).reshape(2, 3)
    np.testing.assert_array_equal(found["a"].read(), numbers)
    np.testing.assert_array_equal(found["b"].read(), numbers)
    assert found["c"].dtype.name == "float8_e4m3fn" and found["c"].read().shape == (2, 3)


@pytest.mark.parametrize("name", ["a.pth.tar", "a.PTH", "a.model", "a"])
def test_the_old_torch_format_is_read_by_content(tmp_path, name):
    arrays = {"w": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(1, np.float32)}
    found = open_weights(write_legacy_file(tmp_path / name, arrays))
    for key, array in arrays.items():
        np.testing.assert_array_equal(found[key].read(), array)


def test_a_damaged_file_of_the_old_format_is_one_line(tmp_path):
    arrays = {"w": np.arange(6, dtype=np.float32)}
    path = write_legacy_file(tmp_path / "a.pth", arrays, elements=1)
    with pytest.raises(InputError, match="storage 0 does not have its 6 elements"):
        open_weights(path)
    whole = write_legacy_file(path, arrays).read_bytes()
    for size in (len(whole) - 1, len(whole) - 30, 40):
        path.write_bytes(whole[:size])
        with pytest.raises(InputError, match="not a complete PyTorch file") as caught:
            open_weights(path)
        assert "\n" not in str(caught.value)


TINY = ModelSettings("vit_tiny_patch16_224", "", tiny.TEACHER)


def complete(path: Path) -> dict[str, np.ndarray]:
    """Returns all tensors of a tiny teacher."""
    tiny.write_teacher(path / "whole.safetensors")
    return {key: each.read() for key, each in open_weights(path / "whole.safetensors").items()}


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_a_folder_of_shards_is_read_whole(tmp_path, kind):
    tensors, folder = complete(tmp_path), tmp_path / "folder"
    folder.mkdir()
    keys = sorted(tensors)
    shards = {f"part-{n}.{kind}": keys[n::2] for n in range(2)}
    for name, own in shards.items():
        part = {key: tensors[key] for key in own}
        (
            save_file(part, folder / name)
            if kind == "safetensors"
            else write_torch_file(folder / name, part)
        )
    name = {"safetensors": "model.safetensors", "bin": "pytorch_model.bin"}[kind]
    weight_map = {key: name for name, own in shards.items() for key in own}
    index = folder / f"{name}.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    spec = zoo.lookup(TINY.model, tiny.TEACHER | {"num_classes": 0})
    loaded = to_timm(load_model(spec, find_weights(str(folder)))[1])
    assert all(np.array_equal(loaded[key], tensors[key]) for key in tensors)
    found = provenance(spec, str(folder), find_weights(str(folder)))
    assert set(found["shards"]) == set(shards) and found["file"] == str(index)
    for wrong, words in (
        ({"w": "../part-0"}, "no file of its folder: refused"),
        ({"w": "/etc/passwd"}, "no file of its folder: refused"),
        ({"w": "gone"}, "shards that do not exist: gone"),
        ({"w": f"part-0.{kind}"}, "does not hold w"),
        ({"w": index.name}, "is an index of shards"),
        ({"w": 3}, "no file of its folder: refused"),
        ({}, "not an index of weights"),
    ):
        index.write_text(json.dumps({"weight_map": wrong}))
        with pytest.raises(InputError, match=words):
            open_weights(index)


def test_a_folder_with_a_torch_file_is_read(tmp_path):
    write_torch_file(tmp_path / "pytorch_model.bin", state())
    assert set(open_weights(find_weights(str(tmp_path)))) == set(KEYS)


UNREADABLE = {
    "git-lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
    "a page": (b"<html>Access denied</html>", "a web page"),
    "a pickle": (pickle.dumps({"a": 1}, 2), "a pickle that torch.save did not write: refused"),
    "gzip": (b"\x1f\x8b\x08\x00", "compressed with gzip"),
    "HDF5": (b"\x89HDF\r\n\x1a\n", "an HDF5 file"),
    "tar": (bytes(257) + b"ustar" + bytes(250), "a tar archive"),
    "JSON": (b'{"a": 1}', "not an index of weights"),
    "nothing": (b"", "is empty"),
    "text": (b"hello, world", "it begins with b'hello, w'"),
}


@pytest.mark.parametrize("name", UNREADABLE)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ""])
def test_error_for_other_files_names_their_kind(tmp_path, name, suffix):
    content, words = UNREADABLE[name]
    (tmp_path / f"a{suffix}").write_bytes(content)
    with pytest.raises(InputError) as caught:
        open_weights(tmp_path / f"a{suffix}")
    message = str(caught.value)
    if name == "text" and suffix == ".safetensors":
        words = "not a complete safetensors file"
    assert words in message and "\n" not in message
    assert len(message.replace(str(tmp_path), "")) <= 200


def test_torchscript_and_whole_models_are_refused_by_name(tmp_path):
    with zipfile.ZipFile(tmp_path / "script.pt", "w") as archive:
        archive.writestr("m/constants.pkl", b"")
        archive.writestr("m/data.pkl", b"")
    with pytest.raises(InputError, match="is TorchScript"):
        open_weights(tmp_path / "script.pt")
    write_archive(tmp_path / "whole.pth", b"\x80\x02ctimm.models\nViT\n)\x81}b.")
    with pytest.raises(InputError, match=r"whole object made by timm\.models\.ViT.*refused"):
        open_weights(tmp_path / "whole.pth")
    quantised = b"ctorch._utils\n_rebuild_qtensor\n)R"
    items = piece("blocks.0.norm1.weight") + tensor() + piece("cls_token") + quantised
    write_archive(tmp_path / "a.pth", b"\x80\x02}(" + items + b"u.")
    with pytest.raises(InputError, match=r"cls_token is made by torch\._utils\._rebuild_qt"):
        check_weights(zoo.lookup(TINY.model, tiny.TEACHER), tmp_path / "a.pth")


def test_error_for_a_file_without_read_permission(tmp_path, monkeypatch):
    (tmp_path / "a.pth").write_bytes(b"PK")

    def denied(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", denied)
    with pytest.raises(InputError, match=r"cannot be read \(Permission denied\)"):
        open_weights(tmp_path / "a.pth")


def test_weights_of_another_model_name_few_keys(tmp_path):
    other = {f"layers.{n}.{'x' * 40}": np.zeros(1, np.float32) for n in range(100)}
    save_file(other | {"layer1.0.conv1.weight": np.zeros(1, np.float32)}, tmp_path / "a")
    with pytest.raises(InputError, match=r"101 keys begin with layer1\., layers\.; .*a ResNet's"):
        check_weights(zoo.lookup(TINY.model, tiny.TEACHER), tmp_path / "a")
    tensors = complete(tmp_path)
    lacking = {key: tensors[key] for key in sorted(tensors)[::2]}
    save_file(lacking, tmp_path / "b")
    with pytest.raises(InputError) as caught:
        check_weights(zoo.lookup(TINY.model, tiny.TEACHER | {"num_classes": 0}), tmp_path / "b")
    message = str(caught.value)
    assert len(message.replace(str(tmp_path), "")) <= 200 and "more" in message


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_tensor_that_is_not_finite_is_named_at_loading(tmp_path, bad):
    tensors = complete(tmp_path)
    tensors["blocks.1.mlp.fc1.weight"][3, 2] = bad
    save_file(tensors, tmp_path / "a")
    spec = zoo.lookup(TINY.model, tiny.TEACHER | {"num_classes": 0})
    with pytest.raises(InputError, match=r"blocks\.1\.mlp\.fc1\.weight has 1 NaN"):
        load_model(spec, tmp_path / "a")


def test_integers_and_floats_of_8_bits_are_no_weights(tmp_path):
    tensors = complete(tmp_path)
    spec = zoo.lookup(TINY.model, tiny.TEACHER | {"num_classes": 0})
    eight = {key: value.astype(ml_dtypes.float8_e4m3fn) for key, value in tensors.items()}
    write_torch_file(tmp_path / "a.pth", eight)
    with pytest.raises(InputError, match="is float8_e4m3fn"):
        load_model(spec, tmp_path / "a.pth")
    tensors["norm.weight"] = tensors["norm.weight"].astype(np.int8)
    save_file(tensors, tmp_path / "a")
    with pytest.raises(InputError, match=r"not floats of 16 bits or more: norm\.weight is int8"):
        load_model(spec, tmp_path / "a")


def test_run_logs_the_loaded_part(tmp_path):
    whole = complete(tmp_path)
    content = {
        "student": {f"module.backbone.{key}": value + 1 for key, value in whole.items()},
        "teacher": {f"backbone.{key}": value for key, value in whole.items()} | HEAD,
    }
    write_torch_file(tmp_path / "dino.pth", content)
    settings = ModelSettings(TINY.model, str(tmp_path / "dino.pth"), tiny.TEACHER)
    found = provenance(
        *resolve_model("teacher", settings)[:1], settings.weights, tmp_path / "dino.pth"
    )
    assert found["taken"] == (
        "part teacher, prefix backbone. removed, left out: head.mlp.0.weight, not loaded: "
        "student.module.backbone"
    )
    assert found["taken"] in describe(found) and json.loads(json.dumps(found)) == found


def test_arguments_of_timm_that_change_no_weight_are_accepted():
    harmless = {
        "drop_path_rate": 0.1,
        "dynamic_img_size": True,
        "weight_init": "jax",
        "in_chans": 3,
    }
    config = {"architecture": TINY.model, "model_args": {"depth": 3} | harmless}
    assert model_arguments(config) == {"depth": 3, "num_classes": 0}
    config["model_args"]["in_chans"] = 1
    with pytest.raises(InputError, match="in_chans 1"):
        model_arguments(config)


def test_an_npz_of_absurd_arrays_is_one_line(tmp_path):
    path = tmp_path / "a.npz"
    for arrays in ({"a": np.array([{}], object)}, {"a": np.array(["x"])}):
        np.savez(path, **arrays)
        with pytest.raises(InputError, match=r"not a complete \.npz file"):
            open_weights(path)
    np.savez_compressed(path, a=np.zeros(1000))
    with pytest.raises(InputError, match="is compressed; save it without compression"):
        open_weights(path)
    for shape in (
        "(1",
        "(-1,)",
        "(4, 2**70)",
        "(1099511627776, 1099511627776)",
        "(0, 1" + "0" * 30 + ")",
    ):
        header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}}}".encode()
        header += b" " * (118 - len(header)) + b"\n"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(
                "a.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header
            )
        with pytest.raises(InputError, match=r"not a complete \.npz file"):
            open_weights(path)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (
            {"norm.weight": "fc_norm.weight", "norm.bias": "fc_norm.bias"},
            "try overrides fc_norm=True",
        ),
        ({"cls_token": "head_dist.weight"}, "class_token=False, global_pool='avg', distilled=True"),
        ({"blocks.0.attn.qkv.bias": ""}, "try overrides qkv_bias=False"),
    ],
)
def test_differences_that_an_override_explains_suggest_it(tmp_path, changed, words):
    tensors = complete(tmp_path)
    renamed = {changed.get(key, key): tensor for key, tensor in tensors.items()}
    renamed.pop("", None)
    save_file(renamed, tmp_path / "a")
    with pytest.raises(InputError) as caught:
        check_weights(zoo.lookup(TINY.model, tiny.TEACHER | {"num_classes": 0}), tmp_path / "a")
    message = str(caught.value)
    assert words in message and len(message.replace(str(tmp_path), "")) <= 200


def test_views_of_one_large_storage_are_read(tmp_path):
    numbers = np.arange(100, dtype=np.float32)
    pushed = [tensor((2, 3), (3, 1), offset, elements=100) for offset in (0, 40, 94)]
    path = write_archive(tmp_path / "a.pth", state_dict(*pushed), numbers.tobytes())
    found = open_weights(path)
    for key, offset in (("w0", 0), ("w1", 40), ("w2", 94)):
        expected = numbers[offset : offset + 6].reshape(2, 3)
        np.testing.assert_array_equal(found[key].read(), expected)


def test_a_repository_of_shards_is_read_from_the_cache(tmp_path, monkeypatch):
    snapshot = tmp_path / "models--somebody--mine" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (tmp_path / "models--somebody--mine" / "refs").mkdir()
    (tmp_path / "models--somebody--mine" / "refs" / "main").write_text("0" * 40)
    for number, key in enumerate(KEYS):
        write_torch_file(snapshot / f"part-{number}.bin", {key: state()[key]})
    weight_map = {key: f"part-{number}.bin" for number, key in enumerate(KEYS)}
    index = snapshot / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert find_weights("somebody/mine") == index
    assert set(open_weights(index)) == set(KEYS)


def test_averaged_weights_without_names_are_mentioned(tmp_path):
    names = b"](" + tensor() + tensor() + b"e"
    pickled = b"\x80\x02}(" + piece("model") + state_dict(tensor())[2:-1]
    pickled += piece("ema") + b"}(" + piece("shadow_params") + names + b"uu."
    taken = open_weights(write_archive(tmp_path / "a.pth", pickled)).taken
    assert taken.part == "model" and "ema.shadow_params (a list of 2 tensors" in str(taken)


def test_a_shard_is_never_an_index_nor_a_list(tmp_path):
    for one, other in ("ab", "ba"):
        index = json.dumps({"weight_map": {"w": f"{other}.index.json"}})
        (tmp_path / f"{one}.index.json").write_text(index)
    with pytest.raises(InputError, match="is an index of shards"):
        open_weights(tmp_path / "a.index.json")
    write_archive(tmp_path / "b.index.json", b"\x80\x02](" + tensor() + b"e.")
    with pytest.raises(InputError, match="holds no dict of tensors"):
        open_weights(tmp_path / "a.index.json")


def test_thousands_of_models_in_one_state_dict_are_refused(tmp_path):
    tensors = {f"{i}.patch_embed.proj.weight": np.zeros(1, np.float32) for i in range(17)}
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(InputError, match="17 models in one state dict"):
        open_weights(tmp_path / "a.safetensors")


def test_a_safetensors_header_may_begin_as_an_archive(tmp_path):
    header = json.dumps({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    header = header.ljust(int.from_bytes(b"PK", "little"))
    size = len(header).to_bytes(8, "little")
    (tmp_path / "a").write_bytes(size + header + b"\0\0\x80?")
    assert open_weights(tmp_path / "a")["w"].read() == 1


def test_a_name_that_no_file_may_have_is_one_line():
    with pytest.raises(InputError, match="File name too long"):
        find_weights("x" * 300)
