"""Injects faults into whole runs and checks that each run resumes to the same student.

  python -m benchmarks.faults --faults 1000 --workdir /tmp/faults

Each fault is injected into a tiny run on the CPU in its own processes. Then the same command is
started again without the fault. It must resume from the latest complete checkpoint and end with the
same student as an undisturbed run, bit for bit. The outcomes:

  continued   the command succeeded in spite of the fault, or was killed
  stopped     it ended with status 1, 2 or 75 and a one-line message, without a traceback
  lost        finished checkpoints are missing, or the run cannot resume
  wrong       another student, a traceback, a hang, another status, a process or a segment of shared
              memory left behind

One line for each fault is appended to faults.jsonl in `--workdir`; the same command continues after
the last one. Faults of disks require Linux, root and loop devices, and are skipped elsewhere.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax

from benchmarks.faults import disks, files, processes
from benchmarks.faults.bench import Bench, cpu_of_children
from benchmarks.faults.trial import STOPPED, Lost, Missed, Trial, Wrong
from benchmarks.results import report
from tests import cli

FAULTS = processes.FAULTS | files.FAULTS | disks.FAULTS
OUTCOMES = {
    "continued": "continued bit-exactly",
    "stopped": "stopped with one clear line",
    "lost": "lost",
    "wrong": "wrong",
}
_PACKAGES = ("jax", "flax", "orbax-checkpoint", "grain")
_TRIES = 12  # until a command is met before its end


def run_trial(bench: Bench, name: str, folder: Path, seed: str) -> dict[str, object]:
    """Injects a fault and returns the outcome as a row."""
    begun, used = time.monotonic(), cpu_of_children()
    outcome, message = "wrong", "missed every time"
    for attempt in range(_TRIES):
        shutil.rmtree(folder, ignore_errors=True)
        trial = Trial(bench, folder, random.Random(f"{seed}/{attempt}"))
        try:
            FAULTS[name](trial)
            trial.go_on()
            stopped = [ended.line for ended in trial.ended if ended.status in STOPPED]
            outcome, message = ("stopped", stopped[0]) if stopped else ("continued", "")
        except (Missed, ProcessLookupError):  # a worker has ended before the fault
            continue
        except (Lost, Wrong) as error:
            outcome, message = type(error).__name__.lower(), str(error)
            with contextlib.suppress(shutil.Error, OSError):  # the command may still write
                shutil.copytree(folder, f"{folder}.{seed.replace('/', '_')}", dirs_exist_ok=True)
        finally:
            trial.close()
        break
    seconds = round(time.monotonic() - begun, 1)
    return {
        "outcome": outcome,
        "message": message,
        "seconds": seconds,
        "cpu": round(cpu_of_children() - used, 1),
    }


def read(file: Path) -> list[dict[str, object]]:
    """Returns the rows of a campaign without incomplete lines."""
    found = []
    for line in file.read_text().splitlines() if file.exists() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def campaign(
    folder: Path,
    faults: int,
    seed: int,
    only: list[str],
    alone: bool,
    program: tuple[str, ...] = cli.PROGRAM,
) -> None:
    """Injects the remaining faults of a campaign, each kind in turn."""
    file = folder / "faults.jsonl"
    rows = read(file)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = {row["number"] for row in rows}
    kinds = [name for name in FAULTS if any(word in name for word in only)] if only else [*FAULTS]
    if not disks.fit(folder):
        print("skipping faults of disks: they require root and loop devices", flush=True)
        kinds = [name for name in kinds if name not in disks.FAULTS]
    jax.config.update("jax_platforms", "cpu")  # a teacher is written; the runs have their own
    bench = Bench(folder / "bench", alone, program)
    for number in range(faults):
        if number in done:
            continue
        name = kinds[number % len(kinds)]
        row = run_trial(bench, name, folder / "trial", f"{seed}/{number}")
        with file.open("a") as stream:
            stream.write(json.dumps({"number": number, "fault": name} | row) + "\n")
        print(f"{number} {name}: {row['outcome']} ({row['cpu']} s) {row['message']}", flush=True)


def table(rows: list[dict[str, object]]) -> list[dict[str, object]]:
    """Returns the number of each outcome for each kind of fault and in total."""
    kinds: dict[str, collections.Counter[str]] = {}
    for row in rows:
        kinds.setdefault(str(row["fault"]), collections.Counter())[str(row["outcome"])] += 1
    kinds["all"] = sum(kinds.values(), collections.Counter())
    return [
        {"fault": name, "times": counts.total()}
        | {heading: counts[outcome] for outcome, heading in OUTCOMES.items()}
        for name, counts in kinds.items()
    ]


def _confined() -> None:
    """Restarts this command with private mounts and shared memory if the kernel allows it."""
    for more in ([], ["--map-root-user"]):
        enter = ["unshare", "--mount", "--propagation", "private", *more]
        inside = 'mount -t tmpfs tmpfs /dev/shm && exec "$@"'
        if (
            shutil.which("unshare")
            and not subprocess.run(
                [*enter, "sh", "-c", inside, "sh", "true"], capture_output=True
            ).returncode
        ):
            again = [sys.executable, "-m", "benchmarks.faults", *sys.argv[1:], "--alone"]
            os.execvp("unshare", [*enter, "sh", "-c", inside, "sh", *again])
    print("shared memory is not checked, because other processes use it", flush=True)


def main() -> None:
    """Runs the campaign and reports its table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--faults", type=int, default=1000, help="number of faults")
    parser.add_argument("--workdir", type=Path, required=True, help="folder of the campaign")
    parser.add_argument("--seed", type=int, default=0, help="seed of moments and places")
    parser.add_argument(
        "--only", nargs="*", default=[], help="only kinds whose names contain one of these words"
    )
    parser.add_argument("--loop", action="store_true", help="runs of tests/loop.py, quicker")
    parser.add_argument(
        "--table", action="store_true", help="print the table without injecting faults"
    )
    parser.add_argument("--keep", action="store_true", help="append to benchmarks/results")
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    folder = arguments.workdir.absolute()
    if not arguments.table:
        if not arguments.alone:
            _confined()
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))  # by way of what cleans up
        folder.mkdir(parents=True, exist_ok=True)
        program = cli.LOOP if arguments.loop else cli.PROGRAM
        campaign(folder, arguments.faults, arguments.seed, arguments.only, arguments.alone, program)
    rows = read(folder / "faults.jsonl")
    command = f"python -m benchmarks.faults --faults {arguments.faults} --workdir DIR"
    report("Injected faults", command, table(rows), "", _PACKAGES, arguments.keep)
    sys.exit(any(row["outcome"] in ("lost", "wrong") for row in rows))


if __name__ == "__main__":
    main()
