"""The linear classification probe: one linear head on frozen features.

SGD without momentum, weight decay, cosine to 1e-8 at every step. The published protocol runs the
backbone on new crops in every epoch (`CropTrainer`); `FeatureTrainer` works on features that were
extracted once. Both train a head for each learning rate on the same batches at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from singer_jax.data.images import TrainTransform
from singer_jax.data.loader import train_batches
from singer_jax.data.sources import Source, Subset
from singer_jax.errors import InputError
from singer_jax.evaluation.backbone import Backbone, Features
from singer_jax.evaluation.metrics import correct_in_top
from singer_jax.methods.base import cross_entropy
from singer_jax.models.params import Params
from singer_jax.training.optimizer import cosine_schedule

FINAL_LEARNING_RATE = 1e-8

Head = dict[str, jax.Array]
"""`kernel` [dim, classes] and `bias` [classes]; a leading axis of rates while several train."""


class Scores(NamedTuple):
    """Of one head on one split: shares of the images, and the mean cross-entropy."""

    top1: float
    top5: float
    loss: float


@dataclasses.dataclass(frozen=True)
class ProbeResult:
    """What a probe found.

    Attributes:
      learning_rate: of the reported head.
      held_out: top-1 of each rate on held-out training images, where there were several.
      last, best: scores on the test split after the last epoch, and at the best one.
      best_epoch: counted from 1.
    """

    learning_rate: float
    held_out: dict[float, float]
    last: Scores
    best: Scores
    best_epoch: int


def init_head(key: jax.Array, dim: int, classes: int) -> Head:
    """A head initialised as PyTorch's `Linear`."""
    bound = dim**-0.5
    kernel_key, bias_key = jax.random.split(key)
    return {
        "kernel": jax.random.uniform(kernel_key, (dim, classes), minval=-bound, maxval=bound),
        "bias": jax.random.uniform(bias_key, (classes,), minval=-bound, maxval=bound),
    }


def apply_head(head: Head, features: Float[Array, "batch dim"]) -> Float[Array, "batch classes"]:
    """Class logits."""
    return features @ head["kernel"] + head["bias"]


def sgd_step(
    head: Head,
    features: Float[Array, "batch dim"],
    labels: Int[Array, " batch"],
    step: Int[Array, ""],
    learning_rate: Float[Array, ""],
    *,
    steps: int,
    weight_decay: float,
) -> tuple[Head, Float[Array, ""]]:
    """One step of the probe.

    Args:
      head: before the step.
      features, labels: of the batch.
      step: counted from 0.
      learning_rate: the peak, that of step 0.
      steps: of the whole probe.
      weight_decay: times the parameter, added to the gradient.

    Returns:
      the head after the step, and the loss before it.
    """
    loss, gradient = jax.value_and_grad(
        lambda head: cross_entropy(apply_head(head, features), labels)
    )(head)
    rate = cosine_schedule(learning_rate, steps, 0, FINAL_LEARNING_RATE / learning_rate)(step)
    head = jax.tree.map(lambda p, g: p - rate * (g + weight_decay * p), head, gradient)
    return head, loss


@jax.jit
def score(
    head: Head, features: Float[Array, "images dim"], labels: Int[Array, " images"]
) -> Scores:
    """Scores of a head, as arrays, on features that hold every image once."""
    logits = apply_head(head, features)
    return Scores(
        top1=jnp.mean(correct_in_top(logits, labels, 1)),
        top5=jnp.mean(correct_in_top(logits, labels, 5)),
        loss=cross_entropy(logits, labels),
    )


class Trainer(Protocol):
    """Trains heads on training images that are named by index."""

    images: int

    def features(self, chosen: np.ndarray) -> Features:
        """Centre-crop features of some images."""

    def train(self, chosen: np.ndarray, rates: Sequence[float]) -> Iterator[Head]:
        """The heads of all rates, stacked, after each epoch on some images."""


def probe(trainer: Trainer, test: Features, config: Any, seed: int = 0) -> ProbeResult:
    """Trains a linear classifier and tests it after every epoch.

    Several learning rates are compared on held-out training images, never on the test split; the
    best one is then trained on all of them.

    Args:
      trainer: for the training images.
      test: features of the test split.
      config: the `probe` part of the configuration.
      seed: of the choice of held-out images.

    Raises:
      InputError: settings that cannot work.
    """
    rates = tuple(config.learning_rates)
    if not rates or min(rates) <= 0:
        raise InputError(f"probe.learning_rates: {rates}; give positive numbers")
    if not 0 < config.held_out < 1:
        raise InputError(f"probe.held_out: {config.held_out} is not between 0 and 1")
    order = np.random.default_rng(seed).permutation(trainer.images)
    held_out: dict[float, float] = {}
    if len(rates) > 1:
        cut = max(1, round(config.held_out * len(order)))
        for heads in trainer.train(order[cut:], rates):
            trained = heads
        scores = jax.vmap(score, in_axes=(0, None, None))(trained, *trainer.features(order[:cut]))
        held_out = dict(zip(rates, np.asarray(scores.top1).tolist(), strict=True))
        rates = (max(rates, key=held_out.__getitem__),)
    only = functools.partial(jax.tree.map, lambda leaf: leaf[0])
    scores = [score(only(heads), *test) for heads in trainer.train(order, rates)]
    by_epoch = [Scores(*map(float, of_epoch)) for of_epoch in jax.device_get(scores)]
    best = max(range(len(by_epoch)), key=lambda epoch: by_epoch[epoch].top1)
    return ProbeResult(rates[0], held_out, by_epoch[-1], by_epoch[best], best + 1)


class _Trainer:
    """What both trainers share: settings, the first heads, the step of all rates."""

    def __init__(self, images: int, dim: int, classes: int, config: Any, seed: int) -> None:
        if config.epochs < 1 or config.batch_size < 1:
            raise InputError("probe.epochs and probe.batch_size: give at least 1")
        if classes < 2:
            raise InputError("the probe needs labels: one folder of images a class")
        self.images, self.dim, self.classes = images, dim, classes
        self.config, self.seed = config, seed

    def steps_per_epoch(self, images: int) -> int:
        return math.ceil(images / self.config.batch_size)

    def start(self, rates: Sequence[float]) -> Head:
        head = init_head(jax.random.key(self.seed), self.dim, self.classes)
        return jax.tree.map(lambda leaf: jnp.stack([leaf] * len(rates)), head)

    def step(self, images: int, rates: Sequence[float]) -> Callable[..., Head]:
        """(heads, features, labels, step) -> heads; traceable."""
        step = functools.partial(
            sgd_step,
            steps=self.config.epochs * self.steps_per_epoch(images),
            weight_decay=self.config.weight_decay,
        )
        peaks = jnp.asarray(rates)
        return lambda *xs: jax.vmap(step, in_axes=(0, None, None, None, 0))(*xs, peaks)[0]


class FeatureTrainer(_Trainer):
    """Trains on features that were extracted once.

    Args:
      train: features of the training split.
      classes: number of labels.
      config: the `probe` part of the configuration.
      seed: of the head and the order.
    """

    def __init__(self, train: Features, classes: int, config: Any, seed: int = 0) -> None:
        super().__init__(*train.values.shape, classes, config, seed)
        self._train = train

    def features(self, chosen: np.ndarray) -> Features:
        return Features(self._train.values[chosen], self._train.labels[chosen])

    def train(self, chosen: np.ndarray, rates: Sequence[float]) -> Iterator[Head]:
        """Batches of the same order for all rates; they cross the end of an epoch."""
        step, steps = self.step(len(chosen), rates), self.steps_per_epoch(len(chosen))

        @jax.jit
        def epoch(heads: Head, train: Features, first: jax.Array, order: jax.Array) -> Head:
            def body(heads: Head, xs: tuple[jax.Array, jax.Array]) -> tuple[Head, None]:
                number, batch = xs
                return step(heads, train.values[batch], train.labels[batch], number), None

            return jax.lax.scan(body, heads, (first + jnp.arange(steps), order))[0]

        rng, heads = np.random.default_rng(self.seed), self.start(rates)
        order = np.zeros(0, chosen.dtype)
        wanted = steps * self.config.batch_size
        for number in range(self.config.epochs):
            while len(order) < wanted:
                order = np.concatenate([order, rng.permutation(chosen)])
            batches, order = order[:wanted].reshape(steps, -1), order[wanted:]
            heads = epoch(heads, self._train, jnp.int32(number * steps), batches)
            yield heads


class CropTrainer(_Trainer):
    """Trains on new random crops in every epoch, through the backbone (the published protocol).

    Args:
      backbone: the model to measure.
      source: the training split.
      config: the `probe` part of the configuration.
      seed: of the head, the order and the crops.
      workers: of the loader.
    """

    def __init__(
        self, backbone: Backbone, source: Source, config: Any, seed: int = 0, workers: int = 0
    ) -> None:
        super().__init__(len(source), backbone.dim, source.num_classes, config, seed)
        self.backbone, self.source, self.workers = backbone, source, workers

    def features(self, chosen: np.ndarray) -> Features:
        return self.backbone.extract(Subset(self.source, chosen), self.config.token, self.workers)

    def train(self, chosen: np.ndarray, rates: Sequence[float]) -> Iterator[Head]:
        """Heads after each epoch; batches cross the end of an epoch."""
        backbone = self.backbone
        token = backbone.choose_token(self.config.token)
        all_rates, steps = self.step(len(chosen), rates), self.steps_per_epoch(len(chosen))

        @jax.jit
        def step(params: Params, heads: Head, batch: Any, number: jax.Array) -> Head:
            features = backbone.pooled(params, batch["image"], token)
            return all_rates(heads, features, batch["label"], number)

        heads = self.start(rates)
        batches = train_batches(
            Subset(self.source, chosen),
            TrainTransform(backbone.image_size),
            batch_size=self.config.batch_size,
            seed=self.seed,
            workers=self.workers,
        )
        with contextlib.closing(batches):
            for number in range(self.config.epochs * steps):
                batch = backbone.put(next(batches))
                heads = step(backbone.params, heads, batch, jnp.int32(number))
                if (number + 1) % steps == 0:
                    yield heads
