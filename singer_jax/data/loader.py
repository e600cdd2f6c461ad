"""Batches through grain: what is in a batch depends only on (seed, epoch, index).

Training draws from `MapDataset.shuffle().repeat().random_map()`, which is random access: the data
of step s are found from s alone, on any number of workers, processes and devices.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import grain
import numpy as np

from singer_jax.data.images import UNREADABLE, open_image
from singer_jax.data.sources import Source
from singer_jax.errors import InputError, RunError

ImageBatch = dict[str, np.ndarray]
"""`image` uint8 [batch, size, size, 3], `label` int32 [batch] (or [batch, size, size] where each
pixel has one), and of the same length `unreadable`: the index of the record that could not be read
and was replaced, or -1."""

_MOST_REPLACEMENTS = 100


@dataclasses.dataclass(frozen=True)
class LoadExample:
    """Reads, decodes and transforms one record; runs in a loader's worker.

    An unreadable image is replaced by the next readable one in the order of the source, with the
    crop that it would have had.

    Attributes:
      source: of the records.
      transform: from a Pillow image and a generator to uint8 pixels; with `takes_label` from
        image, label and generator to pixels and label.
      strict: raise instead of replacing.
    """

    source: Source
    transform: Callable[..., Any]
    strict: bool = False

    def __call__(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
        unreadable = -1
        for offset in range(min(_MOST_REPLACEMENTS, len(self.source))):
            candidate = (int(index) + offset) % len(self.source)
            record = self.source[candidate]
            try:
                image = open_image(record.image, self.source.exif)
                if getattr(self.transform, "takes_label", False):
                    # A label for each pixel, which is cropped with the image.
                    pixels, label = self.transform(image, record.label, rng)
                else:
                    number = record.label if isinstance(record.label, int) else -1
                    pixels, label = self.transform(image, rng), np.int32(number)
            except InputError as error:
                raise InputError(f"{self.source.describe(candidate)}: {error}") from error
            except UNREADABLE as error:
                if self.strict:
                    raise RunError(
                        f"cannot read {self.source.describe(candidate)}: {error}"
                    ) from error
                unreadable = int(index)
                continue
            return {
                "image": pixels,
                "label": label,
                "unreadable": np.int32(unreadable),
            }
        raise RunError(
            f"{_MOST_REPLACEMENTS} images in a row cannot be read, from "
            f"{self.source.describe(int(index))} on"
        )


def worker_count(workers: int | None) -> int:
    """Decoding processes: as asked, or one a core but for the one that feeds the device."""
    if workers is not None:
        return workers
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(16, cores - 1)


def train_batches(
    source: Source,
    transform: Callable[..., Any],
    *,
    batch_size: int,
    seed: int,
    start: int = 0,
    workers: int = 0,
    strict: bool = False,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.DatasetIterator[ImageBatch]:
    """This process's part of the batches of step `start`, `start` + 1, ... without end.

    Args:
      source: the training split.
      transform: as `TrainTransform`.
      batch_size: global; a multiple of `process_count`.
      seed: of order and crops.
      start: the first step.
      workers: processes that decode; 0 decodes in threads of this process.
      strict: an unreadable image raises instead of being replaced.
      process_index, process_count: which part of each batch.
    """
    dataset = (
        grain.MapDataset.range(len(source))
        .seed(seed)
        .shuffle()
        .repeat()
        .random_map(LoadExample(source, transform, strict))
        # After random_map: shards of its input would all draw the same random numbers.
        .slice(slice(process_index, None, process_count))
        .batch(batch_size // process_count)
        .slice(slice(start, None))
    )
    return _iterate(dataset, workers)


def eval_batches(
    source: Source,
    transform: Callable[..., Any],
    *,
    batch_size: int,
    workers: int = 0,
    strict: bool = False,
    seed: int = 0,
) -> grain.DatasetIterator[ImageBatch]:
    """Every record once in order; the last batch is padded, and `valid` [batch] says where.

    Args as `train_batches`; `seed` matters where the transform draws from its generator.
    """
    dataset = (
        grain.MapDataset.range(len(source))
        .seed(seed)
        .random_map(LoadExample(source, transform, strict))
        .batch(batch_size, batch_fn=lambda examples: _pad(examples, batch_size))
    )
    return _iterate(dataset, workers)


def _pad(examples: list[dict[str, Any]], batch_size: int) -> ImageBatch:
    padding = [examples[-1]] * (batch_size - len(examples))
    batch = {key: np.stack([e[key] for e in [*examples, *padding]]) for key in examples[0]}
    return batch | {"valid": np.arange(batch_size) < len(examples)}


def _iterate(dataset: grain.MapDataset, workers: int) -> grain.DatasetIterator[ImageBatch]:
    options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
    if workers == 0:
        return iter(dataset.to_iter_dataset(options))
    dataset = dataset.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2))
    processes = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2)
    return iter(dataset.mp_prefetch(processes, worker_init_fn=_enter_worker))


def _enter_worker(worker: int, workers: int) -> None:
    """Keeps a worker off the accelerator, and ends it when its parent was killed."""
    if "jax" in sys.modules:  # grain imports it; a backend would take a part of the accelerator
        sys.modules["jax"].config.update("jax_platforms", "cpu")
    parent = os.getppid()

    def leave_with_parent() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=leave_with_parent, daemon=True).start()


class UnreadableCount:
    """Counts replaced images, names each once, and stops a run that has too many.

    Args:
      source: for their names.
      log: called with a line for each.
    """

    def __init__(self, source: Source, log: Callable[[str], None]) -> None:
        self.source, self.log = source, log
        self.images = self.unreadable = 0
        self.named: set[int] = set()

    def add(self, batch: ImageBatch) -> None:
        """Counts a batch.

        Raises:
          RunError: more than 1 % of at least 1,000 images.
        """
        indices = batch["unreadable"]
        self.images += len(indices)
        for index in indices[indices >= 0].tolist():
            self.unreadable += 1
            if index not in self.named:
                self.named.add(index)
                self.log(f"unreadable image, replaced: {self.source.describe(index)}")
        if self.images >= 1000 and self.unreadable > 0.01 * self.images:
            raise RunError(
                f"{self.unreadable} of {self.images} images cannot be read (more than 1 %), the "
                f"last one {self.source.describe(max(self.named))}; check the data"
            )
