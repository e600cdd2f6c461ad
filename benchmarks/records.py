"""Compares the images per second of a folder, of prepared records and of tar shards.

  python -m benchmarks.records [--images 4096] [--keep]

The images are JPEGs of 500 x 375 pixels. `read` reads the encoded bytes in random order in one
thread. `loader` makes batches of 64 training crops with two decoding processes; their start is not
counted. The formats take turns. All files are in the page cache, so that disks and networks are not
measured.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from absl import flags
from ml_collections import ConfigDict

from benchmarks.make_inputs import write_images
from benchmarks.results import report
from singer_jax import main as singer_main
from singer_jax.config import prepare
from singer_jax.data.images import TrainTransform
from singer_jax.data.loader import LoaderOptions, train_batches
from singer_jax.data.records import stored_bytes
from singer_jax.data.registry import make_source
from singer_jax.data.sources import TRAIN, Source

_SHARD = 1000  # images of a tar shard
_BATCH, _BATCHES, _WORKERS = 64, 24, 2


def write_shards(images: list[Path], folder: Path) -> None:
    """Writes WebDataset shards."""
    folder.mkdir()
    for number in range(0, len(images), _SHARD):
        with tarfile.open(folder / f"train-{number // _SHARD:06}.tar", "w") as archive:
            for image in images[number : number + _SHARD]:
                archive.add(image, image.name)
                label = tarfile.TarInfo(f"{image.stem}.cls")
                label.size = 1
                archive.addfile(label, io.BytesIO(b"0"))


def prepared(folder: Path, records: Path) -> float:
    """Prepares records and returns the seconds that this took."""
    config: ConfigDict = prepare()
    config.data.source = str(folder)
    start = time.perf_counter()
    if singer_main.run(config, records):
        sys.exit(1)
    return time.perf_counter() - start


def read(source: Source, order: np.ndarray) -> float:
    """Returns the images per second of reading encoded bytes."""
    start = time.perf_counter()
    for index in order:
        stored_bytes(source[int(index)].image)
    return len(order) / (time.perf_counter() - start)


def loaded(source: Source) -> float:
    """Returns the images per second of the loader after its start."""
    transform, options = TrainTransform(224, fast=True), LoaderOptions(_WORKERS)
    batches = train_batches(source, transform, batch_size=_BATCH, seed=0, options=options)
    with contextlib.closing(batches):
        for _ in range(8):
            next(batches)
        start = time.perf_counter()
        for _ in range(_BATCHES):
            next(batches)
        return _BATCH * _BATCHES / (time.perf_counter() - start)


def main() -> None:
    """Measures all formats and reports the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--keep", action="store_true", help="append to benchmarks/results")
    arguments = parser.parse_args()
    flags.FLAGS(sys.argv[:1])  # grain's workers read them
    with tempfile.TemporaryDirectory() as name:
        folder, shards, records = (Path(name) / part for part in ("images", "shards", "records"))
        write_images(arguments.images, folder)
        write_shards(sorted(folder.iterdir()), shards)
        seconds = prepared(folder, records)
        sources = {p.name: make_source(str(p), "", TRAIN) for p in (folder, records, shards)}
        order = np.random.default_rng(0).permutation(arguments.images)
        ways: dict[tuple[str, str], Callable[[], float]] = {}
        for name, source in sources.items():
            ways["read", name] = lambda source=source: read(source, order)
        for name, source in sources.items():
            ways["loader", name] = lambda source=source: loaded(source)
        found: dict[tuple[str, str], list[float]] = {way: [] for way in ways}
        for _ in range(arguments.repeats):
            for way, measure in ways.items():
                found[way].append(measure())
    names = {"images": "folder", "records": "records", "shards": "tar shards"}
    rows = [
        {
            "what": what,
            "from": names[name],
            "images/s": f"{statistics.median(rates):,.0f}",
            "min..max": f"{min(rates):,.0f}..{max(rates):,.0f}",
        }
        for (what, name), rates in found.items()
    ]
    rate = arguments.images / seconds
    rows.append({"what": "prepare", "from": "folder", "images/s": f"{rate:,.0f}", "min..max": ""})
    command = f"python -m benchmarks.records {' '.join(sys.argv[1:])}".strip()
    libraries = ("array_record", "grain", "simplejpeg")
    report("Records, 500 x 375 JPEGs", command, rows, "", libraries, arguments.keep)


if __name__ == "__main__":
    main()
