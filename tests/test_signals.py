"""After SIGTERM or Ctrl-C at any moment a command saves its state, or ends with one line."""

import functools
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import cli

SIGNALS = (signal.SIGINT, signal.SIGTERM)
PIPES = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}


@pytest.fixture(scope="module")
def environment() -> dict[str, str]:
    return cli.environment(quickly=True)


@pytest.fixture(scope="module")
def config_file(tmp_path_factory) -> Path:
    return cli.write_config(tmp_path_factory.mktemp("config"))


@pytest.fixture(scope="module")
def uninterrupted(config_file, environment, tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    arguments = (
        f"--config={config_file}",
        f"--workdir={workdir}",
        "--config.checkpoint.every_steps=99",
    )
    arguments += ("--config.method.name=fitnet",)
    status, printed = cli.finish(cli.start(environment, *arguments))
    assert status == 0, printed
    return workdir


def workers(process: subprocess.Popen) -> list[int]:
    """Returns the decoding processes that a command has started."""
    threads = Path(f"/proc/{process.pid}/task").glob("*/children")
    children = [int(pid) for thread in threads for pid in thread.read_text().split()]
    return [pid for pid in children if "spawn_main" in command_line(pid)]


def command_line(pid: int) -> str:
    file = Path(f"/proc/{pid}/cmdline")
    return file.read_bytes().replace(b"\0", b" ").decode() if file.exists() else ""


def stop(process: subprocess.Popen, number: signal.Signals) -> None:
    """Sends a signal to a run that waits after step 6, and checks that it saves."""
    cli.signal_group(process, number)
    status, printed = cli.finish(process)
    assert status == 75, printed
    assert "Traceback" not in printed
    line = f"singer_jax: {number.name}: saving and stopping; Ctrl-C stops at once"
    assert line in printed.splitlines()  # not behind the progress bar
    assert "singer_jax: stopped after step 6 of 12" in printed.splitlines()[-1]


def stopped_with_workers(
    config_file: Path, environment: dict, workdir: Path, number: signal.Signals
) -> None:
    process = cli.start(
        cli.held(environment, 6),
        f"--config={config_file}",
        f"--workdir={workdir}",
        "--config.data.workers=2",
        "--config.method.name=fitnet",  # compiles in half the time
    )
    cli.wait_for_step(process, workdir, 4)
    decoding = workers(process)
    assert len(decoding) == 2
    stop(process, number)
    assert not any(map(command_line, decoding))


def test_during_a_step_saves_and_ends_the_workers(config_file, environment, tmp_path):
    stopped_with_workers(config_file, environment, tmp_path, signal.SIGINT)


@pytest.mark.slow
def test_a_run_stopped_with_workers_continues_to_the_same_bits(
    config_file, environment, tmp_path, uninterrupted
):
    stopped_with_workers(config_file, environment, tmp_path, signal.SIGTERM)
    arguments = (f"--config={config_file}", f"--workdir={tmp_path}", "--config.data.workers=2")
    arguments += ("--config.method.name=fitnet",)
    status, printed = cli.finish(cli.start(environment, *arguments))
    assert status == 0 and "continuing after step 6" in printed, printed
    cli.assert_same_student(tmp_path, uninterrupted)


@pytest.mark.parametrize("number", SIGNALS)
def test_during_a_step_of_a_loop_saves_and_continues_to_the_same_bits(
    environment, tmp_path, number
):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    start = functools.partial(cli.start, program=cli.LOOP)
    assert cli.finish(start(environment, f"--workdir={whole}"))[0] == 0
    process = start(cli.held(environment, 6), f"--workdir={stopped}")
    cli.wait_for_step(process, stopped, 4)
    stop(process, number)
    status, printed = cli.finish(start(environment, f"--workdir={stopped}"))
    assert status == 0 and "continuing after step 6" in printed, printed
    cli.assert_same_student(stopped, whole)
    assert cli.steps(stopped) == list(range(1, 13))


def test_twice_in_a_row_during_a_save_saves_once(environment, tmp_path):
    arguments = (
        f"--workdir={tmp_path}",
        "--config.steps=100000",
        "--config.checkpoint.every_steps=1",
    )
    process = cli.start(environment, *arguments, program=cli.LOOP)
    saving = tmp_path / "checkpoints"
    cli.wait_until(lambda: any(saving.glob("*.orbax-checkpoint-tmp")), process)
    for number in SIGNALS:
        cli.signal_group(process, number)
    status, printed = cli.finish(process)
    assert status == 75, printed
    assert "Traceback" not in printed
    step = int(printed.splitlines()[-1].split("stopped after step ")[1].split()[0])
    assert step == max(int(path.name) for path in saving.iterdir())  # and no half one


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_during_set_up_ends_at_once_in_one_line(config_file, environment, tmp_path, number):
    arguments = (f"--config={config_file}", f"--workdir={tmp_path}", "--config.data.workers=2")
    process = cli.start(environment, *arguments)
    cli.wait_until(lambda: len(workers(process)) == 2, process)  # which are starting themselves
    cli.signal_group(process, number)
    status, printed = cli.finish(process)  # returns when the last worker has closed stderr
    assert status == 75, printed
    assert "Traceback" not in printed and "Error" not in printed
    assert printed.splitlines()[-1].startswith(f"singer_jax: stopped by {number.name}; ")


SHIELDED = """
import signal, threading, time
from singer_jax.platform import signals
with signals.handled():
    other = threading.Thread(target=threading.Event().wait, daemon=True)
    other.start()  # takes the signal that the main thread has blocked
    with signals.shielded():
        signal.pthread_kill(other.ident, signal.SIGTERM)
        for _ in range(100):
            time.sleep(0.01)
        print("not broken off", flush=True)
    print("went on", flush=True)
"""


def test_a_signal_to_another_thread_does_not_interrupt_a_shielded_block():
    process = subprocess.run([sys.executable, "-c", SHIELDED], capture_output=True, text=True)
    assert process.returncode == 75 and process.stdout == "not broken off\n", process.stderr
    assert process.stderr.startswith("singer_jax: stopped by SIGTERM; ")


SWALLOWED = """
import signal, time, weakref
from singer_jax.platform import signals
class Held:
    pass
with signals.handled():
    held = Held()
    reference = weakref.ref(held, lambda _: signal.raise_signal(signal.SIGTERM))
    del held
    time.sleep(20)
    print("went on", flush=True)
"""


def test_a_signal_in_a_finaliser_which_raises_nothing_is_not_lost():
    process = subprocess.run([sys.executable, "-c", SWALLOWED], capture_output=True, text=True)
    assert process.returncode == 75 and process.stdout == "", process.stderr
    assert process.stderr.startswith("singer_jax: stopped by SIGTERM; ")
    assert len(process.stderr.splitlines()) == 1


# Sends the signal again while the hook is still running, as on a busy machine.
EAGER = """
import threading
class Eager(threading.Timer):
    left = 2
    def start(self):
        if self.interval < 1 and Eager.left:
            Eager.left -= 1
            self.function(*self.args)
        else:
            super().start()
threading.Timer = Eager
"""


def test_a_signal_in_a_hook_which_raises_nothing_is_not_lost():
    program = EAGER + SWALLOWED
    process = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert process.returncode == 75 and process.stdout == "", process.stderr
    assert process.stderr.startswith("singer_jax: stopped by SIGTERM; "), process.stderr
    assert len(process.stderr.splitlines()) == 1


WAITING = """
import time
import jax.numpy  # whose interpreter takes a while to end
from singer_jax.platform import signals
with signals.handled():
    print("ready", flush=True)
    time.sleep(60)
"""


DONE = """
import sys
import jax.numpy
from singer_jax.platform import signals
with signals.handled():
    print("done", flush=True)
    sys.exit(0)
"""


@pytest.mark.parametrize(
    ("program", "ends"), [(WAITING, {(75, 1)}), (DONE, {(0, 0), (75, 1)})], ids=["stopped", "done"]
)
def test_signals_until_the_end_do_not_change_the_status(program, ends):
    """A signal before the end is answered with one line; a signal after it has no effect."""
    process = subprocess.Popen([sys.executable, "-c", program], **PIPES)
    assert process.stdout.readline() in ("ready\n", "done\n")
    while process.poll() is None:
        process.send_signal(signal.SIGTERM)
        time.sleep(0.0005)
    assert (process.returncode, len(process.stderr.read().splitlines())) in ends


ENDING = """
import os, signal, sys
from singer_jax.platform import signals

class Interrupting(SystemExit):
    @property
    def code(self):
        os.kill(os.getpid(), signal.SIGINT)
        return 0

def hook(*error):
    print("another hook", file=sys.stderr)

sys.excepthook = hook
with signals.handled():
    raise {raised}
"""


@pytest.mark.parametrize(
    ("raised", "status", "line"),
    [
        ("Interrupting()", 75, "singer_jax: stopped by SIGINT; run the same command to continue"),
        ("ValueError()", 1, "another hook"),
    ],
)
def test_a_signal_while_the_command_is_ending_is_one_line(raised, status, line):
    """Between the end of the work and that of the process; other errors are not touched."""
    program = ENDING.format(raised=raised)
    done = subprocess.run([sys.executable, "-c", program], **PIPES, timeout=60, check=False)
    assert done.returncode == status, done.stderr
    assert done.stderr.startswith(line) and done.stderr.count("\n") == 1, done.stderr


PROGRAM = """
import sys, threading
from singer_jax.platform import signals
with signals.handled(), signals.deferred():
    print("ready", flush=True)
    threading.Event().wait()
"""


def test_a_second_ctrl_c_ends_a_job_that_does_not_answer():
    process = subprocess.Popen([sys.executable, "-c", PROGRAM], **PIPES)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    assert process.stderr.readline().startswith("singer_jax: SIGINT: saving and stopping")
    lines = []
    while process.poll() is None:  # those within a second count as one
        process.send_signal(signal.SIGINT)
        try:
            lines = process.communicate(timeout=0.2)[1].splitlines()
        except subprocess.TimeoutExpired:
            continue
    assert process.returncode == 75
    assert len(lines) == 1 and "stopped at once by a second Ctrl-C" in lines[0]


HANGING = """
import sys, threading
from singer_jax.platform import signals
with signals.handled():
    print("told", end="")
    threading.Thread(target=threading.Event().wait).start()
    sys.exit(1)
"""


def test_a_hanging_thread_does_not_delay_a_failed_command():
    process = subprocess.run(
        [sys.executable, "-c", HANGING], capture_output=True, text=True, timeout=cli.PATIENCE
    )
    assert (process.returncode, process.stdout, process.stderr) == (1, "told", "")
