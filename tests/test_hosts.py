"""Several processes of one job on the CPU compute the same numbers and end together."""

import json
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import jax
import pytest

from singer_jax.errors import InputError
from singer_jax.platform import hosts
from tests import cli, tiny

IMAGES = 8
STEPS = 12
ROUNDING = {"rtol": 1e-3, "atol": 1e-5}  # of float32 sums in another order, over STEPS steps


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("hosts")


@pytest.fixture(scope="module")
def config_file(folder) -> Path:
    return cli.write_config(folder)


@pytest.fixture(scope="module")
def environment() -> dict[str, str]:
    return cli.environment(quickly=True)


def arguments(config_file: Path, workdir: Path, data: int, fsdp: int = 1) -> list[str]:
    return [
        f"--config={config_file}",
        f"--workdir={workdir}",
        f"--config.steps={STEPS}",
        "--config.checkpoint.every_steps=99",
        f"--config.mesh.data={data}",
        f"--config.mesh.fsdp={fsdp}",
    ]


@pytest.fixture(scope="module")
def reference(folder, config_file, environment) -> Path:
    """Returns the run of one process on one device with the same global batch."""
    workdir = folder / "reference"
    status, printed = cli.finish(cli.start(environment, *arguments(config_file, workdir, 1)))
    assert status == 0, printed
    return workdir


def finish_all(processes: list[subprocess.Popen]) -> list[tuple[int, str]]:
    """Returns status and stderr of each; all end within three minutes of the first."""
    deadline = time.monotonic() + cli.PATIENCE
    while all(process.poll() is None for process in processes):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    deadline = time.monotonic() + 180
    for process in processes:
        process.wait(timeout=max(0, deadline - time.monotonic()))
    return [(process.returncode, process.stderr.read()) for process in processes]


def end_of(processes: list[subprocess.Popen], status: int, *words: str) -> None:
    """Checks that all processes end soon with a status, one line with words and no traceback."""
    for code, printed in finish_all(processes):
        assert code == status, printed
        assert "Traceback" not in printed and "Aborted" not in printed, printed
        last = printed.splitlines()[-1]
        assert last.startswith("singer_jax: ") and all(word in last for word in words), printed


@pytest.mark.slow
def test_two_processes_do_what_one_does(config_file, environment, tmp_path, reference):
    processes = cli.start_together(environment, 2, *arguments(config_file, tmp_path, 2))
    for status, printed in finish_all(processes):
        assert status == 0, printed
    cli.assert_same_student(tmp_path, reference, **ROUNDING)
    assert cli.steps(tmp_path) == cli.steps(reference)  # each row once
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        path.name for path in reference.iterdir()
    )


def loop(workdir: Path, data: int, fsdp: int = 1, steps: int = STEPS) -> list[str]:
    """Returns the arguments of `tests.loop`, a run without a model."""
    return [
        f"--workdir={workdir}",
        f"--config.steps={steps}",
        "--config.checkpoint.every_steps=99",
        f"--config.mesh.data={data}",
        f"--config.mesh.fsdp={fsdp}",
    ]


def test_a_signal_to_one_of_four_stops_all_after_one_step_and_one_process_continues(
    environment, tmp_path
):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    process = cli.start(environment, *loop(whole, 1), program=cli.LOOP)
    assert cli.finish(process)[0] == 0
    processes = cli.start_together(
        cli.held(environment, 4), 4, *loop(stopped, 2, 2), program=cli.LOOP
    )
    cli.wait_for_step(processes[0], stopped, 2)
    processes[2].send_signal(signal.SIGTERM)
    end_of(processes, 75, "stopped after step", "saved in")
    assert len([p for p in (stopped / "checkpoints").iterdir() if p.name.isdigit()]) == 1
    process = cli.start(cli.environment(2, quickly=True), *loop(stopped, 2), program=cli.LOOP)
    status, printed = cli.finish(process)
    assert status == 0 and "continuing after step" in printed, printed
    cli.assert_same_student(stopped, whole, **ROUNDING)


@pytest.mark.slow
def test_parameters_split_over_two_of_four_processes_continue_on_one(
    config_file, environment, tmp_path, reference
):
    held = cli.held(environment, 4)
    processes = cli.start_together(held, 4, *arguments(config_file, tmp_path, 2, 2))
    cli.wait_for_step(processes[0], tmp_path, 2)
    processes[2].send_signal(signal.SIGTERM)
    end_of(processes, 75, "stopped after step", "saved in")
    process = cli.start(cli.environment(2, quickly=True), *arguments(config_file, tmp_path, 2))
    status, printed = cli.finish(process)
    assert status == 0 and "continuing after step" in printed, printed
    cli.assert_same_student(tmp_path, reference, **ROUNDING)


@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_process_ends_the_other(environment, tmp_path, killed):
    run = loop(tmp_path, 2, steps=100_000)
    processes = cli.start_together(environment, 2, *run, program=cli.LOOP)
    cli.wait_for_step(processes[0], tmp_path, 2)
    processes[killed].kill()
    status, printed = finish_all(processes)[1 - killed]
    assert status == 1 and "Traceback" not in printed, printed
    assert printed.splitlines()[-1].startswith("singer_jax: another process died, ")


def images(folder: Path, name: str, damaged: int) -> Path:
    """Writes the same images, of which the last ones are cut off."""
    tiny.write_images(folder / name, IMAGES)
    for file in sorted((folder / name).iterdir())[IMAGES - damaged :]:
        file.write_bytes(file.read_bytes()[:50])
    return folder / name


@pytest.mark.parametrize(
    ("last", "status", "words"),
    [
        (["--config.teacher.weights=/nowhere.safetensors"], 2, ["/nowhere.safetensors"]),
        pytest.param(
            ["--config.data.path={broken}"],
            1,
            ["in a row cannot be read", "{broken}"],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_failure_of_one_process_ends_all(config_file, environment, tmp_path, last, status, words):
    broken = images(tmp_path, "broken", IMAGES)
    run = arguments(config_file, tmp_path / "run", 2)
    data = ["--config.data.source=folder", f"--config.data.path={images(tmp_path, 'whole', 0)}"]
    own = tuple(argument.format(broken=broken) for argument in last)
    processes = cli.start_together(environment, 2, *run, *data, last=own)
    end_of(processes, status, "process 1", *(word.format(broken=broken) for word in words))


def test_an_error_of_one_during_a_step_ends_all(environment, tmp_path):
    processes = cli.start_together(
        environment, 2, *loop(tmp_path, 2), last=("--fail_at=4",), program=cli.LOOP
    )
    end_of(processes, 1, "process 1", "images cannot be read")


def test_a_loss_that_is_not_finite_ends_all(environment, tmp_path):
    run = [*loop(tmp_path, 2), "--nan_at=4"]
    processes = cli.start_together(environment, 2, *run, program=cli.LOOP)
    end_of(processes, 1, "is nan at step 4", "last good checkpoint is kept")


@pytest.mark.slow
def test_unreadable_images_of_all_processes_are_counted(config_file, environment, tmp_path):
    run = arguments(config_file, tmp_path / "run", 2)
    whole, damaged = images(tmp_path, "whole", 0), images(tmp_path, "damaged", 2)
    data = ["--config.data.source=folder", f"--config.data.path={whole}", "--config.steps=4"]
    processes = cli.start_together(
        environment, 2, *run, *data, last=(f"--config.data.path={damaged}",)
    )
    found = finish_all(processes)
    assert [status for status, _ in found] == [0, 0], found
    rows = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    # Four epochs of eight images, of which process 1 reads one half: not those of process 0.
    counted = json.loads(rows[-1])["train/unreadable_images"]
    assert 1 <= counted <= 8
    assert found[1][1].count("skipping unreadable image (replaced)") in (1, 2)
    assert "skipping unreadable image (replaced)" not in found[0][1]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"coordinator": "host:1234"}, ["--processes", "--process", "missing"]),
        ({"processes": 2}, ["--coordinator", "JAX_COORDINATOR_ADDRESS", "missing"]),
        ({"coordinator": "host", "processes": 2, "process": 1}, ["'host'", "HOST:PORT"]),
        ({"coordinator": "host:99999", "processes": 2, "process": 1}, ["'host:99999'"]),
        ({"coordinator": "host:1", "processes": 2, "process": 2}, ["--process: 2", "from 0"]),
        ({"coordinator": "host:1", "processes": 0, "process": 0}, ["--processes 0"]),
    ],
)
def test_inconsistent_flags_are_a_one_line_error(given, words):
    with pytest.raises(InputError) as raised:
        hosts.join(**given)
    assert all(word in str(raised.value) for word in words)
    assert "\n" not in str(raised.value)


def test_a_variable_that_is_not_a_number_is_named(monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "host:1234")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "two")
    with pytest.raises(InputError, match="JAX_NUM_PROCESSES: 'two' is not a number"):
        hosts.join()


def test_an_occupied_port_is_named():
    with HTTPServer(("", 0), BaseHTTPRequestHandler) as server:
        address = f"localhost:{server.server_port}"
        with pytest.raises(InputError, match=f"port {server.server_port}"):
            hosts.join(address, 2, 0)


@pytest.mark.parametrize("process", [0, 1])
def test_missing_processes_are_a_one_line_error_in_time(environment, process):
    address = f"127.0.0.1:{cli.free_port()}"
    status, printed = cli.finish(
        cli.start(
            environment,
            "--config=configs/models.py",
            f"--coordinator={address}",
            "--processes=2",
            f"--process={process}",
            "--join_timeout=3",
        )
    )
    assert status == 1
    assert f"singer_jax: the other processes did not join at {address}" in printed
    assert len(printed.splitlines()) == 1, printed


def test_a_slurm_job_without_srun_runs_alone(monkeypatch, caplog):
    """It happens in the shell of salloc, or in an sbatch script that calls Python directly."""
    slurm = {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    nodes = {"SLURM_STEP_NODELIST": "localhost", "SLURM_STEP_NUM_TASKS": "1"}
    for name, value in (slurm | nodes).items():
        monkeypatch.setenv(name, value)
    hosts.join()
    assert jax.process_count() == 1
    assert "running as one process of the SLURM job" in caplog.text


def test_undetected_processes_are_a_one_line_error(environment):
    process = cli.start(environment | {"OMPI_COMM_WORLD_SIZE": "4"}, "--config=configs/models.py")
    status, printed = cli.finish(process)
    assert status == 2
    assert len(printed.splitlines()) == 1, printed
    assert "MPI started 4 processes" in printed
    assert "--coordinator=HOST:PORT --processes=N --process=I" in printed


POD = """
import os
import jax
os.environ.pop("TPU_SKIP_MDS_QUERY", None)  # which jax sets on a machine without chips
from jax._src.clusters import cloud_tpu_cluster, cluster
cluster.running_in_cloud_tpu_vm = cloud_tpu_cluster.running_in_cloud_tpu_vm = True
from singer_jax.platform import hosts
hosts.join(timeout=100)
with hosts.together():
    print(jax.process_index(), jax.process_count())
"""


class Metadata(BaseHTTPRequestHandler):
    """A metadata server for a TPU VM without TPU variables in its environment."""

    def do_GET(self):
        values = {
            "agent-worker-number": str(self.server.worker),
            "worker-network-endpoints": "127.0.0.1,127.0.0.1",
            "tpu-env": "",
        }
        self.send_response(200)
        self.end_headers()
        self.wfile.write(values[self.path.rsplit("/", 1)[1]].encode())

    def log_message(self, *arguments: object) -> None:
        pass


def test_the_hosts_of_a_tpu_pod_find_each_other_without_variables(environment):
    port = str(cli.free_port())
    servers = [HTTPServer(("127.0.0.1", 0), Metadata) for _ in range(2)]
    processes = []
    for worker, server in enumerate(servers):
        server.worker = worker
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = {
            "GCE_METADATA_IP": f"127.0.0.1:{server.server_port}",
            "JAX_COORDINATOR_PORT": port,
        }
        processes.append(
            subprocess.Popen(
                [sys.executable, "-c", POD],
                env=environment | address,
                stdout=subprocess.PIPE,
                text=True,
            )
        )
    assert [p.communicate(timeout=cli.PATIENCE)[0] for p in processes] == ["0 2\n", "1 2\n"]
    for server in servers:
        server.shutdown()
        server.server_close()
