"""Metrics files and the recorder that follows a loop."""

import json
import math
import sys
import time
import types
from pathlib import Path

import jax
import pytest
from etils import epath
from tensorboardX import event_file_writer  # noqa: F401 - the writer's package is installed

from singer_jax.errors import RunError
from singer_jax.runs import telemetry
from singer_jax.runs.telemetry import MetricsWriter, Recorder, StepMetrics


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_rows_after_the_restored_step_are_cut_back(tmp_path, caplog):
    writer = MetricsWriter(tmp_path)
    for step in (2, 4, 6):
        writer.write(step, {"train/loss": float(step)})
    writer.close()
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'\xff\x00{"step": 2\n[3]\n{"step": "3"}\n')  # as a disk may leave it
        file.write(b'{"step": 8, "tra')  # as a kill leaves it
    writer = MetricsWriter(tmp_path, step=4)
    writer.write(6, {"train/loss": 60.0})
    writer.close()
    assert [(row["step"], row["train/loss"]) for row in rows(tmp_path)] == [
        (2, 2.0),
        (4, 4.0),
        (6, 60.0),
    ]
    assert all(row["time"] > 0 for row in rows(tmp_path))
    assert list((tmp_path / "tensorboard").iterdir())
    assert "4 lines are no rows and are left out" in caplog.text


def recorder(folder: Path, **options: object) -> Recorder:
    defaults = {
        "start": 0,
        "steps": 7,
        "every": 3,
        "batch_size": 4,
        "flops": 1,
        "devices": jax.devices(),
    }
    return Recorder(MetricsWriter(folder), **(defaults | options))


def packed(**metrics: float) -> StepMetrics:
    """Of a single student."""
    return StepMetrics.pack({"": {"loss": 1.0, "grad_norm": 1.0} | metrics})


def metrics(loss: float) -> tuple[StepMetrics, dict]:
    """Of a single student, and of all."""
    return packed(loss=loss), {"unreadable_images": 2}


def test_a_row_for_the_first_step_every_third_and_the_last(tmp_path):
    follow = recorder(tmp_path)
    for step in range(1, 8):
        follow.add(step, *metrics(step))
    follow.flush()
    assert [row["step"] for row in rows(tmp_path)] == [1, 3, 6, 7]
    assert rows(tmp_path)[1]["train/loss"] == 3
    assert rows(tmp_path)[1]["train/unreadable_images"] == 2
    assert rows(tmp_path)[1]["train/images_per_second"] > 0
    assert "train/images_per_second" not in rows(tmp_path)[0]  # mostly the start itself


def test_metrics_are_read_late_so_that_the_device_never_waits(tmp_path):
    follow = recorder(tmp_path, every=1)
    for step in range(1, 4):
        follow.add(step, *metrics(step))
        assert len(follow.pending) == min(step, Recorder.LAG)
    assert [row["step"] for row in rows(tmp_path)] == [1]


@pytest.mark.parametrize("key", ["loss", "grad_norm"])
def test_a_number_that_is_none_stops_the_run_and_names_the_step(tmp_path, key):
    follow = recorder(tmp_path)
    follow.add(1, *metrics(1.0))
    follow.add(2, packed(**{key: math.nan}))
    with pytest.raises(RunError, match=f"train/{key} is nan at step 2"):
        follow.flush()


def test_the_share_of_time_that_waits_for_images(tmp_path):
    follow = recorder(tmp_path, every=1, steps=3)
    for step in range(1, 4):
        follow.add(step, *metrics(step))
        with follow.waiting():
            time.sleep(0.05 if step == 3 else 0)  # after the first row was read
    follow.flush()
    first, second, third = rows(tmp_path)
    assert "train/data_wait_fraction" not in first
    assert 0.5 < second["train/data_wait_fraction"] <= 1
    assert 0 <= third["train/data_wait_fraction"] <= 1


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    """The recorder's clock, in seconds; a test sets it."""
    now = [0.0]
    monkeypatch.setattr(telemetry.time, "perf_counter", lambda: now[0])
    return now


def test_speed_counts_neither_evaluations_nor_saves(tmp_path, clock):
    follow = recorder(tmp_path, every=2, steps=8)

    def evaluation() -> dict[str, float]:
        clock[0] += 1000
        return {"eval/loss": 1.0}

    for step in range(1, 9):
        clock[0] += 0.5
        follow.add(step, *metrics(step))
        follow.flush()
        if step in (3, 4):
            follow.evaluate(step, evaluation)
        if step in (3, 5):
            with follow.saving():
                clock[0] += 100
    speed = {row["step"]: row.get("train/images_per_second") for row in rows(tmp_path)}
    assert speed == {1: None, 2: 8, 3: None, 4: None, 6: 8, 8: 8}  # evaluations have their own rows
    of_evaluations = [row for row in rows(tmp_path) if "eval/loss" in row]
    assert [row["train/evaluation_seconds"] for row in of_evaluations] == [1000, 1000]
    saves = {
        row["step"]: row["train/save_seconds"]
        for row in rows(tmp_path)
        if "train/save_seconds" in row
    }
    assert saves == {4: 100, 6: 100}


def test_nothing_but_finite_is_read_between_rows(tmp_path):
    class Unread:
        def __array__(self, *args: object, **options: object) -> None:
            raise AssertionError("the metrics of a step without a row are read")

    follow = recorder(tmp_path)
    for step in range(1, 8):
        given = metrics(step)[0]
        if not follow.logs(step):
            given = StepMetrics(Unread(), given.finite, given.names)
        follow.add(step, given, {"unreadable_images": 2})
    follow.flush()
    assert [row["step"] for row in rows(tmp_path)] == [1, 3, 6, 7]


def test_progress_in_a_file_is_a_line_now_and_then(tmp_path, clock, caplog, capsys):
    follow = recorder(tmp_path, every=20, steps=100)
    with caplog.at_level("INFO", "singer_jax"):
        for step in range(1, 101):
            clock[0] += 1
            follow.add(step, *metrics(0.5))
            follow.flush()
        follow.close()
    lines = [record.getMessage() for record in caplog.records]
    assert lines == [
        "step 30 of 100, 0:01:10 left, loss 0.5, 4 images/s",
        "step 60 of 100, 0:00:40 left, loss 0.5, 4 images/s",
        "step 90 of 100, 0:00:10 left, loss 0.5, 4 images/s",
    ]
    assert "\r" not in capsys.readouterr().err


def test_a_continued_run_is_one_run_at_weights_and_biases(tmp_path, monkeypatch):
    started: list[dict] = []

    def init(**options: object) -> types.SimpleNamespace:
        started.append(options)
        return types.SimpleNamespace(log=lambda *args, **options: None, finish=lambda: None)

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    for folder in (tmp_path / "run", tmp_path / "run", tmp_path / "other"):
        folder.mkdir(exist_ok=True)
        writer = MetricsWriter(epath.Path(folder), wandb={"seed": 0})
        writer.write(1, {"train/loss": 1.0})
        writer.close()
    first, again, other = (options["id"] for options in started)
    assert first == again != other
    assert all(options["resume"] == "allow" for options in started)


def test_a_wait_that_does_not_end_is_told(tmp_path, caplog, monkeypatch):
    follow = recorder(tmp_path)
    with follow.waiting():
        pass
    monkeypatch.setattr(telemetry, "_PATIENCE", 0.05)
    with follow.waiting():
        time.sleep(0.5)
    assert [record.getMessage().split(":")[0] for record in caplog.records] == ["no images for 0 s"]
