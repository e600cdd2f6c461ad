"""Faults of processes: signals at any moment, workers, several processes, two starts."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

from benchmarks.faults.bench import EVERY, STEPS
from benchmarks.faults.trial import Inject, Missed, Trial, Wrong, session

Command = subprocess.Popen

# Signals. Each moment starts the command and returns when it is reached.


def _at_any_time(trial: Trial) -> Command:
    process = trial.start()
    trial.work(trial.rng.uniform(0, 0.95 * trial.bench.seconds), process)
    return process


def between_steps(trial: Trial) -> Command:
    process = trial.start()
    trial.past(trial.rng.randrange(1, STEPS), process)
    trial.wait(trial.rng.uniform(0, 0.1), process)
    return process


def _during_a_save(trial: Trial) -> Command:
    process, saving = trial.start(), trial.workdir / "checkpoints"
    trial.until(lambda: any(saving.glob("*.orbax-checkpoint-tmp")), process)
    trial.wait(trial.rng.uniform(0, 0.05), process)
    return process


def _during_the_export(trial: Trial) -> Command:
    trial.begin(STEPS)
    process = trial.start()
    trial.until((trial.workdir / "student").exists, process)
    trial.wait(trial.rng.uniform(0, 0.005), process)
    return process


def _while_the_config_is_written(trial: Trial) -> Command:
    process = trial.start()
    trial.until(lambda: any(trial.workdir.glob("config*.json")), process)
    trial.wait(trial.rng.uniform(0, 0.002), process)
    return process


MOMENTS = {
    "at any time": _at_any_time,
    "between steps": between_steps,
    "during a save": _during_a_save,
    "during the export": _during_the_export,
    "while config.json is written": _while_the_config_is_written,
}
SIGNALS = {
    "SIGKILL": (signal.SIGKILL,),
    "SIGTERM": (signal.SIGTERM,),
    "SIGINT": (signal.SIGINT,),
    "two signals in a row": (signal.SIGTERM, signal.SIGINT),
}


def _catches(pid: int) -> bool:
    """Returns True if a process handles SIGTERM itself (`stopping.handled`)."""
    status = Path(f"/proc/{pid}/status").read_text()
    return bool(int(status.split("SigCgt:")[1].split()[0], 16) >> signal.SIGTERM - 1 & 1)


def _signal(moment: str, numbers: tuple[signal.Signals, ...]) -> Inject:
    def inject(trial: Trial) -> None:
        process = MOMENTS[moment](trial)
        if signal.SIGKILL not in numbers:
            # Before, nothing has begun: the interpreter ends as it does.
            trial.until(lambda: _catches(process.pid), process)
        trial.note()
        send = trial.rng.choice((os.kill, os.killpg))
        for number in trial.rng.sample(numbers, len(numbers)):
            if process.poll() is None:
                send(process.pid, number)
            time.sleep(trial.rng.choice((0, 0, 0.01, 0.1)))
        trial.end(process, *({signal.SIGKILL} & set(numbers)))

    return inject


def _suspended(trial: Trial) -> None:
    process = trial.rng.choice((between_steps, _during_a_save, _at_any_time))(trial)
    os.killpg(process.pid, signal.SIGSTOP)
    time.sleep(trial.rng.uniform(0.5, 3))
    os.killpg(process.pid, signal.SIGCONT)
    trial.end(process)


# Processes.


def _decoding(trial: Trial) -> tuple[subprocess.Popen, int]:
    """Starts a run and returns it between steps with one of its two workers."""
    trial.more.append("--config.data.workers=2")
    process = between_steps(trial)
    trial.note()
    workers = [pid for pid in session(process.pid) if "spawn_main" in _command(pid)]
    if len(workers) != 2:
        if trial.end(process).status == 0:  # it was ending already
            raise Missed
        raise Wrong(f"{len(workers)} workers")
    return process, trial.rng.choice(workers)


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:  # the process has ended
        return ""


def _worker_killed(trial: Trial) -> None:
    process, worker = _decoding(trial)
    os.kill(worker, signal.SIGKILL)
    trial.end(process)


def _worker_hangs(trial: Trial) -> None:
    process, worker = _decoding(trial)
    os.kill(worker, signal.SIGSTOP)
    time.sleep(trial.rng.uniform(0.5, 5))
    os.kill(worker, signal.SIGCONT)
    trial.end(process)


def _worker_hangs_for_good(trial: Trial) -> None:
    process, worker = _decoding(trial)
    os.kill(worker, signal.SIGSTOP)
    time.sleep(1)
    os.killpg(process.pid, signal.SIGINT)
    for _ in range(20):  # on a busy machine the second one may be taken for the first, sent twice
        time.sleep(1.1)
        if process.poll() is not None:
            break
        os.killpg(process.pid, signal.SIGINT)
    trial.end(process)


def _parent_killed(trial: Trial) -> None:
    process, _ = _decoding(trial)
    process.kill()
    trial.end(process, signal.SIGKILL)


def _one_of_two(number: signal.Signals) -> Inject:
    def inject(trial: Trial) -> None:
        trial.processes = 2
        trial.more.append("--config.mesh.data=2")
        processes = trial.start_all()
        trial.past(trial.rng.randrange(1, STEPS), processes[0])
        trial.note()
        trial.rng.choice(processes).send_signal(number)
        for process in processes:
            trial.end(process, *({signal.SIGKILL} & {number}))

    return inject


def _two_starts(trial: Trial) -> None:
    if trial.rng.random() < 0.5:
        trial.begin(EVERY)
    processes = [trial.start()]
    time.sleep(trial.rng.choice((0, 0, 0.1, 0.5)))
    processes.append(trial.start())
    ended = [trial.end(process).status for process in processes]
    if sorted(ended) not in ([0, 2], [0, 0]):
        raise Wrong(f"statuses {ended}")


FAULTS = {
    f"{name} {moment}": _signal(moment, numbers)
    for moment in MOMENTS
    for name, numbers in SIGNALS.items()
} | {
    "all processes suspended for a while": _suspended,
    "a loader's worker killed": _worker_killed,
    "a loader's worker hangs for a while": _worker_hangs,
    "a loader's worker hangs until Ctrl-C twice": _worker_hangs_for_good,
    "SIGKILL of a run alone, not of its workers": _parent_killed,
    "SIGKILL of one of two processes": _one_of_two(signal.SIGKILL),
    "SIGTERM to one of two processes": _one_of_two(signal.SIGTERM),
    "two starts at once": _two_starts,
}
