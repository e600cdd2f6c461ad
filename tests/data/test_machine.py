"""Limits of containers: processors by control groups of both versions, and shared memory."""

import os
from collections import namedtuple

import jax
import numpy as np
import pytest
from absl import flags

from singer_jax.data import machine
from singer_jax.data.images import TrainTransform
from singer_jax.data.loader import LoaderOptions, train_batches
from singer_jax.data.sources import TRAIN, DigitsSource
from singer_jax.errors import InputError
from singer_jax.io import files
from singer_jax.models.weight_files import find_weights
from singer_jax.platform import parallel


def write(root, files):
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)


QUOTA = "cpu.cfs_quota_us"
PERIOD = "cpu.cfs_period_us"


@pytest.mark.parametrize(
    ("own", "files", "expected"),
    [
        # Version 2, as docker run --cpus=2 shows it inside.
        ("0::/\n", {"cpu.max": "200000 100000\n"}, 2),
        ("0::/\n", {"cpu.max": "max 100000\n"}, 64),
        ("0::/\n", {"cpu.max": "50000 100000\n"}, 1),  # half a processor
        ("0::/\n", {"cpu.max": "350000 100000\n"}, 3),
        ("0::/\n", {}, 64),
        # A limit of the slice above, as systemd and SLURM set it.
        (
            "0::/job/step\n",
            {"job/cpu.max": "400000 100000", "job/step/cpu.max": "max 100000"},
            4,
        ),
        # Version 1, with and without the path of the host.
        ("4:cpu,cpuacct:/\n", {f"cpu/{QUOTA}": "200000", f"cpu/{PERIOD}": "100000"}, 2),
        (
            "4:cpu,cpuacct:/docker/3f\n2:memory:/docker/3f\n",
            {f"cpu,cpuacct/{QUOTA}": "300000\n", f"cpu,cpuacct/{PERIOD}": "100000\n"},
            3,
        ),
        ("4:cpu:/\n", {f"cpu/{QUOTA}": "-1\n", f"cpu/{PERIOD}": "100000\n"}, 64),
        (
            "1:cpu:/kubepods/pod7\n",
            {f"cpu/kubepods/pod7/{QUOTA}": "800000", f"cpu/kubepods/pod7/{PERIOD}": "100000"},
            8,
        ),
        # Both at once, and a set of processors, which is no limit of time.
        (
            "3:cpuset:/\n1:cpu:/\n0::/\n",
            {f"cpu/{QUOTA}": "500000", f"cpu/{PERIOD}": "100000", "cpuset/cpu.max": "1 1"},
            5,
        ),
    ],
)
def test_limits_of_control_groups_count(tmp_path, monkeypatch, own, files, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    write(tmp_path, {"own": own} | {f"groups/{name}": text for name, text in files.items()})
    assert machine.processors(tmp_path / "own", tmp_path / "groups") == expected
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3}, raising=False)
    assert machine.processors(tmp_path / "own", tmp_path / "groups") == 1


@pytest.mark.parametrize(
    ("megabytes", "workers", "expected", "words"),
    [
        (64, 0, (0, True), ""),
        (64, 2, (2, False), "67 MB free, 771 MB needed"),  # 512 crops of 224 in Docker
        (2000, 2, (2, True), ""),
        (2000, 16, (16, False), "--shm-size=5g"),
        (0, 2, (0, False), "using one decoding thread"),
    ],
)
def test_batches_go_through_shared_memory_where_they_fit(
    monkeypatch, caplog, megabytes, workers, expected, words
):
    status = namedtuple("Status", "f_bavail f_frsize")(megabytes * 256, 4096)
    monkeypatch.setattr(os, "statvfs", lambda _: status)
    monkeypatch.setattr(machine, "_warned", set())
    for _ in range(2):  # a second loader of the same process says nothing more
        assert machine.sharing(workers, 512 * 224 * 224 * 3) == expected
    assert words in caplog.text and len(caplog.text.splitlines()) == (expected[1] is False)


_SLURM = "SLURM_STEP_TASKS_PER_NODE"
_LOCAL = {"JAX_COORDINATOR_ADDRESS": "localhost:1234", "JAX_NUM_PROCESSES": "3"}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, 1),
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "4", "OMPI_COMM_WORLD_SIZE": "16"}, 4),
        ({_SLURM: "8"}, 8),
        ({_SLURM: "4(x2),3", "SLURM_NODEID": "1"}, 4),
        ({_SLURM: "4(x2),3", "SLURM_NODEID": "2"}, 3),
        ({_SLURM: "many", "SLURM_NODEID": "x"}, 1),
        (_LOCAL, 3),
        (_LOCAL | {"JAX_COORDINATOR_ADDRESS": "host0:1234"}, 1),
    ],
)
def test_processes_of_one_machine_share_its_memory(monkeypatch, environment, expected):
    assert machine.processes_here(environment) == expected
    needed = machine._OF_WORKER * 2 + machine._OF_MAIN
    monkeypatch.setattr(machine, "_warned", set())
    for name in (_SLURM, "SLURM_NODEID", "OMPI_COMM_WORLD_LOCAL_SIZE", *_LOCAL):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    for missing in (0, 1):
        status = namedtuple("Status", "f_bavail f_frsize")(expected * needed * 2**20 - missing, 1)
        monkeypatch.setattr(os, "statvfs", lambda _, status=status: status)
        assert machine.sharing(2, 2**20) == (2, not missing)


def test_without_shared_memory_batches_are_the_same(monkeypatch):
    flags.FLAGS(["test"])

    def first(workers: int) -> list[np.ndarray]:
        options = {"batch_size": 16, "seed": 3, "options": LoaderOptions(workers)}
        batches = train_batches(DigitsSource(TRAIN), TrainTransform(8), **options)
        try:
            return [next(batches)["image"] for _ in range(3)]
        finally:
            batches.close()

    expected = first(0)
    monkeypatch.setattr(machine, "sharing", lambda workers, size: (workers, False))
    piped = first(1)
    assert all(type(image) is np.ndarray for image in piped)
    np.testing.assert_array_equal(piped, expected)


@pytest.mark.parametrize("home", ["~", "{tmp}/file", "/proc/none"])
def test_without_a_home_there_is_no_cache_and_no_error(tmp_path, monkeypatch, home):
    """The home directory of an unknown user remains `~`."""
    (tmp_path / "file").write_text("")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", home.format(tmp=tmp_path))
    assert files.cache_folder() is None
    before = jax.config.jax_compilation_cache_dir
    try:
        jax.config.update("jax_compilation_cache_dir", None)
        parallel.start()
        assert jax.config.jax_compilation_cache_dir is None
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
    with pytest.raises(InputError, match="set XDG_CACHE_HOME"):
        files.cached(files.as_path("gs://bucket/weights.safetensors"))


def test_a_proxy_that_needs_a_package_is_one_line(monkeypatch):
    def fails(*_: str) -> str:
        raise ImportError("Using SOCKS proxy, but the 'socksio' package is not installed.\nMore.")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fails)
    with pytest.raises(InputError, match="'socksio' package is not installed") as found:
        find_weights("timm/nothing")
    assert "\n" not in str(found.value)
