"""Tests of the job `prepare`: records train as their images do, also after interruptions."""

import json
import os
import pickle
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from singer_jax import main
from singer_jax.config import prepare
from singer_jax.data import records
from singer_jax.data.imagenet import imagenet_wnids
from singer_jax.data.images import UnreadableImage
from singer_jax.data.records import MANIFEST, RecordSource
from singer_jax.data.registry import make_source
from singer_jax.data.sources import TEST, TRAIN, NoSplit
from singer_jax.errors import InputError
from singer_jax.jobs import prepare as job
from singer_jax.platform import signals
from tests import tiny
from tests.data.downloads import jpeg, write_imagenet, write_parquet, write_webdataset


@pytest.fixture(autouse=True)
def small_shards(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(job, "_IMAGES", 5)


def run(source, folder, **keys) -> int:
    config = prepare()
    config.data.source = str(source)
    config.update_from_flattened_dict(keys)
    return main.run(config, folder)


def write_folder(folder):
    for split, count in (("train", 9), ("val", 4)):
        for label in "ab":
            (folder / split / label).mkdir(parents=True)
            for n in range(count):
                (folder / split / label / f"{n}.jpg").write_bytes(jpeg(n + 100 * (label == "b")))
    return folder


def contents(source):
    return [(records.stored_bytes(source[i].image), source[i].label) for i in range(len(source))]


@pytest.mark.parametrize("kind", ["folder", "imagenet", "webdataset", "parquet"])
def test_records_are_what_they_were_made_of(tmp_path, kind):
    write = {
        "folder": write_folder,
        "imagenet": write_imagenet,
        "webdataset": write_webdataset,
        "parquet": write_parquet,
    }[kind]
    given = write(tmp_path / "given")
    assert run(given, tmp_path / "records") == 0
    settings = job.PrepareSettings(data=job.DataSettings(source=str(given)))
    for split, source in job._open(settings).items():
        made = make_source(str(tmp_path / "records"), "", split)
        made = pickle.loads(pickle.dumps(made))
        assert contents(made) == contents(source)
        assert (made.num_classes, made.exif) == (source.num_classes, source.exif)
        assert made.class_names == source.class_names
        assert made.describe(0).startswith(f"{tmp_path}/records record 0 (")
    digests = {make_source(str(tmp_path / "records"), "", s).fingerprint() for s in (TRAIN, TEST)}
    assert len(digests) == 2
    by_name = make_source("imagenet2012", str(tmp_path / "records"), TRAIN)
    assert isinstance(by_name, RecordSource)
    assert not list((tmp_path / "records").glob("*.partial"))
    assert not list((tmp_path / "records").glob("*progress*"))


@pytest.mark.parametrize(
    "write",
    [
        pytest.param(write_imagenet, marks=pytest.mark.slow),
        pytest.param(write_webdataset, marks=pytest.mark.slow),
        write_parquet,
    ],
)
def test_a_run_on_records_continues_to_the_same_bits(tmp_path, write, caplog):
    assert run(write(tmp_path / "given"), tmp_path / "records") == 0
    config = tiny.config(tiny.write_teacher(tmp_path / "teacher.safetensors"), "fitnet")
    config.data.source, config.steps = str(tmp_path / "records"), 4
    once, twice = tmp_path / "once", tmp_path / "twice"
    assert main.run(config, once) == 0
    rows = [json.loads(line) for line in (once / "metrics.jsonl").open()]
    assert all(np.isfinite(row["train/loss"]) for row in rows)
    shutil.copytree(once, twice)
    shutil.rmtree(twice / "student")
    shutil.rmtree(twice / "checkpoints" / "4")
    caplog.set_level("INFO", "singer_jax")
    assert main.run(config, twice) == 0
    assert "continuing after step 2 of 4" in caplog.text
    students = [folder / "student" / "model.safetensors" for folder in (once, twice)]
    assert students[0].read_bytes() == students[1].read_bytes()


def test_a_stopped_or_killed_job_continues_and_writes_nothing_twice(tmp_path, monkeypatch):
    given = write_webdataset(tmp_path / "given")
    assert run(given, tmp_path / "whole") == 0
    whole = sorted((tmp_path / "whole").iterdir())
    written: list[str] = []
    write_shard = records.write_shard

    def counted(path, *rest):
        written.append(path.name)
        for number, index in enumerate(write_shard(path, *rest)):
            yield index
            if len(written) == 3 and number == 1:
                signals._asked.set()

    monkeypatch.setattr(records, "write_shard", counted)
    try:
        assert run(given, tmp_path / "parts", **{"data.workers": 1}) == 75
    finally:
        signals._asked.clear()
    assert not (tmp_path / "parts" / MANIFEST).exists()
    progress = tmp_path / "parts" / job._PROGRESS
    assert len(progress.read_text().splitlines()) == 1 + 3
    with progress.open("a") as file:
        file.write('{"file": "train-0000')  # the process was killed while it wrote
    assert run(given, tmp_path / "parts", **{"data.workers": 1}) == 0
    assert len(written) == len(set(written)) == 6
    assert [f.name for f in whole] == sorted(f.name for f in (tmp_path / "parts").iterdir())
    for file in whole:
        assert (tmp_path / "parts" / file.name).read_bytes() == file.read_bytes()


def test_starting_again_mends_damaged_records(tmp_path, capsys):
    given = write_parquet(tmp_path / "given")
    assert run(given, tmp_path / "records") == 0
    before = {f.name: f.read_bytes() for f in (tmp_path / "records").iterdir()}
    names = sorted(name for name in before if name.endswith("array_record"))
    damaged = bytearray(before[names[0]])
    damaged[len(damaged) // 2] ^= 1
    (tmp_path / "records" / names[0]).write_bytes(damaged)
    (tmp_path / "records" / names[1]).unlink()
    assert run(given, tmp_path / "records") == 0
    assert {f.name: f.read_bytes() for f in (tmp_path / "records").iterdir()} == before
    other = write_parquet(tmp_path / "other", rows=7)
    assert run(other, tmp_path / "records") == 2
    assert "holds records of other images" in capsys.readouterr().err


def test_an_unreadable_image_keeps_its_place(tmp_path, capsys):
    given = write_folder(tmp_path / "given")
    (given / "train" / "a" / "3.jpg").unlink()
    os.mkfifo(given / "train" / "a" / "3.jpg")
    assert run(given, tmp_path / "records") == 0
    assert "unreadable images: 1 " in capsys.readouterr().out
    made = make_source(str(tmp_path / "records"), "", TRAIN)
    assert made[3].image == b"" and made[3].label == 0
    assert made[4].image == jpeg(4)


def test_the_first_image_may_be_one_that_cannot_be_read(tmp_path, capsys):
    tables = write_parquet(tmp_path / "given", rows=2)
    for file in tables.iterdir():
        table = pyarrow.parquet.read_table(file)
        path_alone = [{"bytes": None, "path": "1.jpg"}]
        images = pa.array(path_alone + table["image"].to_pylist()[1:], table["image"].type)
        pyarrow.parquet.write_table(table.set_column(0, "image", images), file)
    assert run(tables, tmp_path / "records") == 0
    assert "unreadable images: 4" in capsys.readouterr().out
    assert make_source(str(tmp_path / "records"), "", TRAIN)[1].image == jpeg(1)


def test_records_of_imagenet_are_read_as_its_files_are(tmp_path):
    """Not turned by their EXIF tags, from its folders as from its archives."""
    for split in ("train", "val"):
        for wnid in imagenet_wnids()[:2]:
            (tmp_path / "given" / split / wnid).mkdir(parents=True)
            (tmp_path / "given" / split / wnid / "1.JPEG").write_bytes(jpeg(1))
    assert run(tmp_path / "given", tmp_path / "records") == 0
    assert not make_source(str(tmp_path / "records"), "", TRAIN).exif


@pytest.mark.parametrize(
    ("source", "folder", "message"),
    [
        ("folder", "records", "data.path: empty"),
        ("{tmp}/none", "records", "no folder at"),
        ("{tmp}/given", "given", "holds the images; give another folder"),
        ("digits", "records", "has no image files"),
        ("{tmp}/given", "gs://bucket/x", "--workdir: gs://bucket/x is a URL"),
    ],
)
def test_what_cannot_be_prepared_is_one_line(tmp_path, capsys, source, folder, message):
    write_folder(tmp_path / "given")
    where = folder if "://" in folder else tmp_path / folder
    assert run(source.format(tmp=tmp_path), where) == 2
    printed = capsys.readouterr().err
    assert message in printed and len(printed.splitlines()) == 1


def test_a_full_disk_is_an_error_of_one_line_and_keeps_finished_files(
    tmp_path, capsys, monkeypatch
):
    given = write_webdataset(tmp_path / "given")
    made = []

    def fails(path, *rest):
        made.append(path)
        if len(made) == 2:
            path = type(path)("/dev/full/x")
        yield from write_shard(path, *rest)

    write_shard = records.write_shard
    monkeypatch.setattr(records, "write_shard", fails)
    assert run(given, tmp_path / "records", **{"data.workers": 1}) == 1
    assert "finished shards are kept" in capsys.readouterr().err
    assert run(given, tmp_path / "records", **{"data.workers": 1}) == 0


class TestManifest:
    @pytest.fixture
    def folder(self, tmp_path):
        assert run(write_webdataset(tmp_path / "given"), tmp_path / "records") == 0
        return tmp_path / "records"

    def change(self, folder, change):
        content = json.loads((folder / MANIFEST).read_text())
        content = change(content) or content
        (folder / MANIFEST).write_text(json.dumps(content))

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda c: [1], "not in the format"),
            (lambda c: c.update(format="other"), "not in the format"),
            (lambda c: c.update(classes="3"), "'3' is not a valid number of classes"),
            (lambda c: c.update(classes=2**40), "classes, more than"),
            (lambda c: c.update(splits=[]), "damaged"),
            (lambda c: c.update(splits={"train": [3]}), "damaged"),
            (lambda c: c["splits"]["train"][0].update(file="../x"), "not describe a shard"),
            (lambda c: c["splits"]["train"][0].update(file="/etc/passwd"), "not describe a shard"),
            (lambda c: c["splits"]["train"][0].update(images=-1), "not describe a shard"),
            (lambda c: c["splits"]["train"][0].update(file="none"), "No such file"),
            (lambda c: c["splits"]["train"][0].update(size=7), "says 7; prepare again"),
        ],
    )
    def test_a_wrong_one_is_one_line(self, folder, change, message):
        self.change(folder, change)
        with pytest.raises(InputError, match=message) as found:
            RecordSource(folder, TRAIN)
        assert "\n" not in str(found.value)

    def test_more_images_than_there_are_are_unreadable(self, folder):
        self.change(folder, lambda c: c["splits"]["train"][0].update(images=2**40))
        with pytest.raises(UnreadableImage):
            RecordSource(folder, TRAIN)[10]

    def test_a_split_that_is_missing_is_named(self, folder):
        self.change(folder, lambda c: c["splits"].pop("test") and None)
        with pytest.raises(NoSplit, match="has no test split; it has train"):
            RecordSource(folder, TEST)

    def test_damage_in_a_shard_is_an_unreadable_image(self, folder):
        source = RecordSource(folder, TRAIN)
        shard = folder / source.shards[0].file
        honest = shard.read_bytes()
        for place in range(0, len(honest), max(1, len(honest) // 200)):
            shard.write_bytes(honest[:place] + bytes([honest[place] ^ 0x10]) + honest[place + 1 :])
            source = RecordSource(folder, TRAIN)
            for index in range(source.shards[0].images):
                try:
                    assert source[index] == (jpeg(index), index % 3)
                except UnreadableImage:
                    continue


def test_a_class_beyond_the_manifest_is_no_label(tmp_path):
    assert run(write_webdataset(tmp_path / "given"), tmp_path / "records") == 0
    manifest = tmp_path / "records" / MANIFEST
    manifest.write_text(manifest.read_text().replace('"classes": 3', '"classes": 2'))
    with pytest.raises(UnreadableImage, match="label 2 is not one of 2 classes"):
        RecordSource(tmp_path / "records", TRAIN)[2]
