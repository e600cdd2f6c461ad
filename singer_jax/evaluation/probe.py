"""The linear probe: one linear head on frozen features, for any task of `heads`.

SGD without momentum, weight decay, cosine to 1e-8 at every step. The published protocol runs the
backbone on new crops in every epoch (`CropTrainer`); `FeatureTrainer` works on features that were
extracted once. Both train a head for each learning rate on the same batches at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from singer_jax.data.loader import train_batches
from singer_jax.data.sources import Source, Subset
from singer_jax.errors import InputError
from singer_jax.evaluation.backbone import Backbone, Examples
from singer_jax.evaluation.heads import Head, Task, mean_loss, over_devices
from singer_jax.evaluation.progress import Keeper, Progress
from singer_jax.models.params import Params
from singer_jax.platform import parallel
from singer_jax.platform.memory import fitting
from singer_jax.platform.spread import pick, spread
from singer_jax.runs.schedules import cosine_schedule
from singer_jax.runs.telemetry import LOG
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

FINAL_LEARNING_RATE = 1e-8

_MOST_SCORED = 256  # images at once

Within = Callable[[int, Head], None]
"""Called with the steps done and the heads between two epochs."""


@dataclasses.dataclass(frozen=True)
class ProbeSettings(Settings):
    """How a linear probe is trained, and kNN beside it."""

    epochs: int | None = setting(
        None, optional(COUNT), "of training; None: as published, 150 (ADE20K and NYUd 200)"
    )
    batch_size: int = setting(64, COUNT, "of all devices together", "images")
    learning_rates: tuple[float, ...] = setting(
        (0.5,), Each(POSITIVE, least=1), "of several the best on held-out training images is taken"
    )
    val_fraction: float = setting(0.1, BETWEEN, "share of the training images to choose it on")
    weight_decay: float = setting(1e-6, NOT_NEGATIVE, "times the parameter")
    pooling: str | None = setting(
        None,
        optional(OneOf(("cls", "avg", "pooled"))),
        "class token, mean of the patches or the model's own; None: cls where there is one",
    )
    protocol: str = setting(
        "paper",
        OneOf(("paper", "fast")),
        "new crops in every epoch, through the backbone; or features are extracted once",
    )
    views: int = setting(0, FROM_ZERO, "augmented views of `fast`, beside the centre crop")
    depth_zero_as_bin: bool = setting(
        False, Flag(), "pixels without depth train the first bin (official code)"
    )
    depth_drop_saturated: bool = setting(
        False, Flag(), "pixels predicted at 0 or 10 m are left out of the metrics (official code)"
    )
    knn_k: int = setting(20, COUNT, "neighbours of kNN")
    knn_temperature: float = setting(0.07, POSITIVE, "of their weights")


@dataclasses.dataclass(frozen=True)
class ProbeResult:
    """What a probe found.

    Attributes:
      learning_rate: of the reported head.
      held_out: the task's score of each rate on held-out training images, where there were several;
        minus infinity where the head is not finite.
      last, best: metrics on the test split after the last epoch, and at the best one.
      best_epoch: counted from 1.
      head: after the last epoch.
    """

    learning_rate: float
    held_out: dict[float, float]
    last: dict[str, float]
    best: dict[str, float]
    best_epoch: int
    head: dict[str, np.ndarray]


def init_head(key: jax.Array, inputs: int, outputs: int) -> Head:
    """A head initialised as PyTorch's `Linear` and 1x1 `Conv2d`."""
    bound = inputs**-0.5
    kernel_key, bias_key = jax.random.split(key)
    return {
        "kernel": jax.random.uniform(kernel_key, (inputs, outputs), minval=-bound, maxval=bound),
        "bias": jax.random.uniform(bias_key, (outputs,), minval=-bound, maxval=bound),
    }


def sgd_step(
    task: Task,
    head: Head,
    features: Float[Array, "batch ..."],
    labels: Array,
    step: Int[Array, ""],
    learning_rate: Float[Array, ""],
    valid: Bool[Array, " batch"] | None = None,
    *,
    steps: int,
    weight_decay: float,
    mesh: Mesh | None = None,
) -> tuple[Head, Float[Array, ""]]:
    """One step of the probe.

    Args:
      task: whose loss is minimised.
      head: before the step.
      features, labels: of the batch.
      step: counted from 0.
      learning_rate: the peak, that of step 0.
      valid: which images of the batch are no padding; default: all.
      steps: of the whole probe.
      weight_decay: times the parameter, added to the gradient.
      mesh: over whose devices the batch is split; default: it is not.

    Returns:
      the head after the step, and the loss before it.
    """

    def loss_of(head: Head) -> Float[Array, ""]:
        return mean_loss(task, head, features, labels, valid, mesh)

    loss, gradient = jax.value_and_grad(loss_of)(head)
    rate = cosine_schedule(learning_rate, steps, 0, FINAL_LEARNING_RATE / learning_rate)(step)
    head = jax.tree.map(lambda p, g: p - rate * (g + weight_decay * p), head, gradient)
    return head, loss


@functools.partial(jax.jit, static_argnums=(0, 1))
def count(task: Task, mesh: Mesh, heads: Head, features: Array, labels: Array, valid: Array) -> Any:
    """`Task.count` of stacked heads on a batch that is split over the devices."""
    counted = over_devices(mesh, task.count)
    return jax.vmap(counted, in_axes=(0, None, None, None))(heads, features, labels, valid)


def score(
    task: Task,
    heads: Head,
    examples: Examples,
    mesh: Mesh | None = None,
) -> list[dict[str, float]]:
    """The metrics of stacked heads on a split, every image counted once.

    Args:
      task: of the heads.
      heads: with a leading axis.
      examples: of the split.
      mesh: over whose devices the images are split; default: one.
    """
    mesh = mesh or parallel.make_mesh(1)
    features = examples.features.shape[1:]
    of_image = math.prod(features) + math.prod(features[:-1]) * heads["bias"].size
    batch_size = mesh.size * min(
        math.ceil(min(_MOST_SCORED, examples.images) / mesh.size), fitting(mesh, 4 * of_image)
    )
    total: dict[str, np.ndarray] = {}
    for start in range(0, examples.images, batch_size):
        index = np.arange(start, min(start + batch_size, examples.images))
        batch = _padded(mesh, examples, index, batch_size)
        counts = jax.device_get(count(task, mesh, heads, *batch))
        for name, value in counts.items():
            wide = np.int64 if np.issubdtype(value.dtype, np.integer) else np.float64
            total[name] = total.get(name, 0) + value.astype(wide)
    heads_trained = len(heads["bias"])
    return [
        task.metrics({name: value[number] for name, value in total.items()})
        for number in range(heads_trained)
    ]


def _padded(
    mesh: Mesh, examples: Examples, index: np.ndarray, rows: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Features, labels and `valid` of some images and padding, split over the devices."""
    valid = np.arange(rows) < len(index)
    arrays = (*examples.take(np.resize(index, rows)), valid)
    sharding = parallel.batch_sharding(mesh)
    return tuple(parallel.put(array, sharding) for array in arrays)


class Trainer(Protocol):
    """Trains heads on training images that are named by index."""

    task: Task
    images: int
    mesh: Mesh

    def steps_per_epoch(self, images: int) -> int:
        """Of so many images."""

    def centre(self, chosen: np.ndarray) -> Examples:
        """Centre-crop features of some images."""

    def train(
        self,
        chosen: np.ndarray,
        rates: Sequence[float],
        start: Progress = Progress(),
        within: Within | None = None,
    ) -> Iterator[Head]:
        """The heads of all rates, stacked, after each epoch on some images.

        Args:
          chosen: the images.
          rates: learning rates.
          start: where to go on: its `step` and `heads`.
          within: called with step and heads after the steps between, where it can be.
        """


def probe(
    trainer: Trainer,
    test: Examples,
    settings: ProbeSettings,
    seed: int = 0,
    keeper: Keeper | None = None,
) -> ProbeResult:
    """Trains a linear head and tests it after every epoch.

    Several learning rates are compared on held-out training images, never on the test split; the
    best one is then trained on all of them.

    Args:
      trainer: for the training images.
      test: of the test split.
      settings: with a number of epochs.
      seed: of the choice of held-out images.
      keeper: of the progress, from which it goes on; default: nothing is kept.

    Raises:
      Stopped: on request, with the progress kept.
    """
    task, rates = trainer.task, tuple(settings.learning_rates)
    keeper = keeper or Keeper()
    order = np.random.default_rng(seed).permutation(trainer.images)
    held_out: dict[float, float] = {}
    if len(rates) > 1:
        if not keeper.progress.held_out:
            cut = max(1, round(settings.val_fraction * len(order)))
            heads = _train(trainer, order[cut:], rates, keeper)
            found = score(task, heads, trainer.centre(order[:cut]), trainer.mesh)
            finite = are_finite(heads)
            for rate in itertools.compress(rates, ~finite):
                LOG.warning("learning rate %g: the head is not finite, it scores worst", rate)
            scores = tuple(
                _score(task, metrics) if usable else -math.inf
                for metrics, usable in zip(found, finite, strict=True)
            )
            keeper.keep(held_out=scores, step=0, heads=None)
        held_out = dict(zip(rates, keeper.progress.held_out, strict=True))
        rates = (max(rates, key=held_out.__getitem__),)
    heads = _train(trainer, order, rates, keeper, test)
    by_epoch = keeper.progress.by_epoch
    best = max(range(len(by_epoch)), key=lambda epoch: _score(task, by_epoch[epoch]))
    if not are_finite(heads).all():
        LOG.warning("learning rate %g: the head is not finite, its metrics are the worst", *rates)
    head = {name: np.asarray(value[0]) for name, value in heads.items()}
    return ProbeResult(rates[0], held_out, by_epoch[-1], by_epoch[best], best + 1, head)


def are_finite(heads: Mapping[str, Any]) -> Bool[np.ndarray, " heads"]:
    """Returns which of several stacked heads have neither NaN nor infinity in them."""
    finite = [np.isfinite(np.asarray(value)) for value in heads.values()]
    return np.all([each.reshape(len(each), -1).all(axis=1) for each in finite], axis=0)


def _score(task: Task, metrics: Mapping[str, float]) -> float:
    """Returns the score by which heads are compared; minus infinity where there is none."""
    value = metrics[task.score]
    return value if math.isfinite(value) else -math.inf


def _train(
    trainer: Trainer,
    chosen: np.ndarray,
    rates: Sequence[float],
    keeper: Keeper,
    test: Examples | None = None,
) -> dict[str, Any]:
    """The heads at the end; kept after every epoch, with their metrics on `test` if given."""
    start, steps = keeper.progress, trainer.steps_per_epoch(len(chosen))

    def within(step: int, heads: Head) -> None:
        keeper.stop_if_asked(step=step, heads=heads)

    epochs = trainer.train(chosen, rates, start, within)
    for epoch, heads in enumerate(epochs, start.step // steps + 1):
        found = score(trainer.task, heads, test, trainer.mesh) if test is not None else []
        by_epoch = (*keeper.progress.by_epoch, *found)
        keeper.keep(step=epoch * steps, heads=heads, by_epoch=by_epoch)
        keeper.stop_if_asked()
    return keeper.progress.heads


class _Trainer:
    """What both trainers share: settings, the first heads, the step of all rates.

    The batch is padded to a multiple of the devices; the padding weighs nothing.
    """

    def __init__(
        self,
        task: Task,
        images: int,
        head_shape: tuple[int, int],
        settings: ProbeSettings,
        seed: int,
        mesh: Mesh,
    ) -> None:
        if head_shape[1] < 2:
            raise InputError("the probe needs labels: one folder of images a class")
        self.task, self.images, self.head_shape = task, images, head_shape
        self.settings, self.seed, self.mesh = settings, seed, mesh
        self.rows = math.ceil(settings.batch_size / mesh.size) * mesh.size

    def steps_per_epoch(self, images: int) -> int:
        return math.ceil(images / self.settings.batch_size)

    def start(self, rates: Sequence[float], progress: Progress) -> Head:
        """Those of the progress, or new ones; on every device."""
        heads = progress.heads
        if heads is None:
            head = init_head(jax.random.key(self.seed), *self.head_shape)
            heads = {name: np.stack([leaf] * len(rates)) for name, leaf in head.items()}
        sharding = parallel.replicated(self.mesh)
        return {name: parallel.put(leaf, sharding) for name, leaf in heads.items()}

    def step(self, images: int, rates: Sequence[float]) -> Callable[..., Head]:
        """(heads, features, labels, valid, step) -> heads; traceable."""
        peaks = np.asarray(rates, np.float32)

        def of_rate(head: Head, peak: Array, *xs: Array) -> Head:
            features, labels, valid, step = xs
            of_all = {
                "steps": self.settings.epochs * self.steps_per_epoch(images),
                "weight_decay": self.settings.weight_decay,
                "mesh": self.mesh,
            }
            return sgd_step(self.task, head, features, labels, step, peak, valid, **of_all)[0]

        def of_rates(heads: Head, *xs: Array) -> Head:
            in_axes = (0, 0, *[None] * len(xs))
            heads = jax.vmap(of_rate, in_axes=in_axes)(heads, peaks, *xs)
            return jax.lax.with_sharding_constraint(heads, parallel.replicated(self.mesh))

        return of_rates


class FeatureTrainer(_Trainer):
    """Trains on features that were extracted once; each epoch on the next augmented view.

    Args:
      task: of the probe.
      train: of the training split; with one view only the centre crop is trained on, with more
        the others.
      head_shape: inputs and outputs.
      settings: with a number of epochs.
      seed: of the head and the order.
      mesh: over whose devices features and batches are split; default: one.
    """

    def __init__(
        self,
        task: Task,
        train: Examples,
        head_shape: tuple[int, int],
        settings: ProbeSettings,
        seed: int = 0,
        mesh: Mesh | None = None,
    ) -> None:
        mesh = mesh or parallel.make_mesh(1)
        super().__init__(task, train.images, head_shape, settings, seed, mesh)
        self._train = train

    def centre(self, chosen: np.ndarray) -> Examples:
        return Examples(*self._train.take(chosen))

    def train(
        self,
        chosen: np.ndarray,
        rates: Sequence[float],
        start: Progress = Progress(),
        within: Within | None = None,
    ) -> Iterator[Head]:
        """Batches of the same order for all rates; they cross the end of an epoch."""
        steps, train = self.steps_per_epoch(len(chosen)), self._train
        on_device = self._fits()
        run_epoch = (self._on_device if on_device else self._streamed)(len(chosen), rates)
        rng, heads = np.random.default_rng(self.seed), self.start(rates, start)
        order = np.zeros(0, chosen.dtype)
        passes, wanted = 0, steps * self.settings.batch_size
        for number in range(self.settings.epochs):
            while len(order) < wanted:
                view = 1 + passes % (train.views - 1) if train.views > 1 else 0
                order = np.concatenate([order, rng.permutation(chosen) + view * train.images])
                passes += 1
            batches, order = order[:wanted].reshape(steps, -1), order[wanted:]
            first = max(number * steps, start.step)
            if first < (number + 1) * steps:
                heads = run_epoch(heads, first, batches[first - number * steps :], within)
                yield heads

    def _fits(self) -> bool:
        """Whether the devices' memory takes all features, beside a batch."""
        features = self._train.features
        of_row = features.dtype.itemsize * math.prod(features.shape[1:])
        return fitting(self.mesh, of_row) >= len(features) / self.mesh.size + 2 * self.rows

    def _streamed(self, images: int, rates: Sequence[float]) -> Callable[..., Head]:
        """(heads, number of the first step, indices [steps, batch], within) -> heads."""
        step = jax.jit(self.step(images, rates))

        def run(heads: Head, first: int, batches: np.ndarray, within: Within | None) -> Head:
            for number, index in enumerate(batches, first):
                batch = _padded(self.mesh, self._train, index, self.rows)
                heads = step(heads, *batch, np.int32(number))
                if within and number < first + len(batches) - 1:
                    within(number + 1, heads)
            return heads

        return run

    def _on_device(self, images: int, rates: Sequence[float]) -> Callable[..., Head]:
        """As `_streamed`, with all features on the devices and an epoch as one program."""
        epoch = self.epoch(images, rates)
        arrays = [
            spread(self.mesh, rows, len(rows))
            for rows in (self._train.features, self._train.labels)
        ]
        return lambda heads, first, batches, within: epoch(heads, *arrays, np.int32(first), batches)

    def epoch(self, images: int, rates: Sequence[float]) -> Callable[..., Head]:
        """(heads, features, labels, number of the first step, indices [steps, batch]) -> heads."""
        step, mesh = self.step(images, rates), self.mesh
        valid = np.arange(self.rows) < self.settings.batch_size
        take = np.arange(self.rows) % self.settings.batch_size

        @jax.jit
        def epoch(heads: Head, features: Array, labels: Array, first: Array, order: Array) -> Head:
            def body(heads: Head, xs: tuple[Array, Array]) -> tuple[Head, None]:
                number, index = xs
                batch = (pick(mesh, rows, index[take]) for rows in (features, labels))
                of_batch, truth = batch
                return step(heads, of_batch.astype(jnp.float32), truth, valid, number), None

            return jax.lax.scan(body, heads, (first + jnp.arange(len(order)), order))[0]

        return epoch


class CropTrainer(_Trainer):
    """Trains on new random crops in every epoch, through the backbone (the published protocol).

    Args:
      task: of the probe.
      backbone: the model to measure.
      source: the training split.
      transform: makes the random crops.
      centre_of: centre-crop features of a source.
      settings: with a number of epochs.
      seed: of the head, the order and the crops.
      workers: of the loader.
    """

    def __init__(
        self,
        task: Task,
        backbone: Backbone,
        source: Source,
        transform: Callable[..., Any],
        centre_of: Callable[[Source], Examples],
        settings: ProbeSettings,
        seed: int = 0,
        workers: int = 0,
    ) -> None:
        head_shape = task.head_shape(backbone.arch)
        super().__init__(task, len(source), head_shape, settings, seed, backbone.mesh)
        self.backbone, self.source, self.transform = backbone, source, transform
        self.centre_of, self.workers = centre_of, workers

    def centre(self, chosen: np.ndarray) -> Examples:
        return self.centre_of(Subset(self.source, chosen))

    def train(
        self,
        chosen: np.ndarray,
        rates: Sequence[float],
        start: Progress = Progress(),
        within: Within | None = None,
    ) -> Iterator[Head]:
        """Heads after each epoch; batches cross the end of an epoch."""
        steps, step = self.steps_per_epoch(len(chosen)), self.crop_step(len(chosen), rates)
        heads = self.start(rates, start)
        batches = train_batches(
            Subset(self.source, chosen),
            self.transform,
            batch_size=self.settings.batch_size,
            seed=self.seed,
            start=start.step,
            workers=self.workers,
            strict=True,
            rows=self.backbone.rows(self.rows),
        )
        with contextlib.closing(batches):
            for number in range(start.step, self.settings.epochs * steps):
                batch = self.backbone.put(next(batches), self.rows)
                heads = step(self.backbone.params, heads, batch, np.int32(number))
                if (number + 1) % steps == 0:
                    yield heads
                elif within:
                    within(number + 1, heads)

    def crop_step(self, images: int, rates: Sequence[float]) -> Callable[..., Head]:
        """(backbone's parameters, heads, batch, step) -> heads, jitted."""
        backbone, task, step = self.backbone, self.task, self.step(images, rates)

        @jax.jit
        def crop_step(params: Params, heads: Head, batch: Any, number: Array) -> Head:
            features = backbone.features(params, batch["image"], task)
            return step(heads, features, batch["label"], batch["valid"], number)

        return crop_step
