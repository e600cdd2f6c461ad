"""Tests that a stopped probe resumes to exactly the same numbers."""

import functools
import json
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest

from singer_jax.errors import Stopped
from singer_jax.evaluation.backbone import Examples
from singer_jax.evaluation.classification import Classification
from singer_jax.evaluation.probe import ProbeSettings, probe
from singer_jax.evaluation.progress import FileProgressStore, ProgressStore
from singer_jax.evaluation.trainers import FeatureTrainer
from singer_jax.platform import memory
from tests import cli, tiny

CONFIG = """
from singer_jax.config import evaluation

def get_config(protocol="recommended"):
    config = evaluation(protocol)
    config.weights = {weights!r}
    config.data.source, config.data.workers = "digits", 0
    config.probe.epochs, config.probe.learning_rates = 4, (0.1, 0.5)
    return config
"""


def examples(images: int, seed: int) -> Examples:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 4, images).astype(np.int32)
    return Examples(rng.standard_normal((images, 6)).astype(np.float32), labels)


# Asked after each of 3 x 3 steps that compare the rates and of 3 x 4 with the best one; where an
# epoch is one program, after each epoch.
@pytest.mark.parametrize(
    ("bytes_", "questions"),
    [(1, (2, 9, 11, 13, 21)), (2**30, (2, 3, 5, 6))],
    ids=["by steps", "by epochs"],
)
def test_stopped_anywhere_a_probe_ends_with_the_same_bits(bytes_, questions, tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "device_memory", lambda mesh: bytes_)
    settings = ProbeSettings(epochs=3, batch_size=16, learning_rates=(0.1, 0.5))
    train, test = examples(50, 1), examples(20, 2)

    def run(progress_store: ProgressStore | None = None) -> tuple:
        trainer = FeatureTrainer(Classification(4), train, (6, 4), settings)
        result = probe(trainer, test, settings, progress_store=progress_store)
        return result.head, result.held_out, result.last, result.best, result.best_epoch

    file, expected = tmp_path / "probe.npz", run()
    # One probe that is stopped again and again.
    for number in np.diff(questions, prepend=0):
        answers = iter([False] * (number - 1) + [True])
        with pytest.raises(Stopped, match=str(file)):
            run(FileProgressStore(file, "key", lambda answers=answers: next(answers)))
    np.testing.assert_equal(run(FileProgressStore(file, "key", lambda: False)), expected)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 no archive", None])
def test_progress_that_cannot_be_read_or_is_of_another_probe_is_not_continued(content, tmp_path):
    file = tmp_path / "digits.progress.npz"
    progress_store = FileProgressStore(file, "key", lambda: False)
    progress_store.update(step=3, heads={"bias": np.ones((1, 2), np.float32)})
    assert FileProgressStore(file, "key", lambda: False).progress.step == 3
    if content is not None:
        file.write_bytes(content)
    assert (
        FileProgressStore(file, "other" if content is None else "key", lambda: False).progress.step
        == 0
    )


@pytest.mark.slow
def test_a_stopped_command_continues_to_the_same_results(tmp_path):
    """SIGTERM arrives during the comparison of rates, and again during the final training."""
    weights = tiny.write_described(tmp_path / "weights")
    file = tmp_path / "settings.py"
    file.write_text(CONFIG.format(weights=str(weights)))
    environment = cli.environment()

    def start(workdir: str) -> subprocess.Popen:
        return cli.start(environment, f"--config={file}", f"--workdir={tmp_path / workdir}")

    whole = start("whole")
    for final in (False, True):
        process = start("stopped")
        progress = tmp_path / "stopped" / "tasks" / "digits.progress.npz"
        cli.wait_until(functools.partial(in_phase, progress, final), process)
        process.send_signal(signal.SIGTERM)
        status, printed = cli.finish(process)
        assert status == 75, printed
        assert printed.splitlines()[-1].startswith("singer_jax: stopped after step")
        assert "Traceback" not in printed
        assert not (tmp_path / "stopped" / "results.json").exists()
    status, printed = cli.finish(start("stopped"))
    assert status == 0 and "continuing after step" in printed, printed
    status, printed = cli.finish(whole)
    assert status == 0, printed
    expected, found = (
        (tmp_path / name / "results.json").read_bytes() for name in ("whole", "stopped")
    )
    assert found == expected
    tasks = {path.name for path in (tmp_path / "stopped" / "tasks").iterdir()}
    assert tasks == {"digits.json", "digits.npz"}


@pytest.mark.slow
def test_a_signal_to_one_of_two_processes_stops_both_at_one_step(tmp_path):
    file = tmp_path / "settings.py"
    file.write_text(CONFIG.format(weights=str(tiny.write_described(tmp_path / "weights"))))
    arguments = (f"--config={file}", f"--workdir={tmp_path / 'run'}", "--config.probe.epochs=9999")
    processes = cli.start_together(cli.environment(), 2, *arguments)
    progress = tmp_path / "run" / "tasks" / "digits.progress.npz"
    cli.wait_until(functools.partial(in_phase, progress, False), processes[0])
    processes[1].send_signal(signal.SIGTERM)
    ends = [cli.finish(process) for process in processes]
    assert [status for status, _ in ends] == [75, 75], ends
    for _, printed in ends:
        assert "singer_jax: stopped after step" in printed.splitlines()[-1]
        assert "Traceback" not in printed
    assert in_phase(progress, False)


def in_phase(file: Path, final: bool) -> bool:
    """Returns True if steps of the given phase are kept: final training, or comparison of rates."""
    if not file.exists():
        return False
    with np.load(file) as content:
        progress = json.loads(str(content["described"]))["progress"]
    return progress["step"] > 0 and bool(progress["held_out"]) == final
