"""Files are written atomically by several processes, also on a full disk."""

import errno
import os
import threading
from pathlib import Path

import numpy as np
import pytest
from etils import epath

from singer_jax.evaluation import feature_store
from singer_jax.io import files


def test_writers_of_one_file_at_the_same_time_do_not_share_a_partial_file(tmp_path):
    path, barrier = epath.Path(tmp_path / "results.json"), threading.Barrier(4)

    def write(text: str) -> None:
        with files.replacing(path) as partial:
            partial.write_text(text)
            barrier.wait(60)
            assert partial.read_text() == text

    threads = [threading.Thread(target=write, args=(str(n) * 99,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert path.read_text() in {str(n) * 99 for n in range(4)}
    assert [file.name for file in tmp_path.iterdir()] == ["results.json"]


def test_a_file_is_on_disk_before_it_takes_its_name(tmp_path, monkeypatch):
    synced, renamed = [], []
    replace = Path.replace

    def record(self: Path, target: Path) -> Path:
        renamed.append(self)
        assert synced == [os.stat(self).st_ino]
        return replace(self, target)

    monkeypatch.setattr(files.os, "fsync", lambda number: synced.append(os.fstat(number).st_ino))
    monkeypatch.setattr(Path, "replace", record)
    files.write_text(epath.Path(tmp_path / "a.json"), "{}")
    assert len(renamed) == 1 and (tmp_path / "a.json").read_text() == "{}"


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    (tmp_path / "a.json").write_text("old")
    with pytest.raises(OSError), files.replacing(epath.Path(tmp_path / "a.json")) as partial:
        partial.write_text("new")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert [file.read_text() for file in tmp_path.iterdir()] == ["old"]


def test_partial_files_of_killed_processes_are_removed_after_a_day(tmp_path):
    dead, living, other = (
        tmp_path / name
        for name in ("a.11111111.partial.json", "a.22222222.partial.json", "b.1.partial.json")
    )
    for file, age in ((dead, 2 * 24 * 3600), (living, 60), (other, 2 * 24 * 3600)):
        file.write_text("")
        os.utime(file, (os.stat(file).st_mtime - age,) * 2)
    files.write_text(epath.Path(tmp_path / "a.json"), "{}")
    assert {file.name for file in tmp_path.iterdir()} == {"a.json", living.name, other.name}


def test_the_disk_space_of_a_memory_map_is_reserved_before_it_is_written(tmp_path):
    """A write to a hole in the file on a full disk would end the process with SIGBUS."""
    array = feature_store.reserved(tmp_path / "features.npy", np.dtype(np.float16), (1000, 384))
    found = os.stat(tmp_path / "features.npy")
    assert found.st_blocks * 512 >= found.st_size > array.nbytes
    array[:] = 3
    array.flush()
    np.testing.assert_array_equal(np.load(tmp_path / "features.npy"), array)


def test_a_memory_map_on_a_full_disk_is_an_error_of_one_line(tmp_path, monkeypatch):
    def full(*given: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    file = tmp_path / "features.npy"
    with pytest.raises(OSError, match=f"No space left on device: '{file}'"):
        feature_store.reserved(file, np.dtype(np.float16), (1000, 384))
    assert not file.exists()
