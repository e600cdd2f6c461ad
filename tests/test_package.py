"""The wheel, installed without the checkout: it has all that a run needs."""

import json
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests import tiny

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A folder with the package and its command, its dependencies left to this environment."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"  # building leaves files behind
    for name in ("singer_jax", "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "requirements.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet")
    build = ("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, source)
    subprocess.run([*pip, *build], check=True)
    (wheel,) = folder.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", folder / "site", wheel], check=True)
    return folder / "site"


def run(installed: Path, workdir: Path, *arguments: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(installed), "JAX_PLATFORMS": "cpu"}
    return subprocess.run(
        [sys.executable, installed / "bin" / "singer-jax", *arguments],
        env=environment | {"XLA_FLAGS": ""},
        cwd=workdir,
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
def test_a_shipped_configuration_runs_by_its_name(installed, tmp_path):
    teacher = tiny.write_teacher(tmp_path / "t.safetensors", "vit_large_patch16_224")
    done = run(
        installed,
        tmp_path,
        "--config=singer_vitl_vitt:paper",
        "--workdir=run",
        f"--config.teacher.weights={teacher}",
        f"--config.teacher.overrides={tiny.TEACHER}",
        f"--config.student.overrides={tiny.STUDENT}",
        "--config.method.rank=4",
        "--config.data.source=digits",
        "--config.data.workers=1",
        "--config.batch_size=8",
        "--config.steps=2",
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "student" / "model.safetensors").exists()
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["method"]["nullspace"]["mode"] == "init"  # of the protocol


def test_another_name_is_one_line_with_the_closest(installed, tmp_path):
    done = run(installed, tmp_path, "--config=singer_vitl_vit", "--workdir=run")
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1 and "closest: singer_vitl_vitt" in done.stderr


def test_the_wheel_holds_every_file_of_the_package(installed):
    for folder, place in ((ROOT / "singer_jax", "."), (ROOT / "configs", "configs")):
        for file in folder.rglob("*"):
            if file.is_file() and "__pycache__" not in file.parts:
                assert (installed / "singer_jax" / place / file.relative_to(folder)).is_file(), file


def test_the_extras_are_those_of_the_readme():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {"gpu", "tpu", "bench", "dev"} <= set(extras["optional-dependencies"])
