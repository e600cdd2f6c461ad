"""The recorder that follows a training loop."""

import json
import math
import time
from pathlib import Path

import jax
import pytest

from singer_jax.errors import RunError
from singer_jax.runs import recorder as recorder_module
from singer_jax.runs.metrics import MetricsWriter, StepMetrics
from singer_jax.runs.recorder import RecordedSteps, Recorder


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def recorder(folder: Path, **options: object) -> Recorder:
    defaults = {
        "start": 0,
        "steps": 7,
        "every": 3,
        "batch_size": 4,
        "flops": 1,
        "devices": jax.devices(),
    }
    of_recorder = {name: options.pop(name) for name in {"stopped", "capture"} & set(options)}
    steps = RecordedSteps(**(defaults | options))
    return Recorder(MetricsWriter(folder), steps, **of_recorder)


def packed(**metrics: float) -> StepMetrics:
    """Returns the metrics of an only student."""
    return StepMetrics.pack({"": {"loss": 1.0, "grad_norm": 1.0} | metrics})


def metrics(loss: float) -> tuple[StepMetrics, dict]:
    """Returns the metrics of an only student, and the shared ones."""
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
    assert "train/images_per_second" not in rows(tmp_path)[0]  # mostly loading and compiling


def test_metrics_are_read_late_so_that_the_device_never_waits(tmp_path):
    follow = recorder(tmp_path, every=1)
    for step in range(1, 4):
        follow.add(step, *metrics(step))
        assert len(follow.pending) == min(step, Recorder.LAG)
    assert [row["step"] for row in rows(tmp_path)] == [1]


@pytest.mark.parametrize("key", ["loss", "grad_norm"])
def test_a_non_finite_number_stops_the_run_and_names_the_step(tmp_path, key):
    follow = recorder(tmp_path)
    follow.add(1, *metrics(1.0))
    follow.add(2, packed(**{key: math.nan}))
    with pytest.raises(RunError, match=f"train/{key} is nan at step 2"):
        follow.flush()


def test_data_wait_fraction_is_the_time_spent_waiting(tmp_path):
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
    monkeypatch.setattr(recorder_module.time, "perf_counter", lambda: now[0])
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


def test_progress_in_a_file_is_a_line_every_30_s(tmp_path, clock, caplog, capsys):
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


def test_a_wait_that_does_not_end_is_logged(tmp_path, caplog, monkeypatch):
    follow = recorder(tmp_path)
    with follow.waiting():
        pass
    monkeypatch.setattr(recorder_module, "_PATIENCE", 0.05)
    with follow.waiting():
        time.sleep(0.5)
    assert [record.getMessage().split(":")[0] for record in caplog.records] == ["no images for 0 s"]
