"""Tests of the command line: invalid input gives one line and exit status 2, before any work."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

from singer_jax import main
from singer_jax.jobs import JOBS
from tests import cli, shipped, tiny

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    return tiny.write_teacher(tmp_path_factory.mktemp("weights") / "teacher.safetensors")


@pytest.fixture
def config(teacher):
    config = tiny.config(teacher)
    config.log.every_steps = config.checkpoint.every_steps = 100
    return config


def command(*arguments: str) -> tuple[int, str]:
    """Returns exit status and output of the real command."""
    done = subprocess.run(
        [sys.executable, "-m", "singer_jax.main", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=cli.PATIENCE,
    )
    return done.returncode, done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--workdir=x"], ["--config", "missing"]),
        (["--config=configs/singer_vitl_vitt.py"], ["--workdir", "missing"]),
        (["--config=configs/nothing.py", "--workdir=x"], ["no file configs/nothing.py"]),
        (
            ["--config=configs/singer_vitl_vitt.py:papper", "--workdir=x"],
            ["unknown protocol 'papper'", "closest: paper"],
        ),
        (
            ["--config=configs/singer_vitl_vitt.py", "--workdir=x", "--config.methd.rank=3"],
            ["unknown configuration key 'methd.rank'", "closest: method.rank"],
        ),
        (
            ["--config=configs/singer_vitl_vitt.py", "--workdir=x", "--config.method=fitnet"],
            ["method: is a section, not a key; set one of its keys, such as method."],
        ),
        (
            [
                "--config=configs/singer_vitl_vitt.py",
                "--workdir=x",
                "--config.teacher.overrides={'img_size': 16}",
                "--config.optimizer.rate=1",
            ],
            ["unknown configuration key 'optimizer.rate'", "known: optimizer.b1"],
        ),
        (
            [
                "--config=configs/singer_vitl_vitt.py",
                "--workdir=x",
                "--config.student.overrides.depth=3",
            ],
            ["student.overrides.depth: give", "--config.student.overrides=\"{'depth': 3}\""],
        ),
        (
            ["--config=configs/singer_vitl_vitt.py", "--workdir=x", "--config.batch_size=many"],
            ["config.batch_size", "many"],
        ),
        (["--config=configs/quickstart.py", "--workdir=x", "--wokdir=y"], ["wokdir"]),
        (["--config=configs/quickstart.py", "--workdir=x", "resume"], ["'resume'"]),
    ],
)
def test_a_wrong_flag_is_one_line(arguments, words):
    status, printed = command(*arguments)
    assert status == 2, printed
    assert len(printed.splitlines()) == 1, printed
    for word in ["singer_jax: ", *words]:
        assert word in printed


def test_help_lists_commands_and_configurations():
    done = subprocess.run(
        [sys.executable, "-m", "singer_jax.main", "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=cli.PATIENCE,
    )
    assert done.returncode == 0 and not done.stderr
    for name in (*(ROOT / "configs").glob("*.py"),):
        assert f"  {name.stem} " in done.stdout
    assert "--workdir" in done.stdout and max(map(len, done.stdout.splitlines())) < 130


def test_a_mistyped_model_is_told_before_weights_are_fetched(config, tmp_path, capsys, monkeypatch):
    from singer_jax.models import network

    fetched = []
    monkeypatch.setattr(network, "find_weights", fetched.append)
    for role in ("student", "teacher"):
        broken = config.copy_and_resolve_references()
        broken[role].model = "vit_larg_patch16_224"
        broken.teacher.weights = "timm/vit_tiny_patch16_224.augreg_in21k"
        assert main.run(broken, tmp_path / role) == 2
        assert "unknown model 'vit_larg_patch16_224'" in capsys.readouterr().err
    assert not fetched


def test_a_wrong_source_is_not_called_a_path(config, tmp_path, capsys):
    config.data.source = str(tmp_path / "nope")
    assert main.run(config, tmp_path / "run") == 2
    printed = capsys.readouterr().err
    assert f"data.source: no folder at {tmp_path}/nope" in printed and "data.path" not in printed


def _break(key: str, value: object):
    def change(config, folder) -> None:
        parents, name = key.split(".")[:-1], key.split(".")[-1]
        section = config
        for parent in parents:
            section = section[parent]
        with section.ignore_type():
            section[name] = value

    return change


def _other_architecture(config, folder) -> None:
    config.teacher.overrides.embed_dim = 32


def _missing_folder(config, folder) -> None:
    config.data.source, config.data.path = "folder", str(folder / "nowhere")


def _empty_folder(config, folder) -> None:
    (folder / "empty").mkdir()
    config.data.source, config.data.path = "folder", str(folder / "empty")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_break("job", "distil"), ["unknown job 'distil'", "closest: distill"]),
        (_break("teacher.model", "vit_larg_patch16_224"), ["unknown model", "vit_large_patch16"]),
        (_break("data.source", "imagenet2021"), ["unknown data.source", "imagenet2012"]),
        (_break("method.name", "singr"), ["unknown method.name 'singr'", "closest: singer"]),
        (_break("method.layers", (1, 3)), ["method.layers: 3 is out of range", "0 to 2"]),
        (_break("method.nullspace.mode", "projct"), ["nullspace.mode", "closest: project"]),
        (_break("batch_size", 7), ["batch_size: 7", "2 devices"]),
        (_break("precision", "float16"), ["unknown precision", "bfloat16"]),
        (_break("optimizer.name", "adam"), ["unknown optimizer.name", "adamw"]),
        (_break("teacher.weights", "/nowhere/w.safetensors"), ["/nowhere/w.safetensors"]),
        (_break("teacher.weights", ""), ["teacher.weights: empty"]),
        (
            _break("student.overrides", {"width": 3}),
            [
                "unknown configuration key 'student.overrides.width'",
                "known: student.overrides.",
            ],
        ),
        (_break("grad_accum_steps", 0), ["grad_accum_steps: 0", ">= 1"]),
        (_break("checkpoint.every_steps", 0), ["checkpoint.every_steps: 0", ">= 1"]),
        (
            _break("student.overrides", {"num_heads": 0}),
            ["student.overrides.num_heads: 0; give an"],
        ),
        (
            _break("student.overrides", {"depth": "2"}),
            ["student.overrides.depth: '2'; give an integer"],
        ),
        (
            _break("student.overrides", {"mlp_ratio": 0}),
            ["student.overrides.mlp_ratio: 0", "> 0"],
        ),
        (
            _break("student.overrides", {"mlp_ratio": 0.001}),
            ["mlp_ratio 0.001 leaves the MLP empty"],
        ),
        (_break("student.overrides", {"init_values": "x"}), ["init_values: 'x'", "None"]),
        (_break("seed", -1), ["seed: -1; give an integer >= 0"]),
        (_break("data.workers", -1), ["data.workers: -1; give an integer >= 0"]),
        (_break("data.crop_area", (1.0, 0.1)), ["data.crop_area: (1.0, 0.1); give", "ascending"]),
        (_break("method", 3), ["unknown configuration key 'method'"]),
        (_break("teacher.overrides.num_classes", 5), ["num_classes 5", "has 0"]),
        (_break("log.wandb", True), ["log.wandb", "pip install wandb"]),
        (_other_architecture, ["vit_tiny_patch16_224", "mis-shaped: ", "is [24], expected [32]"]),
        (_missing_folder, ["data.path: no folder at", "nowhere"]),
        (_empty_folder, ["no image", "empty"]),
    ],
)
def test_wrong_input_is_one_line(config, tmp_path, capsys, change, words):
    config.mesh.data = 2
    change(config, tmp_path)
    assert main.run(config, tmp_path / "run") == 2
    printed = capsys.readouterr().err
    assert len(printed.splitlines()) == 1, printed
    for word in ["singer_jax: ", *words]:
        assert word in printed
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_an_unwritable_work_directory_is_named(config, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main.run(config, tmp_path / "file" / "run") == 2
    printed = capsys.readouterr().err
    assert f"--workdir: cannot write to {tmp_path}/file/run" in printed


def test_a_work_directory_of_another_run_is_refused(config, tmp_path, capsys):
    config.steps = 1
    assert main.run(config, tmp_path) == 0
    written = (tmp_path / "config.json").read_text()
    config.method.rank, config.seed = 2, 5
    assert main.run(config, tmp_path) == 2
    printed = capsys.readouterr().err
    assert "another configuration: method.rank: 4 -> 2; seed: 0 -> 5" in printed
    assert (tmp_path / "config.json").read_text() == written
    # What does not change the result may change.
    config.method.rank, config.seed = 4, 0
    config.steps, config.checkpoint.keep = 2, 7
    assert main.run(config, tmp_path) == 0
    assert json.loads((tmp_path / "config.json").read_text())["checkpoint"]["keep"] == 7


def test_a_start_that_fails_binds_nothing(config, tmp_path, capsys):
    """Before the first checkpoint, another start may change any setting."""
    run, weights = tmp_path / "run", tmp_path / "teacher.safetensors"
    config.steps, config.teacher.weights = 1, str(weights)
    run.mkdir()
    (run / "config.json").write_text("left by an earlier failure")
    whole = Path(tiny.write_teacher(weights)).read_bytes()

    def refused(words: str) -> None:
        assert main.run(config, run) == 2
        printed = capsys.readouterr().err
        assert words in printed and len(printed.splitlines()) == 1, printed
        assert (run / "config.json").read_text() == "left by an earlier failure"

    weights.write_bytes(whole[:-100])
    refused("not a complete safetensors file")
    weights.write_bytes(whole)
    config.data.source = str(tiny.write_images(tmp_path / "images" / "train", 8).parent)
    config.evals.every_steps = 1
    refused("nothing to evaluate on")
    config.evals.every_steps, config.method.rank, config.seed = 0, 3, 7
    assert main.run(config, run) == 0
    assert json.loads((run / "config.json").read_text())["method"]["rank"] == 3


def test_another_teacher_is_refused_on_resume(config, tmp_path, capsys):
    weights = tiny.write_teacher(tmp_path / "teacher.safetensors")
    config.steps, config.teacher.weights, config.method.name = 1, str(weights), "fitnet"
    assert main.run(config, tmp_path / "run") == 0
    tensors = load_file(weights)
    tensors["blocks.1.mlp.fc1.bias"][3] += 1e-4
    save_file(tensors, weights)
    config.steps = 2
    capsys.readouterr()
    assert main.run(config, tmp_path / "run") == 2
    printed = capsys.readouterr().err
    assert f"other teacher weights than {weights} now holds; use a new --workdir" in printed
    tiny.write_teacher(weights)
    assert main.run(config, tmp_path / "run") == 0


def test_a_checkpoint_that_says_nothing_of_its_teacher_is_continued(config, tmp_path, monkeypatch):
    from singer_jax.runs.checkpoints import Checkpoints

    save = Checkpoints.save

    def save_as_before(self, state, step, meta):
        save(self, state, step, {k: v for k, v in meta.items() if k != "teacher"})

    config.steps, config.method.name = 1, "fitnet"
    monkeypatch.setattr(Checkpoints, "save", save_as_before)
    assert main.run(config, tmp_path) == 0
    monkeypatch.undo()
    config.steps = 2
    assert main.run(config, tmp_path) == 0


def test_the_command_line_starts_no_job_when_imported():
    """A data loader's worker imports `main` again, which must not initialise an accelerator."""
    code = "import sys, singer_jax.main; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


@pytest.mark.parametrize(
    ("packages", "forbidden"),
    [
        (
            ["singer_jax.models.weights", "singer_jax.methods"],
            ["grain", "tensorflow_datasets", "clu", "ml_collections", "singer_jax.data"],
        ),
        (["singer_jax.training.settings", "singer_jax.training.setup"], ["orbax"]),
        (
            ["singer_jax.data.sources", "singer_jax.data.images"],
            ["jax", "singer_jax.models", "singer_jax.methods"],
        ),
    ],
)
def test_packages_import_only_what_they_may(packages, forbidden):
    """Models and methods import without grain, TFDS, clu and ml_collections."""
    block = "\n".join(
        [
            "import sys",
            f"for name in {forbidden!r}: sys.modules[name] = None",
            *(f"import {package}" for package in packages),
        ]
    )
    done = subprocess.run(
        [sys.executable, "-c", block], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("file", "protocol"),
    [
        (path.name, variant)
        for path in sorted((ROOT / "configs").glob("*.py"))
        for variant in shipped.variants(path.stem)
    ],
)
def test_every_configuration_loads_and_says_how_to_run_it(file, protocol):
    from importlib.util import module_from_spec, spec_from_file_location

    spec = spec_from_file_location(file, ROOT / "configs" / file)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config(protocol)
    assert config.job in JOBS
    assert f"configs/{file}" in module.__doc__ or "launch/run.sh" in module.__doc__
    if config.job == "distill":
        from singer_jax.config import settings_of
        from singer_jax.models.zoo import lookup

        assert lookup(config.teacher.weights).name == lookup(config.teacher.model).name
        for own in settings_of(config).each().values():
            lookup(own.student.model)
        assert (config.method.layer_mapping == "official") == (protocol == "paper")
        assert (config.data.normalisation == "imagenet") == (protocol == "paper")
