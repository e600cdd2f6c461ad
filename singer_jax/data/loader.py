"""Data loading with grain; the content of a batch depends only on (seed, epoch, index).

Training reads `MapDataset.shuffle().repeat().random_map()`, which has random access: the data of
step s follow from s alone, for any number of workers, processes and devices.
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
"""`image` uint8 [batch, size, size, 3], `label` int32 [batch] (per pixel: [batch, size, size]), and
`unreadable` [batch]: the index of the unreadable record that was replaced, or -1."""

_MOST_REPLACEMENTS = 100
_START = 30  # seconds to wait for the worker processes
_MOST_EXAMPLES = 2**53  # of a run; grain computes with their number as a float


@dataclasses.dataclass(frozen=True)
class LoadExample:
    """Reads, decodes and transforms one record; runs in a loader worker.

    An unreadable image is replaced by another image of the source, drawn with the random numbers of
    the example. The replacement therefore depends on (seed, epoch, index) alone.

    Attributes:
      source: source of the records.
      transform: function from a Pillow image and a generator to uint8 pixels; with `takes_label`
        from image, label and generator to pixels and label.
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
            "and its replacements; list unreadable images with the job check_data"
        )

    def _load(self, index: int, rng: np.random.Generator) -> tuple[np.ndarray, Any]:
        record = self.source[index]
        image = open_image(record.image, self.source.exif)
        if getattr(self.transform, "takes_label", False):
            # Labels per pixel are cropped with the image.
            return self.transform(image, record.label, rng)
        number = record.label if isinstance(record.label, int) else -1
        return self.transform(image, rng), np.int32(number)


@dataclasses.dataclass(frozen=True)
class LoaderOptions:
    """How a process loads a batch; no option changes the content of the rows.

    Attributes:
      workers: number of decoding processes; 0: decode in a thread of this process.
      strict: raise at an unreadable image instead of replacing it.
      rows: rows of each batch that this process reads; None: all.
    """

    workers: int = 0
    strict: bool = False
    rows: np.ndarray | None = None


def worker_count(workers: int | None) -> int:
    """Returns the number of decoding processes; the default leaves one core to the main process."""
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
    options: LoaderOptions = LoaderOptions(),
) -> grain.DatasetIterator[ImageBatch]:
    """Yields this process's rows of the batches of steps `start`, `start` + 1, ... without end.

    Args:
      source: the training split.
      transform: transform such as `TrainTransform`.
      batch_size: global batch size.
      seed: seed of the order and the crops.
      start: index of the first step.
      options: how this process loads. Rows from `batch_size` on are padding, which `valid` marks.
    """
    examples = _order(source, seed).random_map(LoadExample(source, transform, options.strict))
    # Slice after random_map, because slices of its input would all draw the same random numbers.
    if options.rows is None:
        own = batch_size
        dataset = examples.batch(own)
    else:
        own = len(options.rows)
        dataset = _rows_of_batches(examples, batch_size, options.rows)
    of_batch = own * _example_bytes(transform)
    return _iterate(dataset.slice(slice(start, None)), options.workers, of_batch)


def _order(source: Source, seed: int) -> grain.MapDataset:
    """Returns the shuffled indices of the training split's records, epoch after epoch."""
    epochs = max(1, _MOST_EXAMPLES // max(1, len(source)))
    return grain.MapDataset.range(len(source)).seed(seed).shuffle().repeat(epochs)


def batch_records(source: Source, seed: int, batch_size: int, step: int) -> list[int]:
    """Returns the indices of the records in the global batch of step `step` (the first is 0)."""
    order = _order(source, seed)
    return [int(order[index]) for index in range(step * batch_size, (step + 1) * batch_size)]


def eval_batches(
    source: Source,
    transform: Callable[..., Any],
    *,
    batch_size: int,
    seed: int = 0,
    part: range | None = None,
    options: LoaderOptions = LoaderOptions(),
) -> grain.DatasetIterator[ImageBatch]:
    """Yields every record once in order; the last batch is padded, which `valid` [batch] marks.

    The arguments are those of `train_batches`. `seed` matters if the transform uses its generator.
    `part` are the indices of the records; None: all. An unreadable image is replaced by one of the
    whole source.
    """
    part = range(len(source)) if part is None else part
    examples = (
        grain.MapDataset.range(part.start, part.stop)
        .seed(seed)
        .random_map(LoadExample(source, transform, options.strict))
    )
    rows = np.arange(batch_size) if options.rows is None else options.rows
    dataset = _rows_of_batches(examples, batch_size, rows)
    return _iterate(dataset, options.workers, len(rows) * _example_bytes(transform))


def _example_bytes(transform: Callable[..., Any]) -> int:
    """Returns the approximate bytes of an example: three per pixel, and four per pixel label."""
    size = getattr(transform, "size", 224)
    return size**2 * (7 if getattr(transform, "takes_label", False) else 3) + 64


@dataclasses.dataclass(frozen=True)
class _Rows:
    """Selected rows of consecutive batches; the last example serves as padding."""

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
    if not flags.FLAGS.is_parsed():  # grain reads absl flags, which a library does not parse
        flags.FLAGS.mark_as_parsed()
    batches = iter(dataset.mp_prefetch(processes, worker_init_fn=_enter_worker))
    batches.get_state()  # creates the workers now, not in threads at the first batch
    with signals.shielded(), _main_module_hidden():
        before = set(multiprocessing.active_children())
        batches.start_prefetch()  # starts threads, which must not be interrupted
        _wait_for_started(workers, before)
    return batches


@contextlib.contextmanager
def _main_module_hidden() -> Iterator[None]:
    """Keeps workers that start inside from importing the program's main module again.

    Python's `spawn` would run a script without `if __name__ == "__main__":` again in each worker.
    Workers do not need the main module, because its objects are pickled by value.
    """
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _wait_for_started(workers: int, before: set[multiprocessing.process.BaseProcess]) -> None:
    started: set[multiprocessing.process.BaseProcess] = set()
    latest = time.monotonic() + _START  # a worker that cannot start raises at the first batch
    while len(started) < workers and time.monotonic() < latest:
        time.sleep(0.01)
        started.update(set(multiprocessing.active_children()) - before)


def _enter_worker(worker: int, workers: int) -> None:
    """Restricts a worker to the CPU, and ends it when its parent ends."""
    if "jax" in sys.modules:  # imported by grain; an accelerator backend would reserve memory
        sys.modules["jax"].config.update("jax_platforms", "cpu")

    def leave_with_parent() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=leave_with_parent, daemon=True).start()


class UnreadableCount:
    """Logs each unreadable image once, and stops a run that has too many.

    Args:
      source: source of the images.
      log: function that is called with a line for each image that this process could not read.
      most: largest allowed fraction of unreadable images among the images read.
      gather: function from this process's indices to those of all processes, whose result is read
        two batches later; None for a single process.
    """

    _LAG = 2  # batches; reading the gathered indices later avoids waiting for a device
    _FEWEST = 20  # images; with fewer, a fraction means little

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
        """Returns the number of distinct images that no process could read so far."""
        return len(self.found)

    def add(self, batch: ImageBatch, last: bool = False) -> None:
        """Counts a batch.

        Args:
          batch: batch of this process.
          last: whether the run ends with this batch; if so, the images of the other processes are
            counted at once.

        Raises:
          RunError: more than the fraction `most` of the images is unreadable, and at least 20 are.
        """
        indices = batch["unreadable"]
        for index in sorted(set(indices[indices >= 0].tolist()) - self.named):
            self.named.add(index)
            self.log(f"skipping unreadable image (replaced): {self.source.describe(index)}")
        self._pending.append(self.gather(indices) if self.gather else indices)
        while len(self._pending) > (self._LAG if self.gather and not last else 0):
            of_all = np.asarray(self._pending.pop(0))
            self.images += len(of_all)
            self.found.update(of_all[of_all >= 0].tolist())
        read = min(self.images, len(self.source))  # each image is read once per epoch
        if len(self.found) >= self._FEWEST and len(self.found) > self.most * read:
            allowed = f"data.max_unreadable={self.most:g}"
            raise RunError(
                f"{len(self.found)} of {read} images cannot be read, more than {allowed}; first: "
                f"{self.source.describe(min(self.found))}; list them with the job check_data"
            )
