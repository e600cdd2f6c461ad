"""Evaluation while training: kNN of the student, and the method's losses on held-out images."""

from __future__ import annotations

import contextlib
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
from singer_jax.training.setup import Setup
from singer_jax.training.step import TrainState


class Evaluator:
    """Measures a state on the test split.

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
        self.batch_size = min(config.batch_size, len(self.test) // devices * devices)
        if not self.batch_size:
            raise InputError(f"evals: the test split has fewer images than {devices} devices")
        self.loss = jax.jit(run.distillation.loss)

    def __call__(self, state: TrainState, teacher: Params | None) -> dict[str, float]:
        """`eval/held_out/loss`, `eval/held_out/loss_<term>` and, with labels, `eval/knn/top1`."""
        metrics = self._losses(state, teacher)
        if self.test.num_classes and self.bank.num_classes:
            metrics["eval/knn/top1"] = self._knn(state)
        return metrics

    def _losses(self, state: TrainState, teacher: Params | None) -> dict[str, float]:
        found: list[dict[str, float]] = []
        batches = eval_batches(
            self.test,
            EvalTransform(self.run.image_size),
            batch_size=self.batch_size,
            workers=self.workers,
        )
        sharding = parallel.batch_sharding(self.run.mesh)
        with contextlib.closing(batches):
            for number, batch in enumerate(batches):
                if not batch["valid"].all():
                    break  # whole batches only, so that their mean is that of their images
                examples = {k: parallel.put(batch[k], sharding) for k in ("image", "label")}
                key = jax.random.key(number)  # the same masks at every evaluation
                total, metrics = self.loss(state.params, state.constants, teacher, examples, key)
                terms = {k: v for k, v in metrics.items() if k.startswith("loss_")}
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
            backbone.extract(source, task, transform, self.workers)
            for source in (self.bank, self.test)
        )
        return 100 * knn_top1(bank, queries, classes=self.test.num_classes)
