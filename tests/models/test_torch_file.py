"""Untrusted `.pth` files are read as arrays or refused with a one-line error."""

import os
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from singer_jax.errors import InputError
from singer_jax.models import torch_file
from singer_jax.models.weight_files import open_weights
from tests.models.torch_writer import (
    piece,
    state_dict,
    tensor,
    write_archive,
    write_legacy_file,
    write_torch_file,
)

FUNCTION = b"ctorch._utils\n_rebuild_tensor_v2\n"
NAMESPACE = b"cargparse\nNamespace\n)\x81"


def refused(path: Path) -> str:
    """Returns the error for a file that cannot be opened or read."""
    with pytest.raises(InputError) as caught:
        for found in open_weights(path).values():
            found.read()
    message = str(caught.value)
    assert len(message.splitlines()) == 1 and str(path) in message and len(message) < 1000
    return message


def test_a_hand_made_file_is_read(tmp_path):
    whole, column, scalar = tensor(), tensor((2,), (3,), 1), tensor((), (), 5)
    empty = tensor((0, 4), (4, 1), 6)
    path = write_archive(tmp_path / "a.pth", state_dict(whole, column, scalar, empty))
    read = {key: found.read() for key, found in open_weights(path).items()}
    numbers = np.frombuffer(bytes(range(24)), np.float32).reshape(2, 3)
    np.testing.assert_array_equal(read["w0"], numbers)
    np.testing.assert_array_equal(read["w1"], numbers[:, 1])
    np.testing.assert_array_equal(read["w2"], numbers[1, 2])
    assert read["w3"].shape == (0, 4)
    assert all(array.flags.c_contiguous and array.flags.owndata for array in read.values())


def test_a_transposed_tensor_becomes_contiguous(tmp_path):
    path = write_archive(tmp_path / "a.pth", state_dict(tensor((3, 2), (1, 3))))
    read = open_weights(path)["w0"].read()
    np.testing.assert_array_equal(read, np.frombuffer(bytes(range(24)), "f4").reshape(2, 3).T)
    assert read.flags.c_contiguous


@pytest.mark.parametrize(
    "hostile",
    [
        tensor(offset=1),
        tensor(offset=-1),
        tensor(offset=2**70),
        tensor(shape=(3, 3)),
        tensor(strides=(3, 2)),
        tensor(strides=(-3, 1)),
        tensor(strides=(2**62, 1)),
        tensor(shape=(2**40, 2**40), strides=(0, 0)),
        tensor(shape=(1000,), strides=(0,)),
        tensor(shape=(2**80, 0), strides=(1, 1)),
        tensor(shape=(2, True), strides=(3, 1)),
        tensor(shape=(2.0, 3), strides=(3, 1)),
        tensor(shape=("2", 3)),
        tensor(shape=[2, 3]),
        tensor(shape=(2,)),
        tensor(shape=(1,) * 100, strides=(1,) * 100),
        tensor(strides=None),
        tensor(offset="0"),
        tensor(elements=7),
        tensor(elements=-1),
        tensor(elements=2**62),
        tensor(elements="6"),
        tensor(elements=True, shape=(2,), strides=(1,)),
        tensor(key="1"),
        tensor(key="../data.pkl\n"),
        tensor(key=0),
        tensor(kind=b"ctorch\nDoubleStorage\n"),
        tensor(kind=piece("FloatStorage")),
        tensor(kind=FUNCTION),
    ],
)
def test_no_tensor_reaches_outside_its_storage(tmp_path, hostile):
    path = write_archive(tmp_path / "a.pth", state_dict(hostile))
    assert "not a complete PyTorch file" in refused(path)


NESTED_KEY = b"}" + b")" + b"\x85" * 500_000 + b"Ns"  # a dict, {((((...),),),): None}
ATTACKS = {
    "deeply nested key": b"\x80\x02" + NESTED_KEY + b".",
    "deeply nested lists": b"\x80\x02" + b"]" * 900_000 + b"a" * 899_999 + b".",
    "a million lists": b"\x80\x02" + b"]" * 1_000_001 + b".",
    "marks without end": b"\x80\x02" + b"(" * 900_000 + b".",
    "memo far away": b"\x80\x02]r\xff\xff\xff\x7f.",
    "memo never written": b"\x80\x02j\xff\xff\xff\x7f.",
    "a number of 2 GB": b"\x80\x02\x8b\xff\xff\xff\x7f.",
    "a text of 2 GB": b"\x80\x02X\xff\xff\xff\x7fabc.",
    "a text of 16 EB": b"\x80\x04\x8d" + b"\xff" * 8 + b".",
    "a text that is not UTF-8": b"\x80\x02X\x02\x00\x00\x00\xff\xfe.",
    "the same long entry again and again": b"\x80\x02("
    + piece(("storage", "FloatStorage", "k" * 60_000, "cpu", 1))
    + b"q\x09"
    + b"Qh\x09" * 200_000
    + b"t.",
    "more than 16 MB": b"\x80\x02" + piece("x" * 2**24) + b".",
    "a call of a dict": b"\x80\x02})R.",
    "a call with a dict": b"\x80\x02" + FUNCTION + b"}R.",
    "a call with too few": b"\x80\x02" + FUNCTION + b")R.",
    "a parameter of nothing": b"\x80\x02ctorch._utils\n_rebuild_parameter\n(NtR.",
    "an ordered dict of its items": b"\x80\x02ccollections\nOrderedDict\n(]tR.",
    "a name in two lines": b"\x80\x04" + piece("os\nx") + piece("system") + b"\x93.",
    "a name that is no text": b"\x80\x04NN\x93.",
    "a name too long": b"\x80\x04" + piece("o" * 10**6) + piece("s") + b"\x93.",
    "items of a tuple": b"\x80\x02)Na.",
    "one item too few": b"\x80\x02}(Nu.",
    "nothing on the stack": b"\x80\x02.",
    "no mark": b"\x80\x02t.",
    "no end": b"\x80\x02N",
    "an old operation": b"\x80\x02(ios\nsystem\n.",
    "an extension": b"\x80\x02\x82\x01.",
    "an unknown operation": b"\x80\x02\xff.",
    "no bytes": b"",
    "a list": b"\x80\x02].",
    "no tensors": b"\x80\x02}.",
    "keys that are numbers": b"\x80\x02}K\x01" + tensor() + b"s.",
}


def test_no_pickle_crashes_hangs_or_fills_the_memory(tmp_path):
    """Runs in a separate process with a memory limit of 300 MB beyond its imports."""
    for number, pickled in enumerate(ATTACKS.values()):
        write_archive(tmp_path / f"{number}.pth", pickled)
    code = f"""
import pathlib, resource
from singer_jax.errors import InputError
from singer_jax.models.weight_files import open_weights
now = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (now + 300 * 2**20,) * 2)
for number in range({len(ATTACKS)}):
    try:
        open_weights(pathlib.Path({str(tmp_path)!r}) / f"{{number}}.pth")
        print(number, "was accepted", flush=True)
    except InputError as error:
        assert "Memory" not in str(error), error
        print(number, error, flush=True)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False
    )
    printed = done.stdout.splitlines()
    assert done.returncode == 0, (done.stderr, printed)
    assert len(printed) == len(ATTACKS)
    for name, line in zip(ATTACKS, printed, strict=True):
        assert "is not a complete" in line or "can run code" in line or "no state dict" in line, (
            name
        )
        assert len(line) < 1000, name


@pytest.mark.parametrize("owner", [FUNCTION, b"cargparse\nNamespace\n", NAMESPACE, tensor()])
@pytest.mark.parametrize(
    "state",
    [
        b"}" + piece("__code__") + b"Ns",
        b"N}" + piece("__code__") + b"Ns\x86",  # the form that sets attributes with slots
        b"}" + piece("read") + FUNCTION + b"s",
    ],
)
def test_a_state_changes_nothing_of_ours(tmp_path, owner, state):
    before = {
        name: dict(vars(value))
        for name, value in vars(torch_file).items()
        if hasattr(value, "__dict__") and getattr(value, "__module__", "") == torch_file.__name__
    }
    path = write_archive(tmp_path / "a.pth", state_dict(tensor(), owner + state + b"b"))
    read = open_weights(path)["w0"].read()
    np.testing.assert_array_equal(read.ravel(), np.frombuffer(bytes(range(24)), np.float32))
    assert {name: dict(vars(vars(torch_file)[name])) for name in before} == before


def _with(path: Path, *, change=None, **entries: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", state_dict(tensor()))
        for name, content in ({"data/0": bytes(24)} | entries).items():
            archive.writestr(f"archive/{name}", content)
    if change:
        path.write_bytes(change(path.read_bytes()))
    return path


def _central(content: bytes, offset: int, form: str, value: int) -> bytes:
    """Returns an archive with one field changed in the last entry of its directory."""
    changed = bytearray(content)
    struct.pack_into(form, changed, content.rindex(b"PK\x01\x02") + offset, value)
    return bytes(changed)


def test_an_archive_is_what_torch_writes(tmp_path):
    path = tmp_path / "a.pth"
    for compression in (zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        with zipfile.ZipFile(path, "w", compression) as archive:
            archive.writestr("archive/data.pkl", state_dict(tensor()) + bytes(2**24))
            archive.writestr("archive/data/0", bytes(24))
        assert "archive/data.pkl is compressed" in refused(path)
    with zipfile.ZipFile(_with(path), "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("archive/data/0", bytes(24))
    assert "two entries with the same name" in refused(path)
    assert "big-endian" in refused(_with(path, byteorder=b"big"))
    assert open_weights(_with(path, byteorder=b"little"))
    assert "2 entries data.pkl" in refused(_with(path, **{"more/data.pkl": b""}))
    encrypted = _with(path, change=lambda content: _central(content, 8, "<H", 1))
    assert "archive/data/0 is encrypted" in refused(encrypted)
    for size in (23, 25, 2**31):  # of an entry that lies
        for fields in ((20, 24), (24,)):

            def lie(content, size=size, fields=fields):
                for field in fields:
                    content = _central(content, field, "<L", size)
                return content

            refused(_with(path, change=lie))
    flipped = _with(path, change=lambda content: content.replace(bytes(24), bytes(23) + b"\x01"))
    assert "Bad CRC-32" in refused(flipped)
    path.write_bytes(_with(path).read_bytes()[:-40])
    refused(path)
    path.unlink()
    path.mkdir()
    assert "Is a directory" in refused(path)


def test_a_file_that_changes_after_it_was_opened_is_noticed(tmp_path):
    path = write_archive(tmp_path / "a.pth", state_dict(tensor()))
    found = open_weights(path)["w0"]
    write_archive(path, state_dict(tensor()), bytes(20))
    with pytest.raises(InputError, match="not a complete PyTorch file"):
        found.read()
    os.unlink(path)
    with pytest.raises(InputError, match="No such file"):
        found.read()


def read_or_refused(path: Path) -> None:
    """Checks the property of the fuzz tests: arrays of the stated shapes, or `InputError`."""
    try:
        for found in open_weights(path).values():
            assert found.read().shape == found.shape
    except InputError as error:
        assert len(str(error).splitlines()) == 1


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("fuzz") / "small.pth"
    arrays = {"norm.weight": np.arange(6, dtype=np.float32), "head": np.ones((2, 3), np.int64)}
    write_torch_file(path, {"model": arrays, "epoch": 3})
    return path


fuzz = settings(max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture])


@fuzz
@given(flips=st.lists(st.tuples(st.integers(0, 10**6), st.integers(1, 255)), max_size=4))
def test_flipped_bytes_are_read_or_refused(small, flips):
    content = bytearray(small.read_bytes())
    for place, bits in flips:
        content[place % len(content)] ^= bits
    damaged = small.with_name("flipped.pth")
    damaged.write_bytes(content)
    read_or_refused(damaged)


PIECES = [bytes([code]) for code in b"()}]Nu.tsae\x81\x85\x86\x87\x88\x89bR0Q\x94\x93h\x00q\x00"]
PIECES += [piece(value) for value in (0, 1, 7, -1, 2**62, "w", "storage", "0", 0.5, b"b", None)]
PIECES += [FUNCTION, NAMESPACE, b"ctorch\nFloatStorage\n", b"ccollections\nOrderedDict\n", tensor()]


@fuzz
@example([b"}", b"w"])
@given(pieces=st.lists(st.sampled_from(PIECES), max_size=30))
def test_random_pickles_are_read_or_refused(small, pieces):
    path = small.with_name("random.pth")
    read_or_refused(write_archive(path, b"\x80\x04" + b"".join(pieces) + b"."))


def test_values_that_only_metadata_tells_are_refused(tmp_path):
    negated = tensor()[:-2] + b"}(" + piece("neg") + b"\x88utR"
    with pytest.raises(InputError, match="metadata that changes its values"):
        open_weights(write_archive(tmp_path / "a.pth", state_dict(negated)))
    file = write_legacy_file(tmp_path / "b.pth", {"w": np.ones(2, np.float32)})
    content = file.read_bytes()
    view = piece("v") + piece(0) + piece(1) + b"\x87"  # of a larger storage
    assert content.count(b"NtQ") == 1
    file.write_bytes(content.replace(b"NtQ", view + b"tQ"))
    with pytest.raises(InputError, match="is a view of another storage"):
        open_weights(file)
