"""A work directory belongs to one run at a time."""

import errno
import json
import os
import signal
import socket
import threading
import time

import pytest
from etils import epath

from singer_jax.errors import InputError, RunError
from singer_jax.runs import lock
from tests import cli


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(lock, "BEAT", 0.1)
    monkeypatch.setattr(lock, "SILENCE", 1.0)
    monkeypatch.setattr(lock, "SETTLE", 0.3)


@pytest.fixture
def folder(tmp_path) -> epath.Path:
    return epath.Path(tmp_path)


def left(folder: epath.Path, **changed: object) -> None:
    """As a run on another machine leaves it behind."""
    content = {"id": "x", "host": "elsewhere", "process": 7, "since": "2026-01-01 00:00:00+00:00"}
    (folder / lock.FILE).write_text(json.dumps(content | changed))


def test_a_second_start_is_refused_in_one_line_and_a_signal_frees_the_folder(folder):
    process = cli.hold(folder)
    with pytest.raises(InputError) as raised, lock.holding(folder):
        pass
    told = str(raised.value)
    since = json.loads((folder / lock.FILE).read_text())["since"]
    assert f"process {process.pid} of {socket.gethostname()} since {since}" in told
    assert "--workdir" in told and "\n" not in told
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 75
    assert not any(folder.iterdir())
    with lock.holding(folder) as held:
        held.check()
        assert [path.name for path in folder.iterdir()] == [lock.FILE]
    assert not any(folder.iterdir())


def test_what_a_killed_process_left_is_taken_over_with_a_line(folder, caplog):
    process = cli.hold(folder)
    process.kill()
    process.wait()
    with lock.holding(folder) as held:
        held.check()
    assert f"taken over from process {process.pid} of" in caplog.text
    assert not any(folder.iterdir())


def test_a_number_of_a_process_that_is_used_again_is_another_process(folder):
    mine = lock.RunLock(folder).content
    left(folder, process=os.getpid(), machine=mine["machine"], born="1")
    with lock.holding(folder) as held:
        held.check()
    left(folder, process=os.getpid(), machine=mine["machine"], born=mine["born"])
    with pytest.raises(InputError, match="is held by"), lock.holding(folder):
        pass


@pytest.mark.parametrize("cut", [False, True])
def test_another_machine_is_waited_for_and_taken_over_when_silent(folder, caplog, cut):
    left(folder)
    if cut:
        (folder / lock.FILE).write_text('{"id": "x", "ho')
    start = time.monotonic()
    with lock.holding(folder) as held:
        held.check()
    assert time.monotonic() - start > lock.SILENCE
    assert "which is silent" in caplog.text


def test_another_machine_that_lives_is_not(folder):
    left(folder)
    stop = threading.Event()

    def live() -> None:
        while not stop.wait(0.1):
            os.utime(folder / lock.FILE)

    thread = threading.Thread(target=live)
    thread.start()
    try:
        with pytest.raises(InputError, match="process 7 of elsewhere"), lock.holding(folder):
            pass
    finally:
        stop.set()
        thread.join()
    assert json.loads((folder / lock.FILE).read_text())["id"] == "x"


def test_a_run_gives_signs_of_life(folder):
    with lock.holding(folder) as held:
        before = held._sign()
        deadline = time.monotonic() + 30
        while held._sign() == before:
            assert time.monotonic() < deadline
            time.sleep(0.02)


def test_of_starts_at_the_same_time_one_goes_on(folder):
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
    deadline = time.monotonic() + 60
    while len(passed) + len(refused) < 4:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert len(passed) == 1
    leave.set()
    for thread in threads:
        thread.join()
    assert not any(folder.iterdir())


def test_a_run_that_was_taken_for_dead_saves_nothing_more(folder):
    with lock.holding(folder) as held:
        left(folder)
        with pytest.raises(RunError, match="taken over by process 7 of elsewhere"):
            held.check()
    assert (folder / lock.FILE).exists()  # the other's
    (folder / lock.FILE).unlink()
    with lock.holding(folder) as held:
        (folder / lock.FILE).unlink()
        with pytest.raises(RunError, match="is gone"):
            held.check()


def test_processes_of_one_run_share_it(folder):
    with lock.holding(folder), lock.holding(folder, active=False) as other:
        other.check()
    assert not any(folder.iterdir())


def test_a_disk_that_takes_nothing_is_one_line_and_leaves_nothing(folder, monkeypatch):
    def full(content: object, file: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(lock.json, "dump", full)
    with pytest.raises(InputError, match="No space left on device"), lock.holding(folder):
        pass
    assert not any(folder.iterdir())
