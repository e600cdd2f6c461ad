"""Order, crops and replacement depend on (seed, epoch, index) alone."""

import itertools
import json
import os
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
    UnreadableCount,
    batch_records,
    eval_batches,
    train_batches,
    worker_count,
)
from singer_jax.data.sources import TRAIN, DigitsSource, FolderSource, Subset
from singer_jax.errors import RunError
from tests.tiny import write_images

DIGITS = Subset(DigitsSource(TRAIN), np.arange(20))
CROP = TrainTransform(8)


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
    parts = [
        first(
            train_batches(DIGITS, CROP, batch_size=6, seed=0, process_index=i, process_count=2), 4
        )
        for i in (0, 1)
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
    found = first(train_batches(source, CROP, **options), 4)
    assert digest(found) == digest(first(train_batches(source, CROP, **options), 4))
    lines: list[str] = []
    count = UnreadableCount(source, lines.append)
    for batch in found:
        count.add(batch)
    assert count.unreadable == 4  # two damaged images, two epochs
    assert sorted(lines) == [
        f"unreadable image, replaced: {tmp_path / name}" for name in ("003.jpg", "004.jpg")
    ]
    (clean,) = first(eval_batches(source, CentreCrop(8), batch_size=10), 1)
    np.testing.assert_array_equal(clean["image"][3], clean["image"][5])  # the next readable one


def test_strict_raises_with_the_path(tmp_path):
    source = damaged_folder(tmp_path, 4, [2])
    with pytest.raises(RunError, match=str(tmp_path / "002.jpg")):
        first(train_batches(source, CROP, batch_size=4, seed=0, strict=True), 1)


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


def test_more_than_one_percent_unreadable_stops_from_a_thousand_images_on():
    def batch(unreadable: int) -> dict:
        indices = np.full(500, -1)
        indices[:unreadable] = 7
        return {"unreadable": indices}

    count = UnreadableCount(DIGITS, lambda line: None)
    count.add(batch(6))  # 500 images are too few to judge
    count.add(batch(4))  # 10 of 1,000 are 1 %
    with pytest.raises(RunError, match="16 of 1500"):
        count.add(batch(6))


def test_automatic_workers_leave_a_core_free():
    assert worker_count(3) == 3
    assert 0 <= worker_count(None) <= 16


def run_loading(folder: Path, reports: Path, workers: int, *more: str) -> subprocess.Popen:
    """tests/data/loading.py in a process of its own; it prints a digest of six batches."""
    reports.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "tests.data.loading", str(folder), str(reports), str(workers)]
    return subprocess.Popen([*command, *more], stdout=subprocess.PIPE, text=True)


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
            # What runs in a worker is the data room alone; JAX, which grain imports, has started no
            # backend and may start none but the CPU.
            assert set(report["modules"]) <= {
                "singer_jax",
                "singer_jax.data",
                "singer_jax.data.images",
                "singer_jax.data.loader",
                "singer_jax.data.machine",
                "singer_jax.data.sources",
                "singer_jax.errors",
                "singer_jax.io.limits",
                "singer_jax.platform.signals",
            }
            assert report["backends"] == [] and report["platforms"] == "cpu"
    assert printed[0] == printed[1]


def test_workers_leave_with_a_killed_parent_and_leave_nothing_behind(tmp_path):
    write_images(tmp_path / "images", 10)
    before = set(os.listdir("/dev/shm"))
    process = run_loading(tmp_path / "images", tmp_path / "reports", 2, "wait")
    process.stdout.readline()
    workers = [int(file.stem) for file in (tmp_path / "reports").iterdir()]
    assert len(workers) == 2 and all(is_running(pid) for pid in workers)
    process.send_signal(signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 30
    while any(is_running(pid) for pid in workers) or set(os.listdir("/dev/shm")) - before:
        assert time.monotonic() < deadline, "workers or shared memory outlive the parent"
        time.sleep(0.2)


def is_running(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status")
    return status.exists() and "State:\tZ" not in status.read_text()
