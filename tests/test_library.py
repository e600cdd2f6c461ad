"""Tests that the code blocks of docs/library.md run, and that all public names exist."""

import dataclasses
import errno
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from flax import nnx
from huggingface_hub import constants
from safetensors.numpy import load_file

import singer_jax
from singer_jax import library, main
from singer_jax.config import settings_of
from singer_jax.errors import InputError, RunError
from singer_jax.models.network import resolve_model
from singer_jax.models.weights import load_model as load_weights
from singer_jax.models.weights import to_timm
from tests import cli, tiny
from tests.models.test_weights import fake_hub

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "library.md").read_text()
TITLES = re.findall(r"^## (.*)$", PAGE, flags=re.M)
BLOCKS = dict(zip(TITLES, re.findall(r"```python\n(.*?)```", PAGE, flags=re.S), strict=True))
WEIGHTS = "timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k"


@pytest.fixture(scope="module")
def hub(tmp_path_factory) -> Path:
    """Creates a Hugging Face cache with random weights under the names of real ones."""
    folder = tmp_path_factory.mktemp("hub")
    singer_jax.save_model(singer_jax.create_model("vit_tiny_patch16_224"), folder / "model")
    files = {path.name: path.read_bytes() for path in (folder / "model").iterdir()}
    fake_hub(folder / "hub", WEIGHTS, files)
    return folder / "hub"


def run(title: str, hub: Path, folder: Path, monkeypatch) -> dict[str, object]:
    """Returns the variables that a code block defines."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(hub))
    monkeypatch.chdir(folder)
    names: dict[str, object] = {"__name__": "__main__"}
    exec(compile(BLOCKS[title], title, "exec"), names)
    return names


@pytest.mark.parametrize("title", BLOCKS)
def test_a_block_is_short(title):
    assert len(BLOCKS[title].splitlines()) < 32


def test_patch_features(hub, tmp_path, monkeypatch, capsys):
    run("Patch features of a timm model", hub, tmp_path, monkeypatch)
    shape, statistics = capsys.readouterr().out.splitlines()
    assert shape == "(2, 196, 192)" and statistics == "(0.5, 0.5, 0.5) (0.5, 0.5, 0.5)"


def test_a_loop_of_one_s_own_trains_student_and_method_and_nothing_else(
    hub, tmp_path, monkeypatch, capsys
):
    names = run("SiNGER in your own training loop", hub, tmp_path, monkeypatch)
    assert np.isfinite(float(capsys.readouterr().out))
    images = np.random.default_rng(0).integers(0, 256, (2, 224, 224, 3), np.uint8)
    given = (names["both"], names["optimizer"], names["teacher"], images)
    losses = [float(names["step"](*given)) for _ in range(3)]
    assert losses[-1] < losses[0]
    singer_jax.save_model(names["student"], tmp_path / "student")
    saved = load_file(tmp_path / "student" / "model.safetensors")
    fresh = singer_jax.create_model("vit_tiny_patch16_224", embed_dim=96, depth=4, num_classes=0)
    start = to_timm(nnx.to_pure_dict(nnx.state(fresh)))
    assert set(saved) == set(start)
    assert not np.array_equal(saved["patch_embed.proj.weight"], start["patch_embed.proj.weight"])
    # Nothing but Params is trained: the projection of the refiner is as the method made it.
    again = singer_jax.Singer(
        names["teacher"], names["student"].arch, singer_jax.SingerSettings(rank=16), nnx.Rngs(0)
    )
    for layer, refiner in names["method"].refiner.items():
        np.testing.assert_array_equal(refiner.projection[...], again.refiner[layer].projection[...])
    before, after = (
        to_timm(nnx.to_pure_dict(nnx.state(model)))
        for model in (singer_jax.load_model(WEIGHTS), names["teacher"])
    )
    for key, value in before.items():
        np.testing.assert_array_equal(after[key], value)


def test_a_student_module_of_your_own_has_a_finite_loss(hub, tmp_path, monkeypatch):
    names = run("A student module of your own", hub, tmp_path, monkeypatch)
    images = np.random.default_rng(0).integers(0, 256, (2, 224, 224, 3), np.uint8)
    teacher, student, method = (names[name] for name in ("teacher", "student", "method"))

    def loss(student: nnx.Module) -> object:
        seen = singer_jax.ModelFeatures(student, student.features(images))
        return sum(method.loss(of_teacher, seen, singer_jax.Batch()).values())

    of_teacher = singer_jax.ModelFeatures.of(teacher, images)
    value, gradients = nnx.value_and_grad(loss)(student)
    assert np.isfinite(value)
    for leaf in (gradients.embed.kernel, gradients.blocks[0].kernel, gradients.blocks[1].kernel):
        assert np.any(leaf[...] != 0) and np.all(np.isfinite(leaf[...]))


def test_a_loaded_model_reads_the_size_that_the_user_gives(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(hub))
    model = singer_jax.load_model(WEIGHTS, image_size=64)
    assert model.arch.img_size == (64, 64)
    assert model.spec.prepare(np.zeros((1, 224, 224, 3), np.uint8)).shape == (1, 64, 64, 3)
    expected = singer_jax.TeacherSettings(weights=WEIGHTS, overrides={"img_size": 64})
    spec, file = resolve_model("teacher", expected)
    params = to_timm(load_weights(spec, file)[1])
    loaded = to_timm(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    assert loaded["pos_embed"].shape == (1, 17, 192)
    np.testing.assert_array_equal(loaded["pos_embed"], params["pos_embed"])
    with pytest.raises(InputError, match="img_size"):
        singer_jax.load_model(WEIGHTS, image_size=50)
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(InputError, match=r"image_size: .* keeps its size; load .*run/student"):
        singer_jax.load_model(tmp_path / "run", image_size=64)


def test_a_null_space(hub, tmp_path, monkeypatch, capsys):
    run("Look into a null space", hub, tmp_path, monkeypatch)
    count, share = capsys.readouterr().out.splitlines()
    assert count.startswith("96 of 192 directions below")
    assert 0 < float(share.split()[0]) < 1


def test_a_whole_run_and_its_student(hub, tmp_path, monkeypatch, capsys):
    run("A complete run", hub, tmp_path, monkeypatch)
    assert "depth=2" in capsys.readouterr().out
    run_again, exported = (
        singer_jax.load_model(tmp_path / "runs" / "mine" / part) for part in (".", "student")
    )
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
    features = [m.features(m.spec.prepare(images))[-1] for m in (run_again, exported)]
    np.testing.assert_array_equal(*features)


def test_a_new_method_trains_by_its_settings_and_by_its_name(hub, tmp_path, monkeypatch):
    settings_of(tiny.config("unused"))  # keys that were read before do not hide the new method's
    monkeypatch.setitem(singer_jax.METHODS, "norms", None)  # taken out again at the end
    names = run("A method of your own", hub, tmp_path, monkeypatch)
    given = singer_jax.DistillSettings(method=names["NormSettings"](weight=0.5))
    teacher = tiny.write_teacher(tmp_path / "teacher.safetensors")
    config = tiny.config(teacher)
    config.method.name, config.method.weight = "norms", 0.5
    config.steps = 2
    by_name = settings_of(config)
    assert by_name.method == given.method
    assert main.run(config, tmp_path / "command") == 0
    singer_jax.distill(dataclasses.replace(by_name, method=given.method), tmp_path / "library")
    cli.assert_same_student(tmp_path / "command", tmp_path / "library")
    rows = (tmp_path / "library" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(rows[-1])["train/loss_norms"] > 0


def test_public_names_exist_and_import_lazily():
    code = (
        "import singer_jax, sys\n"
        "assert not {'jax', 'flax', 'numpy'} & set(sys.modules)\n"
        "assert {'load_model', 'save_model', 'list_models', 'distill'} < set(dir(singer_jax))\n"
        "for name in singer_jax.__all__: getattr(singer_jax, name)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_a_full_disk_is_a_run_error_in_the_library_too(tmp_path, monkeypatch):
    def fill(settings: object, workdir: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(tmp_path / "config.json"))

    monkeypatch.setattr(library.job, "distill", fill)
    with pytest.raises(RunError, match=r"cannot write .*config\.json \(No space left on device\)"):
        library.distill(singer_jax.DistillSettings(), tmp_path)


def test_what_a_model_cannot_be_is_said(tmp_path):
    with pytest.raises(InputError, match=r"unknown model 'vit_tiny'; closest"):
        singer_jax.create_model("vit_tiny")
    with pytest.raises(InputError, match=r"unknown precision 'float16'"):
        singer_jax.create_model("vit_tiny_patch16_224", precision="float16")
    with pytest.raises(InputError, match=r"no weights file at .*nothing"):
        singer_jax.load_model(tmp_path / "nothing")
    model = singer_jax.VisionTransformer(singer_jax.Architecture(depth=1), rngs=nnx.Rngs(0))
    with pytest.raises(InputError, match=r"model\.spec: missing"):
        singer_jax.save_model(model, tmp_path)
