"""Damaged checkpoints are detected and moved away, and the run continues from the previous one."""

import contextlib
import errno
import shutil
import time
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from hypothesis import given
from hypothesis import strategies as st

from singer_jax.errors import InputError, RunError
from singer_jax.io.files import working_disks
from singer_jax.jobs import replay
from singer_jax.platform import parallel
from singer_jax.runs import manifests, verify
from singer_jax.runs.checkpoints import Checkpoints, checksum
from singer_jax.training.failed_step import Captured
from tests.damage import files, flip, largest, warned

META = {"config": {"learning_rate": 1e-3, "layers": (1, 2)}, "data": "abc"}


def state(step: int) -> dict:
    """Returns leaves of several dtypes, one of them too large to be stored inline."""
    rng = np.random.default_rng(step)
    large = rng.standard_normal((64, 64)).astype(np.float32)
    return {
        "step": jnp.int32(step),
        "params": {"kernel": jnp.asarray(large), "bias": jnp.asarray(large[0], jnp.bfloat16)},
        "opt_state": [{"mask": jnp.asarray(large[1] > 0, jnp.uint8)}],
    }


@pytest.fixture(scope="module")
def abstract(mesh):
    like = jax.eval_shape(lambda: state(0))
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=parallel.replicated(mesh)), like
    )


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Path:
    """Returns a work directory with the checkpoints 2 and 4."""
    folder = tmp_path_factory.mktemp("two")
    with contextlib.closing(Checkpoints(folder, 2)) as checkpoints:
        for step in (2, 4):
            checkpoints.save(state(step), step, META)
    return folder


def _empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


DAMAGES = {
    "a file truncated": lambda folder: largest(folder / "state" / "d").write_bytes(b"\x28\xb5"),
    "a file emptied": lambda folder: (folder / "meta" / "metadata").write_bytes(b""),
    "a file missing": lambda folder: (folder / "state" / "manifest.ocdbt").unlink(),
    "a byte flipped in an array": lambda folder: flip(largest(folder / "state"), 5000),
    "a byte flipped beside": lambda folder: flip(
        folder / "meta" / "metadata", (folder / "meta" / "metadata").read_bytes().index(b"abc")
    ),
    "a folder missing": lambda folder: shutil.rmtree(folder / "state"),
    "everything missing": _empty,
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_the_previous_one_is_used_and_nothing_is_deleted(two, tmp_path, abstract, caplog, kind):
    shutil.copytree(two, tmp_path, dirs_exist_ok=True)
    DAMAGES[kind](tmp_path / "checkpoints" / "4")
    damaged = {file.name: file.read_bytes() for file in files(tmp_path / "checkpoints" / "4")}
    with contextlib.closing(Checkpoints(tmp_path, 2)) as checkpoints:
        assert checkpoints.newest_whole() == 2
        assert (tmp_path / "checkpoints" / "4").is_dir()  # until it is known whose run this is
        checkpoints.set_aside()
        assert checkpoints.manager.latest_step() == 2
        jax.tree.map(np.testing.assert_array_equal, checkpoints.restore(2, abstract), state(2))
        checkpoints.save(state(4), 4, META)
    aside = tmp_path / "checkpoints.damaged"
    assert {file.name: file.read_bytes() for file in files(aside / "4")} == damaged
    reason = (aside / "4.txt").read_text().strip()
    assert reason and f"checkpoint 4 is damaged ({reason}), moved to {aside / '4'}" in caplog.text
    with contextlib.closing(Checkpoints(tmp_path, 2)) as checkpoints:
        assert checkpoints.newest_whole() == 4


def test_a_second_damaged_checkpoint_of_a_step_is_kept_too(two, tmp_path):
    for _ in range(2):
        shutil.copytree(two, tmp_path, dirs_exist_ok=True)
        verify.set_aside(epath.Path(tmp_path / "checkpoints" / "4"), "tried")
    names = sorted(path.name for path in (tmp_path / "checkpoints.damaged").iterdir())
    assert names == ["4", "4.2", "4.2.txt", "4.txt"]


def test_a_replay_starts_from_the_newest_valid_checkpoint_before_its_step(
    two, tmp_path, monkeypatch, caplog
):
    shutil.copytree(two, tmp_path, dirs_exist_ok=True)

    def restored(checkpoints: Checkpoints, step: int, wanted: object) -> dict:
        return {"": types.SimpleNamespace(step=step)}

    def first(step: int) -> int:
        """Returns the step of the state from which a replay of `step` starts."""
        captured = Captured(step, "", "loss is nan", [], [], {})
        return replay._state_before(epath.Path(tmp_path), run, None, captured, None).step

    monkeypatch.setattr(replay, "restore_states", restored)
    run = types.SimpleNamespace(each={"": types.SimpleNamespace(state=None)})
    assert (first(6), first(4)) == (4, 2)
    with pytest.raises(InputError, match="no finished checkpoint before step 2"):
        first(2)
    (tmp_path / "checkpoints" / "4" / "meta" / "metadata").write_bytes(b"")
    assert first(6) == 2
    assert "checkpoint 4 is damaged" in caplog.text and "2 is read instead" in caplog.text


def test_without_a_valid_checkpoint_the_run_fails_with_one_line(two, tmp_path):
    shutil.copytree(two, tmp_path, dirs_exist_ok=True)
    for step in ("2", "4"):
        (tmp_path / "checkpoints" / step / "meta" / "metadata").unlink()
    with contextlib.closing(Checkpoints(tmp_path, 2)) as checkpoints:
        with pytest.raises(RunError, match=r"no checkpoint is whole \(4: .*; 2: .*\)") as raised:
            checkpoints.newest_whole()
        assert "\n" not in str(raised.value)
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2


@given(
    file=st.integers(0),
    place=st.integers(0),
    kind=st.sampled_from(["flip", "cut", "gone"]),
    manifest=st.booleans(),
)
def test_a_change_of_any_file_is_detected_and_valid_checkpoints_restore(
    two, abstract, file, place, kind, manifest
):
    """With a manifest a change is an error or a warning; without one it may have no effect."""
    folder = epath.Path(two / "checkpoints" / "4")
    target = files(two / "checkpoints" / "4")[file % len(files(two / "checkpoints" / "4"))]
    content, described = target.read_bytes(), manifests.place(folder).read_text()
    try:
        if not manifest:
            manifests.remove(folder)
        if kind == "flip":
            flip(target, place // 8, place % 8)
        elif kind == "cut":
            target.write_bytes(content[: place % (len(content) + 1)])
        else:
            target.unlink()
        same = target.exists() and target.read_bytes() == content
        with warned() as lines:
            reason = verify.find_corruption(folder)
        assert not (manifest and not same) or reason or len(lines) == 1
        assert not same or not reason
        if reason is None:
            with contextlib.closing(Checkpoints(two, read_only=True)) as checkpoints:
                restored = checkpoints.restore(4, abstract)
            jax.tree.map(np.testing.assert_array_equal, restored, state(4))
    finally:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
        manifests.place(folder).write_text(described)


def test_every_save_of_a_finished_run_has_its_manifest(tmp_path, monkeypatch):
    """A later check decodes no array."""
    with contextlib.closing(Checkpoints(tmp_path, 2)) as checkpoints:
        for step in (2, 4, 6):
            checkpoints.save(state(step), step, META)
    monkeypatch.setattr(verify, "_difference", None)
    for step in (4, 6):
        folder = epath.Path(tmp_path / "checkpoints" / str(step))
        if step == 6 or manifests.read(folder):  # of saves close together the last one is verified
            assert verify.find_corruption(folder) is None
    names = {path.stem for path in (tmp_path / "checkpoints.manifests").iterdir()}
    assert {"6"} <= names <= {"4", "6"}


def test_a_start_writes_the_manifest_of_a_checkpoint_without_one_and_a_reader_does_not(
    two, tmp_path
):
    shutil.copytree(two, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "checkpoints.manifests")
    for read_only in (True, False):
        with contextlib.closing(Checkpoints(tmp_path, read_only=read_only)) as checkpoints:
            assert checkpoints.newest_whole() == 4
        written = (tmp_path / "checkpoints.manifests" / "4.json").exists()
        assert written is not read_only


@pytest.mark.parametrize("content", ["", "{", "[]", '{"files": {}, "digest": "x"}'])
def test_a_damaged_manifest_leaves_the_decision_to_the_contents(two, tmp_path, content):
    shutil.copytree(two, tmp_path, dirs_exist_ok=True)
    folder = epath.Path(tmp_path / "checkpoints" / "4")
    manifests.place(folder).write_text(content)
    with warned() as lines:
        assert verify.find_corruption(folder) is None
    assert len(lines) == 1 and "its manifest is damaged" in lines[0]
    flip(largest(tmp_path / "checkpoints" / "4" / "state"), 5000)
    assert verify.find_corruption(folder)


@pytest.mark.parametrize("name", ["read", "file_digests"])
def test_an_unreadable_manifest_leaves_the_decision_to_the_contents(two, monkeypatch, name):
    def fail(*given: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(manifests, name, fail)
    with warned() as lines:
        assert verify.find_corruption(epath.Path(two / "checkpoints" / "4")) is None
    assert len(lines) == 1 and "Input/output error" in lines[0]


def test_the_manifest_of_another_checkpoint_of_that_step_is_not_used(two, tmp_path):
    shutil.copytree(two, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "checkpoints" / "4")  # by hand; its manifest stays
    with contextlib.closing(Checkpoints(tmp_path, 2)) as checkpoints, warned() as lines:
        checkpoints.save(state(5), 4, META)
        checkpoints.wait()
    assert verify.find_corruption(epath.Path(tmp_path / "checkpoints" / "4")) is None and not lines


def _swapped(values: np.ndarray) -> None:
    values[0], values[2**15] = values[2**15], values[0]


def _signs(values: np.ndarray) -> None:
    values[[3, 70]] *= -1


@pytest.mark.parametrize("change", [_swapped, _signs])
@pytest.mark.parametrize("manifest", [True, False])
def test_changes_of_two_values_are_corruption(tmp_path, manifest, change):
    """The linear checksum of older checkpoints misses these changes; one bit can cause both."""
    values = np.ones(2**15 + 1, np.float32)
    values[2**15] = 2
    changed = values.copy()
    change(changed)
    assert verify.checksum(values, 1) == verify.checksum(changed, 1)
    for name, array in (("one", values), ("other", changed)):
        with contextlib.closing(Checkpoints(tmp_path / name)) as checkpoints:
            checkpoints.save({"a": jnp.asarray(array)}, 4, META)
    folder, other = (tmp_path / name / "checkpoints" / "4" for name in ("one", "other"))
    shutil.rmtree(folder / "state")
    shutil.copytree(other / "state", folder / "state")
    if not manifest:
        manifests.remove(epath.Path(folder))
    assert verify.find_corruption(epath.Path(folder)) == "the checksum of a does not match"


@given(
    st.integers(0, 10_000),
    st.sampled_from([np.float32, jnp.bfloat16, np.uint8]),
    st.sampled_from([(), (5, 4)]),
    st.sampled_from([1, 2]),
)
def test_the_checksum_of_a_file_is_that_of_the_device(seed, dtype, shape, version):
    values = np.random.default_rng(seed).integers(-99, 99, shape).astype(dtype)
    assert verify.checksum(values, version) == int(checksum(jnp.asarray(values), version))


def test_a_leaf_larger_than_a_part_has_the_same_checksum(monkeypatch):
    values = np.arange(1000, dtype=np.float32)
    expected = verify.checksum(values)
    monkeypatch.setattr(verify, "_PART", 64)
    assert verify.checksum(values) == expected


@pytest.mark.parametrize("rotten", [2, 4])
def test_corruption_is_detected_during_the_run_and_moved_away_at_the_next_save(tmp_path, rotten):
    with contextlib.closing(Checkpoints(tmp_path, 2)) as checkpoints:
        checkpoints.save(state(2), 2, META)
        checkpoints.wait()
        if rotten == 2:
            flip(largest(tmp_path / "checkpoints" / "2" / "state"), 5000)
        checkpoints.save(state(4), 4, META)
        checkpoints.wait()
        if rotten == 4:
            flip(largest(tmp_path / "checkpoints" / "4" / "state"), 5000)
        deadline = time.monotonic() + 900
        while rotten not in checkpoints.watch.damaged:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert set(checkpoints.watch.damaged) == {rotten}
        checkpoints.save(state(6), 6, META)
        checkpoints.wait()
        kept = {2, 4, 6} - {rotten}
        assert set(verify.finished(checkpoints.manager.directory)) == kept
    assert (tmp_path / "checkpoints.damaged" / str(rotten)).is_dir()


@pytest.mark.parametrize(
    "error",
    [
        ValueError("RESOURCE_EXHAUSTED: No space left on device [tensorstore_spec='x']"),
        OSError(errno.EROFS, "Read-only file system", "state"),
    ],
    ids=repr,
)
def test_a_failed_save_is_a_one_line_error_and_keeps_other_checkpoints(two, monkeypatch, error):
    def save(*given: object, **named: object) -> None:
        raise error

    with contextlib.closing(Checkpoints(two, 2)) as checkpoints:
        monkeypatch.setattr(checkpoints.manager, "save", save)
        with pytest.raises(RunError, match=r"cannot save to .*, finished .* kept: ") as raised:
            checkpoints.save(state(6), 6, META)
        assert "tensorstore_spec" not in str(raised.value)
        assert checkpoints.newest_whole() == 4


def test_a_full_disk_is_a_one_line_error_and_other_errors_are_not_hidden(tmp_path):
    with (
        pytest.raises(RunError, match=f"cannot write to {tmp_path} .No space left on device.; "),
        working_disks(epath.Path(tmp_path)),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(BrokenPipeError), working_disks(epath.Path(tmp_path)):
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")


@pytest.mark.parametrize(
    "error",
    [
        ValueError("UNAVAILABLE: connection refused [tensorstore_spec='x']"),
        PermissionError(errno.EACCES, "Permission denied"),
        OSError(errno.ESTALE, "Stale file handle"),
        MemoryError(),
    ],
    ids=repr,
)
def test_a_temporary_read_error_is_not_corruption(two, monkeypatch, error):
    def read(path: epath.Path) -> None:
        raise error

    monkeypatch.setattr(verify, "_reader", lambda folder: read)
    monkeypatch.setattr(manifests, "read", lambda folder: None)
    with pytest.raises(RunError, match=f"cannot read .*: {type(error).__name__}: ") as raised:
        verify.find_corruption(epath.Path(two / "checkpoints" / "4"))
    assert "tensorstore_spec" not in str(raised.value)


def test_a_stale_file_handle_is_not_corruption(two, monkeypatch):
    def digests(folder: epath.Path, given_up: object) -> None:
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(manifests, "file_digests", digests)
    with pytest.raises(RunError, match=r"cannot read .*Stale file handle"):
        verify.find_corruption(epath.Path(two / "checkpoints" / "4"))
