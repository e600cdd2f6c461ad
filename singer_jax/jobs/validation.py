"""The evaluation of students while they train: losses on the test split and kNN."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import numpy as np

from singer_jax.data.images import EvalTransform
from singer_jax.data.loader import worker_count
from singer_jax.data.registry import open_source
from singer_jax.data.sources import TEST, Source, check_same_classes, evenly
from singer_jax.errors import InputError
from singer_jax.evaluation.backbone import Backbone, extract_each
from singer_jax.evaluation.knn import knn_top1
from singer_jax.models.params import Params, join
from singer_jax.platform import parallel
from singer_jax.runs.metrics import LOG, metric_name
from singer_jax.training.settings import DistillSettings
from singer_jax.training.setup import RunSetup
from singer_jax.training.step import TrainState
from singer_jax.training.validation_losses import ValidationLosses

_PER_CLASS = 10  # images of the training split that kNN compares with
_LARGEST_BANK = 20_000  # which is extracted at each evaluation, unless more are asked for


def bank_size(images: int, classes: int) -> int:
    """Returns how many training images kNN compares with: several a class, at least `images`."""
    return max(images, min(_PER_CLASS * classes, _LARGEST_BANK))


class Validation:
    """Evaluates students on the test split: the losses of their methods and, with labels, kNN.

    Each unreadable image is named once. kNN leaves it out; the losses take another image instead.

    Args:
      settings: The settings of the run.
      run: The students.
      train_split: The training images, some of which kNN compares with.
      stopped: The students that ended with an error, which are left out; it may grow later.

    Raises:
      InputError: There is no test split, or its classes are not those of the training split.
    """

    def __init__(
        self,
        settings: DistillSettings,
        run: RunSetup,
        train_split: Source,
        stopped: Mapping[str, str],
    ) -> None:
        images = settings.evals.images
        self.run, self.stopped = run, stopped
        self.workers = worker_count(settings.data.workers)
        test = _open_test_split(settings)
        check_same_classes(train_split, test)
        self.test = evenly(test, images)
        self.bank = evenly(train_split, bank_size(images, train_split.num_classes))
        self.unreadable: set[str] = set()
        bank = self.bank
        if self.test.num_classes and len(bank) < min(2 * bank.num_classes, len(train_split)):
            LOG.warning(
                "evals.images: kNN compares with %d images of %d classes; give at least two a "
                "class",
                len(bank),
                bank.num_classes,
            )
        self.losses = ValidationLosses(
            run,
            self.test,
            settings.batch_size // settings.grad_accum_steps,
            self.workers,
            functools.partial(self._warn_of_unreadable, self.test),
        )

    def __call__(
        self, states: Mapping[str, TrainState], teacher: Params | None
    ) -> dict[str, float]:
        """Evaluates the students.

        Args:
          states: The states by the student's name.
          teacher: The teacher's parameters.

        Returns:
          `eval/val/loss`, `eval/val/loss_<term>` and `eval/knn/top1`, of several students with the
          prefix `eval/NAME/`, and `eval/images/unreadable`, the number of images of both splits
          that could not be read since the start, by any process.
        """
        losses = self.losses(states, teacher)
        active = {name: state for name, state in states.items() if name not in self.stopped}
        metrics = {
            metric_name("eval", name, f"val/{term}"): value
            for name in active
            for term, value in losses[name].items()
        }
        if self.test.num_classes and self.bank.num_classes:
            for name, top1 in self._knn(active).items():
                metrics[metric_name("eval", name, "knn/top1")] = top1
        # Each process reads a part of the images.
        of_all = set().union(*parallel.of_each_process(self.unreadable))
        metrics["eval/images/unreadable"] = len(of_all)
        return metrics

    def _knn(self, states: Mapping[str, TrainState]) -> dict[str, float]:
        """Returns the top-1 accuracy of kNN in percent by the student's name."""
        classes, mesh = self.test.num_classes, self.run.any.mesh
        backbones, tasks = {}, {}
        for name, state in states.items():
            params = join(state.params["student"], state.constants["student"])
            own = self.run.each[name].distillation.student
            backbones[name] = Backbone(own, params, mesh)
            tasks[name] = backbones[name].classification(classes, None)
        banks, tests = (
            extract_each(
                backbones,
                source,
                tasks,
                EvalTransform,
                self.workers,
                functools.partial(self._warn_of_unreadable, source),
            )
            for source in (self.bank, self.test)
        )
        return {
            name: 100 * knn_top1(banks[name], tests[name], classes=classes, mesh=mesh)
            for name in states
        }

    def _warn_of_unreadable(self, source: Source, indices: np.ndarray) -> None:
        for described in map(source.describe, indices.tolist()):
            if described not in self.unreadable:
                self.unreadable.add(described)
                LOG.warning(
                    "unreadable image, left out of kNN, replaced in the losses: %s", described
                )


def _open_test_split(settings: DistillSettings) -> Source:
    try:
        return open_source(settings.data, TEST)
    except InputError as error:
        raise InputError(
            f"evals.every_steps: {settings.evals.every_steps}, but there is nothing to evaluate "
            f"on: {error}; set evals.every_steps=0 or add a test split"
        ) from error
