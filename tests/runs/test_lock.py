"""Only one job at a time writes to a folder."""

import errno
import json
import os
import shutil
import signal
import socket
import threading
import time
from pathlib import Path

import pytest
from etils import epath
from ml_collections import ConfigDict

import configs.quickstart
import configs.study
from singer_jax import config, main
from singer_jax.errors import InputError, RunError
from singer_jax.runs import lock
from tests import cli, tiny


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(lock, "BEAT", 0.1)
    monkeypatch.setattr(lock, "SILENCE", 1.0)
    monkeypatch.setattr(lock, "SETTLE", 0.3)


@pytest.fixture
def folder(tmp_path) -> epath.Path:
    return epath.Path(tmp_path)


def left(folder: epath.Path, **changed: object) -> None:
    """Writes the lock file of a killed run on another machine."""
    content = {"id": "x", "host": "elsewhere", "process": 7, "since": "2026-01-01 00:00:00+00:00"}
    (folder / lock.LOCK_FILE).write_text(json.dumps(content | changed))


def test_a_second_start_is_refused_in_one_line_and_a_signal_frees_the_folder(folder):
    process = cli.hold(folder)
    with pytest.raises(InputError) as raised, lock.holding(folder):
        pass
    message = str(raised.value)
    since = json.loads((folder / lock.LOCK_FILE).read_text())["since"]
    assert f"process {process.pid} of {socket.gethostname()} since {since}" in message
    assert "--workdir" in message and "\n" not in message
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=cli.PATIENCE) == 75
    assert not any(folder.iterdir())
    with lock.holding(folder) as held:
        held.check()
        assert [path.name for path in folder.iterdir()] == [lock.LOCK_FILE]
    assert not any(folder.iterdir())


def test_the_lock_of_a_killed_process_is_taken_over_with_a_warning(folder, caplog):
    process = cli.hold(folder)
    process.kill()
    process.wait()
    with lock.holding(folder) as held:
        held.check()
    assert f"taken over from process {process.pid} of" in caplog.text
    assert not any(folder.iterdir())


def test_a_reused_process_number_is_another_process(folder):
    mine = lock.RunLock(folder).content
    left(folder, process=os.getpid(), machine=mine["machine"], born="1")
    with lock.holding(folder) as held:
        held.check()
    left(folder, process=os.getpid(), machine=mine["machine"], born=mine["born"])
    with pytest.raises(InputError, match="is in use by"), lock.holding(folder):
        pass


@pytest.mark.parametrize("cut", [False, True])
def test_the_lock_of_another_machine_is_taken_over_without_heartbeat(folder, caplog, cut):
    left(folder)
    if cut:
        (folder / lock.LOCK_FILE).write_text('{"id": "x", "ho')
    start = time.monotonic()
    with lock.holding(folder) as held:
        held.check()
    assert time.monotonic() - start > lock.SILENCE
    assert "which has no heartbeat" in caplog.text


def test_a_live_lock_of_another_machine_is_not_taken_over(folder, monkeypatch):
    monkeypatch.setattr(lock, "SILENCE", 60.0)  # its first sign of life ends the wait
    left(folder)
    stop = threading.Event()

    def live() -> None:
        while not stop.wait(0.1):
            os.utime(folder / lock.LOCK_FILE)

    thread = threading.Thread(target=live)
    thread.start()
    try:
        with pytest.raises(InputError, match="process 7 of elsewhere"), lock.holding(folder):
            pass
    finally:
        stop.set()
        thread.join()
    assert json.loads((folder / lock.LOCK_FILE).read_text())["id"] == "x"


def test_a_run_sends_heartbeats(folder):
    with lock.holding(folder) as held:
        before = held._sign()
        deadline = time.monotonic() + cli.PATIENCE
        while held._sign() == before:
            assert time.monotonic() < deadline
            time.sleep(0.02)


def test_only_one_of_simultaneous_starts_continues(folder, monkeypatch):
    monkeypatch.setattr(lock, "SETTLE", 2.0)  # on a busy machine, too
    left(folder)  # by a run that is silent, for which all of them wait
    passed, refused, leave = [], [], threading.Event()

    def start() -> None:
        try:
            with lock.holding(folder) as held:
                passed.append(held)
                leave.wait()
        except InputError:
            refused.append(1)

    threads = [threading.Thread(target=start) for _ in range(4)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + cli.PATIENCE
    while len(passed) + len(refused) < 4:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert len(passed) == 1
    leave.set()
    for thread in threads:
        thread.join()
    assert not any(folder.iterdir())


def test_a_run_whose_lock_was_taken_over_saves_nothing_more(folder):
    with lock.holding(folder) as held:
        left(folder)
        with pytest.raises(RunError, match="taken over by process 7 of elsewhere"):
            held.check()
    assert (folder / lock.LOCK_FILE).exists()  # the other's
    (folder / lock.LOCK_FILE).unlink()
    with lock.holding(folder) as held:
        (folder / lock.LOCK_FILE).unlink()
        with pytest.raises(RunError, match="is missing"):
            held.check()


def test_processes_of_one_run_share_it(folder):
    with lock.holding(folder), lock.holding(folder, active=False) as other:
        other.check()
    assert not any(folder.iterdir())


def test_a_full_disk_is_a_one_line_error_and_leaves_no_file(folder, monkeypatch):
    def full(content: object, file: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(lock.json, "dump", full)
    with pytest.raises(InputError, match="No space left on device"), lock.holding(folder):
        pass
    assert not any(folder.iterdir())


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """Returns a work directory with a finished and evaluated run."""
    folder = tmp_path_factory.mktemp("run")
    settings = tiny.config(tiny.write_teacher(folder / "teacher.safetensors"), "fitnet")
    settings.steps = 2
    assert main.run(settings, folder / "run") == 0
    results = {"table1": {}, "tasks": {"digits": {"top1": 50.0}}, "protocol": "fast"}
    (folder / "run" / "evaluation").mkdir()
    (folder / "run" / "evaluation" / "results.json").write_text(json.dumps(results))
    return folder / "run"


def _distill(run: Path) -> ConfigDict:
    return tiny.config(run.parent / "teacher.safetensors")


def _evaluate(run: Path) -> ConfigDict:
    settings = config.evaluation()
    settings.run, settings.data.source, settings.mesh.data = str(run), "digits", 1
    settings.probe.protocol, settings.probe.epochs, settings.data.workers = "fast", 1, 0
    return settings


def _nullspace(run: Path) -> ConfigDict:
    settings = config.null_spaces()
    settings.teacher.model, settings.teacher.weights = "vit_tiny_patch16_224", str(run)
    settings.data.source, settings.data.workers, settings.mesh.data = "digits", 0, 1
    settings.teacher.overrides = dict(tiny.STUDENT)
    settings.images, settings.rank, settings.weight_matrices = 2, 2, ("mlp",)
    return settings


def _check_data(run: Path) -> ConfigDict:
    settings = config.check_data()
    settings.data.source = "digits"
    return settings


def _export(run: Path) -> ConfigDict:
    settings = config.export()
    settings.run = str(run)
    return settings


def _report(run: Path) -> ConfigDict:
    settings = config.report()
    settings.run, settings.images = str(run), 1
    return settings


def _compare(run: Path) -> ConfigDict:
    settings = config.compare()
    settings.runs = (str(run), str(run.with_name("other")))
    return settings


def _study(run: Path) -> ConfigDict:
    return configs.study.get_config()


def _quickstart(run: Path) -> ConfigDict:
    return configs.quickstart.get_config()


WRITERS = {
    _distill: "",
    _evaluate: "",
    _nullspace: "",
    _check_data: "",
    _export: "student",
    _report: "report",
    _compare: "compare",
    _study: "",
    _quickstart: "",
}


@pytest.mark.parametrize("job", WRITERS)
def test_each_job_that_writes_is_refused_where_another_writes(run, tmp_path, capsys, job):
    other = run.with_name("other")
    if job is _compare and not other.exists():
        shutil.copytree(run, other)
        described = json.loads((other / "config.json").read_text())
        (other / "config.json").write_text(json.dumps(described | {"seed": 1}))
    folder = tmp_path / "out" / WRITERS[job]
    folder.mkdir(parents=True)
    with lock.holding(epath.Path(folder)):
        assert main.run(job(run), tmp_path / "out") == 2
    printed = capsys.readouterr().err
    assert f"{folder} is in use by process {os.getpid()}" in printed
    assert not any(folder.rglob("*.json")), "nothing was written"


def test_a_run_exports_no_student_while_the_job_export_writes_it(run, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "run")
    student = tmp_path / "run" / "student"
    (student / "model.safetensors").unlink()
    settings = tiny.config(run.parent / "teacher.safetensors", "fitnet")
    settings.steps = 2  # all of them are done
    with lock.holding(epath.Path(student)):
        assert main.run(settings, tmp_path / "run") == 2
    assert f"{student} is in use by process {os.getpid()}" in capsys.readouterr().err
    assert not (student / "model.safetensors").exists()
    assert main.run(settings, tmp_path / "run") == 0
    exported = {path.name for path in student.iterdir()}
    assert exported == {"config.json", "model.safetensors", "README.md"}
