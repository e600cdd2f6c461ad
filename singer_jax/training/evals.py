"""Evaluation while training: kNN of the student, and the method's losses on held-out images."""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import jax
import numpy as np

from singer_jax import parallel
from singer_jax.data.images import EvalTransform
from singer_jax.data.loader import eval_batches, worker_count
from singer_jax.data.sources import TEST, Source, evenly, make_source
from singer_jax.errors import InputError
from singer_jax.evaluation.backbone import Backbone
from singer_jax.evaluation.knn import knn_top1
from singer_jax.models.params import Params, join
from singer_jax.telemetry import LOG
from singer_jax.training.setup import Setup
from singer_jax.training.step import TrainState


class Evaluator:
    """Measures a state on the test split.

    An image that cannot be read is named once. kNN leaves it out; in the held-out losses the next
    readable one takes its place, the same at every evaluation, so that the batches stay whole and
    the losses comparable.

    Args:
      config: as `singer_jax.config.default` describes it; reads `evals` and `data`.
      run: its setup.
      train: the training split, whose first images are the bank of kNN.

    Raises:
      InputError: no test split, or one with fewer images than devices.
    """

    def __init__(self, config: Any, run: Setup, train: Source) -> None:
        try:
            test = make_source(config.data.source, config.data.path, TEST)
        except InputError as error:
            raise InputError(
                f"evals.every: {config.evals.every}, but there is nothing to evaluate on: {error}; "
                "set evals.every=0 or add a test split"
            ) from error
        self.run, self.workers = run, worker_count(config.data.workers)
        self.test, self.bank = (evenly(source, config.evals.images) for source in (test, train))
        devices = run.mesh.size
        micro_batch = config.batch_size // config.accumulation  # no more memory than a step takes
        self.batch_size = min(micro_batch, len(self.test) // devices * devices)
        if not self.batch_size:
            raise InputError(f"evals: the test split has fewer images than {devices} devices")
        self.unreadable: set[str] = set()

        @jax.jit
        def loss(state: TrainState, teacher: Params | None, batch: Any, key: jax.Array) -> Any:
            features = run.distillation.teach(teacher, batch)
            return run.distillation.loss(
                state.params, state.constants, teacher, features, batch, key
            )

        self.loss = loss

    def __call__(self, state: TrainState, teacher: Params | None) -> dict[str, float]:
        """`eval/held_out/loss`, `eval/held_out/loss_<term>` and, with labels, `eval/knn/top1`.

        `eval/images/unreadable` counts those of both splits that could not be read so far.
        """
        metrics = self._losses(state, teacher)
        if self.test.num_classes and self.bank.num_classes:
            metrics["eval/knn/top1"] = self._knn(state)
        metrics["eval/images/unreadable"] = len(self.unreadable)
        return metrics

    def _name(self, source: Source, indices: np.ndarray) -> None:
        for index in indices.tolist():
            name = source.describe(index)
            if name not in self.unreadable:
                self.unreadable.add(name)
                LOG.warning("unreadable image, left out of kNN, replaced in the losses: %s", name)

    def _losses(self, state: TrainState, teacher: Params | None) -> dict[str, float]:
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
                self._name(self.test, batch["unreadable"][batch["unreadable"] >= 0])
                given = {key: batch[key] for key in ("image", "label")}
                examples = parallel.put_rows(given, sharding, self.batch_size)
                key = jax.random.key(number)  # the same masks at every evaluation
                total, terms = self.loss(state, teacher, examples, key)
                found.append(jax.device_get(terms | {"loss": total}))
        return {
            f"eval/held_out/{name}": float(np.mean([terms[name] for terms in found]))
            for name in found[0]
        }

    def _knn(self, state: TrainState) -> float:
        params = join(state.params["student"], state.constants["student"])
        backbone = Backbone(self.run.distillation.student, params, self.run.mesh)
        task = backbone.classification(self.test.num_classes, None)
        transform = EvalTransform(backbone.image_size)
        bank, queries = (
            backbone.extract(
                source,
                task,
                transform,
                self.workers,
                left_out=functools.partial(self._name, source),
            )
            for source in (self.bank, self.test)
        )
        return 100 * knn_top1(bank, queries, classes=self.test.num_classes, mesh=backbone.mesh)
