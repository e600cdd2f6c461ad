"""Validation losses: the losses of the methods on held-out images."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from singer_jax.data.images import EvalTransform
from singer_jax.data.loader import LoaderOptions, eval_batches
from singer_jax.data.sources import Source
from singer_jax.models.params import Params
from singer_jax.platform import parallel
from singer_jax.training.setup import RunSetup
from singer_jax.training.step import Metrics, TrainState


class ValidationLosses:
    """Losses of students on a test split, with the same images and random numbers every time.

    An unreadable image is replaced by another one of the split, so that the batches stay complete
    and the losses comparable.

    Args:
      run: RunSetup of the students.
      test: The held-out images.
      batch_size: Largest batch size; that of a step, so that a step's memory suffices.
      workers: Number of workers of the loader.
      replaced: Called with the indices of the images that could not be read.
    """

    def __init__(
        self,
        run: RunSetup,
        test: Source,
        batch_size: int,
        workers: int = 0,
        replaced: Callable[[np.ndarray], None] = lambda indices: None,
    ) -> None:
        devices, students = run.any.mesh.size, run.students
        self.run, self.test, self.workers, self.replaced = run, test, workers, replaced
        self.batch_size = max(min(batch_size, len(test)) // devices, 1) * devices

        @jax.jit
        def losses(
            states: Mapping[str, TrainState], teacher: Params | None, batch: Any, key: jax.Array
        ) -> dict[str, Metrics]:
            features, found = students.teach(teacher, batch), {}
            for name, own in students.each.items():
                parts = states[name].params, states[name].constants
                total, terms = own.loss(*parts, teacher, features, batch, key)
                found[name] = terms | {"loss": total}
            return found

        self.losses = losses

    def __call__(
        self, states: Mapping[str, TrainState], teacher: Params | None
    ) -> dict[str, dict[str, float]]:
        """Returns `loss` and `loss_<term>` of each student, averaged over the images."""
        found: list[dict[str, dict[str, float]]] = []
        weights = []
        for number, batch in enumerate(self._batches()):
            key = jax.random.key(number)  # the same masks at every evaluation
            found.append(jax.device_get(self.losses(states, teacher, batch, key)))
            weights.append(len(batch["image"]))
        return jax.tree.map(lambda *values: float(np.average(values, weights=weights)), *found)

    def _batches(self) -> Iterator[dict[str, jax.Array]]:
        """Yields all images: full batches, a smaller one, and a rest smaller than the devices."""
        mesh, images = self.run.any.mesh, len(self.test)
        whole = images // self.batch_size * self.batch_size
        rest = images % mesh.size
        split, everywhere = parallel.batch_sharding(mesh), parallel.replicated(mesh)
        parts = (
            (0, whole, self.batch_size, split),
            (whole, images - rest, images - rest - whole, split),
            (images - rest, images, rest, everywhere),
        )
        for start, stop, batch_size, sharding in parts:
            if start == stop:
                continue
            batches = eval_batches(
                self.test,
                EvalTransform(self.run.image_size),
                batch_size=batch_size,
                part=range(start, stop),
                options=LoaderOptions(self.workers, rows=parallel.local_rows(sharding, batch_size)),
            )
            with contextlib.closing(batches):
                for batch in batches:
                    self.replaced(batch["unreadable"][batch["unreadable"] >= 0])
                    given = {key: batch[key] for key in ("image", "label")}
                    yield parallel.put_rows(given, sharding, batch_size)
