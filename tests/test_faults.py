"""The campaign of faults in short: nothing lost, nothing silently wrong."""

import importlib
import subprocess
import sys

import pytest

from benchmarks.faults import __main__ as faults
from benchmarks.faults import disks

# Kinds whose moment or place other tests meet for certain, with whole runs or real checkpoints.
ELSEWHERE = {
    "SIGKILL between steps": "test_runs.test_a_killed_run_ends_with_the_same_bits",
    "SIGTERM between steps": "test_runs.test_a_stopped_run_saves_says_so_and_continues",
    "SIGINT between steps": "test_runs.test_a_stopped_run_saves_says_so_and_continues",
    "SIGTERM at any time": "test_signals.test_during_set_up_ends_at_once_in_one_line",
    "SIGINT at any time": "test_signals.test_during_set_up_ends_at_once_in_one_line",
    "two signals in a row during a save": (
        "test_signals.test_twice_in_a_row_during_a_save_saves_once"
    ),
    "NaN in the features of a batch": (
        "test_runs.test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_checkpoint"
    ),
    "SIGKILL of one of two processes": "test_hosts.test_a_killed_process_ends_the_other",
    "SIGTERM to one of two processes": (
        "test_hosts.test_a_signal_to_one_of_four_stops_all_after_one_step_and_one_process_goes_on"
    ),
} | dict.fromkeys(
    (f"newest checkpoint: {name}" for name in ("a file truncated", "a file emptied")),
    "test_stored.test_the_one_before_goes_on_and_nothing_is_deleted",
)
HERE = [name for name in faults.FAULTS if name not in ELSEWHERE]


def test_the_others_are_tested_where_it_is_said():
    assert set(ELSEWHERE) <= set(faults.FAULTS)
    for place in ELSEWHERE.values():
        module, name = place.split(".")
        assert callable(getattr(importlib.import_module(f"tests.{module}"), name))


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> dict[str, dict[str, object]]:
    """Each kind once."""
    folder = tmp_path_factory.mktemp("faults")
    command = [sys.executable, "-m", "benchmarks.faults", "--workdir", str(folder)]
    command += ["--faults", str(len(HERE)), "--only", *HERE]
    done = subprocess.run(command, capture_output=True, text=True)
    rows = faults.read(folder / "faults.jsonl")
    assert rows, done.stderr
    return {str(row["fault"]): row for row in rows}


@pytest.mark.parametrize("name", HERE)
def test_nothing_is_lost_or_wrong(outcomes, name):
    if name in disks.FAULTS and name not in outcomes:
        pytest.skip("needs root and loop devices")
    assert outcomes[name]["outcome"] in ("continued", "stopped"), outcomes[name]["told"]


def test_a_table_counts_what_was_found():
    rows = [{"fault": "a", "outcome": "lost"}, {"fault": "a", "outcome": "stopped"}]
    found = [tuple(row.values()) for row in faults.table(rows)]
    assert found == [("a", 2, 0, 1, 1, 0), ("all", 2, 0, 1, 1, 0)]
