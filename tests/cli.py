"""Commands in processes of their own, for tests of whole runs."""

import contextlib
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from tests import tiny

CONFIG = """
import os
from tests import tiny

def get_config(protocol="recommended"):
    if "HOLD_AFTER" in os.environ:
        from tests.loop import hold_if_asked
        hold_if_asked()
    config = tiny.config({teacher!r}, protocol=protocol)
    config.steps = 12
    config.checkpoint.every_steps = 3
    return config
"""


def write_config(folder: Path) -> Path:
    """A configuration file of a run of 12 tiny steps, with its teacher beside."""
    teacher = tiny.write_teacher(folder / "teacher.safetensors")
    file = folder / "tiny_run.py"
    file.write_text(CONFIG.format(teacher=str(teacher)))
    return file


def environment(devices: int = 1, quickly: bool = False) -> dict[str, str]:
    """Virtual CPU devices, and the compilation cache of these tests.

    With `quickly`, programs are compiled without most optimisations, in half of the time.
    """
    return (
        os.environ
        | ({"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"} if quickly else {})
        | {
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": os.getcwd(),
        }
    )


PATIENCE = 900  # seconds after which a test takes a process for hanging, on a busy machine, too
PROGRAM = ("-m", "singer_jax.main")
LOOP = ("-m", "tests.loop")  # takes a quarter of the CPU seconds


def held(environment: dict[str, str], step: int) -> dict[str, str]:
    """Returns an environment in which a run waits after a step until it is stopped."""
    return environment | {"HOLD_AFTER": str(step)}


def start(
    environment: dict, *arguments: object, program: tuple[str, ...] = PROGRAM
) -> subprocess.Popen:
    """Starts a command in a process group of its own, as a terminal does."""
    return subprocess.Popen(
        [sys.executable, *program, *map(str, arguments)],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def start_together(
    environment: dict,
    count: int,
    *arguments: object,
    last: tuple[object, ...] = (),
    program: tuple[str, ...] = PROGRAM,
) -> list[subprocess.Popen]:
    """Starts `count` processes of one job; the last one gets the arguments `last`, too."""
    return [
        start(
            environment,
            *arguments,
            *flags,
            *(last if number == count - 1 else ()),
            program=program,
        )
        for number, flags in enumerate(joining(count))
    ]


def joining(count: int) -> list[list[str]]:
    """The flags with which each of `count` processes joins the others."""
    address = f"127.0.0.1:{free_port()}"
    return [
        [f"--coordinator={address}", f"--processes={count}", f"--process={number}"]
        for number in range(count)
    ]


_PORTS = itertools.cycle(range(20_000, 32_000))


def free_port() -> int:
    """Returns a port that no other test takes meanwhile.

    It is below those that the kernel gives to connections. Each process of the tests begins at a
    port of its own and returns no port twice.
    """
    for port in _PORTS:
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    raise AssertionError


for _ in range(os.getpid() * 101 % 12_000):
    next(_PORTS)


HOLD = """
import sys, time
from etils import epath
from singer_jax.platform import signals
from singer_jax.runs.lock import holding
with signals.handled(), holding(epath.Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(1000)
"""


def hold(workdir: Path) -> subprocess.Popen:
    """Another process that holds a work directory."""
    arguments = [sys.executable, "-c", HOLD, str(workdir)]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n", process.stderr.read()
    return process


def finish(process: subprocess.Popen) -> tuple[int, str]:
    _, printed = process.communicate(timeout=PATIENCE)
    return process.returncode, printed


def wait_until(happened: Callable[[], bool], process: subprocess.Popen) -> None:
    deadline = time.monotonic() + PATIENCE
    while not happened():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def steps(workdir: Path) -> list[int]:
    file = workdir / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return [json.loads(line)["step"] for line in lines]


def wait_for_step(process: subprocess.Popen, workdir: Path, step: int) -> None:
    wait_until(lambda: max(steps(workdir), default=0) >= step, process)


def student(workdir: Path) -> dict[str, np.ndarray]:
    return load_file(workdir / "student" / "model.safetensors")


def assert_same_student(workdir: Path, other: Path, **tolerance: float) -> None:
    """Bit for bit where no tolerance is given."""
    expected, found = student(other), student(workdir)
    assert set(found) == set(expected)
    for key, value in expected.items():
        np.testing.assert_allclose(
            found[key], value, err_msg=key, **({"rtol": 0, "atol": 0} | tolerance)
        )


def signal_group(process: subprocess.Popen, number: signal.Signals) -> None:
    """As Ctrl-C in a terminal does: to the command and all that it started."""
    os.killpg(process.pid, number)
