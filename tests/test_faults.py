"""The campaign of faults in short: nothing is lost, nothing is silently wrong.

More faults meet whole runs in test_runs.py, test_signals.py and test_hosts.py, checkpoints in
test_stored.py and test_resuming.py, loaders in data/test_loader.py.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.faults import __main__ as faults
from benchmarks.faults import disks

FEW = [
    "SIGKILL during a save",
    "SIGTERM during a save",
    "SIGINT during the export",
    "two starts at once",
    "newest checkpoint: half copied",
    "metrics.jsonl cut",
    "disk full during a save",
]
OTHERS = [
    "SIGKILL at any time",
    "a loader's worker killed",
    "SIGKILL during the export",
    "SIGKILL while config.json is written",
    "two signals in a row while config.json is written",
    "a loader's worker hangs until Ctrl-C twice",
    "config.json cut",
    "TensorBoard's file cut or gone",
    "work directory moved",
    "work directory copied while the run goes on, and continued there",
    "clock set back",
    "images replaced by a folder during a strict run",
    "images fewer at the next start",
    "SIGKILL while images cannot be read",
    "disk full between steps",
    "disk full during the export",
    "disk of the metrics full, that of the checkpoints not",
    "disk turns read-only during a save",
    "disk hangs for a while",
]


def campaign(folder: Path, kinds: list[str], *more: str) -> dict[str, dict[str, object] | None]:
    """Injects each of them once; None for a disk's where the campaign leaves them out."""
    command = [sys.executable, "-m", "benchmarks.faults", "--workdir", str(folder)]
    command += ["--faults", str(len(kinds)), "--only", *kinds, *more]
    quickly = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}  # half of the compiler's time
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=quickly)
    rows = faults.read(folder / "faults.jsonl")
    left_out = disks.FAULTS if "skipping faults of disks" in done.stdout else ()
    found = dict.fromkeys(left_out) | {str(row["fault"]): row for row in rows}
    assert set(found) >= set(kinds), done.stderr  # the campaign itself came to its end
    return found


@pytest.fixture(scope="module")
def few(tmp_path_factory) -> dict[str, dict[str, object] | None]:
    return campaign(tmp_path_factory.mktemp("few"), FEW, "--loop")


@pytest.fixture(scope="module")
def whole_runs(tmp_path_factory) -> dict[str, dict[str, object] | None]:
    return campaign(tmp_path_factory.mktemp("whole_runs"), FEW + OTHERS)


def check(found: dict[str, object] | None) -> None:
    if found is None:
        pytest.skip("needs root and loop devices")
    assert found["outcome"] in ("continued", "stopped"), found["message"]


@pytest.mark.parametrize("name", FEW)
def test_nothing_is_lost_or_wrong_with_a_loop(few, name):
    check(few[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", FEW + OTHERS)
def test_nothing_is_lost_or_wrong_with_whole_runs(whole_runs, name):
    check(whole_runs[name])


def test_a_table_counts_what_was_found():
    rows = [{"fault": "a", "outcome": "lost"}, {"fault": "a", "outcome": "stopped"}]
    found = [tuple(row.values()) for row in faults.table(rows)]
    assert found == [("a", 2, 0, 1, 1, 0), ("all", 2, 0, 1, 1, 0)]


def test_a_row_that_a_kill_left_half_written_is_none(tmp_path: Path):
    (tmp_path / "faults.jsonl").write_text('{"number": 0}\n{"numb')
    assert faults.read(tmp_path / "faults.jsonl") == [{"number": 0}]
