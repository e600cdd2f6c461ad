"""The promises of SECURITY.md on untrusted files: each file is created here and refused."""

import contextlib
import io
import json
import os
import pickle
import re
import struct
import subprocess
import sys
import time
import zipfile
import zlib
from pathlib import Path

import h5py
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from PIL import Image
from safetensors.numpy import save_file

from benchmarks.fuzz_targets import ENTRIES, prepared_set
from singer_jax.data import images
from singer_jax.data.benchmarks import open_benchmark
from singer_jax.data.images import EvalTransform, TrainTransform, UnreadableImage, open_image
from singer_jax.data.loader import LoadExample
from singer_jax.data.matlab import read_numbers
from singer_jax.data.sources import TEST, TRAIN, FolderSource, TfdsSource
from singer_jax.errors import InputError, RunError
from singer_jax.io import limits
from singer_jax.io.files import as_path
from singer_jax.models import weights
from singer_jax.models.network import ModelSettings, resolve_model
from singer_jax.models.weight_files import find_weights, open_weights
from singer_jax.platform import parallel
from singer_jax.report.collect import read_metrics
from singer_jax.runs.checkpoints import Checkpoints
from tests.data import official

RNG = np.random.default_rng(0)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.slow
def test_a_short_campaign_of_changed_files_finds_nothing(tmp_path):
    """Runs every entry point of benchmarks/fuzz.py on valid files with random changes."""
    command = [sys.executable, "-m", "benchmarks.fuzz", "--inside", "--seconds=0"]
    command += ["--executions=800", f"--findings={tmp_path}"]
    environment = os.environ | {limits.FACTOR: "0.05", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        command,
        env=environment,
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = {file.stem: json.loads(file.read_text()) for file in tmp_path.glob("*.json")}
    assert set(found) == set(ENTRIES)
    assert all(entry["executions"] == 800 for entry in found.values())
    assert {name: entry["findings"] for name, entry in found.items() if entry["findings"]} == {}


# Images.


@pytest.mark.parametrize("size", [(1, 65_500), (65_500, 1)])
def test_a_thin_image_is_not_enlarged_to_gigabytes(size):
    stored = encoded(Image.new("RGB", size), "JPEG")
    with pytest.raises(UnreadableImage, match=r"4,292,608,000 pixels.*SINGER_JAX_LIMITS"):
        EvalTransform(224)(open_image(stored))
    assert TrainTransform(224, fast=True)(open_image(stored), RNG).shape == (224, 224, 3)


def test_more_pixels_than_the_limit_are_refused_until_it_is_raised(monkeypatch):
    bomb = encoded(Image.new("1", (20_000, 10_000)), "PNG")
    assert len(bomb) < 60_000
    with pytest.raises(UnreadableImage, match=r"200,000,000 pixels"):
        open_image(bomb)
    monkeypatch.setenv(limits.FACTOR, "2")
    assert open_image(bomb).size == (20_000, 10_000)
    monkeypatch.setenv(limits.FACTOR, "much")
    with pytest.raises(InputError, match="give a number above 0"):
        open_image(bomb)


def test_a_jpeg_of_thousands_of_scans_is_refused_before_it_is_decoded():
    stored = encoded(Image.new("RGB", (4000, 4000)), "JPEG", progressive=True)
    last = stored[stored.rindex(b"\xff\xda") : -2]
    start = time.process_time()
    with pytest.raises(UnreadableImage, match="scans"):
        open_image(stored[:-2] + last * 5000 + stored[-2:])
    assert time.process_time() - start < 10  # decoded, it would take minutes
    assert EvalTransform(32)(open_image(stored)).shape == (32, 32, 3)


def test_postscript_in_a_photo_is_not_run(tmp_path, monkeypatch):
    """Pillow would start Ghostscript."""
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/was_here\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    photo = tmp_path / "photo.jpg"
    Image.new("RGB", (8, 8)).save(photo, "EPS")
    with pytest.raises(UnreadableImage, match="cannot identify"):
        images.to_rgb(open_image(photo))
    assert not (tmp_path / "was_here").exists()


def test_a_pipe_among_the_images_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "photo.jpg")
    with pytest.raises(UnreadableImage, match="a pipe or a device"):
        open_image(tmp_path / "photo.jpg")


def test_links_in_a_circle_add_nothing(tmp_path):
    (tmp_path / "photo.jpg").write_bytes(encoded(Image.new("RGB", (8, 8)), "JPEG"))
    for name in "ab":
        (tmp_path / name).symlink_to(tmp_path)
    assert len(FolderSource(str(tmp_path), TRAIN)) == 1


def test_the_name_of_an_image_moves_no_cursor(tmp_path, caplog):
    (tmp_path / "\x1b[2J\n.jpg").write_bytes(encoded(Image.new("RGB", (8, 8)), "JPEG"))
    described = FolderSource(str(tmp_path), TRAIN).describe(0)
    assert described.isprintable() and described.endswith(r"/\x1b[2J\n.jpg")
    for name in ("a", "b", "\x1b[2J\n"):
        (tmp_path / name).mkdir()
    for name in "ab":
        (tmp_path / name / "1.jpg").write_bytes((tmp_path / "\x1b[2J\n.jpg").read_bytes())
    (tmp_path / "\x1b[2J\n.jpg").unlink()
    FolderSource(str(tmp_path), TRAIN)
    assert caplog.messages[-1].endswith(r"1 of 3 classes have no images: \x1b[2J\n")


# Data sets.


def test_a_name_in_a_list_breaks_no_line(tmp_path):
    with_list(tmp_path, "inat19", "gone\x1c\n.jpg")
    with pytest.raises(InputError, match="is not completely unpacked") as error:
        open_benchmark("inat19", str(tmp_path), "test")
    assert str(error.value).isprintable()


def with_list(root: Path, name: str, entry: str) -> None:
    """Creates a data set whose test list names another file."""
    getattr(official, name)(root)
    file = next(root.rglob({"inat19": "val2019.json"}.get(name, "test.txt")))
    if name == "inat19":
        content = json.loads(file.read_text())
        content["images"][0]["file_name"] = entry
        file.write_text(json.dumps(content))
    else:
        file.write_text(f"{entry} 1 1 1\n")


@pytest.mark.parametrize(
    ("name", "entry"),
    [
        ("inat19", "../../../secret.jpg"),
        ("inat19", "a/../../../../secret.jpg"),
        ("inat19", "/etc/secret.jpg"),
        ("pet", "../../../../secret"),
        ("food", "apple_pie/../../../../../secret"),
    ],
)
def test_a_list_names_only_files_below_its_data_set(tmp_path, name, entry):
    official.save(tmp_path / "secret.jpg", 0)
    root = tmp_path / "a" / "b" / "data"
    with_list(root, name, entry)
    with pytest.raises(InputError, match="no file below it"):
        open_benchmark(name, str(root), TEST)


def test_a_list_asks_for_no_absurd_number_of_classes(tmp_path):
    official.pet(tmp_path)
    (tmp_path / "oxford-iiit-pet" / "annotations" / "test.txt").write_text("Breed_0_6 9999999 1 1")
    with pytest.raises(InputError, match="9,999,999 classes, more than"):
        open_benchmark("pet", str(tmp_path), TEST)
    (tmp_path / "oxford-iiit-pet" / "annotations" / "test.txt").write_text("Breed_0_6 0 1 1")
    with pytest.raises(InputError, match="label -1 is not one of its 0 classes"):
        open_benchmark("pet", str(tmp_path), TEST)


def test_a_mat_file_that_unpacks_to_gigabytes_is_refused(tmp_path):
    """Covers data in one piece and in many pieces."""
    for pieces, size in ((1, 2**26), (100, 2**20)):
        packed = zlib.compress(struct.pack("<II", 1, size) + bytes(size), 9)
        element = struct.pack("<II", 15, len(packed)) + packed
        (tmp_path / "a.mat").write_bytes(b"MATLAB".ljust(124) + b"\x00\x01IM" + element * pieces)
        with pytest.raises(InputError, match="after decompression, more than"):
            read_numbers(tmp_path / "a.mat", "labels")


@pytest.mark.parametrize("how", ["external", "virtual", "link", "piece", "group"])
def test_an_hdf5_file_holds_its_own_numbers(tmp_path, how):
    """HDF5 can refer to pixels in any file of the machine."""
    official.nyud(tmp_path)
    folder = tmp_path / "nyu_depth_v2"
    (folder / "secret").write_bytes(bytes(6 * 3 * 32 * 24))
    shape = (6, 3, 32, 24)
    with h5py.File(folder / "nyu_depth_v2_labeled.mat", "r+") as file:
        pixels = file["images"][...]
        del file["images"]
        if how == "external":
            where = [(str(folder / "secret"), 0, 6 * 3 * 32 * 24)]
            file.create_dataset("images", shape, "u1", external=where)
        elif how == "virtual":
            layout = h5py.VirtualLayout(shape, "u1")
            layout[...] = h5py.VirtualSource(str(folder / "other.mat"), "images", shape)
            file.create_virtual_dataset("images", layout)
        elif how == "link":
            file["images"] = h5py.ExternalLink(str(folder / "other.mat"), "images")
        elif how == "piece":
            file.create_dataset("images", (6, 3, 2**15, 2**13), "u1", chunks=(1, 3, 2**15, 2**13))
        else:
            file.create_group("images")
    with h5py.File(folder / "other.mat", "w") as other:
        other["images"] = pixels
    with pytest.raises(InputError, match=r"stored in this file|bytes a frame"):
        open_benchmark("nyud", str(tmp_path), TEST)


@pytest.fixture
def prepared(tmp_path) -> Path:
    folder = prepared_set(tmp_path)
    assert TfdsSource("untrusted_scenes", str(tmp_path), TEST)[0].label == 1
    return folder


def test_a_prepared_set_imports_nothing(prepared, tmp_path, monkeypatch):
    (tmp_path / "untrusted_module.py").write_text("raise SystemExit('it ran')\n")
    monkeypatch.syspath_prepend(tmp_path)
    file = prepared / "features.json"
    changed = file.read_text().replace(
        "tensorflow_datasets.core.features.image_feature.Image", "untrusted_module.Image"
    )
    file.write_text(changed)
    with pytest.raises(InputError, match="wants to import 'untrusted_module': refused"):
        TfdsSource("untrusted_scenes", str(tmp_path), TEST)


def test_a_prepared_set_takes_its_records_from_its_folder(prepared, tmp_path):
    file = prepared / "dataset_info.json"
    content = json.loads(file.read_text())
    template = content["splits"][0]["filepathTemplate"]
    content["splits"][0]["filepathTemplate"] = f"../../{template}"
    file.write_text(json.dumps(content))
    with pytest.raises(InputError, match="outside it: refused"):
        TfdsSource("untrusted_scenes", str(tmp_path), TEST)


def test_a_damaged_record_is_an_unreadable_image(prepared, tmp_path):
    source = TfdsSource("untrusted_scenes", str(tmp_path), TEST)
    source.records.data_source = [b"\xff" * 40]
    with pytest.raises(RunError, match="cannot read untrusted_scenes/test record 0"):
        LoadExample(source, EvalTransform(8), strict=True)(0, RNG)


# Weights and what lies beside them.


def test_a_header_is_not_larger_than_its_file_or_its_limit(tmp_path):
    for size, content in ((2**40, bytes(100)), (2**25, bytes(2**25))):
        (tmp_path / "a.safetensors").write_bytes(size.to_bytes(8, "little") + content)
        with pytest.raises(InputError, match="bytes of header"):
            open_weights(tmp_path / "a.safetensors")


def test_an_archive_of_a_million_entries_is_not_listed(tmp_path):
    """An entry of the archive's directory has 46 bytes, but needs ten times as much memory."""
    with zipfile.ZipFile(tmp_path / "a.pth", "w") as archive:
        archive.writestr("archive/data.pkl", b"")
    content = (tmp_path / "a.pth").read_bytes()
    start, end = content.index(b"PK\x01\x02"), content.index(b"PK\x05\x06")
    record, count = content[start:end], 2**24 // (end - start) + 1
    size = (count * len(record)).to_bytes(4, "little")
    tail = content[end : end + 12] + size + content[end + 16 :]
    (tmp_path / "a.pth").write_bytes(content[:start] + record * count + tail)
    with pytest.raises(InputError, match="its directory has"):
        open_weights(tmp_path / "a.pth")


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"depth": 1000}, "1,000 blocks, more than 100"),
        ({"depth": 90}, "it has 1 blocks, expected 90"),
        ({"img_size": 16_384}, "1,048,576 patches, more than 16,384"),
    ],
)
def test_a_config_json_asks_for_no_absurd_model(tmp_path, monkeypatch, asked, words):
    """The check precedes the creation of the model, because tracing 1,000 blocks takes an hour."""
    stated = {"architecture": "vit_tiny_patch16_224", "num_classes": 3, "model_args": asked}
    (tmp_path / "config.json").write_text(json.dumps(stated))
    save_file({"blocks.0.norm1.weight": np.ones(192, np.float32)}, tmp_path / "model.safetensors")
    monkeypatch.setattr(weights, "abstract_model", lambda *_: pytest.fail("was traced"))
    with pytest.raises(InputError, match=words):
        resolve_model("teacher", ModelSettings(weights=str(tmp_path)))


@pytest.mark.parametrize("name", ["../secret", "..", "timm/../../secret", "gs://b/../../secret"])
def test_weights_are_cached_below_the_cache(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError):
        find_weights(name)
    assert list(tmp_path.iterdir()) == []


def test_a_url_with_dots_is_refused():
    with pytest.raises(InputError, match=r"the URL contains"):
        as_path("gs://bucket/../../home/model.safetensors")


class Hostile:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> object:
        return Path.touch, (self.path,)


def test_arrays_are_numbers_and_not_packed(tmp_path):
    was_here = tmp_path / "was_here"
    np.savez(tmp_path / "a.npz", bias=np.array([Hostile(was_here)], object))
    np.savez_compressed(tmp_path / "b.npz", bias=np.zeros(2**20))
    for name, words in (("a", "Object arrays"), ("b", "compressed")):
        with pytest.raises(InputError, match=words):
            limits.read_arrays(tmp_path / f"{name}.npz")
    assert not was_here.exists()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # TensorStore's
def test_a_checkpoint_is_data_only(tmp_path):
    """Replaces every file of a checkpoint by a pickle whose execution would be noticed."""
    state = {"params": {"w": jnp.arange(6.0)}}
    sharding = parallel.replicated(parallel.make_mesh(1, 1))
    abstract = {"params": {"w": jax.ShapeDtypeStruct((6,), jnp.float32, sharding=sharding)}}
    writer = Checkpoints(epath.Path(tmp_path))
    writer.save(state, 1, {})
    writer.close()
    was_here = tmp_path / "was_here"
    files = [path for path in (tmp_path / "checkpoints" / "1").rglob("*") if path.is_file()]
    assert len(files) > 3
    for file in files:
        honest = file.read_bytes()
        file.write_bytes(pickle.dumps(Hostile(was_here)))
        reader = Checkpoints(epath.Path(tmp_path), read_only=True)
        with contextlib.suppress(Exception):  # which one: tests/test_checkpoints.py
            reader.restore(1, abstract)
        reader.close()
        file.write_bytes(honest)
    assert not was_here.exists()


def test_every_promise_has_a_test_that_exists():
    root = Path(__file__).parents[1]
    text, tests = (root / "SECURITY.md").read_text().split("## Tests")
    promises = [int(number) for number in re.findall(r"^(\d+)\. ", text, re.MULTILINE)]
    assert promises == list(range(1, len(promises) + 1)) and len(promises) > 10
    rows = re.findall(r"^\| (\d+) \| `(tests/[\w/]+\.py)::(test_\w+)` \|$", tests, re.MULTILINE)
    assert len(rows) == tests.count("\n|") - 2  # without the head
    assert {int(number) for number, _, _ in rows} == set(promises)
    for _, file, name in rows:
        assert f"def {name}(" in (root / file).read_text(), (file, name)


def test_rows_of_metrics_are_numbers(tmp_path):
    lines = ['{"step": 1, "a": 2.5, "b": "<script>", "c": [1]}', "[1]", '"step"', '{"step": 2, "a']
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines, "[" * 10**5]))
    assert read_metrics(epath.Path(tmp_path)) == [{"step": 1, "a": 2.5}]
    (tmp_path / "metrics.jsonl").write_bytes(b'\xff\n{"step": 1, "eval/held_out/loss": 2.5}')
    assert read_metrics(epath.Path(tmp_path)) == [{"step": 1, "eval/val/loss": 2.5}]
