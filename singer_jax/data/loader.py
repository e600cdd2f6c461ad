"""Batches through grain: what is in a batch depends only on (seed, epoch, index).

Training draws from `MapDataset.shuffle().repeat().random_map()`, which is random access: the data
of step s are found from s alone, on any number of workers, processes and devices.
"""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import os
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from typing import Any

import grain
import numpy as np
from absl import flags

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
_MOST_EXAMPLES = 2**53  # of a run; grain divides their number as a float


@dataclasses.dataclass(frozen=True)
class LoadExample:
    """Reads, decodes and transforms one record; runs in a loader's worker.

    An unreadable image is replaced by another of the source, drawn from the example's own random
    numbers: the replacement depends on (seed, epoch, index) alone.

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
        index = candidate = int(index)
        unreadable = -1
        for _ in range(_MOST_REPLACEMENTS):
            try:
                pixels, label = self._load(candidate, rng)
            except InputError as error:
                raise InputError(f"{self.source.describe(candidate)}: {error}") from error
            except UnreadableImage as error:
                if self.strict:
                    raise RunError(
                        f"cannot read {self.source.describe(candidate)}: {error}"
                    ) from error
                unreadable = index
                candidate = int(rng.integers(len(self.source)))
                continue
            return {"image": pixels, "label": label, "unreadable": np.int32(unreadable)}
        raise RunError(
            f"{_MOST_REPLACEMENTS} images in a row cannot be read: {self.source.describe(index)} "
            "and those drawn in its place; list them with the job check_data"
        )

    def _load(self, index: int, rng: np.random.Generator) -> tuple[np.ndarray, Any]:
        record = self.source[index]
        image = open_image(record.image, self.source.exif)
        if getattr(self.transform, "takes_label", False):
            # A label for each pixel, which is cropped with the image.
            return self.transform(image, record.label, rng)
        number = record.label if isinstance(record.label, int) else -1
        return self.transform(image, rng), np.int32(number)


def worker_count(workers: int | None) -> int:
    """Decoding processes: as asked, or one a core but for the one that feeds the device."""
    if workers is not None:
        return workers
    return machine.processors() - 1


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
    epochs = max(1, _MOST_EXAMPLES // max(1, len(source)))
    return grain.MapDataset.range(len(source)).seed(seed).shuffle().repeat(epochs)


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
    part: range | None = None,
    rows: np.ndarray | None = None,
) -> grain.DatasetIterator[ImageBatch]:
    """Every record once in order; the last batch is padded, and `valid` [batch] says where.

    Args as `train_batches`; `seed` matters where the transform draws from its generator. `part`
    says which records; what replaces one that cannot be read is drawn from the whole source.
    `rows` are those of each batch that this process reads; None: all.
    """
    part = range(len(source)) if part is None else part
    examples = (
        grain.MapDataset.range(part.start, part.stop)
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


def map_batches(
    source: Source, function: Callable[[int], np.ndarray], batch_size: int, workers: int = 0
) -> grain.DatasetIterator[np.ndarray]:
    """Applies a function that returns a few bytes to each index of a source, in order.

    The last batch may be smaller.
    """
    dataset = grain.MapDataset.range(len(source)).map(function).batch(batch_size)
    return _iterate(dataset, workers, 0)


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
    if not flags.FLAGS.is_parsed():  # grain reads flags of its own; a library has none
        flags.FLAGS.mark_as_parsed()
    batches = iter(dataset.mp_prefetch(processes, worker_init_fn=_enter_worker))
    batches.get_state()  # makes the workers here, and not in threads of its own at the first batch
    with signals.shielded(), _main_module_hidden():
        before = set(multiprocessing.active_children())
        batches.start_prefetch()  # in threads, which a process that leaves must not break off
        _wait_for_started(workers, before)
    return batches


@contextlib.contextmanager
def _main_module_hidden() -> Iterator[None]:
    """Keeps workers that start inside from importing the program's main module again.

    Python's `spawn` would run a script that has no `if __name__ == "__main__":` once more in each
    worker. Workers need nothing of it: what they get of a main module is pickled by value.
    """
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


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
    """Names each unreadable image once, and stops a run that has too many.

    Args:
      source: of the images.
      log: called with a line for each image that this process could not read.
      most: largest share of the images read that may be unreadable.
      gather: of several processes: from the indices of this one's images to those of all, which are
        read two batches later; else None.
    """

    _LAG = 2  # batches, so that reading what others found never waits for a device
    _FEWEST = 20  # images; fewer say little of a share

    def __init__(
        self,
        source: Source,
        log: Callable[[str], None],
        most: float = 0.01,
        gather: Callable[[np.ndarray], Any] | None = None,
    ) -> None:
        self.source, self.log, self.most, self.gather = source, log, most, gather
        self.images = 0
        self.named: set[int] = set()
        self.found: set[int] = set()
        self._pending: list[Any] = []

    @property
    def unreadable(self) -> int:
        """Number of different images that could not be read so far, in any process."""
        return len(self.found)

    def add(self, batch: ImageBatch) -> None:
        """Counts a batch.

        Raises:
          RunError: more than the share `most` of the images read, and at least 20.
        """
        indices = batch["unreadable"]
        for index in sorted(set(indices[indices >= 0].tolist()) - self.named):
            self.named.add(index)
            self.log(f"unreadable image, replaced: {self.source.describe(index)}")
        self._pending.append(self.gather(indices) if self.gather else indices)
        while len(self._pending) > (self._LAG if self.gather else 0):
            of_all = np.asarray(self._pending.pop(0))
            self.images += len(of_all)
            self.found.update(of_all[of_all >= 0].tolist())
        read = min(self.images, len(self.source))  # each image once an epoch
        if len(self.found) >= self._FEWEST and len(self.found) > self.most * read:
            allowed = f"data.max_unreadable={self.most:g}"
            raise RunError(
                f"{len(self.found)} of {read} images cannot be read, more than {allowed}, such as "
                f"{self.source.describe(min(self.found))}; list them with the job check_data"
            )
