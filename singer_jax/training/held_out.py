"""The method's losses on images that are not trained on."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from singer_jax import parallel
from singer_jax.data.images import EvalTransform
from singer_jax.data.loader import eval_batches
from singer_jax.data.sources import Source
from singer_jax.errors import InputError
from singer_jax.models.params import Params
from singer_jax.training.setup import Setup
from singer_jax.training.step import TrainState


class HeldOut:
    """Losses of a state on a test split, the same images and random numbers every time.

    In the place of an image that cannot be read the next readable one is taken, so that the batches
    stay whole and the losses comparable.

    Args:
      run: the setup.
      test: the images.
      batch_size: at most; a step's, so that no more memory is needed than a step takes.
      workers: of the loader.
      replaced: called with the indices of the images that could not be read.

    Raises:
      InputError: fewer images than devices.
    """

    def __init__(
        self,
        run: Setup,
        test: Source,
        batch_size: int,
        workers: int = 0,
        replaced: Callable[[np.ndarray], None] = lambda indices: None,
    ) -> None:
        devices = run.mesh.size
        self.run, self.test, self.workers, self.replaced = run, test, workers, replaced
        self.batch_size = min(batch_size, len(test) // devices * devices)
        if not self.batch_size:
            raise InputError(f"evals: the test split has fewer images than {devices} devices")

        @jax.jit
        def loss(state: TrainState, teacher: Params | None, batch: Any, key: jax.Array) -> Any:
            features = run.distillation.teach(teacher, batch)
            return run.distillation.loss(
                state.params, state.constants, teacher, features, batch, key
            )

        self.loss = loss

    def __call__(self, state: TrainState, teacher: Params | None) -> dict[str, float]:
        """`loss` and `loss_<term>`, averaged over the images."""
        found: list[dict[str, float]] = []
        sharding = parallel.batch_sharding(self.run.mesh)
        batches = eval_batches(
            self.test,
            EvalTransform(self.run.image_size),
            batch_size=self.batch_size,
            workers=self.workers,
            rows=parallel.local_rows(sharding, self.batch_size),
        )
        with contextlib.closing(batches):
            # Whole batches only, so that their mean is that of their images.
            for number in range(len(self.test) // self.batch_size):
                batch = next(batches)
                self.replaced(batch["unreadable"][batch["unreadable"] >= 0])
                given = {key: batch[key] for key in ("image", "label")}
                examples = parallel.put_rows(given, sharding, self.batch_size)
                key = jax.random.key(number)  # the same masks at every evaluation
                total, terms = self.loss(state, teacher, examples, key)
                found.append(jax.device_get(terms | {"loss": total}))
        return {name: float(np.mean([terms[name] for terms in found])) for name in found[0]}
