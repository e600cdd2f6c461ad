"""Fuzz targets of benchmarks/fuzz.py: the readers of untrusted files, with valid seed files.

An entry takes a folder to write in. It returns the contents of valid files, and a function that
reads any content.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import re
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from singer_jax.data.images import EvalTransform, TrainTransform, UnreadableImage, open_image
from singer_jax.errors import InputError
from singer_jax.models.checkpoint import read_content
from singer_jax.models.weight_files import find_weights, open_weights, read_hub_config
from tests.data import official
from tests.models.torch_writer import (
    piece,
    state_dict,
    tensor,
    write_archive,
    write_legacy_file,
    write_torch_file,
)

Entry = tuple[list[bytes], Callable[[bytes], None]]

_FOREIGN = Path(__file__).parents[1] / "tests" / "models" / "foreign"
_ARRAYS = {"norm.weight": np.arange(6, dtype=np.float32), "head": np.ones((2, 3), np.int64)}


def _read_weights(path: Path) -> None:
    for found in open_weights(path).values():
        assert found.read().shape == tuple(found.shape)


def _torch_file(folder: Path) -> Entry:
    path = folder / "a.pth"
    write_torch_file(path, {"model": _ARRAYS, "epoch": 3})

    def enter(data: bytes) -> None:
        path.write_bytes(data)
        _read_weights(path)

    return [path.read_bytes()], enter


def _torch_pickle(folder: Path) -> Entry:
    """The pickle inside a whole archive, whose checksums would stop every change of it."""
    seeds = [state_dict(tensor(), tensor((2,), (3,), 1)), state_dict(tensor((0, 4), (4, 1), 6))]
    return seeds, lambda data: _read_weights(write_archive(folder / "a.pth", data))


def _legacy_torch_file(folder: Path) -> Entry:
    """The format from before torch 1.6: five pickles and the storages."""
    path = folder / "a.pth"
    write_legacy_file(
        path, {"norm.weight": np.arange(6, dtype=np.float32), "head": np.ones((2, 3), np.float32)}
    )

    def enter(data: bytes) -> None:
        path.write_bytes(data)
        _read_weights(path)

    return [path.read_bytes()], enter


def _foreign_keys(folder: Path) -> Entry:
    """A pickle with keys of every format that is converted, nested as training code nests them."""
    seeds, elements = [], 2048
    for recording in sorted(_FOREIGN.glob("*/model.json")):
        named = json.loads(recording.read_text())["file"]
        content = read_content(find_weights(str(recording.parent / named)))
        while not any(hasattr(value, "read") for value in content.values()):
            content = next(value for value in content.values() if isinstance(value, dict))
        pushed = b""
        for key, stored in content.items():
            if not re.search(r"(blocks|layers?)\.1\.|text|decoder|periods", key):
                strides = np.empty(stored.shape, np.uint8).strides
                pushed += piece(key) + tensor(stored.shape, strides, elements=elements)
        seeds.append(b"\x80\x02}(" + piece("model") + b"}(" + pushed + b"uu.")
    data = bytes(4 * elements)
    return seeds, lambda pickled: _read_weights(write_archive(folder / "a.pth", pickled, data))


def _npz(folder: Path) -> Entry:
    path = folder / "a.npz"
    np.savez(path, **{"embedding/kernel": np.ones((2, 2, 3, 4), np.float32), "cls": np.ones(4)})

    def enter(data: bytes) -> None:
        path.write_bytes(data)
        _read_weights(path)

    return [path.read_bytes()], enter


def _npz_header(folder: Path) -> Entry:
    """The header of an array inside a whole archive, whose checksums would stop every change."""
    path, header = folder / "a.npz", io.BytesIO()
    np.save(header, np.ones((2, 3), np.float32))

    def enter(data: bytes) -> None:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("cls.npy", data)
        _read_weights(path)

    return [header.getvalue()], enter


def _index_of_shards(folder: Path) -> Entry:
    from safetensors.numpy import save_file

    shards = {"norm.weight": "a.safetensors", "head": "b.safetensors"}
    for key, name in shards.items():
        save_file({key: _ARRAYS[key]}, folder / name)
    path = folder / "model.safetensors.index.json"

    def enter(data: bytes) -> None:
        path.write_bytes(data)
        _read_weights(path)

    return [json.dumps({"metadata": {"total_size": 48}, "weight_map": shards}).encode()], enter


def _transformers_config(folder: Path) -> Entry:
    from singer_jax.models.weights import from_hub_config

    seeds = [file.read_bytes() for file in sorted(_FOREIGN.glob("hf_*/config.json"))]

    def enter(data: bytes) -> None:
        (folder / "config.json").write_bytes(data)
        stated = read_hub_config(folder)
        if "architecture" in stated:
            from_hub_config(stated)

    return seeds, enter


def _safetensors(folder: Path) -> Entry:
    from safetensors.numpy import save_file

    path = folder / "a.safetensors"
    save_file(_ARRAYS | {"half": np.ones(3, np.float16)}, path, metadata={"format": "pt"})

    def enter(data: bytes) -> None:
        path.write_bytes(data)
        _read_weights(path)

    return [path.read_bytes()], enter


def _config_json(folder: Path) -> Entry:
    from singer_jax.models.export_timm import to_hub_config
    from singer_jax.models.weights import from_hub_config
    from singer_jax.models.zoo import lookup

    names = ("vit_tiny_patch16_224", "vit_base_patch16_dinov3", "vit_base_patch16_siglip_224")
    seeds = [json.dumps(to_hub_config(lookup(name, {"depth": 3}))).encode() for name in names]

    def enter(data: bytes) -> None:
        (folder / "config.json").write_bytes(data)
        stated = read_hub_config(folder)
        if "architecture" in stated:
            from_hub_config(stated)

    return seeds, enter


def _image(folder: Path) -> Entry:
    picture = official.picture(0)
    kinds = (("JPEG", {}), ("JPEG", {"progressive": True}), ("PNG", {}), ("WEBP", {}), ("GIF", {}))
    seeds = []
    for kind, options in (*kinds, ("BMP", {}), ("TIFF", {}), ("TIFF", {"compression": "tiff_lzw"})):
        buffer = io.BytesIO()
        picture.save(buffer, kind, **options)
        seeds.append(buffer.getvalue())
    transforms = EvalTransform(16), TrainTransform(16, fast=True), TrainTransform(16)

    def enter(data: bytes) -> None:
        for number, transform in enumerate(transforms):
            image = open_image(data, exif=number == 0)
            assert transform(image, np.random.default_rng(0)).shape == (16, 16, 3)

    return seeds, enter


def _mat(folder: Path) -> Entry:
    import scipy.io

    from singer_jax.data.matlab import read_numbers

    path, seeds = folder / "a.mat", []
    for packed in (False, True):
        scipy.io.savemat(path, {"labels": np.arange(9, dtype=np.uint8)}, do_compression=packed)
        seeds.append(path.read_bytes())

    def enter(data: bytes) -> None:
        path.write_bytes(data)
        read_numbers(path, "labels")

    return seeds, enter


def _of_benchmark(name: str, file: str, write: Callable[[Path], None]) -> Callable[[Path], Entry]:
    """A file of a data set of Table 1."""

    def entry(folder: Path) -> Entry:
        from singer_jax.data.benchmarks import open_benchmark
        from singer_jax.data.loader import LoadExample

        write(folder)
        path = next(folder.rglob(file))

        def enter(data: bytes) -> None:
            path.write_bytes(data)
            source = open_benchmark(name, str(folder), "test")
            if name == "nyud":
                from singer_jax.data.dense import DepthTransform

                LoadExample(source, DepthTransform(16, train=False), True)(0, None)

        return [path.read_bytes()], enter

    return entry


@functools.cache
def _scenes() -> type:
    """A set of one image; TFDS takes a name once."""
    import tensorflow_datasets as tfds

    class FuzzedScenes(tfds.core.GeneratorBasedBuilder):
        """An image and a label."""

        VERSION = tfds.core.Version("1.0.0")

        def _info(self) -> tfds.core.DatasetInfo:
            label = tfds.features.ClassLabel(num_classes=2)
            features = tfds.features.FeaturesDict({"image": tfds.features.Image(), "label": label})
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, manager: object) -> dict[str, object]:
            return {"test": self._generate_examples()}

        def _generate_examples(self) -> Iterator[tuple[int, dict[str, object]]]:
            image = io.BytesIO()
            official.picture(0).save(image, "PNG")
            yield 0, {"image": image.getvalue(), "label": 1}

    return FuzzedScenes


def prepared_set(folder: Path) -> Path:
    """A set that TFDS prepared by code that is not here, as an untrusted one is."""
    _scenes()(data_dir=str(folder), file_format="array_record").download_and_prepare()
    return (folder / "fuzzed_scenes").rename(folder / "untrusted_scenes") / "1.0.0"


def _tfds_record(folder: Path) -> Entry:
    from singer_jax.data.loader import LoadExample
    from singer_jax.data.sources import TfdsSource

    prepared_set(folder)
    source = TfdsSource("untrusted_scenes", str(folder), "test")
    seed, load = source.records.data_source[0], LoadExample(source, EvalTransform(16), True)

    def enter(data: bytes) -> None:
        source.records.data_source = [data]
        load(0, np.random.default_rng(0))

    return [seed], enter


def _tfds_json(folder: Path) -> Entry:
    """Both files that say what the records are, one after the other."""
    from singer_jax.data.sources import TfdsSource

    described = prepared_set(folder)
    files = [described / name for name in ("dataset_info.json", "features.json")]
    valid = [file.read_bytes() for file in files]

    def enter(data: bytes) -> None:
        for file, content in zip(files, valid, strict=True):
            file.write_bytes(data)
            try:
                source = TfdsSource("untrusted_scenes", str(folder), "test")
                if len(source):
                    source[0]
            except (InputError, UnreadableImage):
                pass
            finally:
                file.write_bytes(content)

    return valid, enter


def _tar(folder: Path) -> Entry:
    """A list of the images in an archive, and of those in an archive within it."""
    from singer_jax.data.tars import scan
    from tests.data.downloads import jpeg, tar_bytes

    path = folder / "a.tar"
    members = {"a/1.jpg": jpeg(1), "b/2.jpg": jpeg(2), "b/2.cls": b"3", "b/3.json": b'{"label": 1}'}
    long = {"n" * 150 + ".tar": tar_bytes(members)}

    def enter(data: bytes) -> None:
        path.write_bytes(data)
        scan(path, len(data))

    return [tar_bytes(members), tar_bytes(long)], enter


def _files_of_a_run(folder: Path) -> Entry:
    """config.json, metrics.jsonl and results.json of a run that is reported or compared."""
    from etils import epath

    from singer_jax.evaluation.results import provenance
    from singer_jax.jobs.report import results_of
    from singer_jax.report.collect import read_metrics
    from singer_jax.settings.settings import to_dict
    from singer_jax.training.restore import read_settings
    from singer_jax.training.settings import DistillSettings

    run, settings = epath.Path(folder), DistillSettings()
    (folder / "evaluation").mkdir()
    results = {"table1": {"IN-val": 1.5}, "tasks": {"digits": {"top1": 90.0}}, "protocol": "fast"}
    results |= provenance({"probe": {"epochs": 1}}, {"digits": "0a"}, 2, "0b")
    rows = b'{"step": 1, "time": 2.5, "train/loss": 0.5}\n{"step": 2, "eval/knn/top1": 3}\n'

    def enter(data: bytes) -> None:
        (folder / "metrics.jsonl").write_bytes(data)
        (folder / "config.json").write_bytes(data)
        (folder / "evaluation" / "results.json").write_bytes(data)
        for read in (read_settings, read_metrics, lambda run: results_of(run, settings)):
            with contextlib.suppress(InputError):
                read(run)

    return [json.dumps(to_dict(settings)).encode(), json.dumps(results).encode(), rows], enter


ENTRIES: dict[str, Callable[[Path], Entry]] = {
    "torch file": _torch_file,
    "pickle of a torch file": _torch_pickle,
    "torch file before 1.6": _legacy_torch_file,
    "keys of other libraries": _foreign_keys,
    "npz": _npz,
    "header of an npz array": _npz_header,
    "index of shards": _index_of_shards,
    "config.json of transformers": _transformers_config,
    "safetensors": _safetensors,
    "config.json": _config_json,
    "image": _image,
    "mat version 5": _mat,
    "mat version 7.3": _of_benchmark("nyud", "nyu_depth_v2_labeled.mat", official.nyud),
    "JSON list": _of_benchmark("inat19", "val2019.json", official.inat19),
    "TFDS record": _tfds_record,
    "TFDS JSON": _tfds_json,
    "files of a run": _files_of_a_run,
    "tar file": _tar,
    "text list": _of_benchmark("pet", "test.txt", official.pet),
}
# Readers in C, C++ and Rust, of which atheris sees nothing.
COMPILED = ("safetensors", "mat version 7.3")
