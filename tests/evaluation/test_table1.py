"""Tests of one tiny student on all tasks of Table 1, with the real file formats."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.special

from singer_jax import main
from singer_jax.config import evaluation
from singer_jax.data.benchmarks import open_benchmark
from singer_jax.data.dense import DepthTransform, SegmentationTransform
from singer_jax.data.images import EvalTransform, open_image
from singer_jax.data.sources import TEST
from singer_jax.evaluation import table1
from singer_jax.evaluation.backbone import ModelSelection, load_backbone
from singer_jax.platform import parallel
from tests import cli, tiny
from tests.data import official
from tests.evaluation.test_heads import bilinear

SETTINGS = {"probe.epochs": 2, "probe.batch_size": 4, "probe.protocol": "fast", "probe.views": 1}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    return str(official.write_all(tmp_path_factory.mktemp("data")))


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    config = tiny.config(tiny.write_teacher(folder / "teacher.safetensors"), "fitnet")
    config.steps = 2
    assert main.run(config, folder / "run") == 0
    return folder / "run"


def settings(run: Path, data: str, changes: dict | None = None):
    config = evaluation()
    config.mesh.data = 1
    given = {"run": str(run), "data.path": data, "data.workers": 0}
    config.update_from_flattened_dict(SETTINGS | given | (changes or {}))
    return config


@pytest.fixture(scope="module")
def evaluated(run, data, tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("evaluated")
    assert main.run(settings(run, data), workdir) == 0
    return workdir


def tokens_and_labels(run: Path, data: str, task: str) -> tuple[np.ndarray, list]:
    """Returns raw tokens of the last block and labels of a test split, image by image."""
    backbone = load_backbone(parallel.make_mesh(1), ModelSelection(run=str(run)))
    model = backbone.network.merge(backbone.params)
    benchmark = table1.TASKS[task]
    source = open_benchmark(benchmark.data, data, TEST)
    rng, found, labels = np.random.default_rng(0), [], []
    for index in range(len(source)):
        record = source[index]
        image = open_image(record.image)
        if benchmark.kind in ("classification", "transfer"):
            pixels, label = EvalTransform(16)(image), record.label
        else:
            dense = {"segmentation": SegmentationTransform, "depth": DepthTransform}
            pixels, label = dense[benchmark.kind](16, train=False)(image, record.label, rng)
        found.append(np.asarray(model.features(backbone.network.spec.prepare(pixels[None]))[-1][0]))
        labels.append(label)
    return np.stack(found).astype(np.float64), labels


def in_numpy(task: str, tokens: np.ndarray, labels: list, head: dict) -> dict[str, float]:
    """Computes the metrics of a head in NumPy."""
    kind = table1.TASKS[task].kind
    kernel, bias = (head[name].astype(np.float64) for name in ("kernel", "bias"))
    if kind in ("classification", "transfer"):
        logits = tokens[:, 0] @ kernel + bias
        order = np.argsort(-logits, axis=1)
        return {
            "top1": 100
            * np.mean([label == row[0] for label, row in zip(labels, order, strict=True)]),
            "top5": 100
            * np.mean([label in row[:5] for label, row in zip(labels, order, strict=True)]),
        }
    patches = tokens[:, 1:]
    if kind == "depth":
        summary = np.broadcast_to(tokens[:, :1], patches.shape)
        patches = np.concatenate([patches, summary], axis=-1)
    logits = (patches @ kernel + bias).reshape(len(tokens), 4, 4, -1)
    full, truth = np.stack([bilinear(x, (16, 16)) for x in logits]), np.stack(labels)
    if kind == "segmentation":
        predicted, known = full.argmax(-1), truth >= 0
        scores = []
        for label in range(150):
            mine, real = (predicted == label) & known, (truth == label) & known
            if (mine | real).any():
                scores.append((mine & real).sum() / (mine | real).sum())
        return {"miou": 100 * np.mean(scores)}
    depth = scipy.special.softmax(full / 0.03, axis=-1) @ np.linspace(0, 10, 256)
    valid = (truth > 0) & (truth < 10)
    p, t = depth[valid], truth[valid].astype(np.float64)
    return {
        "rmse": np.sqrt(np.mean((p - t) ** 2)),
        "mae": np.mean(np.abs(p - t)),
        "abs_rel": np.mean(np.abs(p - t) / t),
        "delta1": np.mean(np.maximum(p / t, t / p) < 1.25),
    }


def test_every_cell_is_that_of_numpy(run, data, evaluated):
    results = json.loads((evaluated / "results.json").read_text())
    assert set(results["tasks"]) == set(table1.TASKS) and not results["skipped"]
    cells = {}
    for task, benchmark in table1.TASKS.items():
        name = "imagenet" if benchmark.kind == "transfer" else task
        head = dict(np.load(evaluated / "tasks" / f"{name}.npz"))
        tokens, labels = tokens_and_labels(run, data, task)
        for metric, value in in_numpy(task, tokens, labels, head).items():
            # T = 0.03 makes depth nearly a choice of bins, which multiplies rounding.
            tolerance = 2e-2 if benchmark.kind == "depth" else 1e-4
            found = results["tasks"][task][metric]
            np.testing.assert_allclose(found, value, rtol=tolerance, err_msg=f"{task} {metric}")
        cells[task] = results["tasks"][task][benchmark.metric]
    assert results["table1"] == {
        "IN-val": cells["imagenet"],
        "ADE mIoU": cells["ade20k"],
        "NYUd RMSE": cells["nyud"],
        "iNat19": cells["inat19"],
        "DS": (cells["imagenet_v2"] + cells["imagenet_r"]) / 2,
        "FG": sum(cells[name] for name in ("aircraft", "pet", "food", "flowers")) / 4,
    }


HOLD = """
import os
import time
from singer_jax.evaluation import evaluated_model
write = evaluated_model._write
def write_and_wait(file, content):
    write(file, content)
    if file.name == os.environ.get("HOLD_AT"):
        time.sleep(1000)
evaluated_model._write = write_and_wait
"""


@pytest.mark.slow
def test_finished_tasks_are_not_repeated(run, data, evaluated, tmp_path):
    """After a kill and a restart, the results are the same and no task runs twice."""
    config = tmp_path / "settings.py"
    flat = {"run": str(run), "data.path": data, "data.workers": 0, "mesh.data": 1, **SETTINGS}
    config.write_text(
        "from singer_jax.config import default\n"
        f"{HOLD}\n"
        "def get_config(protocol='recommended'):\n"
        "    config = default(protocol, 'evaluate')\n"
        f"    config.update_from_flattened_dict({flat!r})\n"
        "    return config\n"
    )
    workdir = tmp_path / "out"
    command = [
        sys.executable,
        "-m",
        "singer_jax.main",
        f"--config={config}",
        f"--workdir={workdir}",
    ]
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    held = environment | {"HOLD_AT": "ade20k.json"}
    process = subprocess.Popen(command, env=held, stderr=subprocess.DEVNULL)
    cli.wait_until((workdir / "tasks" / "ade20k.json").exists, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    finished = {p: p.stat().st_mtime_ns for p in (workdir / "tasks").glob("*.json")}
    assert len(finished) == 4
    subprocess.run(command, env=environment, check=True, capture_output=True)
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    again = (workdir / "results.json").read_bytes()
    subprocess.run(command, env=environment, check=True, capture_output=True)
    assert (workdir / "results.json").read_bytes() == again
    whole = json.loads((evaluated / "results.json").read_text())
    resumed = json.loads(again)
    # Other thread counts in this process than in the other: close, not equal.
    for task, metrics in whole["tasks"].items():
        metric = table1.TASKS[task].metric
        assert resumed["tasks"][task][metric] == pytest.approx(metrics[metric], rel=0.05), task


def test_other_settings_are_measured_again(run, data, tmp_path):
    tasks = {"tasks": ("pet",)}
    assert main.run(settings(run, data, tasks), tmp_path) == 0
    first = json.loads((tmp_path / "results.json").read_text())
    extracted = (tmp_path / "features" / "pet" / "meta.json").stat().st_mtime_ns
    changed = {"probe.epochs": 3, "probe.learning_rates": (0.1, 1.0)}
    assert main.run(settings(run, data, tasks | changed), tmp_path) == 0
    second = json.loads((tmp_path / "results.json").read_text())
    assert set(second["tasks"]["pet"]["held_out"]) == {"0.1", "1.0"} != first["tasks"]["pet"]
    # The features depend on none of both.
    assert (tmp_path / "features" / "pet" / "meta.json").stat().st_mtime_ns == extracted


def test_damaged_features_are_extracted_again(run, data, tmp_path):
    config = settings(run, data, {"tasks": ("food",)})
    assert main.run(config, tmp_path) == 0
    results = (tmp_path / "results.json").read_text()
    file = tmp_path / "features" / "food" / "features.npy"
    content = bytearray(file.read_bytes())
    content[-3] ^= 64
    file.write_bytes(content)
    (tmp_path / "tasks" / "food.json").unlink()
    assert main.run(config, tmp_path) == 0
    assert (tmp_path / "results.json").read_text() == results


def test_missing_data_sets_are_skipped_and_named(run, tmp_path, capsys):
    official.pet(tmp_path / "data")
    assert main.run(settings(run, str(tmp_path / "data")), tmp_path / "out") == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert set(results["tasks"]) == {"pet"}
    assert set(results["skipped"]) == set(table1.TASKS) - {"pet"}
    assert "nyu_depth_v2" in results["skipped"]["nyud"]
    assert all(value is None for value in results["table1"].values())
    printed = capsys.readouterr().out
    assert "not directly comparable" in printed


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tasks": ("nyud2",)}, "closest: nyud"),
        ({"tasks": ("pet",), "data.path": "/nowhere"}, "pet: no folder /nowhere"),
        ({"data.path": "/nowhere"}, "no data set of Table 1 found"),
        ({"probe.protocol": "quick"}, "unknown probe.protocol"),
        ({"data.normalisation": "none"}, "unknown data.normalisation"),
        ({"run": "/nowhere"}, "/nowhere holds no checkpoints"),
        ({"tasks": ("imagenet_r",)}, "needs the head of the task imagenet"),
    ],
)
def test_bad_input_is_one_line(run, data, tmp_path, capsys, changes, words):
    assert main.run(settings(run, data, changes), tmp_path) == 2
    printed = capsys.readouterr().err
    assert words in printed and len(printed.splitlines()) == 1


def test_the_published_row_stands_beside(capsys):
    rows = {"measured here": table1.row({})}
    paper = table1.published(
        {
            "method": {"name": "singer"},
            "teacher": {"model": "timm/vit_large_patch16_224.augreg"},
            "student": {"model": "vit_tiny_patch16_224"},
        },
        "",
    )
    assert paper[1]["IN-val"] == 70.59 and paper[1]["FG"] == 64.61
    assert table1.published(None, "vit_small_patch16_224")[1]["NYUd RMSE"] == 1.1065
    assert table1.published(None, "vit_huge_patch14_224") is None
    text = table1.format_rows(rows | {f"published: {paper[0]}": paper[1]})
    assert "70.59" in text and text.splitlines()[1].split()[2:] == ["-"] * 6


def test_a_new_imagenet_head_is_scored_again_under_domain_shift(run, data, tmp_path):
    official.imagenet(tmp_path / "data")
    official.imagenet_v2(tmp_path / "data")
    config = settings(run, str(tmp_path / "data"))
    assert main.run(config, tmp_path / "out") == 0
    first = json.loads((tmp_path / "out" / "results.json").read_text())["tasks"]
    official.save(tmp_path / "data" / "imagenet" / "train" / official.WNIDS[0] / "new.JPEG", 1)
    assert main.run(config, tmp_path / "out") == 0
    second = json.loads((tmp_path / "out" / "results.json").read_text())["tasks"]
    assert second["imagenet"]["loss"] != first["imagenet"]["loss"]
    assert second["imagenet_v2"]["loss"] != first["imagenet_v2"]["loss"]


def test_one_task_more_keeps_the_others(run, data, tmp_path):
    for tasks in (("pet",), ("food",)):
        assert main.run(settings(run, data, {"tasks": tasks}), tmp_path) == 0
    assert set(json.loads((tmp_path / "results.json").read_text())["tasks"]) == {"pet", "food"}


def test_a_damaged_image_is_named_and_not_replaced(run, tmp_path, capsys):
    official.pet(tmp_path / "data")
    broken = tmp_path / "data" / "oxford-iiit-pet" / "images" / "Breed_1_7.jpg"
    broken.write_bytes(b"")
    assert main.run(settings(run, str(tmp_path / "data")), tmp_path / "out") == 1
    assert str(broken) in capsys.readouterr().err


def test_a_task_of_table_1_can_be_named_as_the_source(run, data, tmp_path):
    assert main.run(settings(run, data, {"data.source": "ade20k"}), tmp_path) == 0
    found = json.loads((tmp_path / "results.json").read_text())["tasks"]
    assert set(found) == {"ade20k"} and found["ade20k"]["miou"] > 0
