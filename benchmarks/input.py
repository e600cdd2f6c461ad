"""How many images one core decodes, crops and flips in a second, alone and in the real loader.

  python -m benchmarks.input

500 x 375 JPEGs (ImageNet's usual size), crops of 224. Alone: CPU seconds of the
transform in one process. Loader: CPU seconds of the whole process tree, batches of 64, one worker.
"""

from __future__ import annotations

import argparse
import contextlib
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from absl import flags

from benchmarks.make_inputs import write_images
from benchmarks.results import report
from singer_jax.data.images import TrainTransform, open_image
from singer_jax.data.loader import train_batches
from singer_jax.data.registry import make_source
from singer_jax.data.sources import TRAIN


def cpu_seconds() -> float:
    """Of this process and its finished children."""
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(one.ru_utime + one.ru_stime for one in used)


def alone(photos: list[bytes]) -> float:
    """CPU seconds an image."""
    transform, rng = TrainTransform(224), np.random.default_rng(0)
    start = time.process_time()
    for stored in photos:
        transform(open_image(stored), rng)
    return (time.process_time() - start) / len(photos)


def loaded(folder: Path, batches: int) -> float:
    """CPU seconds an image, without what starting and ending the loader takes."""

    def take(count: int) -> float:
        start = cpu_seconds()
        source = make_source(str(folder), "", TRAIN)
        loader = train_batches(
            source,
            TrainTransform(224),
            batch_size=64,
            seed=0,
            start=0,
            workers=1,
            strict=True,
            process_index=0,
            process_count=1,
        )
        with contextlib.closing(loader):
            for _, _ in zip(range(count), loader, strict=False):
                pass
        return cpu_seconds() - start

    return (take(batches + 4) - take(4)) / (64 * batches)


def main() -> None:
    """Measures and reports."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    flags.FLAGS(sys.argv[:1])  # grain's workers read them
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "images"
        write_images(arguments.images, folder)
        photos = [file.read_bytes() for file in sorted(folder.iterdir())]
        times = {"transform alone": [], "loader, one worker": []}
        for _ in range(arguments.repeats):
            times["transform alone"].append(alone(photos))
            times["loader, one worker"].append(loaded(folder, 16))
    rows = [
        {
            "what": what,
            "CPU ms an image": f"{1e3 * statistics.median(found):.2f}",
            "min..max": f"{1e3 * min(found):.2f}..{1e3 * max(found):.2f}",
            "images/s a core": f"{1 / statistics.median(found):.0f}",
        }
        for what, found in times.items()
    ]
    command = f"python -m benchmarks.input {' '.join(sys.argv[1:])}".strip()
    report("Decoding, 500 x 375 JPEGs", command, rows, "", ("pillow", "grain", "numpy"))


if __name__ == "__main__":
    main()
