"""Batches through grain: what is in a batch depends only on (seed, epoch, index).

Training draws from `MapDataset.shuffle().repeat().random_map()`, which is random access: the data
of step s are found from s alone, on any number of workers, processes and devices.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import grain
import numpy as np

from singer_jax.data import machine
from singer_jax.data.images import UnreadableImage, open_image
from singer_jax.data.sources import Source
from singer_jax.errors import InputError, RunError
from singer_jax.platform import signals

ImageBatch = dict[str, np.ndarray]
"""`image` uint8 [batch, size, size, 3], `label` int32 [batch] (or [batch, size, size] where each
pixel has one), and of the same length `unreadable`: the index of the record that could not be read
and was replaced, or -1."""

_MOST_REPLACEMENTS = 100
_START = 30  # seconds until a worker's process exists at the latest


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
            try:
                record = self.source[candidate]
                image = open_image(record.image, self.source.exif)
                if getattr(self.transform, "takes_label", False):
                    # A label for each pixel, which is cropped with the image.
                    pixels, label = self.transform(image, record.label, rng)
                else:
                    number = record.label if isinstance(record.label, int) else -1
                    pixels, label = self.transform(image, rng), np.int32(number)
            except InputError as error:
                raise InputError(f"{self.source.describe(candidate)}: {error}") from error
            except UnreadableImage as error:
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
    return min(16, machine.processors() - 1)


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
    rows: np.ndarray | None = None,
) -> grain.DatasetIterator[ImageBatch]:
    """This process's part of the batches of step `start`, `start` + 1, ... without end.

    Args:
      source: the training split.
      transform: as `TrainTransform`.
      batch_size: global; a multiple of `process_count`.
      seed: of order and crops.
      start: the first step.
      workers: processes that decode; 0 decodes in a thread of this one.
      strict: an unreadable image raises instead of being replaced.
      process_index, process_count: which part of each batch.
      rows: instead of these, which rows of each batch, for batches of any size: rows from
        `batch_size` on are padding, and `valid` says so.
    """
    examples = _order(source, seed).random_map(LoadExample(source, transform, strict))
    # After random_map: shards of its input would all draw the same random numbers.
    if rows is None:
        shard = examples.slice(slice(process_index, None, process_count))
        own = batch_size // process_count
        dataset = shard.batch(own)
    else:
        own = len(rows)
        dataset = _rows_of_batches(examples, batch_size, rows)
    return _iterate(dataset.slice(slice(start, None)), workers, own * _example_bytes(transform))


def _order(source: Source, seed: int) -> grain.MapDataset:
    """Indices of the training split's records, epoch after epoch."""
    return grain.MapDataset.range(len(source)).seed(seed).shuffle().repeat()


def batch_records(source: Source, seed: int, batch_size: int, step: int) -> list[int]:
    """Which records are in the global batch of the step `step` (the first is 0)."""
    order = _order(source, seed)
    return [int(order[index]) for index in range(step * batch_size, (step + 1) * batch_size)]


def eval_batches(
    source: Source,
    transform: Callable[..., Any],
    *,
    batch_size: int,
    workers: int = 0,
    strict: bool = False,
    seed: int = 0,
    rows: np.ndarray | None = None,
) -> grain.DatasetIterator[ImageBatch]:
    """Every record once in order; the last batch is padded, and `valid` [batch] says where.

    Args as `train_batches`; `seed` matters where the transform draws from its generator. `rows`
    are those of each batch that this process reads; None: all.
    """
    examples = (
        grain.MapDataset.range(len(source))
        .seed(seed)
        .random_map(LoadExample(source, transform, strict))
    )
    rows = np.arange(batch_size) if rows is None else rows
    dataset = _rows_of_batches(examples, batch_size, rows)
    return _iterate(dataset, workers, len(rows) * _example_bytes(transform))


def _example_bytes(transform: Callable[..., Any]) -> int:
    """Returns about how many bytes an example has: three of a pixel, four of its label."""
    size = getattr(transform, "size", 224)
    return size**2 * (7 if getattr(transform, "takes_label", False) else 3) + 64


@dataclasses.dataclass(frozen=True)
class _Rows:
    """Some rows of consecutive batches, one after the other; the last example is the padding."""

    examples: grain.MapDataset
    batch_size: int
    rows: np.ndarray

    def __len__(self) -> int:
        batches = -(-len(self.examples) // self.batch_size)
        return min(batches * len(self.rows), sys.maxsize)

    def __getitem__(self, index: int) -> dict[str, Any]:
        batch, number = divmod(int(index), len(self.rows))
        first, row = batch * self.batch_size, int(self.rows[number])
        last = min(first + self.batch_size, len(self.examples)) - 1
        example = self.examples[min(first + row, last)]
        return example | {"valid": np.bool_(first + row <= last)}


def _rows_of_batches(
    examples: grain.MapDataset, batch_size: int, rows: np.ndarray
) -> grain.MapDataset:
    return grain.MapDataset.source(_Rows(examples, batch_size, rows)).batch(len(rows))


def _iterate(
    dataset: grain.MapDataset, workers: int, batch_bytes: int
) -> grain.DatasetIterator[ImageBatch]:
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)
    workers, shared = machine.sharing(workers, batch_bytes)
    if workers == 0:
        return iter(dataset.to_iter_dataset(options))
    dataset = dataset.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2))
    if not shared:
        through_pipes = grain.experimental.DatasetOptions(min_shm_size=sys.maxsize)
        dataset = grain.experimental.WithOptionsIterDataset(dataset, through_pipes)
    processes = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2)
    batches = iter(dataset.mp_prefetch(processes, worker_init_fn=_enter_worker))
    batches.get_state()  # makes the workers here, and not in threads of its own at the first batch
    with signals.shielded():
        before = set(multiprocessing.active_children())
        batches.start_prefetch()  # in threads, which a process that leaves must not break off
        _wait_for_started(workers, before)
    return batches


def _wait_for_started(workers: int, before: set[multiprocessing.process.BaseProcess]) -> None:
    started: set[multiprocessing.process.BaseProcess] = set()
    latest = time.monotonic() + _START  # one that cannot start says so with the first batch
    while len(started) < workers and time.monotonic() < latest:
        time.sleep(0.01)
        started.update(set(multiprocessing.active_children()) - before)


def _enter_worker(worker: int, workers: int) -> None:
    """Keeps a worker off the accelerator, and ends it with its parent."""
    if "jax" in sys.modules:  # grain imports it; a backend would take a part of the accelerator
        sys.modules["jax"].config.update("jax_platforms", "cpu")

    def leave_with_parent() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=leave_with_parent, daemon=True).start()


class UnreadableCount:
    """Counts replaced images, names each once, and stops a run that has too many.

    Args:
      source: for their names.
      log: called with a line for each.
      total: of several processes: from this one's number of replaced images to the number of all,
        which is read two batches later; else None.
      processes: how many there are.
    """

    _LAG = 2  # batches, so that reading the number of all never waits for a device

    def __init__(
        self,
        source: Source,
        log: Callable[[str], None],
        total: Callable[[int], Any] | None = None,
        processes: int = 1,
    ) -> None:
        self.source, self.log, self.total, self.processes = source, log, total, processes
        self.images = self._read = 0
        self._pending: list[Any] = []
        self.named: set[int] = set()

    @property
    def unreadable(self) -> Any:
        """Of all batches so far; of several processes perhaps an array that is still computed."""
        return sum(self._pending, start=self._read)

    def add(self, batch: ImageBatch) -> None:
        """Counts a batch.

        Raises:
          RunError: more than 1 % of at least 1,000 images.
        """
        indices = batch["unreadable"]
        replaced = indices[indices >= 0].tolist()
        for index in sorted(set(replaced) - self.named):
            self.named.add(index)
            self.log(f"unreadable image, replaced: {self.source.describe(index)}")
        self.images += len(indices) * self.processes
        self._pending.append(self.total(len(replaced)) if self.total else len(replaced))
        while len(self._pending) > (self._LAG if self.total else 0):
            self._read += int(self._pending.pop(0))
        if self.images >= 1000 and self._read > 0.01 * self.images:
            last = f", the last one {self.source.describe(max(self.named))}" if self.named else ""
            raise RunError(
                f"{self._read} of {self.images} images cannot be read (more than 1 %){last}; "
                "check the data"
            )
