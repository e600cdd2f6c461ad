"""Linear probe: trains one linear head on frozen features and selects its learning rate.

The published protocol runs the backbone on new crops in every epoch (`trainers.CropTrainer`);
`trainers.FeatureTrainer` works on features that were extracted once.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import numpy as np
from jax.sharding import Mesh

from singer_jax.errors import Stopped
from singer_jax.evaluation.backbone import Examples
from singer_jax.evaluation.heads import Head, Task
from singer_jax.evaluation.progress import Progress, ProgressStore
from singer_jax.evaluation.scoring import are_finite, score
from singer_jax.runs.metrics import LOG
from singer_jax.settings.ranges import (
    BETWEEN,
    COUNT,
    FROM_ZERO,
    NOT_NEGATIVE,
    POSITIVE,
    Each,
    Flag,
    OneOf,
    optional,
)
from singer_jax.settings.settings import Settings, setting


@dataclasses.dataclass(frozen=True)
class ProbeSettings(Settings):
    """Settings of the linear probe and of kNN."""

    epochs: int | None = setting(
        None,
        optional(COUNT),
        "Number of training epochs. None: 150 (200 for ADE20K and NYUd), as in the paper.",
    )
    batch_size: int = setting(64, COUNT, "Global batch size, summed over all devices.", "images")
    learning_rates: tuple[float, ...] = setting(
        (0.5,),
        Each(POSITIVE, least=1),
        "Peak learning rates. With several, the best one on held-out training images is reported.",
    )
    val_fraction: float = setting(
        0.1, BETWEEN, "Fraction of the training images held out to select the learning rate."
    )
    weight_decay: float = setting(1e-6, NOT_NEGATIVE, "Weight decay of SGD.")
    pooling: str | None = setting(
        None,
        optional(OneOf(("cls", "avg", "pooled"))),
        "Input of the classification head: class token (`cls`), mean of the patch tokens (`avg`), "
        "or the model's pooled output. None: `cls` if the model has a class token, else `pooled`.",
    )
    protocol: str = setting(
        "paper",
        OneOf(("paper", "fast")),
        "Training protocol of the probe. `paper`: new random crops in every epoch; `fast`: "
        "features are extracted once.",
    )
    views: int = setting(
        0, FROM_ZERO, "Number of augmented views that `fast` extracts besides the centre crop."
    )
    depth_zero_as_bin: bool = setting(
        False, Flag(), "Trains pixels without depth as the first bin, as the official code does."
    )
    depth_drop_saturated: bool = setting(
        False,
        Flag(),
        "Excludes pixels predicted at 0 or 10 m from the metrics, as the official code does.",
    )
    knn_k: int = setting(20, COUNT, "Number of neighbours of kNN.")
    knn_temperature: float = setting(0.07, POSITIVE, "Temperature of kNN's votes.")


@dataclasses.dataclass(frozen=True)
class ProbeResult:
    """Result of a probe.

    Attributes:
      learning_rate: peak learning rate of the reported head.
      held_out: score of each rate on held-out training images, if there were several rates; minus
        infinity for a head that is not finite.
      last: metrics on the test split after the last epoch.
      best: metrics on the test split at the best epoch.
      best_epoch: number of the best epoch, counted from 1.
      head: head after the last epoch.
    """

    learning_rate: float
    held_out: dict[float, float]
    last: dict[str, float]
    best: dict[str, float]
    best_epoch: int
    head: dict[str, np.ndarray]


class Trainer(Protocol):
    """Trainer of heads on training images that are selected by index."""

    task: Task
    images: int
    mesh: Mesh

    def steps_per_epoch(self, images: int) -> int:
        """Returns the number of steps of an epoch over this number of images."""

    def centre(self, chosen: np.ndarray) -> Examples:
        """Returns centre-crop features of some images."""

    def train(
        self, chosen: np.ndarray, rates: Sequence[float], start: Progress = Progress()
    ) -> Iterator[tuple[int, Head]]:
        """Yields the number of steps done and the stacked heads of all rates.

        It yields at least at the end of each epoch, and after each step if the trainer supports it.

        Args:
          chosen: indices of the images.
          rates: learning rates.
          start: progress to resume from; its `step` and `heads` are used.
        """


@dataclasses.dataclass(frozen=True)
class Probed:
    """Model that is probed.

    Attributes:
      trainer: trainer of its heads.
      test: its features of the test split.
      progress_store: its progress, from which the probe resumes.
      name: its name in warnings; empty if there is only one model.
    """

    trainer: Trainer
    test: Examples
    progress_store: ProgressStore = dataclasses.field(default_factory=ProgressStore)
    name: str = ""

    def head(self, rate: float) -> str:
        """Returns the name of a learning rate's head for messages."""
        return f"{self.name + ': ' if self.name else ''}the head at learning rate {rate:g}"


def probe(
    trainer: Trainer,
    test: Examples,
    settings: ProbeSettings,
    seed: int = 0,
    progress_store: ProgressStore | None = None,
) -> ProbeResult:
    """Returns `probe_each` of one model.

    Args:
      trainer: trainer of the heads.
      test: features of the test split.
      settings: settings of the probe; `epochs` must be set.
      seed: seed of the choice of held-out images.
      progress_store: the progress, from which the probe resumes; default: none.
    """
    return probe_each([Probed(trainer, test, progress_store or ProgressStore())], settings, seed)[0]


def probe_each(
    probed: Sequence[Probed], settings: ProbeSettings, seed: int = 0
) -> list[ProbeResult]:
    """Trains a linear head for each model and tests it after every epoch.

    Several learning rates are compared on held-out training images, never on the test split. The
    best one is then trained on all training images. All models advance step by step together, so
    that trainers with common batches (`trainers.CropBatches`) decode each batch once.

    Args:
      probed: models, on the same training split.
      settings: settings of the probe; `epochs` must be set.
      seed: seed of the choice of held-out images.

    Raises:
      Stopped: a stop was requested; the progress is kept.
    """
    rates = tuple(settings.learning_rates)
    order = np.random.default_rng(seed).permutation(probed[0].trainer.images)
    if len(rates) > 1:
        cut = max(1, round(settings.val_fraction * len(order)))
        comparing = [one for one in probed if not one.progress_store.progress.held_out]
        _train_each(comparing, order[cut:], [rates] * len(comparing))
        for one in comparing:
            scores = _held_out_scores(one, order[:cut], rates)
            one.progress_store.update(held_out=scores, step=0, heads=None)
    chosen = [_best_rate(rates, one.progress_store.progress.held_out) for one in probed]
    _train_each(probed, order, [(rate,) for rate in chosen], tested=True)
    return [_result(one, rates, rate) for one, rate in zip(probed, chosen, strict=True)]


def _best_rate(rates: Sequence[float], scores: Sequence[float]) -> float:
    return rates[int(np.argmax(scores))] if scores else rates[0]


def _held_out_scores(
    one: Probed, held_out: np.ndarray, rates: Sequence[float]
) -> tuple[float, ...]:
    """Returns the score of each rate's head on some images; warns of non-finite heads."""
    trainer, heads = one.trainer, one.progress_store.progress.heads
    found = score(trainer.task, heads, trainer.centre(held_out), trainer.mesh)
    finite = are_finite(heads)
    for rate in itertools.compress(rates, ~finite):
        LOG.warning("%s is not finite and scores worst", one.head(rate))
    return tuple(
        _score(trainer.task, metrics) if usable else -math.inf
        for metrics, usable in zip(found, finite, strict=True)
    )


def _result(one: Probed, rates: Sequence[float], rate: float) -> ProbeResult:
    progress, task = one.progress_store.progress, one.trainer.task
    by_epoch = progress.by_epoch
    best = max(range(len(by_epoch)), key=lambda epoch: _score(task, by_epoch[epoch]))
    if not are_finite(progress.heads).all():
        LOG.warning("%s is not finite; its metrics are the worst possible", one.head(rate))
    head = {name: np.asarray(value[0]) for name, value in progress.heads.items()}
    held_out = dict(zip(rates, progress.held_out, strict=True)) if progress.held_out else {}
    return ProbeResult(rate, held_out, by_epoch[-1], by_epoch[best], best + 1, head)


def _score(task: Task, metrics: Mapping[str, float]) -> float:
    """Returns the score by which heads are compared; minus infinity if it is not finite."""
    value = metrics[task.score]
    return value if math.isfinite(value) else -math.inf


def _train_each(
    probed: Sequence[Probed],
    chosen: np.ndarray,
    rates: Sequence[Sequence[float]],
    tested: bool = False,
) -> None:
    """Trains the heads of all models to the end; afterwards their stores hold them.

    The heads are kept after every epoch, with their metrics on the test split if `tested`.

    Args:
      probed: models.
      chosen: indices of the training images.
      rates: learning rates of each model.
      tested: True if the test split is scored after every epoch.
    """
    done = [one.progress_store.progress.step for one in probed]
    running = {
        number: one.trainer.train(chosen, rates[number], one.progress_store.progress)
        for number, one in enumerate(probed)
    }
    while running:
        # Models that are behind advance first, so that all then use the same batch.
        behind = min(done[number] for number in running)
        moved = {}
        for number in [number for number in running if done[number] == behind]:
            step, heads = next(running[number], (None, None))
            if step is None:
                del running[number]
                continue
            moved[number], done[number] = heads, step
        _keep(probed, chosen, moved, done, tested)


def _keep(
    probed: Sequence[Probed],
    chosen: np.ndarray,
    moved: Mapping[int, Head],
    done: Sequence[int],
    tested: bool,
) -> None:
    """Keeps the heads at the end of an epoch; on a stop, keeps all heads and raises `Stopped`."""
    within = []
    for number, heads in moved.items():
        trainer, progress_store = probed[number].trainer, probed[number].progress_store
        if done[number] % trainer.steps_per_epoch(len(chosen)):
            within.append(number)
            continue
        found = score(trainer.task, heads, probed[number].test, trainer.mesh) if tested else []
        by_epoch = (*progress_store.progress.by_epoch, *found)
        progress_store.update(step=done[number], heads=heads, by_epoch=by_epoch)
    # One store asks for all: processes agree on a stop by the number of times they asked.
    first = probed[next(iter(moved))].progress_store if moved else None
    if first and first.stopping():
        for number in within:
            probed[number].progress_store.update(step=done[number], heads=moved[number])
        raise Stopped(first.describe())
