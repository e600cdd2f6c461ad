"""The linear probe: one linear head on frozen features, for any task of `heads`.

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
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from singer_jax.data.loader import train_batches
from singer_jax.data.sources import Source, Subset
from singer_jax.errors import InputError
from singer_jax.evaluation.backbone import Backbone, Examples
from singer_jax.evaluation.heads import Head, Task
from singer_jax.models.params import Params
from singer_jax.training.optimizer import cosine_schedule

FINAL_LEARNING_RATE = 1e-8

# Features up to this size go to the device at once, and a whole epoch is one program.
_ON_DEVICE = 2**30


@dataclasses.dataclass(frozen=True)
class ProbeResult:
    """What a probe found.

    Attributes:
      learning_rate: of the reported head.
      held_out: the task's score of each rate on held-out training images, where there were several.
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
    *,
    steps: int,
    weight_decay: float,
) -> tuple[Head, Float[Array, ""]]:
    """One step of the probe.

    Args:
      task: whose loss is minimised.
      head: before the step.
      features, labels: of the batch.
      step: counted from 0.
      learning_rate: the peak, that of step 0.
      steps: of the whole probe.
      weight_decay: times the parameter, added to the gradient.

    Returns:
      the head after the step, and the loss before it.
    """
    loss, gradient = jax.value_and_grad(task.loss)(head, features, labels)
    rate = cosine_schedule(learning_rate, steps, 0, FINAL_LEARNING_RATE / learning_rate)(step)
    head = jax.tree.map(lambda p, g: p - rate * (g + weight_decay * p), head, gradient)
    return head, loss


@functools.partial(jax.jit, static_argnums=0)
def _count(task: Task, heads: Head, features: Array, labels: Array, valid: Array) -> Any:
    return jax.vmap(task.count, in_axes=(0, None, None, None))(heads, features, labels, valid)


def score(
    task: Task,
    heads: Head,
    examples: Examples,
    batch_size: int = 256,
) -> list[dict[str, float]]:
    """The metrics of stacked heads on a split, every image counted once.

    Args:
      task: of the heads.
      heads: with a leading axis.
      examples: of the split.
      batch_size: images at once; the last batch is padded and the padding left out.
    """
    images = np.arange(examples.images)
    batch_size = min(batch_size, len(images))
    total: dict[str, np.ndarray] = {}
    for start in range(0, len(images), batch_size):
        index = images[start : start + batch_size]
        valid = np.arange(batch_size) < len(index)
        features, labels = examples.take(np.resize(index, batch_size))
        counts = jax.device_get(_count(task, heads, features, labels, valid))
        for name, value in counts.items():
            wide = np.int64 if np.issubdtype(value.dtype, np.integer) else np.float64
            total[name] = total.get(name, 0) + value.astype(wide)
    heads_trained = len(heads["bias"])
    return [
        task.metrics({name: value[number] for name, value in total.items()})
        for number in range(heads_trained)
    ]


class Trainer(Protocol):
    """Trains heads on training images that are named by index."""

    task: Task
    images: int

    def centre(self, chosen: np.ndarray) -> Examples:
        """Centre-crop features of some images."""

    def train(self, chosen: np.ndarray, rates: Sequence[float]) -> Iterator[Head]:
        """The heads of all rates, stacked, after each epoch on some images."""


def probe(trainer: Trainer, test: Examples, config: Any, seed: int = 0) -> ProbeResult:
    """Trains a linear head and tests it after every epoch.

    Several learning rates are compared on held-out training images, never on the test split; the
    best one is then trained on all of them.

    Args:
      trainer: for the training images.
      test: of the test split.
      config: the `probe` part of the configuration.
      seed: of the choice of held-out images.

    Raises:
      InputError: settings that cannot work.
    """
    task, rates = trainer.task, tuple(config.learning_rates)
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
        found = score(task, trained, trainer.centre(order[:cut]))
        held_out = {rate: metrics[task.score] for rate, metrics in zip(rates, found, strict=True)}
        rates = (max(rates, key=held_out.__getitem__),)
    by_epoch = []
    for heads in trainer.train(order, rates):
        by_epoch += score(task, heads, test)
    best = max(range(len(by_epoch)), key=lambda epoch: by_epoch[epoch][task.score])
    head = {name: np.asarray(value[0]) for name, value in heads.items()}
    return ProbeResult(rates[0], held_out, by_epoch[-1], by_epoch[best], best + 1, head)


class _Trainer:
    """What both trainers share: settings, the first heads, the step of all rates."""

    def __init__(
        self, task: Task, images: int, head_shape: tuple[int, int], config: Any, seed: int
    ) -> None:
        if config.epochs < 1:
            raise InputError(f"probe.epochs: {config.epochs}; give at least 1")
        if config.batch_size < 1:
            raise InputError(f"probe.batch_size: {config.batch_size}; give at least 1")
        if head_shape[1] < 2:
            raise InputError("the probe needs labels: one folder of images a class")
        self.task, self.images, self.head_shape = task, images, head_shape
        self.config, self.seed = config, seed

    def steps_per_epoch(self, images: int) -> int:
        return math.ceil(images / self.config.batch_size)

    def start(self, rates: Sequence[float]) -> Head:
        head = init_head(jax.random.key(self.seed), *self.head_shape)
        return jax.tree.map(lambda leaf: jnp.stack([leaf] * len(rates)), head)

    def step(self, images: int, rates: Sequence[float]) -> Callable[..., Head]:
        """(heads, features, labels, step) -> heads; traceable."""
        step = functools.partial(
            sgd_step,
            self.task,
            steps=self.config.epochs * self.steps_per_epoch(images),
            weight_decay=self.config.weight_decay,
        )
        peaks = jnp.asarray(rates)
        return lambda *xs: jax.vmap(step, in_axes=(0, None, None, None, 0))(*xs, peaks)[0]


class FeatureTrainer(_Trainer):
    """Trains on features that were extracted once; each epoch on the next augmented view.

    Args:
      task: of the probe.
      train: of the training split; with one view only the centre crop is trained on, with more
        the others.
      head_shape: inputs and outputs.
      config: the `probe` part of the configuration.
      seed: of the head and the order.
    """

    def __init__(
        self,
        task: Task,
        train: Examples,
        head_shape: tuple[int, int],
        config: Any,
        seed: int = 0,
    ) -> None:
        super().__init__(task, train.images, head_shape, config, seed)
        self._train = train

    def centre(self, chosen: np.ndarray) -> Examples:
        return Examples(*self._train.take(chosen))

    def train(self, chosen: np.ndarray, rates: Sequence[float]) -> Iterator[Head]:
        """Batches of the same order for all rates; they cross the end of an epoch."""
        steps, train = self.steps_per_epoch(len(chosen)), self._train
        run_epoch = self._epoch(len(chosen), rates)
        rng, heads = np.random.default_rng(self.seed), self.start(rates)
        order = np.zeros(0, chosen.dtype)
        passes, wanted = 0, steps * self.config.batch_size
        for number in range(self.config.epochs):
            while len(order) < wanted:
                view = 1 + passes % (train.views - 1) if train.views > 1 else 0
                order = np.concatenate([order, rng.permutation(chosen) + view * train.images])
                passes += 1
            batches, order = order[:wanted].reshape(steps, -1), order[wanted:]
            heads = run_epoch(heads, number * steps, batches)
            yield heads

    def _epoch(self, images: int, rates: Sequence[float]) -> Callable[..., Head]:
        """(heads, number of the first step, indices [steps, batch]) -> heads."""
        step, train = self.step(images, rates), self._train
        if train.features.nbytes > _ON_DEVICE:
            one = jax.jit(step)

            def run(heads: Head, first: int, batches: np.ndarray) -> Head:
                for number, index in enumerate(batches):
                    heads = one(heads, *train.take(index), jnp.int32(first + number))
                return heads

            return run

        @jax.jit
        def epoch(heads: Head, features: Array, labels: Array, first: Array, order: Array) -> Head:
            def body(heads: Head, xs: tuple[Array, Array]) -> tuple[Head, None]:
                number, index = xs
                batch = features[index].astype(jnp.float32)
                return step(heads, batch, labels[index], number), None

            return jax.lax.scan(body, heads, (first + jnp.arange(len(order)), order))[0]

        arrays = (jnp.asarray(train.features), jnp.asarray(train.labels))
        return lambda heads, first, batches: epoch(heads, *arrays, jnp.int32(first), batches)


class CropTrainer(_Trainer):
    """Trains on new random crops in every epoch, through the backbone (the published protocol).

    Args:
      task: of the probe.
      backbone: the model to measure.
      source: the training split.
      transform: makes the random crops.
      centre_of: centre-crop features of a source.
      config: the `probe` part of the configuration.
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
        config: Any,
        seed: int = 0,
        workers: int = 0,
    ) -> None:
        super().__init__(task, len(source), task.head_shape(backbone.arch), config, seed)
        if config.batch_size % backbone.mesh.size:
            raise InputError(
                f"probe.batch_size: {config.batch_size} is not divisible by "
                f"{backbone.mesh.size} devices; set mesh.data"
            )
        self.backbone, self.source, self.transform = backbone, source, transform
        self.centre_of, self.workers = centre_of, workers

    def centre(self, chosen: np.ndarray) -> Examples:
        return self.centre_of(Subset(self.source, chosen))

    def train(self, chosen: np.ndarray, rates: Sequence[float]) -> Iterator[Head]:
        """Heads after each epoch; batches cross the end of an epoch."""
        backbone, task = self.backbone, self.task
        all_rates, steps = self.step(len(chosen), rates), self.steps_per_epoch(len(chosen))

        @jax.jit
        def step(params: Params, heads: Head, batch: Any, number: jax.Array) -> Head:
            features = backbone.features(params, batch["image"], task)
            return all_rates(heads, features, batch["label"], number)

        heads = self.start(rates)
        batches = train_batches(
            Subset(self.source, chosen),
            self.transform,
            batch_size=self.config.batch_size,
            seed=self.seed,
            workers=self.workers,
            strict=True,
        )
        with contextlib.closing(batches):
            for number in range(self.config.epochs * steps):
                batch = backbone.put(next(batches))
                heads = step(backbone.params, heads, batch, jnp.int32(number))
                if (number + 1) % steps == 0:
                    yield heads
