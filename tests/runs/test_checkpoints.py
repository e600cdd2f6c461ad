"""A damaged checkpoint is never restored, and a run continues on any mesh."""

import contextlib
from pathlib import Path

import jax
import numpy as np
import pytest
from etils import epath
from hypothesis import given
from hypothesis import strategies as st

from singer_jax.config import settings_of
from singer_jax.errors import RunError
from singer_jax.models.architecture import ComputePolicy
from singer_jax.models.params import leaves
from singer_jax.models.weights import load_model
from singer_jax.models.zoo import lookup
from singer_jax.platform import parallel
from singer_jax.runs import verify
from singer_jax.runs.checkpoints import Checkpoints, checksum, fingerprint
from singer_jax.training.setup import RunSetup, setup_students
from tests import tiny


@pytest.fixture(scope="module")
def teacher_file(tmp_path_factory) -> str:
    return str(tiny.write_teacher(tmp_path_factory.mktemp("teacher") / "teacher.safetensors"))


@pytest.fixture(scope="module")
def run(teacher_file) -> RunSetup:
    return setup_students(settings_of(tiny.config(teacher_file)), 64, 10)


@pytest.fixture
def saved(tmp_path, run) -> tuple[Path, object]:
    state = run.init_states(run.load_teacher())[""]
    with contextlib.closing(Checkpoints(tmp_path, 2)) as checkpoints:
        checkpoints.save(state, 3, {"data": "abc"})
    return tmp_path, state


def assert_same(one: object, other: object) -> None:
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_a_state_comes_back_as_it_was(saved, run):
    folder, state = saved
    with contextlib.closing(Checkpoints(folder, 2)) as checkpoints:
        assert checkpoints.manager.latest_step() == 3
        assert checkpoints.meta(3)["data"] == "abc"
        assert_same(checkpoints.restore(3, run.any.state), state)


def test_a_run_resumes_on_another_mesh(saved, teacher_file):
    folder, state = saved
    config = tiny.config(teacher_file)
    config.mesh.data, config.mesh.fsdp = 4, 2
    many = setup_students(settings_of(config), 64, 10)
    with contextlib.closing(Checkpoints(folder, 2)) as checkpoints:
        restored = checkpoints.restore(3, many.any.state)
    kernel = restored.params["student"]["blocks"][0]["mlp"]["fc1"]["kernel"]
    assert len(kernel.sharding.device_set) == 8
    assert_same(jax.device_get(restored), jax.device_get(state))


def test_the_student_comes_back_alone(saved, run):
    folder, state = saved
    abstract = parallel.with_shardings(run.any.mesh, jax.eval_shape(run.any.init_student))
    with contextlib.closing(Checkpoints(folder)) as checkpoints:
        student = checkpoints.restore_student(3, abstract)
    expected = dict(leaves(state.params["student"])) | dict(leaves(state.constants["student"]))
    assert set(expected) == {keys for keys, _ in leaves(student)}
    for keys, leaf in leaves(student):
        np.testing.assert_array_equal(leaf, expected[keys])


def array_files(folder: Path) -> list[Path]:
    files = [path for path in (folder / "checkpoints" / "3" / "state").rglob("*") if path.is_file()]
    return [path for path in files if "/d/" in str(path)]


def test_a_flipped_bit_is_detected(saved, run):
    folder, _ = saved
    noticed, tried = 0, 0
    for path in array_files(folder):
        content = bytearray(path.read_bytes())
        places = list(range(len(content) // 7, len(content), max(1, len(content) // 2)))
        frame = content.find(b"\x28\xb5\x2f\xfd")
        if frame >= 0:
            places.append(frame + 5)  # the size of what a zstd frame unpacks to
        for place in places:
            damaged = content.copy()
            damaged[place] ^= 16
            path.write_bytes(damaged)
            tried += 1
            with contextlib.closing(Checkpoints(folder, 2)) as checkpoints:
                try:
                    restored = checkpoints.restore(3, run.any.state)
                except RunError:
                    noticed += 1
                else:
                    # Bytes that the storage does not read back into any array.
                    assert_same(jax.device_get(restored), jax.device_get(saved[1]))
        path.write_bytes(content)
    assert tried and noticed


def test_a_half_written_file_is_detected(saved, run):
    folder, _ = saved
    for path in array_files(folder):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with (
        contextlib.closing(Checkpoints(folder, 2)) as checkpoints,
        pytest.raises(RunError, match=r"checkpoint 3 in .* is damaged .* check_run lists the "),
    ):
        checkpoints.restore(3, run.any.state)


@pytest.mark.parametrize(
    "content", [b'{"htem_handlers": {}, "metrics": {}, "x": 0, "custom_metadata": {}}', b"[]", b""]
)
def test_damaged_times_of_a_checkpoint_change_nothing(saved, run, content):
    """Orbax's file of times may be damaged in any way; hypothesis found two unknown keys."""
    folder, state = saved
    (folder / "checkpoints" / "3" / "_CHECKPOINT_METADATA").write_bytes(content)
    for options in ({"keep": 2}, {"read_only": True}):
        with contextlib.closing(Checkpoints(folder, **options)) as checkpoints:
            assert checkpoints.newest_whole() == 3
            assert_same(checkpoints.restore(3, run.any.state), state)
    with contextlib.closing(Checkpoints(folder, 2)) as checkpoints:
        checkpoints.save(state, 5, {"data": "abc"})
        checkpoints.save(state, 7, {"data": "abc"})
        checkpoints.wait()
        assert list(checkpoints.manager.all_steps()) == [5, 7]  # the oldest is removed


def test_one_without_checksums_is_refused(saved, run):
    folder, _ = saved
    file = folder / "checkpoints" / "3" / "meta" / "metadata"
    file.write_text('{"data": "abc"}')
    assert verify.find_corruption(epath.Path(file.parent.parent)) == "it holds no checksums"
    with (
        contextlib.closing(Checkpoints(folder, 2)) as checkpoints,
        pytest.raises(RunError, match=r"checkpoint 3 in .* is damaged .* holds no checksum of "),
    ):
        checkpoints.restore(3, run.any.state)


def test_another_dtype_or_shape_is_refused_and_named(saved, run):
    folder, _ = saved
    state = run.any.state._replace(step=jax.ShapeDtypeStruct((), np.float32))
    with (
        contextlib.closing(Checkpoints(folder, 2)) as checkpoints,
        pytest.raises(RunError, match=r"holds no float32\[\] at step"),
    ):
        checkpoints.restore(3, state)


@given(
    st.integers(0, 10_000),
    st.sampled_from([np.float32, np.int32, np.float16, np.uint8]),
    st.sampled_from([1, 2]),
    st.data(),
)
def test_any_flipped_bit_changes_the_checksum(seed, dtype, version, data):
    values = np.random.default_rng(seed).integers(0, 100, (3, 5)).astype(dtype)
    raw = bytearray(values.tobytes())
    raw[data.draw(st.integers(0, len(raw) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    flipped = np.frombuffer(bytes(raw), dtype).reshape(3, 5)
    before, after = (checksum(jax.numpy.asarray(x), version) for x in (values, flipped))
    assert before != after


@pytest.mark.parametrize("version", [1, 2])
def test_the_checksum_does_not_depend_on_the_mesh(version):
    mesh = parallel.make_mesh(4, 2)
    values = np.random.default_rng(0).standard_normal((8, 6)).astype(np.float32)
    spec = jax.sharding.PartitionSpec(("data", "fsdp"), None)
    sharded = jax.device_put(values, jax.sharding.NamedSharding(mesh, spec))
    whole = checksum(jax.numpy.asarray(values), version)
    assert jax.jit(checksum, static_argnums=1)(sharded, version) == whole
    assert checksum(jax.numpy.asarray(values[::-1]), version) != whole


def test_a_fingerprint_is_that_of_the_values_alone(teacher_file):
    """It depends on all values, but not on the mesh or the layout of the blocks in memory."""
    spec = lookup("vit_tiny_patch16_224", tiny.TEACHER | {"num_classes": 0})
    mesh = parallel.make_mesh(1, 2)
    found = {
        fingerprint(load_model(spec, Path(teacher_file), policy, place)[1], policy.stacked)
        for policy in (ComputePolicy(), ComputePolicy(stacked=True))
        for place in (None, lambda abstract: parallel.tree_shardings(mesh, abstract))
    }
    assert len(found) == 1
    params = load_model(spec, Path(teacher_file))[1]
    kernel = params["blocks"][1]["attn"]["qkv"]["kernel"]
    params["blocks"][1]["attn"]["qkv"]["kernel"] = kernel.at[2, 3].add(1e-3)
    assert fingerprint(params) not in found


def test_a_reader_leaves_a_save_in_progress_alone(tmp_path):
    half_written = tmp_path / "checkpoints" / "7.orbax-checkpoint-tmp"
    half_written.mkdir(parents=True)
    with contextlib.closing(Checkpoints(tmp_path, read_only=True)) as checkpoints:
        assert checkpoints.manager.latest_step() is None
    assert half_written.is_dir()
