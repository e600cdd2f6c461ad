"""Trainers of linear heads, on features extracted once or on new crops in every epoch.

They use SGD without momentum, with weight decay and a cosine schedule to 1e-8 at every step. Both
train a head for each learning rate on the same batches at once.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from singer_jax.data.loader import LoaderOptions, train_batches
from singer_jax.data.sources import Source, Subset
from singer_jax.errors import InputError
from singer_jax.evaluation.backbone import Backbone, Examples
from singer_jax.evaluation.heads import Head, Task, mean_loss
from singer_jax.evaluation.probe import ProbeSettings
from singer_jax.evaluation.progress import Progress
from singer_jax.evaluation.scoring import padded
from singer_jax.models.params import Params
from singer_jax.platform import parallel
from singer_jax.platform.memory import fitting
from singer_jax.platform.sharded_rows import pick, spread
from singer_jax.runs.schedules import cosine_schedule

FINAL_LEARNING_RATE = 1e-8


def init_head(key: jax.Array, inputs: int, outputs: int) -> Head:
    """Returns a head initialised as PyTorch's `Linear` and 1x1 `Conv2d`."""
    bound = inputs**-0.5
    kernel_key, bias_key = jax.random.split(key)
    return {
        "kernel": jax.random.uniform(kernel_key, (inputs, outputs), minval=-bound, maxval=bound),
        "bias": jax.random.uniform(bias_key, (outputs,), minval=-bound, maxval=bound),
    }


class FeatureBatch(NamedTuple):
    """Features and labels of a batch; `valid` is False for padding, None without padding."""

    features: Float[Array, "batch ..."]
    labels: Array
    valid: Bool[Array, " batch"] | None = None


@dataclasses.dataclass(frozen=True)
class SgdOptions:
    """The inputs that all steps of a probe share.

    Attributes:
      steps: number of steps of the whole probe.
      weight_decay: factor of the parameter that is added to the gradient.
      mesh: devices over which a batch is split; None: it is not split.
    """

    steps: int
    weight_decay: float
    mesh: Mesh | None = None


def sgd_step(
    task: Task,
    head: Head,
    batch: FeatureBatch,
    step: Int[Array, ""],
    learning_rate: Float[Array, ""],
    options: SgdOptions,
) -> tuple[Head, Float[Array, ""]]:
    """Computes one step of the probe.

    Args:
      task: task whose loss is minimised.
      head: head before the step.
      batch: features and labels.
      step: number of the step, counted from 0.
      learning_rate: peak learning rate, which is that of step 0.
      options: what all steps share.

    Returns:
      the head after the step, and the loss before it.
    """

    def loss_of(head: Head) -> Float[Array, ""]:
        return mean_loss(task, head, *batch, options.mesh)

    loss, gradient = jax.value_and_grad(loss_of)(head)
    final_ratio = FINAL_LEARNING_RATE / learning_rate
    rate = cosine_schedule(learning_rate, options.steps, 0, final_ratio)(step)
    head = jax.tree.map(lambda p, g: p - rate * (g + options.weight_decay * p), head, gradient)
    return head, loss


def padded_rows(batch_size: int, mesh: Mesh) -> int:
    """Returns the number of rows of a batch padded to a multiple of the number of devices."""
    return math.ceil(batch_size / mesh.size) * mesh.size


class _Trainer:
    """Common base of both trainers: settings, initial heads, and the step of all rates.

    The batch is padded to a multiple of the number of devices. Padding has no weight in the loss.
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
            raise InputError(
                "data.source: the probe needs labels; give a folder with one subfolder per class"
            )
        self.task, self.images, self.head_shape = task, images, head_shape
        self.settings, self.seed, self.mesh = settings, seed, mesh
        self.rows = padded_rows(settings.batch_size, mesh)

    def steps_per_epoch(self, images: int) -> int:
        return math.ceil(images / self.settings.batch_size)

    def start(self, rates: Sequence[float], progress: Progress) -> Head:
        """Returns the heads of the progress, or initial ones, on every device."""
        heads = progress.heads
        if heads is None:
            head = init_head(jax.random.key(self.seed), *self.head_shape)
            heads = {name: np.stack([leaf] * len(rates)) for name, leaf in head.items()}
        sharding = parallel.replicated(self.mesh)
        return {name: parallel.put(leaf, sharding) for name, leaf in heads.items()}

    def step(self, images: int, rates: Sequence[float]) -> Callable[..., Head]:
        """Returns (heads, features, labels, valid, step) -> heads; traceable."""
        peaks = np.asarray(rates, np.float32)
        steps = self.settings.epochs * self.steps_per_epoch(images)
        options = SgdOptions(steps, self.settings.weight_decay, self.mesh)

        def of_rate(head: Head, peak: Array, *xs: Array) -> Head:
            *batch, step = xs
            return sgd_step(self.task, head, FeatureBatch(*batch), step, peak, options)[0]

        def of_rates(heads: Head, *xs: Array) -> Head:
            in_axes = (0, 0, *[None] * len(xs))
            heads = jax.vmap(of_rate, in_axes=in_axes)(heads, peaks, *xs)
            return jax.lax.with_sharding_constraint(heads, parallel.replicated(self.mesh))

        return of_rates


class FeatureTrainer(_Trainer):
    """Trainer on features that were extracted once; each epoch uses the next augmented view.

    Args:
      task: task of the probe.
      train: features and labels of the training split; a single view is the centre crop and is
        trained on, with several views the centre crop is skipped.
      head_shape: number of inputs and outputs of the head.
      settings: settings of the probe; `epochs` must be set.
      seed: seed of the head and of the order.
      mesh: devices over which features and batches are split; default: one device.
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
        self, chosen: np.ndarray, rates: Sequence[float], start: Progress = Progress()
    ) -> Iterator[tuple[int, Head]]:
        """Trains all rates on the same batches; a batch may span the end of an epoch."""
        steps, train = self.steps_per_epoch(len(chosen)), self._train
        run_epoch = (self._on_device if self._fits() else self._streamed)(len(chosen), rates)
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
                left = batches[first - number * steps :]
                for done, after in run_epoch(heads, first, left):
                    yield done, after
                heads = after

    def _fits(self) -> bool:
        """Returns True if all features and a batch fit into the devices' memory."""
        features = self._train.features
        of_row = features.dtype.itemsize * math.prod(features.shape[1:])
        return fitting(self.mesh, of_row) >= len(features) / self.mesh.size + 2 * self.rows

    def _streamed(self, images: int, rates: Sequence[float]) -> Callable[..., Any]:
        """Returns (heads, number of the first step, indices [steps, batch]) -> steps and heads."""
        step = jax.jit(self.step(images, rates))

        def run(heads: Head, first: int, batches: np.ndarray) -> Iterator[tuple[int, Head]]:
            for number, index in enumerate(batches, first):
                batch = padded(self.mesh, self._train, index, self.rows)
                heads = step(heads, *batch, np.int32(number))
                yield number + 1, heads

        return run

    def _on_device(self, images: int, rates: Sequence[float]) -> Callable[..., Any]:
        """Returns a function as `_streamed`, with features on the devices and a jitted epoch."""
        epoch = self.epoch(images, rates)
        arrays = [
            spread(self.mesh, rows, len(rows))
            for rows in (self._train.features, self._train.labels)
        ]

        def run(heads: Head, first: int, batches: np.ndarray) -> Iterator[tuple[int, Head]]:
            yield first + len(batches), epoch(heads, *arrays, np.int32(first), batches)

        return run

    def epoch(self, images: int, rates: Sequence[float]) -> Callable[..., Head]:
        """Returns (heads, features, labels, first step, indices [steps, batch]) -> heads."""
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


class CropBatches:
    """Batches of new random crops, decoded once for all trainers that request the same step.

    Trainers that advance step by step share one stream. A request for any other step than the last
    or the next one opens a new stream, which changes the speed but not the batches.

    Args:
      source: training split.
      transform: transform that makes the random crops.
      settings: settings of the probe.
      mesh: devices over which a batch is split.
      seed: seed of the order and of the crops.
      workers: number of decoding processes.
    """

    def __init__(
        self,
        source: Source,
        transform: Callable[..., Any],
        settings: ProbeSettings,
        mesh: Mesh,
        seed: int = 0,
        workers: int = 0,
    ) -> None:
        self.source, self.transform, self.batch_size = source, transform, settings.batch_size
        self.mesh, self.seed, self.workers = mesh, seed, workers
        self._stream: Any = None
        self._chosen: np.ndarray | None = None
        self._step = -1  # step of the last batch
        self._batch: dict[str, jax.Array] = {}

    def at(self, chosen: np.ndarray, step: int) -> dict[str, jax.Array]:
        """Returns images, labels and `valid` of a step, counted from 0, on the mesh.

        Args:
          chosen: indices of the training images from which batches are drawn.
          step: number of the step.
        """
        same = chosen is self._chosen or np.array_equal(chosen, self._chosen)
        if same and step == self._step:
            return self._batch
        sharding, rows = parallel.batch_sharding(self.mesh), padded_rows(self.batch_size, self.mesh)
        if not same or self._stream is None or step != self._step + 1:
            self.close()
            self._stream = train_batches(
                Subset(self.source, chosen),
                self.transform,
                batch_size=self.batch_size,
                seed=self.seed,
                start=step,
                options=LoaderOptions(self.workers, True, parallel.local_rows(sharding, rows)),
            )
        batch = next(self._stream)
        given = {key: batch[key] for key in ("image", "label", "valid")}
        self._batch = parallel.put_rows(given, sharding, rows)
        self._chosen, self._step = chosen, step
        return self._batch

    def close(self) -> None:
        """Stops the decoding processes."""
        if self._stream is not None:
            self._stream.close()
        self._stream, self._chosen, self._batch = None, None, {}


class CropTrainer(_Trainer):
    """Trainer on new random crops in every epoch, through the backbone (the published protocol).

    Args:
      task: task of the probe.
      backbone: model to evaluate.
      batches: crops; their owner closes them.
      centre_of: function that returns centre-crop features of a source.
      settings: settings of the probe; `epochs` must be set.
      seed: seed of the head.
    """

    def __init__(
        self,
        task: Task,
        backbone: Backbone,
        batches: CropBatches,
        centre_of: Callable[[Source], Examples],
        settings: ProbeSettings,
        seed: int = 0,
    ) -> None:
        head_shape = task.head_shape(backbone.arch)
        images = len(batches.source)
        super().__init__(task, images, head_shape, settings, seed, backbone.mesh)
        self.backbone, self.batches, self.centre_of = backbone, batches, centre_of

    def centre(self, chosen: np.ndarray) -> Examples:
        return self.centre_of(Subset(self.batches.source, chosen))

    def train(
        self, chosen: np.ndarray, rates: Sequence[float], start: Progress = Progress()
    ) -> Iterator[tuple[int, Head]]:
        """Trains on random crops; a batch may span the end of an epoch."""
        steps, step = self.steps_per_epoch(len(chosen)), self.crop_step(len(chosen), rates)
        heads = self.start(rates, start)
        for number in range(start.step, self.settings.epochs * steps):
            batch = self.batches.at(chosen, number)
            heads = step(self.backbone.params, heads, batch, np.int32(number))
            yield number + 1, heads

    def crop_step(self, images: int, rates: Sequence[float]) -> Callable[..., Head]:
        """Returns (backbone's parameters, heads, batch, step) -> heads, jitted."""
        backbone, task, step = self.backbone, self.task, self.step(images, rates)

        @jax.jit
        def crop_step(params: Params, heads: Head, batch: Any, number: Array) -> Head:
            features = backbone.features(params, batch["image"], task)
            return step(heads, features, batch["label"], batch["valid"], number)

        return crop_step
