"""Metrics files and the recorder that follows a loop."""

import json
import math
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from tensorboardX import event_file_writer  # noqa: F401 - the writer's package is installed

from singer_jax.errors import RunError
from singer_jax.runs import telemetry
from singer_jax.runs.telemetry import MetricsWriter, Recorder


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


def metrics(loss: float) -> tuple[dict, dict]:
    """Of a single student, and of all."""
    own = {"loss": jnp.float32(loss), "grad_norm": jnp.float32(1.0)}
    return {"": own}, {"unreadable_images": 2}


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
    follow.add(2, {"": metrics(1.0)[0][""] | {key: jnp.float32(math.nan)}})
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


def test_a_wait_that_does_not_end_is_told(tmp_path, caplog, monkeypatch):
    follow = recorder(tmp_path)
    with follow.waiting():
        pass
    monkeypatch.setattr(telemetry, "_PATIENCE", 0.05)
    with follow.waiting():
        time.sleep(0.5)
    assert [record.getMessage().split(":")[0] for record in caplog.records] == ["no images for 0 s"]
