"""Measures how many images one core decodes, crops and flips, alone and in a loader.

  pip install ".[bench]" && pip install --no-deps timm torchvision==0.28.0
  python -m benchmarks.input

The images are JPEGs of 500 x 375 pixels, ImageNet's usual size, and the crops have 224. This
project's transform (fast and exact) is compared with torchvision's RandomResizedCrop and
RandomHorizontalFlip of Pillow images. They take turns. `transform alone` counts the CPU time of one
process, `loader` that of the whole process tree with batches of 64 and one worker of grain or
PyTorch. The error is the difference of the fast crop from the exact one in grey levels.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from PIL import Image

from benchmarks.make_inputs import write_images
from benchmarks.results import report
from benchmarks.step import import_timm
from singer_jax.data.images import TrainTransform, open_image
from singer_jax.data.loader import LoaderOptions, train_batches
from singer_jax.data.registry import make_source
from singer_jax.data.sources import TRAIN, Subset

# The number of images of ImageNet-1k, because the time to draw an order depends on it.
_EPOCH = 1_281_167

FAST, EXACT, THEIRS = "ours, fast", "ours, exact", "torchvision"


def cpu_seconds() -> float:
    """Returns the CPU seconds of this process and its finished children."""
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(one.ru_utime + one.ru_stime for one in used)


def torchvision_transforms() -> Any:
    """Returns torchvision's transform from a Pillow image to uint8 [3, 224, 224]."""
    import_timm()  # which makes torchvision importable on a machine without a GPU
    from torchvision import transforms

    crop, flip = transforms.RandomResizedCrop(224), transforms.RandomHorizontalFlip()
    return transforms.Compose([crop, flip, transforms.PILToTensor()])


class Torchvision:
    """A PyTorch data set of a folder; images are read, decoded and cropped on access."""

    def __init__(self, files: list[Path]) -> None:
        self.files, self.transform = files, torchvision_transforms()

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Any:
        return self.transform(Image.open(self.files[index]).convert("RGB")), 0


def per_image(one: Callable[[bytes], Any], photos: list[bytes]) -> float:
    """Returns the CPU seconds of a call."""
    start = time.process_time()
    for stored in photos:
        one(stored)
    return (time.process_time() - start) / len(photos)


def alone(photos: list[bytes]) -> dict[str, Callable[[], float]]:
    """Returns the CPU seconds per image of each pipeline."""
    theirs = torchvision_transforms()

    def of_theirs(stored: bytes) -> Any:
        return theirs(Image.open(io.BytesIO(stored)).convert("RGB"))

    def ours(fast: bool) -> Callable[[bytes], Any]:
        transform, rng = TrainTransform(224, fast=fast), np.random.default_rng(0)
        return lambda stored: transform(open_image(stored), rng)

    each = {FAST: ours(True), EXACT: ours(False), THEIRS: of_theirs}
    return {name: functools.partial(per_image, one, photos) for name, one in each.items()}


def their_batches(folder: Path, count: int) -> None:
    """Reads batches from PyTorch's loader."""
    from torch.utils.data import DataLoader

    files = sorted(folder.iterdir())
    files *= -(-_EPOCH // len(files))
    loader = iter(DataLoader(Torchvision(files), 64, shuffle=True, num_workers=1))
    for _ in range(count):
        next(loader)
    del loader


def difference(photos: list[bytes]) -> tuple[float, float]:
    """Returns the mean and 99th percentile of the fast crop's error, in grey levels of 255."""
    errors = []
    for seed, stored in enumerate(photos):
        fast, exact = (
            TrainTransform(224, fast=kind)(open_image(stored), np.random.default_rng(seed))
            for kind in (True, False)
        )
        errors.append(np.abs(fast.astype(int) - exact))
    return float(np.mean(errors)), float(np.percentile(errors, 99))


def loaded(folder: Path, batches: int, which: str) -> float:
    """Returns the CPU seconds per image, without the start and end of the loader."""

    def take(count: int) -> float:
        start = cpu_seconds()
        if which == THEIRS:
            their_batches(folder, count)
            return cpu_seconds() - start
        source = make_source(str(folder), "", TRAIN)
        source = Subset(source, np.arange(_EPOCH) % len(source))
        loader = train_batches(
            source,
            TrainTransform(224, fast=which == FAST),
            batch_size=64,
            seed=0,
            options=LoaderOptions(workers=1, strict=True),
        )
        with contextlib.closing(loader):
            for _, _ in zip(range(count), loader, strict=False):
                pass
        return cpu_seconds() - start

    return (take(batches + 4) - take(4)) / (64 * batches)


def main() -> None:
    """Measures all pipelines and reports the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    flags.FLAGS(sys.argv[:1])  # grain's workers read them
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "images"
        write_images(arguments.images, folder)
        photos = [file.read_bytes() for file in sorted(folder.iterdir())]
        mean, largest = difference(photos)
        ways = {("transform alone", name): one for name, one in alone(photos).items()}
        for name in (FAST, EXACT, THEIRS):
            loading = functools.partial(loaded, folder, 16, name)
            ways["loader, one worker", name] = loading
        times: dict[tuple[str, str], list[float]] = {way: [] for way in ways}
        for _ in range(arguments.repeats):
            for way, measure in ways.items():
                times[way].append(measure())
    medians = {way: statistics.median(found) for way, found in times.items()}
    rows = [
        {
            "what": what,
            "pipeline": name,
            "CPU ms an image": f"{1e3 * medians[what, name]:.2f}",
            "min..max": f"{1e3 * min(found):.2f}..{1e3 * max(found):.2f}",
            "images/s a core": f"{1 / medians[what, name]:.0f}",
            "than torchvision": f"{medians[what, THEIRS] / medians[what, name]:.2f} x",
            "error": f"{mean:.2f}, 99th percentile {largest:.0f}" if name == FAST else "",
        }
        for (what, name), found in times.items()
    ]
    command = f"python -m benchmarks.input {' '.join(sys.argv[1:])}".strip()
    libraries = ("pillow", "simplejpeg", "opencv-python-headless", "grain", "torch", "torchvision")
    report("Decoding, 500 x 375 JPEGs", command, rows, "", libraries)


if __name__ == "__main__":
    main()
