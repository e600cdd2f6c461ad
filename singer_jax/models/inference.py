"""Passes of models over a source of images, in which each readable image counts exactly once."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from singer_jax.data.loader import LoaderOptions, eval_batches
from singer_jax.data.sources import Source
from singer_jax.platform import parallel

_PER_DEVICE = 8  # images, unless the caller computes how many fit

DeviceBatch = dict[str, jax.Array]
"""`image`, `label` and `valid` [batch] of a batch, split over the devices of a mesh."""


def leave_out(indices: np.ndarray) -> None:
    """Leaves unreadable images out of a pass without a message."""


@dataclasses.dataclass(frozen=True)
class ImagePass:
    """One pass over all images of a source, in their order.

    Attributes:
      source: images.
      transform: transform from an image to the model's input.
      workers: number of decoding processes.
      seed: seed of a random transform.
      unreadable: called with the indices of unreadable images that this process met, which are left
        out; None: the first unreadable image raises.
      before_batch: called before each batch; an exception that it raises ends the pass.
    """

    source: Source
    transform: Callable[..., Any]
    workers: int = 0
    seed: int = 0
    unreadable: Callable[[np.ndarray], None] | None = None
    before_batch: Callable[[], None] = lambda: None

    def batches(self, mesh: Mesh, batch_size: int | None = None) -> Iterator[DeviceBatch]:
        """Yields the batches on the devices; `valid` is False for padding and unreadable images.

        Args:
          mesh: devices over which a batch is split.
          batch_size: number of rows of a batch, a multiple of the number of devices; None: a few
            for each device.

        Raises:
          RunError: an image cannot be read, and `unreadable` is None.
          Exception: any exception of `before_batch`.
        """
        sharding, batch_size = parallel.batch_sharding(mesh), batch_size or _PER_DEVICE * mesh.size
        rows = parallel.local_rows(sharding, batch_size)
        batches = eval_batches(
            self.source,
            self.transform,
            batch_size=batch_size,
            seed=self.seed,
            options=LoaderOptions(self.workers, self.unreadable is None, rows),
        )
        with contextlib.closing(batches):
            for batch in batches:
                self.before_batch()
                given = {key: batch[key] for key in ("image", "label", "valid")}
                replaced = batch["unreadable"] >= 0  # the row holds another image of the source
                if replaced.any():
                    self.unreadable(batch["unreadable"][batch["valid"] & replaced])
                    given["valid"] = batch["valid"] & ~replaced
                yield parallel.put_rows(given, sharding, batch_size)

    def map(
        self, compute: Callable[[DeviceBatch], Any], mesh: Mesh, batch_size: int | None = None
    ) -> Iterator[tuple[Any, np.ndarray]]:
        """Yields what a function computes of each batch, with the labels, without invalid rows.

        A batch is computed while the results of the previous one are copied to the host.

        Args:
          compute: function from a batch to a tree of arrays with a row for each image; its jitted
            functions return arrays with `parallel.gathered(mesh)`.
          mesh, batch_size: as for `batches`, which also states the exceptions.
        """
        pending = None
        for batch in self.batches(mesh, batch_size):
            given = batch["label"], batch["valid"]
            computed = compute(batch), *(_gather(mesh, given) if _several() else given)
            if pending is not None:
                yield _valid_rows(*pending)
            pending = computed
        if pending is not None:
            yield _valid_rows(*pending)

    def compute(
        self, function: Callable[[DeviceBatch], Any], mesh: Mesh, batch_size: int | None = None
    ) -> Any:
        """Returns the results of `map` for all images as one tree, without the labels."""
        parts = [rows for rows, _ in self.map(function, mesh, batch_size)]
        return jax.tree.map(lambda *xs: np.concatenate(xs), *parts)


def _several() -> bool:
    return jax.process_count() > 1


@functools.partial(jax.jit, static_argnums=0)
def _gather(mesh: Mesh, arrays: Any) -> Any:
    return jax.lax.with_sharding_constraint(arrays, parallel.gathered(mesh))


def _valid_rows(found: Any, labels: jax.Array, valid: jax.Array) -> tuple[Any, np.ndarray]:
    chosen = np.asarray(valid)
    return jax.tree.map(lambda x: np.asarray(x)[chosen], (found, labels))
