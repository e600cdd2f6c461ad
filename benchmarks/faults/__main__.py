"""A campaign of faults on whole runs: nothing lost, nothing silently wrong.

  python -m benchmarks.faults --faults 1000 --workdir /tmp/faults

Each fault meets a tiny run on the CPU in processes of its own. Then the same command is started
again without it, and must go on after the latest whole checkpoint to the student that a run has
which nothing disturbed, bit for bit. What comes of a fault:

  continued   the command ended well in spite of it, or was killed
  stopped     it ended with status 1, 2 or 75 and one clear line, without a traceback
  lost        finished checkpoints are gone, or the run cannot go on
  wrong       another student, a traceback, a hang, another status, a process or a segment of shared
              memory left behind

`--workdir` keeps one line of each fault in faults.jsonl; the same command goes on after the last.
Faults of disks need Linux, root and loop devices, and are left out elsewhere.
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
    """Injects a fault; what came of it, in a row."""
    begun, used = time.monotonic(), cpu_of_children()
    outcome, told = "wrong", "missed every time"
    for attempt in range(_TRIES):
        shutil.rmtree(folder, ignore_errors=True)
        trial = Trial(bench, folder, random.Random(f"{seed}/{attempt}"))
        try:
            FAULTS[name](trial)
            trial.go_on()
            stopped = [ended.line for ended in trial.ended if ended.status in STOPPED]
            outcome, told = ("stopped", stopped[0]) if stopped else ("continued", "")
        except (Missed, ProcessLookupError):  # a worker has ended before the fault
            continue
        except (Lost, Wrong) as error:
            outcome, told = type(error).__name__.lower(), str(error)
            with contextlib.suppress(shutil.Error, OSError):  # the command may still write
                shutil.copytree(folder, f"{folder}.{seed.replace('/', '_')}", dirs_exist_ok=True)
        finally:
            trial.close()
        break
    seconds = round(time.monotonic() - begun, 1)
    return {
        "outcome": outcome,
        "told": told,
        "seconds": seconds,
        "cpu": round(cpu_of_children() - used, 1),
    }


def read(file: Path) -> list[dict[str, object]]:
    """The rows of a campaign; one that a kill left half written is none."""
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
    """Injects what is missing of so many faults, each kind in turn."""
    file = folder / "faults.jsonl"
    rows = read(file)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = {row["number"] for row in rows}
    kinds = [name for name in FAULTS if any(word in name for word in only)] if only else [*FAULTS]
    if not disks.fit(folder):
        print("faults of disks are left out: they need root and loop devices", flush=True)
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
        print(f"{number} {name}: {row['outcome']} ({row['cpu']} s) {row['told']}", flush=True)


def table(rows: list[dict[str, object]]) -> list[dict[str, object]]:
    """Of each kind of fault how often it came to what, and of all."""
    kinds: dict[str, collections.Counter[str]] = {}
    for row in rows:
        kinds.setdefault(str(row["fault"]), collections.Counter())[str(row["outcome"])] += 1
    kinds["all"] = sum(kinds.values(), collections.Counter())
    return [
        {"fault": name, "times": counts.total()}
        | {told: counts[outcome] for outcome, told in OUTCOMES.items()}
        for name, counts in kinds.items()
    ]


def _confined() -> None:
    """Starts this again with mounts and shared memory of its own, where the kernel lets it."""
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
    print("shared memory is not looked at: it is not this campaign's alone", flush=True)


def main() -> None:
    """The campaign, and its table at the end."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--faults", type=int, default=1000, help="how many")
    parser.add_argument("--workdir", type=Path, required=True, help="folder of the campaign")
    parser.add_argument("--seed", type=int, default=0, help="of moments and places")
    parser.add_argument("--only", nargs="*", default=[], help="kinds whose names hold one of these")
    parser.add_argument("--loop", action="store_true", help="runs of tests/loop.py, quicker")
    parser.add_argument("--table", action="store_true", help="only the table so far")
    parser.add_argument("--keep", action="store_true", help="append it to RESULTS.md")
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
