"""The metrics that a run writes, and the files that hold them."""

import json
import sys
import types
from pathlib import Path

from etils import epath
from tensorboardX import event_file_writer  # noqa: F401 - the writer's package is installed

from singer_jax.runs.metrics import MetricsWriter


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


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
    assert list((tmp_path / "tensorboard").iterdir())
    assert "4 lines are not rows and are left out" in caplog.text


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
