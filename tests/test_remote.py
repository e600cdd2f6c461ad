"""Work directories at gs:// URLs: an emulated store, accessed by the original clients."""

import contextlib
import json
import signal
import subprocess
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from safetensors.numpy import load, save

from singer_jax import main
from singer_jax.config import compare, evaluation, export, report
from singer_jax.errors import InputError, RunError
from singer_jax.evaluation.backbone import ModelSelection, load_backbone
from singer_jax.io import files
from singer_jax.runs import lock, manifests, verify
from singer_jax.runs.checkpoints import Checkpoints
from singer_jax.runs.metrics import MetricsWriter
from tests import cli, tiny
from tests.object_store import BUCKET, object_store


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """Sets the environment of this process and its children: one device, own caches, the store."""
    with object_store() as store, pytest.MonkeyPatch.context() as patch:
        cache = tmp_path_factory.mktemp("cache")
        for name, value in (store | {"XDG_CACHE_HOME": str(cache)}).items():
            patch.setenv(name, value)
        yield cli.environment(quickly=True)


@pytest.fixture(scope="module")
def config_file(tmp_path_factory) -> Path:
    return cli.write_config(tmp_path_factory.mktemp("config"))


# Ends itself while it saves its fourth checkpoint, after step 12.
VANISHING = """
import os, runpy, signal
from singer_jax.runs.checkpoints import Checkpoints
save = Checkpoints.save
def save_and_vanish(self, state, step, meta):
    save(self, state, step, meta)
    if step == 12:
        os.kill(os.getpid(), signal.SIGKILL)
Checkpoints.save = save_and_vanish
runpy.run_module("singer_jax.main", run_name="__main__")
"""


@pytest.fixture(scope="module")
def distil(environment, config_file):
    def start(workdir: object, **program: tuple[str, ...]) -> subprocess.Popen:
        arguments = (f"--config={config_file}", f"--workdir={workdir}", "--config.steps=20")
        return cli.start(environment, *arguments, **program)

    return start


def finish(process: subprocess.Popen) -> str:
    _, printed = process.communicate(timeout=cli.PATIENCE)
    assert process.returncode == 0, printed
    return printed


def rows(workdir: epath.Path) -> list[int]:
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["step"] for line in lines]


@pytest.fixture(scope="module")
def run(distil) -> epath.Path:
    """Returns the work directory of a run on the store that was killed and resumed to the end."""
    workdir = epath.Path(f"gs://{BUCKET}/runs/killed")
    process = distil(workdir, program=("-c", VANISHING))
    _, printed = process.communicate(timeout=cli.PATIENCE)
    assert process.returncode == -signal.SIGKILL, printed
    assert (workdir / "checkpoints" / "9" / "commit_success.txt").exists()
    assert not (workdir / "student").exists()
    assert {1, 2, 4, 6, 8} <= set(rows(workdir))  # all that a finished checkpoint has behind it
    assert "continuing after step" in finish(distil(workdir))
    return workdir


@pytest.mark.slow
def test_a_run_killed_on_a_store_ends_with_the_bits_of_a_local_run(run, distil, tmp_path):
    finish(distil(tmp_path))
    files = {"config.json", "weights.json", "metrics.jsonl"}
    names = files | {"tensorboard", "checkpoints", "student"}
    for folder in (run, epath.Path(tmp_path)):
        assert names <= {path.name for path in folder.iterdir()}
        assert any((folder / "tensorboard").iterdir())
        finished = {path.name for path in (folder / "checkpoints").iterdir()}
        assert finished == {"18", "20"}
    expected, found = (
        load((folder / "student" / "model.safetensors").read_bytes())
        for folder in (epath.Path(tmp_path), run)
    )
    assert set(found) == set(expected)
    for key, value in expected.items():
        np.testing.assert_array_equal(found[key], value, err_msg=key)
    assert rows(run) == sorted(set(rows(run)))  # no row twice
    assert set(rows(epath.Path(tmp_path))) <= set(rows(run))
    assert not Path("gs:").exists()


@pytest.mark.slow
def test_everything_that_reads_a_run_reads_it_from_a_store(run, tmp_path, capsys):
    measure = evaluation()
    measure.run, measure.data.source, measure.data.workers = str(run), "digits", 0
    measure.mesh.data = 1
    measure.probe.protocol, measure.probe.epochs = "fast", 1
    assert main.run(measure, run / "evaluation") == 0, capsys.readouterr().err
    content = json.loads((run / "evaluation" / "results.json").read_text())
    assert 0 <= content["tasks"]["digits"]["top1"] <= 100
    assert (run / "evaluation" / "tasks" / "digits.npz").exists()
    features = files.cached(run / "evaluation" / "features" / "digits" / "features.npy")
    assert features.is_file()  # mapped into memory, so kept on this machine

    leave = export()
    leave.run = str(run)
    assert main.run(leave, f"gs://{BUCKET}/exported") == 0, capsys.readouterr().err
    exported = epath.Path(f"gs://{BUCKET}/exported/student")
    weights = (exported / "model.safetensors").read_bytes()
    assert weights == (run / "student" / "model.safetensors").read_bytes()
    assert (exported / "features.stablehlo").exists()

    page = report()
    page.baselines, page.images = (str(run),), 2
    assert main.run(page, str(run)) == 0, capsys.readouterr().err
    html = (run / "report" / "index.html").read_text()
    assert "digits top1" in html and "student, singer (killed)" in html

    both = compare()
    both.runs = (str(run), f"gs://{BUCKET}/nothing")
    assert main.run(both, tmp_path) == 2
    assert f"run: gs://{BUCKET}/nothing is not the work directory" in capsys.readouterr().err


@pytest.mark.slow
def test_weights_on_a_store_are_those_of_now(run, mesh):
    """An older copy in the cache is not used in place of the current file."""
    copied = epath.Path(f"gs://{BUCKET}/copied")
    for name in ("model.safetensors", "config.json"):
        (copied / name).write_bytes((run / "student" / name).read_bytes())
    expected = load_backbone(mesh, ModelSelection(run=str(run))).digest()
    for weights in (run, run / "student", copied / "model.safetensors"):
        assert load_backbone(mesh, ModelSelection(weights=str(weights))).digest() == expected
    tensors = load((copied / "model.safetensors").read_bytes())
    tensors["cls_token"] += 1
    (copied / "model.safetensors").write_bytes(save(tensors))
    assert load_backbone(mesh, ModelSelection(weights=str(copied))).digest() != expected


def objects(folder: epath.Path, below: str = "") -> set[str]:
    found = set()
    for path in (folder / below).iterdir():
        name = f"{below}{path.name}"
        found |= objects(folder, f"{name}/") if path.is_dir() else {name}
    return found


def test_a_damaged_checkpoint_on_a_store_is_moved_and_none_of_it_lost(environment):
    folder = epath.Path(f"gs://{BUCKET}/damaged")
    with contextlib.closing(Checkpoints(folder, 2)) as checkpoints:
        for step in (2, 4):
            checkpoints.save({"a": jnp.arange(5000) * step}, step, {"data": "abc"})
    newest = folder / "checkpoints" / "4"
    before, known = objects(newest), manifests.read(newest)
    assert known and set(known) == before == set(manifests.file_digests(newest))
    assert manifests.changed(known, manifests.file_digests(newest)) == []
    (newest / "meta" / "metadata").write_text("{")
    assert manifests.changed(known, manifests.file_digests(newest)) == ["meta/metadata"]
    with contextlib.closing(Checkpoints(folder, 2)) as checkpoints:
        assert checkpoints.newest_whole() == 2
        checkpoints.set_aside()
        assert checkpoints.manager.latest_step() == 2
        checkpoints.save({"a": jnp.arange(5000)}, 4, {"data": "abc"})
    assert verify.finished(folder / "checkpoints") == [2, 4]
    assert verify.find_corruption(newest) is None
    aside = folder / "checkpoints.damaged"
    assert objects(aside / "4") == before
    assert (aside / "4" / "meta" / "metadata").read_text() == "{"
    assert (aside / "4.txt").read_text().strip()


def test_a_run_on_a_store_is_held_by_one_process(environment, monkeypatch):
    monkeypatch.setattr(lock, "BEAT", 0.1)
    monkeypatch.setattr(lock, "SILENCE", 20.0)  # on a busy machine a beat may be late
    monkeypatch.setattr(lock, "SETTLE", 0.3)
    folder = epath.Path(f"gs://{BUCKET}/held")
    with lock.holding(folder) as held:
        held.check()
        monkeypatch.setattr(lock, "_machine", lambda: "another one")
        with pytest.raises(InputError, match="is in use by process"), lock.holding(folder):
            pass
        held.check()
    assert not (folder / lock.LOCK_FILE).exists()
    monkeypatch.setattr(lock, "SILENCE", 1.0)
    (folder / lock.LOCK_FILE).write_text(json.dumps({"id": "x"}))
    with lock.holding(folder) as held:  # a silent one
        held.check()


def test_metrics_can_be_followed_between_checkpoints(environment, monkeypatch):
    folder = epath.Path(f"gs://{BUCKET}/metrics")
    writer = MetricsWriter(folder)
    writer.write(1, {"train/loss": 1.0})
    monkeypatch.setattr(MetricsWriter, "PUSH_EVERY", 0)
    writer.write(2, {"train/loss": 0.5})
    assert rows(folder) == [1, 2]
    monkeypatch.undo()
    writer.write(3, {"train/loss": 0.2})
    writer.close()
    assert rows(folder) == [1, 2, 3]
    MetricsWriter(folder, step=2).close()
    assert rows(folder) == [1, 2]


def test_a_store_that_takes_nothing_any_more_fails_the_run_in_one_line(environment):
    writer = MetricsWriter(epath.Path("gs://no-such-bucket/run"))
    writer.write(1, {"train/loss": 1.0})
    with pytest.raises(RunError, match="cannot write to gs://no-such-bucket/run"):
        writer.flush()


@pytest.mark.parametrize(
    ("workdir", "words"),
    [
        ("ftp://host/run", ["unknown scheme 'ftp'", "gs://"]),
        ("gs:/bucket/run", ["gs:/bucket/run", "gs://bucket/folder"]),
        ("gs://", ["no bucket"]),
        ("s3://bucket/run", ["s3://bucket/run", "pip install s3fs"]),
        ("gs://no-such-bucket/run", ["cannot write to gs://no-such-bucket/run", "no such bucket"]),
    ],
)
def test_a_url_that_cannot_work_is_one_line(
    environment, config_file, monkeypatch, capsys, workdir, words
):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    config = tiny.config(config_file.parent / "teacher.safetensors")
    assert main.run(config, workdir) == 2
    printed = capsys.readouterr().err
    assert len(printed.splitlines()) == 1, printed
    for word in words:
        assert word in printed


def test_a_run_whose_checkpoints_cannot_be_kept_is_one_line(
    config_file, tmp_path, monkeypatch, capsys
):
    installed = ModuleType("s3fs")
    installed.__spec__ = ModuleSpec("s3fs", None)
    monkeypatch.setitem(sys.modules, "s3fs", installed)
    config = tiny.config(config_file.parent / "teacher.safetensors")
    assert main.run(config, "s3://bucket/run") == 2
    printed = capsys.readouterr().err
    assert len(printed.splitlines()) == 1, printed
    assert "s3://bucket/run: checkpoints are kept in local folders or gs:// only" in printed


@pytest.mark.parametrize("key", ["data.path", "data.source", "teacher.weights"])
def test_a_url_elsewhere_is_one_line(environment, config_file, tmp_path, capsys, key):
    config = tiny.config(config_file.parent / "teacher.safetensors")
    section, name = key.split(".")
    config[section][name] = "gs://bucket/images"
    assert main.run(config, tmp_path / "run") == 2
    printed = capsys.readouterr().err
    assert len(printed.splitlines()) == 1, printed
    assert "gs://bucket/images" in printed and (key in printed or "weights" in printed)
    assert not (tmp_path / "run").exists()
