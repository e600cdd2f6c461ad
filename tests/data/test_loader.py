"""Order, crops and replacement depend on (seed, epoch, index) alone."""

import itertools
import json
import os
import secrets
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from singer_jax.data.images import EvalTransform as CentreCrop
from singer_jax.data.images import TrainTransform
from singer_jax.data.loader import (
    LoaderOptions,
    UnreadableCount,
    batch_records,
    eval_batches,
    train_batches,
    worker_count,
)
from singer_jax.data.sources import TRAIN, DigitsSource, FolderSource, Subset
from singer_jax.errors import RunError
from tests import cli
from tests.tiny import write_images

DIGITS = Subset(DigitsSource(TRAIN), np.arange(20))
CROP = TrainTransform(8)
WHOLE = TrainTransform(8, scale=(1.0, 1.0), ratio=(1.2, 1.2), flip=0.0)


def first(batches: object, count: int) -> list[dict]:
    found = list(itertools.islice(batches, count))
    batches.close()
    return found


def digest(batches: list[dict]) -> list[bytes]:
    return [batch["image"].tobytes() + batch["label"].tobytes() for batch in batches]


def batches(seed: int = 0, **options: object) -> list[bytes]:
    return digest(first(train_batches(DIGITS, CROP, batch_size=6, seed=seed, **options), 8))


def test_a_resumed_loader_continues_where_it_was():
    whole = batches()
    assert batches(start=3)[:5] == whole[3:]
    assert batches(seed=1) != whole


def test_batches_cross_the_end_of_an_epoch_and_epochs_differ():
    source = Subset(DigitsSource(TRAIN), np.arange(20))
    source.source.labels[:20] = np.arange(20)
    labels = np.concatenate(
        [b["label"] for b in first(train_batches(source, CROP, batch_size=6, seed=0), 10)]
    )
    epochs = labels.reshape(3, 20)
    for epoch in epochs:
        assert sorted(epoch) == list(range(20))
    assert not np.array_equal(epochs[0], epochs[1])


def test_the_records_of_a_batch_are_known_from_its_step():
    whole = first(train_batches(DIGITS, CROP, batch_size=6, seed=3), 8)
    for step, batch in enumerate(whole):
        records = batch_records(DIGITS, seed=3, batch_size=6, step=step)
        assert [DIGITS[record].label for record in records] == batch["label"].tolist()


def test_processes_share_each_global_batch():
    whole = first(train_batches(DIGITS, CROP, batch_size=6, seed=0), 4)
    options = [LoaderOptions(rows=np.arange(i, 6, 2)) for i in (0, 1)]
    parts = [
        first(train_batches(DIGITS, CROP, batch_size=6, seed=0, options=of_process), 4)
        for of_process in options
    ]
    for step, batch in enumerate(whole):
        expected = sorted(image.tobytes() for image in batch["image"])
        found = sorted(image.tobytes() for part in parts for image in part[step]["image"])
        assert found == expected


@given(st.integers(1, 60), st.integers(1, 25))
def test_evaluation_sees_every_image_once_whatever_the_batch_size(images, batch_size):
    source = Subset(DigitsSource(TRAIN), np.arange(images))
    seen = []
    for batch in eval_batches(source, CentreCrop(8), batch_size=batch_size):
        assert len(batch["image"]) == len(batch["valid"]) == batch_size
        seen += batch["label"][batch["valid"]].tolist()
    assert seen == [source[i].label for i in range(images)]


def damaged_folder(folder: Path, images: int, damaged: list[int]) -> FolderSource:
    write_images(folder, images)
    for number in damaged:
        path = folder / f"{number:03}.jpg"
        path.write_bytes(path.read_bytes()[:50])
    return FolderSource(str(folder), TRAIN)


def test_an_unreadable_image_is_replaced_the_same_way_counted_and_named(tmp_path):
    source = damaged_folder(tmp_path, 10, [3, 4])
    options = {"batch_size": 5, "seed": 0}
    seen = first(train_batches(source, CROP, **options), 4)
    assert digest(seen) == digest(first(train_batches(source, CROP, **options), 4))
    lines: list[str] = []
    count = UnreadableCount(source, lines.append)
    for batch in seen:
        count.add(batch)
    assert count.unreadable == 2  # in each of the two epochs
    assert sorted(lines) == [
        f"skipping unreadable image (replaced): {tmp_path / name}"
        for name in ("003.jpg", "004.jpg")
    ]
    (clean,) = first(eval_batches(source, CentreCrop(8), batch_size=10), 1)
    readable = np.delete(clean["image"], [3, 4], axis=0)
    assert all(any(np.array_equal(clean["image"][n], one) for one in readable) for n in (3, 4))


def test_replacements_come_from_anywhere_and_follow_from_seed_epoch_and_index(tmp_path):
    """Half of the folder is unreadable in one stretch, like a class that is damaged as a whole."""
    source = damaged_folder(tmp_path, 24, list(range(12)))
    options = {"batch_size": 24, "seed": 0}
    replaced = []
    whole = first(train_batches(source, WHOLE, **options), 3)
    for batch in whole:
        wrong = batch["unreadable"] >= 0
        assert sorted(batch["unreadable"][wrong]) == list(range(12))
        replaced += [image.tobytes() for image in batch["image"][wrong]]
    assert len(set(replaced)) > 6  # 12 are readable; the next one in order would be one alone
    assert digest(first(train_batches(source, WHOLE, start=1, **options), 2)) == digest(whole[1:])


def test_strict_raises_with_the_path(tmp_path):
    source = damaged_folder(tmp_path, 4, [2])
    with pytest.raises(RunError, match=str(tmp_path / "002.jpg")):
        strict = LoaderOptions(strict=True)
        first(train_batches(source, CROP, batch_size=4, seed=0, options=strict), 1)


class Broken(TrainTransform):
    def __call__(self, image, rng):
        raise ValueError("a bug in this transform")


def test_an_error_of_a_transform_is_no_unreadable_image(tmp_path):
    source = FolderSource(write_images(tmp_path, 3), TRAIN)
    with pytest.raises(ValueError, match="a bug in this transform"):
        first(train_batches(source, Broken(8), batch_size=3, seed=0), 1)


def test_a_folder_without_a_single_readable_image_raises(tmp_path):
    source = damaged_folder(tmp_path, 3, [0, 1, 2])
    with pytest.raises(RunError, match="cannot be read"):
        first(train_batches(source, CROP, batch_size=3, seed=0), 1)


def found(*indices: int, images: int = 500) -> dict:
    unreadable = np.full(images, -1)
    unreadable[: len(indices)] = indices
    return {"unreadable": unreadable}


def test_a_run_ends_above_the_share_of_different_unreadable_images():
    source = Subset(DigitsSource(TRAIN), np.arange(1000))
    count = UnreadableCount(source, lambda line: None, most=0.02)
    for _ in range(10):
        count.add(found(*range(19)))  # too few to judge, however often they are read
    assert count.unreadable == 19
    count.add(found(19))  # 20 of 1,000 are 2 %
    with pytest.raises(RunError, match=r"21 of 1000 .* data\.max_unreadable=0\.02"):
        count.add(found(20))


def test_fewer_than_twenty_unreadable_images_never_stop_a_run():
    source = Subset(DigitsSource(TRAIN), np.arange(28))
    count = UnreadableCount(source, lambda line: None)
    for _ in range(100):
        count.add(found(3, 4, images=28))
    assert count.unreadable == 2


def test_unreadable_images_of_several_processes_are_counted_once():
    count = UnreadableCount(
        Subset(DigitsSource(TRAIN), np.arange(1000)),
        lambda line: None,
        gather=lambda own: np.concatenate([own, [7, 8]]),
    )
    for _ in range(6):
        count.add(found(7))
    assert count.unreadable == 2 and count.named == {7}
    count.add(found(9), last=True)
    assert count.unreadable == 3 and count.images == 7 * 502


def test_automatic_workers_are_the_cores_but_one(monkeypatch):
    assert worker_count(3) == 3
    for cores in (1, 2, 64):
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid, n=cores: range(n), raising=False)
        assert worker_count(None) == cores - 1


SHARED = f"{secrets.token_hex(2)}_"  # begins the names of segments of these tests alone


def run_loading(folder: Path, reports: Path, workers: int, *more: str) -> subprocess.Popen:
    """Runs tests/data/loading.py in a separate process, which prints digests of six batches."""
    reports.mkdir(exist_ok=True)
    environment = os.environ | {"SHARED_MEMORY": f"/{SHARED}"}
    command = [sys.executable, "-m", "tests.data.loading", str(folder), str(reports), str(workers)]
    return subprocess.Popen([*command, *more], stdout=subprocess.PIPE, text=True, env=environment)


def test_workers_change_nothing_and_start_no_accelerator(tmp_path):
    write_images(tmp_path / "images", 10)
    printed = []
    for workers in (0, 2):
        reports = tmp_path / f"reports{workers}"
        done = run_loading(tmp_path / "images", reports, workers)
        printed.append(json.loads(done.stdout.readline()))
        assert done.wait() == 0
        found = [json.loads(file.read_text()) for file in reports.iterdir()]
        assert len(found) == max(workers, 1)
        for report in found if workers else []:
            # A worker runs the package `data` alone; JAX, which grain imports, has started no
            # backend and may start none but the CPU.
            assert set(report["modules"]) <= {
                "singer_jax",
                "singer_jax.data",
                "singer_jax.data.formats",
                "singer_jax.data.images",
                "singer_jax.data.listing",
                "singer_jax.data.loader",
                "singer_jax.data.machine",
                "singer_jax.data.sources",
                "singer_jax.errors",
                "singer_jax.io",
                "singer_jax.io.limits",
                "singer_jax.platform",
                "singer_jax.platform.signals",
            }
            assert report["backends"] == [] and report["platforms"] == "cpu"
    assert printed[0] == printed[1]


LOADING = """
from singer_jax.data.images import TrainTransform
from singer_jax.data.loader import LoaderOptions, train_batches
from singer_jax.data.registry import TrainingDataSettings, open_source

source = open_source(TrainingDataSettings(source="digits"), "train")
with open("started", "a") as file:
    file.write(__name__ + " ")
options = LoaderOptions(workers=2)
batches = train_batches(source, TrainTransform(8), batch_size=2, seed=0, options=options)
print([len(next(batches)["label"]) for _ in range(3)])
batches.close()
"""


@pytest.mark.parametrize(
    "how",
    [
        pytest.param("script", marks=pytest.mark.slow),
        "module",
        pytest.param("command", marks=pytest.mark.slow),
        "stdin",
    ],
)
def test_workers_start_in_any_program_and_do_not_run_it_again(tmp_path, how):
    """The program neither parses absl flags nor has a main guard."""
    (tmp_path / "program.py").write_text(LOADING)
    arguments = {
        "script": [str(tmp_path / "program.py")],
        "module": ["-m", "program"],
        "command": ["-c", LOADING],
        "stdin": ["-"],
    }[how]
    done = subprocess.run(
        [sys.executable, *arguments],
        input=LOADING,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=cli.PATIENCE,
    )
    assert done.stdout == "[2, 2, 2]\n", done.stderr
    assert (tmp_path / "started").read_text() == "__main__ "


def test_batches_of_one_image_are_those_of_larger_ones():
    whole = first(train_batches(DIGITS, CROP, batch_size=4, seed=0), 2)
    single = first(train_batches(DIGITS, CROP, batch_size=1, seed=0), 8)
    images = np.concatenate([batch["image"] for batch in single])
    np.testing.assert_array_equal(images, np.concatenate([batch["image"] for batch in whole]))


def test_workers_exit_when_their_parent_is_killed(tmp_path):
    write_images(tmp_path / "images", 10)
    process = run_loading(tmp_path / "images", tmp_path / "reports", 2, "wait")
    process.stdout.readline()
    workers = [int(file.stem) for file in (tmp_path / "reports").iterdir()]
    assert len(workers) == 2 and all(is_running(pid) for pid in workers)
    assert segments()
    process.send_signal(signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + cli.PATIENCE
    while any(is_running(pid) for pid in workers) or segments():
        assert time.monotonic() < deadline, "workers or shared memory outlive the parent"
        time.sleep(0.02)


def segments() -> list[str]:
    return [name for name in os.listdir("/dev/shm") if name.startswith(SHARED)]


def is_running(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status")
    return status.exists() and "State:\tZ" not in status.read_text()
