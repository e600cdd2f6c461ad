"""Tests of exported students: bit-exact timm weights, and a self-contained program."""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from singer_jax import main
from singer_jax.config import export
from singer_jax.errors import RunError
from singer_jax.evaluation.backbone import ModelSelection, load_backbone
from singer_jax.library import load_model
from singer_jax.models import zoo
from singer_jax.models.export_timm import to_hub_config
from singer_jax.models.program import check_program, features_program, largest_difference
from tests import tiny

LOAD_WITHOUT_US = """
import sys
sys.modules["singer_jax"] = None
import jax.export, numpy
program = jax.export.deserialize(bytearray(open(sys.argv[1], "rb").read()))
numpy.savez(sys.argv[3], **program.call(numpy.load(sys.argv[2])))
"""


@pytest.mark.parametrize(
    "model",
    [
        "vit_tiny_patch16_224",
        "vit_tiny_patch14_reg4_dinov2",
        "vit_small_plus_patch16_dinov3_qkvb",
        "vit_base_patch16_siglip_224",
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_export_of_imported_weights_returns_the_same_bytes(tmp_path, model, dtype):
    import ml_dtypes  # noqa: F401 - names bfloat16

    sizes = {**tiny.TEACHER, "num_classes": 0}
    given = tiny.write_teacher(tmp_path / "model.safetensors", model)
    tensors = {key: value.astype(dtype) for key, value in load_file(given).items()}
    save_file(tensors, given)
    spec = zoo.lookup(model, sizes)
    (tmp_path / "config.json").write_text(json.dumps(to_hub_config(spec)))
    config = export()
    config.weights, config.formats = str(given), ("timm",)
    assert main.run(config, tmp_path / "out") == 0
    exported = load_file(tmp_path / "out" / "student" / "model.safetensors")
    assert set(exported) == set(tensors)
    for key, value in tensors.items():
        assert exported[key].dtype == value.dtype
        assert exported[key].tobytes() == value.tobytes(), key
    stated = json.loads((tmp_path / "out" / "student" / "config.json").read_text())
    assert stated == json.loads(json.dumps(to_hub_config(spec)))
    assert stated["num_features"] == 24
    assert stated["pretrained_cfg"]["input_size"] == [3, 16, 16]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    config = tiny.config(tiny.write_teacher(folder / "teacher.safetensors"))
    config.steps = 4
    assert main.run(config, folder / "run") == 0
    return folder / "run"


def test_the_program_runs_without_this_package(run, mesh, tmp_path):
    config = export()
    assert main.run(config, run) == 0  # the run itself is exported where nothing else is named
    images = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)
    np.save(tmp_path / "images.npy", images)
    program = run / "student" / "features.stablehlo"
    command = [sys.executable, "-c", LOAD_WITHOUT_US, program, tmp_path / "images.npy"]
    subprocess.run([*map(str, command), str(tmp_path / "out.npz")], check=True)
    found = np.load(tmp_path / "out.npz")
    backbone = load_backbone(mesh, ModelSelection(run=str(run)))
    model = backbone.network.merge(backbone.params)
    tokens = model.features(backbone.network.spec.prepare(images))[-1]
    np.testing.assert_allclose(found["tokens"], tokens, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found["pooled"], model.pooled(tokens), rtol=1e-4, atol=1e-5)


def test_a_variant_of_a_timm_model_keeps_its_name(tmp_path, caplog):
    config = tiny.config(tiny.write_teacher(tmp_path / "teacher.safetensors"))
    config.student.model, config.steps = "deit3_tiny_patch16_224", 1
    assert main.run(config, tmp_path / "run") == 0
    config = export()
    config.formats = ("timm",)
    with caplog.at_level("INFO", "singer_jax"):
        assert main.run(config, tmp_path / "run") == 0
    assert "deit3_tiny_patch16_224 exported to" in caplog.text
    student = tmp_path / "run" / "student"
    assert "# deit3_tiny_patch16_224\n" in (student / "README.md").read_text()
    for folder in (tmp_path / "run", student):
        assert load_model(folder).spec.name == "deit3_tiny_patch16_224"


def test_an_earlier_checkpoint_can_be_exported(run, tmp_path, capsys):
    config = export()
    config.run, config.step, config.formats = str(run), 2, ("timm",)
    assert main.run(config, tmp_path / "two") == 0
    config.step = None
    assert main.run(config, tmp_path / "last") == 0
    two, last, trained = (
        load_file(folder / "student" / "model.safetensors")
        for folder in (tmp_path / "two", tmp_path / "last", run)
    )
    assert all(np.array_equal(last[key], trained[key]) for key in trained)
    assert not np.array_equal(two["cls_token"], last["cls_token"])
    config.step = 3
    assert main.run(config, tmp_path / "three") == 2
    assert "holds checkpoints [2, 4], not 3" in capsys.readouterr().err


def test_the_end_of_a_run_says_how_images_are_prepared_and_where_it_comes_from(run):
    student = run / "student"
    stated = json.loads((student / "config.json").read_text())["pretrained_cfg"]
    size = stated["input_size"][1]
    assert stated["interpolation"] == "bilinear"
    # As data.images.EvalTransform resizes the shorter side.
    assert int(size / stated["crop_pct"]) == int(size * 256 / 224) == 18
    card = (student / "README.md").read_text()
    assert "`singer`" in card and "32 seen (4 steps of 8), from `digits`" in card
    assert str(student.parent.parent) not in card


def test_formats_are_written_side_by_side_and_the_card_names_them(run, tmp_path):
    config = export()
    config.run, config.formats = str(run), ("timm", "huggingface")
    assert main.run(config, tmp_path / "out") == 0
    student = tmp_path / "out" / "student"
    files = {str(path.relative_to(student)) for path in student.rglob("*.*") if path.is_file()}
    theirs = {"config.json", "model.safetensors", "preprocessor_config.json", "README.md"}
    assert files == {"config.json", "model.safetensors", "README.md"} | {
        f"huggingface/{name}" for name in theirs
    }
    assert "features.stablehlo" not in (student / "README.md").read_text()
    assert "AutoModel" in (student / "huggingface" / "README.md").read_text()
    config.formats = ("stablehlo",)
    assert main.run(config, tmp_path / "out") == 0
    card = (student / "README.md").read_text()
    assert "features.stablehlo" in card and "local-dir:" in card  # what was there before still is


@pytest.mark.parametrize("absent", ["jax2onnx", "onnxruntime"])
def test_onnx_without_its_extra_is_refused_before_anything_is_read(
    tmp_path, monkeypatch, capsys, absent
):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == absent else name)
    config = export()
    config.weights, config.formats = "not/there", ("onnx",)
    assert main.run(config, tmp_path) == 2
    assert "pip install 'singer-jax[onnx]'" in capsys.readouterr().err


def test_a_student_that_timm_could_not_be_told_is_refused(tmp_path, capsys):
    config = tiny.config(tiny.write_teacher(tmp_path / "teacher.safetensors"))
    config.student.overrides.norm_eps = 1e-3
    assert main.run(config, tmp_path / "run") == 2
    assert "norm_eps" in capsys.readouterr().err


def test_a_program_that_returns_nan_differs_from_the_model():
    ones = [np.ones(2, np.float32), np.ones(2, np.float32)]
    assert largest_difference(ones, ones) == 0
    for wrong in ([np.full(2, np.nan, np.float32), ones[1]], [ones[0], ones[1] * np.nan]):
        assert not largest_difference(wrong, ones) <= 1e-4
        assert not largest_difference(ones, wrong) <= 1e-4


def test_a_named_part_is_exported_in_a_dtype_that_others_read(tmp_path):
    sizes = {**tiny.TEACHER, "num_classes": 0}
    spec = zoo.lookup("vit_tiny_patch16_224", sizes)
    tensors = load_file(tiny.write_teacher(tmp_path / "a.safetensors"))
    wide = {key: value.astype(np.float64) for key, value in tensors.items()}
    other = {key: value + 1 for key, value in wide.items()}
    both = {f"one.{key}": value for key, value in wide.items()}
    save_file(both | {f"two.{key}": value for key, value in other.items()}, tmp_path / "b")
    (tmp_path / "config.json").write_text(json.dumps(to_hub_config(spec)))
    config = export()
    config.weights, config.formats = str(tmp_path / "b"), ("timm",)
    config.weights_key = "two"
    assert main.run(config, tmp_path / "out") == 0
    exported = load_file(tmp_path / "out" / "student" / "model.safetensors")
    for key, value in tensors.items():
        assert exported[key].dtype == np.float32
        np.testing.assert_array_equal(exported[key], value + 1)


def test_an_epsilon_that_timm_has_no_argument_for_is_refused_before_loading(
    tmp_path, monkeypatch, capsys
):
    tiny.write_teacher(tmp_path / "model.safetensors")
    spec = zoo.lookup("vit_tiny_patch16_224", {**tiny.TEACHER, "num_classes": 0})
    stated = to_hub_config(spec)
    stated["model_args"]["norm_eps"] = 1e-12
    (tmp_path / "config.json").write_text(json.dumps(stated))
    monkeypatch.setattr("singer_jax.jobs.export.load_backbone", None)
    config = export()
    config.weights, config.formats = str(tmp_path), ("timm",)
    assert main.run(config, tmp_path / "out") == 2
    assert "norm_eps" in capsys.readouterr().err


def test_a_program_of_another_model_is_refused(run, mesh):
    backbone = load_backbone(mesh, ModelSelection(run=str(run)))
    program = features_program(backbone.network, backbone.params)
    check_program(program, backbone.network, backbone.params)
    other = jax.tree.map(lambda leaf: -leaf, backbone.params)
    with pytest.raises(RunError, match="differs from the model"):
        check_program(program, backbone.network, other)
