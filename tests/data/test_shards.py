"""Images in tar files and Parquet shards: their detection, order and labels."""

import gzip
import io
import os
import pickle
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from singer_jax.data import tars
from singer_jax.data.imagenet import imagenet_wnids
from singer_jax.data.parquet import ParquetSource
from singer_jax.data.registry import make_source
from singer_jax.data.shard_files import by_split
from singer_jax.data.sources import TEST, TRAIN, NoSplit
from singer_jax.data.tars import TarSource
from singer_jax.errors import InputError
from singer_jax.io import limits
from tests.data.downloads import (
    jpeg,
    tar_bytes,
    write_imagenet,
    write_parquet,
    write_webdataset,
)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def contents(source):
    return [(source[i].image, source[i].label) for i in range(len(source))]


def test_imagenet_archives_are_read_as_they_are_downloaded(tmp_path):
    folder = write_imagenet(tmp_path / "download")
    train, test = (make_source(str(folder), "", split) for split in (TRAIN, TEST))
    expected = [(jpeg(10 * label + i), label) for label in (3, 0, 999) for i in range(4)]
    assert contents(pickle.loads(pickle.dumps(train))) == expected
    assert train.num_classes == test.num_classes == 1000
    assert not train.exif
    # The labels of tensorflow_datasets: n01751748, n09193705, n02437616 are 65, 970 and 355.
    wnids = imagenet_wnids()
    assert [wnids[test[i].label] for i in range(2)] == ["n01751748", "n09193705"]
    assert test[2].image == jpeg(55_000)
    assert imagenet_wnids()[3] in train.describe(0) and "img_train.tar" in train.describe(0)


def test_webdataset_shards_have_the_labels_of_their_keys(tmp_path):
    folder = write_webdataset(tmp_path / "shards")
    train, test = TarSource(folder, TRAIN), TarSource(folder, TEST)
    assert contents(train) == [(jpeg(n), n % 3) for n in range(12)]
    assert contents(test) == [(jpeg(100 + n), (100 + n) % 3) for n in range(12)]
    assert train.num_classes == 3 and train.exif
    assert train.fingerprint() != test.fingerprint()


def test_a_json_label_and_two_pictures_of_a_key(tmp_path):
    members = {
        "a.depth.png": b"d", "a.jpg": jpeg(1), "a.json": b'{"label": 1}',
        "b.jpg": jpeg(2), "b.json": b'{"label": 0}', "b.txt": b"x",
    }  # fmt: skip
    (tmp_path / "x.tar").write_bytes(tar_bytes(members))
    assert contents(TarSource(tmp_path / "x.tar", TRAIN)) == [(jpeg(1), 1), (jpeg(2), 0)]
    with pytest.raises(NoSplit, match="test split"):
        TarSource(tmp_path / "x.tar", TEST)


def test_folders_in_an_archive_are_classes_and_hidden_files_are_none(tmp_path):
    members = {
        "set/b/IMG.1.jpg": jpeg(1), "set/b/IMG.2.jpg": jpeg(2), "set/b/._IMG.1.jpg": b"x",
        "set/a/3.png": jpeg(3), "set/a/notes.txt": b"x",
    }  # fmt: skip
    (tmp_path / "x.tar").write_bytes(tar_bytes(members))
    source = TarSource(tmp_path / "x.tar", TRAIN)
    assert contents(source) == [(jpeg(1), 1), (jpeg(2), 1), (jpeg(3), 0)]
    assert source.class_names == ("a", "b")
    (tmp_path / "x.tar").write_bytes(tar_bytes({"1.jpg": jpeg(1), "s/2.jpg": jpeg(2)}))
    assert contents(TarSource(tmp_path / "x.tar", TRAIN)) == [(jpeg(1), -1), (jpeg(2), -1)]


def test_labels_that_are_dropped_are_named(tmp_path, caplog):
    members = {"a/1.jpg": jpeg(1), "b/2.jpg": jpeg(2)}
    for split, more in (("train", {}), ("val", {"3.jpg": jpeg(3)})):
        (tmp_path / f"{split}.tar").write_bytes(tar_bytes(members | more))
    assert TarSource(tmp_path, TRAIN).num_classes == 2 and not caplog.text
    assert TarSource(tmp_path, TEST).num_classes == 0
    assert "no labels, since 1 of 3 images of test lie in no class folder" in caplog.text


def test_a_tar_file_is_listed_once_and_again_where_it_changed(tmp_path, monkeypatch):
    file = tmp_path / "x.tar"
    file.write_bytes(tar_bytes({"1.jpg": jpeg(1)}))
    first = contents(TarSource(file, TRAIN))
    scans = []
    scan = tars.scan
    monkeypatch.setattr(tars, "scan", lambda *a: scans.append(a) or scan(*a))
    assert contents(TarSource(file, TRAIN)) == first and not scans
    file.write_bytes(tar_bytes({"1.jpg": jpeg(7), "2.jpg": jpeg(8)}))
    assert len(TarSource(file, TRAIN)) == 2 and len(scans) == 1
    for listed in (tmp_path / "cache" / "singer_jax" / "tars").iterdir():
        listed.write_bytes(listed.read_bytes()[:100])
    assert len(TarSource(file, TRAIN)) == 2 and len(scans) == 2
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    assert len(TarSource(file, TRAIN)) == 2


def test_names_in_an_archive_never_lead_outside(tmp_path):
    """Names are never used as paths; links and devices are not images."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name in ("../../evil.jpg", "/etc/passwd.jpg"):
            about = tarfile.TarInfo(name)
            about.size = 3
            archive.addfile(about, io.BytesIO(b"abc"))
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE):
            about = tarfile.TarInfo("link.jpg")
            about.type, about.linkname = kind, "/etc/passwd"
            archive.addfile(about)
    (tmp_path / "x.tar").write_bytes(buffer.getvalue())
    before = sorted(tmp_path.rglob("*"))
    source = TarSource(tmp_path / "x.tar", TRAIN)
    assert [source[i].image for i in range(len(source))] == [b"abc", b"abc"]
    assert sorted(set(tmp_path.rglob("*")) - set(before))[0].is_relative_to(tmp_path / "cache")


def _header(size: bytes, kind: bytes = b"0", name: bytes = b"a.jpg") -> bytes:
    block = bytearray(tarfile.TarInfo(name.decode()).tobuf())
    block[124:136] = size
    block[156:157] = kind
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (gzip.compress(tar_bytes({"1.jpg": jpeg(1)})), "compressed; decompress it first"),
        (b"no tar" * 500, "not a complete tar"),
        (tar_bytes({"1.jpg": jpeg(1)})[:700], "not a complete tar|extends past the end"),
        (_header(b"77777777777\0") + b"x" * 512, "extends past the end"),
        (_header(b"\xff" * 12) + b"x" * 512, "not a complete tar"),  # a negative size
        (_header(b"00077777777\0", b"x") + b"x" * 2**25, "16,777,215|bytes, more than"),
        (tar_bytes({"1.jpg": b"x", "1.cls": b"cat"}), "'1.cls' does not hold a class number"),
        (tar_bytes({"1.jpg": b"x", "1.cls": b"-5"}), "-5 is not a class number"),
        (tar_bytes({"1.jpg": b"x", "1.cls": b"9" * 9}), "999,999,999|classes, more than"),
        (tar_bytes({"1.jpg": b"x", "1.cls": b"1", "2.jpg": b"y"}), "2.jpg has no label"),
        (tar_bytes({"train/1.jpg": b"x", "val/2.jpg": b"y"}), "unpack it"),
        (tar_bytes({"readme.txt": b"x"}), "no image"),
    ],
)
def test_a_tar_file_that_is_none_is_one_line(tmp_path, content, message):
    (tmp_path / "x.tar").write_bytes(content)
    with pytest.raises(InputError, match=message) as found:
        TarSource(tmp_path / "x.tar", TRAIN)
    assert "\n" not in str(found.value)


def test_any_bytes_are_a_tar_file_or_one_line(tmp_path):
    rng = np.random.default_rng(0)
    honest = tar_bytes({"a/1.jpg": jpeg(1), "b/" + "n" * 150 + ".jpg": jpeg(2), "b/3.cls": b"1"})
    for number in range(300):
        changed = bytearray(honest)
        for place in rng.integers(0, len(changed), 3):
            changed[place] = rng.integers(256)
        file = tmp_path / f"{number}.tar"
        file.write_bytes(changed)
        try:
            contents(TarSource(file, TRAIN))
        except InputError as error:
            assert "\n" not in str(error)
        os.unlink(file)


def test_split_is_the_last_split_word_in_the_path(tmp_path):
    names = {
        TRAIN: ["00000.tar", "x-train-1.tar", "train/0.tar", "val-like.d/train_2.tar"],
        TEST: ["imagenet-val-0.tar", "validation/0.tar"],
        None: [".hidden.tar", "test-0.tar", "ILSVRC2012_img_train_t3.tar", "a/b/c.tar"],
    }
    for group in names.values():
        for name in group:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_bytes(b"")
    found = by_split(tmp_path, ".tar")
    for split in (TRAIN, TEST):
        assert {f.relative_to(tmp_path).as_posix() for f in found[split]} == set(names[split])


def test_image_folder_takes_precedence_over_an_archive_in_it(tmp_path):
    for name in "ab":
        (tmp_path / "train" / name).mkdir(parents=True)
        (tmp_path / "train" / name / "1.jpg").write_bytes(jpeg(1))
    (tmp_path / "ILSVRC2012_img_train.tar").write_bytes(tar_bytes({"1.jpg": jpeg(2)}))
    assert len(make_source(str(tmp_path), "", TRAIN)) == 2


def test_both_splits_come_from_one_kind_of_source(tmp_path):
    """A split in folders and one in a tar file number their classes by different rules."""
    for n, name in enumerate(("cat", "dog", "emu")):
        (tmp_path / "a" / "train" / name).mkdir(parents=True)
        (tmp_path / "a" / "train" / name / "1.jpg").write_bytes(jpeg(n))
    archive = tar_bytes({"dog/1.jpg": jpeg(1), "emu/1.jpg": jpeg(2)})
    (tmp_path / "a" / "val.tar").write_bytes(archive)
    assert make_source(str(tmp_path / "a"), "", TRAIN).num_classes == 3
    with pytest.raises(InputError, match=r"in folders, but its test split in val\.tar") as found:
        make_source(str(tmp_path / "a"), "", TEST)
    assert not isinstance(found.value, NoSplit)
    (tmp_path / "a" / "val.tar").rename(tmp_path / "a" / "train.tar")
    with pytest.raises(NoSplit, match="has no test split"):
        make_source(str(tmp_path / "a"), "", TEST)
    (tmp_path / "a" / "train").rename(tmp_path / "a" / "val")
    with pytest.raises(InputError, match=r"its train split in train\.tar"):
        make_source(str(tmp_path / "a"), "", TRAIN)
    (tmp_path / "b").mkdir()
    for split in ("train", "val"):
        (tmp_path / "b" / f"{split}.tar").write_bytes(archive)
    both = [make_source(str(tmp_path / "b"), "", split) for split in (TRAIN, TEST)]
    assert both[0].class_names == both[1].class_names == ("dog", "emu")


def test_parquet_shards_of_the_hub(tmp_path):
    folder = write_parquet(tmp_path / "data")
    train, test = ParquetSource(folder, TRAIN), ParquetSource(folder, TEST)
    assert contents(train) == [(jpeg(n), n % 3) for n in range(24)]
    assert contents(test) == [(jpeg(n), n % 3) for n in range(100, 124)]
    assert train.class_names == ("a", "b", "c") and train.num_classes == 3
    assert train.fingerprint() != test.fingerprint()
    rows = [f"{file.name} row {row}" for file in train.files for row in range(12)]
    assert [train.describe(index) for index in range(24)] == rows
    with pytest.raises(InputError, match=r"in order only.*prepare"):
        make_source(str(folder), "", TRAIN)


def write_table(file, **columns):
    pyarrow.parquet.write_table(pa.table(columns), file)
    return file


def test_columns_are_found_by_type_or_asked_for(tmp_path):
    file = write_table(tmp_path / "x.parquet", photo=[jpeg(1), jpeg(2)], fine=[4, 0], coarse=[1, 0])
    source = ParquetSource(file, TRAIN)
    assert contents(source) == [(jpeg(1), -1), (jpeg(2), -1)] and source.num_classes == 0
    source = ParquetSource(file, TRAIN, label="fine")
    assert contents(source) == [(jpeg(1), 4), (jpeg(2), 0)] and source.num_classes == 5
    for message, asked in (("label: 'col'.*fine, coarse", "col"), ("label: 'photo'", "photo")):
        with pytest.raises(InputError, match=message):
            ParquetSource(file, TRAIN, label=asked)
    file = write_table(tmp_path / "y.parquet", left=[b"1"], right=[b"2"], label=[0])
    with pytest.raises(InputError, match=r"image: y\.parquet has left, right; name one"):
        ParquetSource(file, TRAIN)
    assert contents(ParquetSource(file, TRAIN, image="right")) == [(b"2", 0)]
    file = write_table(tmp_path / "z.parquet", text=["x"], label=[0])
    with pytest.raises(InputError, match="no column of images; its columns are text, label"):
        ParquetSource(file, TRAIN)


def test_a_damaged_parquet_file_is_one_line(tmp_path, monkeypatch):
    file = write_table(tmp_path / "x.parquet", image=[jpeg(n) for n in range(9)], label=[*range(9)])
    honest = file.read_bytes()
    for end in (0, 10, len(honest) // 2, len(honest) - 1):
        file.write_bytes(honest[:end])
        with pytest.raises(InputError, match=r"x\.parquet: not a complete Parquet file"):
            ParquetSource(file, TRAIN)
    file.write_bytes(honest)
    monkeypatch.setenv(limits.FACTOR, "1e-7")
    with pytest.raises(InputError, match="bytes in a row group, more than"):
        ParquetSource(file, TRAIN)
    for labels in ([0, -2], [2**40, 0], [2**22, 0]):
        file = write_table(tmp_path / "y.parquet", image=[b"a", b"b"], label=labels)
        monkeypatch.delenv(limits.FACTOR, raising=False)
        with pytest.raises(InputError, match=r"is not a class|classes"):
            contents(ParquetSource(file, TRAIN))
