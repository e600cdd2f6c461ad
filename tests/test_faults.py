"""The campaign of faults in short, a few of each kind: nothing lost, nothing silently wrong.

More faults meet whole runs in test_runs.py, test_signals.py and test_hosts.py, checkpoints in
test_stored.py and test_resuming.py, loaders in data/test_loader.py.
"""

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.faults import __main__ as faults
from benchmarks.faults import disks

KINDS = [
    "SIGKILL at any time",
    "SIGKILL during a save",
    "SIGKILL during the export",
    "SIGKILL while config.json is written",
    "SIGTERM during a save",
    "SIGINT during the export",
    "two signals in a row while config.json is written",
    "a loader's worker killed",
    "a loader's worker hangs until Ctrl-C twice",
    "two starts at once",
    "newest checkpoint: half copied",
    "config.json cut",
    "metrics.jsonl cut",
    "TensorBoard's file cut or gone",
    "work directory moved",
    "work directory copied while the run goes on, and continued there",
    "clock set back",
    "images replaced by a folder during a strict run",
    "images fewer at the next start",
    "SIGKILL while images cannot be read",
    "disk full between steps",
    "disk full during a save",
    "disk full during the export",
    "disk of the metrics full, that of the checkpoints not",
    "disk turns read-only during a save",
    "disk hangs for a while",
]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> dict[str, dict[str, object]]:
    """Each of them once; None of a disk's where the campaign leaves them out."""
    folder = tmp_path_factory.mktemp("faults")
    command = [sys.executable, "-m", "benchmarks.faults", "--workdir", str(folder)]
    command += ["--faults", str(len(KINDS)), "--only", *KINDS]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    rows = faults.read(folder / "faults.jsonl")
    assert rows, done.stderr
    left_out = disks.FAULTS if "faults of disks are left out" in done.stdout else ()
    return dict.fromkeys(left_out) | {str(row["fault"]): row for row in rows}


@pytest.mark.parametrize("name", KINDS)
def test_nothing_is_lost_or_wrong(outcomes, name):
    if outcomes[name] is None:
        pytest.skip("needs root and loop devices")
    assert outcomes[name]["outcome"] in ("continued", "stopped"), outcomes[name]["told"]


def test_a_table_counts_what_was_found():
    rows = [{"fault": "a", "outcome": "lost"}, {"fault": "a", "outcome": "stopped"}]
    found = [tuple(row.values()) for row in faults.table(rows)]
    assert found == [("a", 2, 0, 1, 1, 0), ("all", 2, 0, 1, 1, 0)]


def test_a_row_that_a_kill_left_half_written_is_none(tmp_path: Path):
    (tmp_path / "faults.jsonl").write_text('{"number": 0}\n{"numb')
    assert faults.read(tmp_path / "faults.jsonl") == [{"number": 0}]
