"""The training batches of a run on its devices."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from singer_jax.data.images import TrainTransform
from singer_jax.data.loader import LoaderOptions, UnreadableCount, train_batches, worker_count
from singer_jax.data.sources import Source
from singer_jax.platform import parallel
from singer_jax.runs.metrics import LOG
from singer_jax.training.settings import DistillSettings
from singer_jax.training.setup import RunSetup


def device_batches(
    settings: DistillSettings, run: RunSetup, source: Source, start: int
) -> Iterator[tuple[Any, int]]:
    """Yields the batches of the steps after `start`, split over the devices.

    Args:
      settings: The settings of the run.
      run: The students, for the mesh and the size of the crops.
      source: The training images.
      start: Number of steps that are done.

    Yields:
      A batch as the training step takes it, and the number of unreadable images up to it.

    Raises:
      RunError: Too many images are unreadable, or one is and `data.fail_on_unreadable` is set.
    """
    data, mesh, size = settings.data, run.any.mesh, settings.batch_size
    sharding = parallel.batch_sharding(mesh)
    gather = parallel.gather_of_processes(mesh)
    unreadable = UnreadableCount(source, LOG.warning, data.max_unreadable, gather)
    batches = train_batches(
        source,
        TrainTransform(
            run.image_size, data.crop_area, data.crop_ratio, data.flip, data.decode == "fast"
        ),
        batch_size=size,
        seed=settings.seed,
        start=start,
        options=LoaderOptions(
            worker_count(data.workers),
            data.fail_on_unreadable,
            # Row i of the batch is image i of the step, on any number of processes.
            parallel.local_rows(sharding, size),
        ),
    )
    with contextlib.closing(batches):
        for step, batch in enumerate(batches, start + 1):
            unreadable.add(batch, last=step == run.any.steps)
            examples = {key: batch[key] for key in ("image", "label")}
            yield parallel.put_rows(examples, sharding, size), unreadable.unreadable
