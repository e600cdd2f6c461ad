"""The metrics that a run writes, and the files that hold them."""

import json
import os
import struct
import sys
import types
from pathlib import Path

import pytest
from etils import epath
from tensorboardX.proto.event_pb2 import Event

from singer_jax.runs.metrics import MetricsWriter


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def events(file: Path) -> list[Event]:
    """Reads a file of length-prefixed records with two checksums of 4 bytes each."""
    data, found = file.read_bytes(), []
    while data:
        (length,) = struct.unpack("Q", data[:8])
        found.append(Event.FromString(data[12 : 12 + length]))
        data = data[16 + length :]
    return found


def test_rows_after_the_restored_step_are_dropped(tmp_path, caplog):
    writer = MetricsWriter(tmp_path)
    for step in (2, 4, 6):
        writer.write(step, {"train/loss": float(step)})
    writer.close()
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'\xff\x00{"step": 2\n[3]\n{"step": "3"}\n')  # as a damaged disk leaves it
        file.write(b'{"step": 8, "tra')  # as a killed process leaves it
    writer = MetricsWriter(tmp_path, step=4)
    writer.write(6, {"train/loss": 60.0})
    writer.close()
    assert [(row["step"], row["train/loss"]) for row in rows(tmp_path)] == [
        (2, 2.0),
        (4, 4.0),
        (6, 60.0),
    ]
    assert all(row["time"] > 0 for row in rows(tmp_path))
    assert "4 lines are not rows and are left out" in caplog.text


def test_tensorboard_gets_the_scalars_and_drops_what_a_run_writes_again(tmp_path):
    writer = MetricsWriter(tmp_path, step=4)
    writer.write(6, {"train/loss": 60.0, "train/lr": 0.5})
    writer.close()
    (file,) = (tmp_path / "tensorboard").iterdir()
    version, start, row = events(file)
    assert version.file_version == "brain.Event:2"
    assert (start.step, start.session_log.status) == (5, start.session_log.START)
    assert row.step == 6
    assert [(v.tag, v.simple_value) for v in row.summary.value] == [
        ("train/loss", 60.0),
        ("train/lr", 0.5),
    ]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_a_full_disk_of_the_event_file_is_an_error_and_no_hang(tmp_path):
    writer = MetricsWriter(tmp_path)
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, writer.tensorboard.records._writer.fileno())
    os.close(full)
    with pytest.raises(OSError, match="No space left"):
        for step in range(2000):  # more than a buffer, and than any queue
            writer.write(step, {"train/loss": 1.0})
    with pytest.raises(OSError, match="No space left"):
        writer.close()
    assert writer.file.closed


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
