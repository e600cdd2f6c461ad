"""The interface of distillation methods, the matching of layers, and the adapters.

A method is an NNX module. Its `nnx.Param`s are trained. Its `FrozenVariable`s are computed once,
saved and never trained. A new method needs a file with its settings and a subclass of `Method`, and
a line in `methods/__init__.py`. Axis names are batch, tokens, patches, dim and classes as in
`models/vit.py`; rank is that of a LoRA update.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import numpy as np
import scipy.optimize
from flax import nnx
from jaxtyping import Array, Float, Int, Num, Shaped

from singer_jax.errors import InputError
from singer_jax.methods.tokens import TokenMatch
from singer_jax.models.architecture import Architecture
from singer_jax.models.vit import VisionTransformer
from singer_jax.settings.ranges import FROM_ZERO, Each, Flag, OneOf, optional
from singer_jax.settings.settings import Settings, setting

Scalars = dict[str, Float[Array, ""]]


class FrozenVariable(nnx.Variable):
    """A variable that is saved with a method and never trained; `Method.absorb` may change it."""


@dataclasses.dataclass(frozen=True)
class ModelFeatures:
    """A model and its features of one batch: the raw residual stream after each block.

    Attributes:
      model: The model.
      features: Features by index of the block.
      registers: The test-time register token that was added to each feature, by index of the block;
        empty for a model without test-time registers.
    """

    model: VisionTransformer
    features: Mapping[int, Float[Array, "batch tokens dim"]]
    registers: Mapping[int, Float[Array, "batch 1 dim"]] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(
        cls, model: VisionTransformer, images: Num[Array, "batch height width 3"]
    ) -> ModelFeatures:
        """Returns a model that has a `spec`, and all its features of images in 0..255."""
        return cls(model, dict(enumerate(model.features(model.spec.prepare(images)))))

    @classmethod
    def of_streams(
        cls, model: VisionTransformer, streams: Mapping[int, Float[Array, "batch tokens dim"]]
    ) -> ModelFeatures:
        """Returns a model and its features, as `VisionTransformer.streams_at` returns them."""
        parts = {layer: model.split_register(x) for layer, x in streams.items()}
        added = {layer: register for layer, (register, _) in parts.items() if register is not None}
        return cls(model, {layer: feature for layer, (_, feature) in parts.items()}, added)

    def next_block(
        self, layer: int, x: Float[Array, "batch tokens dim"]
    ) -> Float[Array, "batch tokens dim"]:
        """Applies the block after `layer` to `x`, which replaces the feature of `layer`.

        A register token that was added to the feature is passed along. If features are means over
        views (`models.shift_average`), the next feature differs from the result: the mean of a
        block's outputs is not the block's output for the mean.
        """
        return self.model.apply_block(layer + 1, x, self.registers.get(layer))

    def head_output(self) -> Float[Array, "batch outputs"]:
        """Applies the model's head to its last feature."""
        return self.model.head_output(self.features[self.model.arch.depth - 1])


@dataclasses.dataclass(frozen=True)
class Batch:
    """Inputs of a method from a batch or micro-batch, in addition to the features.

    Random numbers are drawn for all images of the step at once, and `own` selects those of this
    micro-batch. They depend neither on the number of micro-batches nor on that of processes.

    Attributes:
      labels: Class of each image; None if the data has no labels.
      key: Key for the random numbers of this step, the same for all of its micro-batches.
      rows: Index of each image in the batch of the step; None for the whole batch in order.
      parts: Number of micro-batches of the step, all of the same size.
    """

    labels: Int[Array, " batch"] | None = None
    key: jax.Array | None = None
    rows: Int[Array, " batch"] | None = None
    parts: int = 1

    def own(self, of_step: Shaped[Array, "images ..."]) -> Shaped[Array, "batch ..."]:
        """Selects this micro-batch's rows of an array with a row for each image of the step."""
        return of_step if self.rows is None else of_step[self.rows]


class MethodRequirements(NamedTuple):
    """The inputs that a method reads.

    Attributes:
      teacher: True if the method needs a teacher.
      logits: True if it reads the output of the student's head, and so every block.
      labels: True if it reads the labels of the images.
      teacher_logits: True if it reads the teacher's head, which has the classes of the student.
      measured: True if it needs the result of `Method.measure` on the first batches.
    """

    teacher: bool = True
    logits: bool = False
    labels: bool = False
    teacher_logits: bool = False
    measured: bool = False


@dataclasses.dataclass(frozen=True)
class TokenSettings(Settings):
    """Settings of all methods that compare tokens of student and teacher."""

    layer_mapping: str = setting(
        "last_to_last",
        OneOf(("last_to_last", "official")),
        "Rule that assigns a student block to each teacher block (`methods.base.match_layers`).",
    )
    interpolate_patch_grid: bool = setting(
        False,
        Flag(),
        "Interpolate the student's patches to the teacher's grid if the grids differ.",
    )


@dataclasses.dataclass(frozen=True)
class LayerSettings(TokenSettings):
    """Settings of the distilled blocks."""

    layers: tuple[int, ...] | None = setting(
        None,
        optional(Each(FROM_ZERO)),
        "Distilled teacher blocks, 0-based and ascending. None: blocks at the published relative "
        "depths.",
    )
    include_last_layer: bool = setting(
        True, Flag(), "Distil the teacher's last block in addition to `layers`."
    )


class Method(nnx.Module):
    """A distillation loss with trainable parts.

    A subclass names the class of its settings and is made by `Subclass(teacher, student, settings,
    rngs)`. The arguments are the teacher (None for a method without one), the student's
    architecture, the settings, and NNX random streams. A method that requires measurements also
    takes `measured`. The constructor may run under `jax.jit`.

    Attributes:
      Settings: Class of the settings, all of which have defaults.
      teacher_layers, student_layers: The distilled blocks, matched one to one.
      tokens: The compared tokens; None if no features are compared.
    """

    Settings: ClassVar[type[Settings]] = Settings
    teacher_layers: tuple[int, ...] = ()
    student_layers: tuple[int, ...] = ()
    tokens: TokenMatch | None = None

    @classmethod
    def needs(cls, settings: Any) -> MethodRequirements:
        """Returns the inputs that `loss` reads."""
        return MethodRequirements()

    @classmethod
    def measure(cls, teacher: ModelFeatures, settings: Any) -> dict[str, Array]:
        """Returns measurements of the teacher on a batch; those of several batches are added."""
        return {}

    @property
    def teacher_reads(self) -> tuple[int, ...]:
        """Teacher blocks whose features `loss` and `diagnose` read."""
        return self.teacher_layers

    def loss(self, teacher: ModelFeatures | None, student: ModelFeatures, batch: Batch) -> Scalars:
        """Returns named, already weighted loss terms, whose sum is minimised."""
        raise NotImplementedError

    def observe(self, teacher: ModelFeatures | None) -> dict[str, Any]:
        """Returns means over the images of a training batch, from which `absorb` keeps statistics.

        They are averaged over the micro-batches of a step. By default there are none.
        """
        return {}

    def absorb(self, means: dict[str, Any]) -> None:
        """Updates the method's `FrozenVariable`s with the result of `observe`.

        It is called on a copy of the method before the loss of each micro-batch, and on the method
        itself, with the means of the whole step, after the update.
        """

    def diagnose(self, teacher: ModelFeatures | None) -> Scalars:
        """Returns further metrics, which are computed only in logged steps."""
        return {}

    def report(self, metrics: Mapping[str, float]) -> list[tuple[int, str]]:
        """Returns the lines to log when a run starts, each with its `logging` level.

        Args:
          metrics: Metrics of the first step, diagnostics included.
        """
        if self.tokens is None:
            return []
        layers = ", ".join(
            f"{own}<-{layer}"
            for layer, own in zip(self.teacher_layers, self.student_layers, strict=True)
        )
        line = f"layer mapping (student<-teacher): {layers}; tokens: {self.tokens.describe()}"
        return [(logging.INFO, line)]


def match_layers(
    rule: str, teacher_layers: Sequence[int], teacher_depth: int, student_depth: int
) -> tuple[int, ...]:
    """Returns the student block that learns from each distilled teacher block.

    It is the one-to-one assignment with the least sum of distances between relative depths.

    Args:
      rule: `last_to_last` compares (l + 1) / L of teacher and student, so that the last block
        learns from the last; `official` compares l / L of the teacher with linspace(0, 1, L) of the
        student, which for equal depths leaves the student's last block untrained.
      teacher_layers: block indices.
      teacher_depth, student_depth: numbers of blocks.

    Raises:
      InputError: more layers than the student has blocks.
    """
    if len(teacher_layers) > student_depth:
        raise InputError(
            f"method.layers: {len(teacher_layers)} distilled layers, but the student has only "
            f"{student_depth} blocks; distil fewer layers or use a deeper student"
        )
    layers = np.asarray(teacher_layers)
    depths = {
        "last_to_last": (
            (layers + 1) / teacher_depth,
            np.arange(1, student_depth + 1) / student_depth,
        ),
        "official": (layers / teacher_depth, np.linspace(0, 1, student_depth)),
    }
    of_teacher, of_student = depths[rule]
    distance = np.abs(of_teacher[:, None] - of_student[None, :])
    matched = [int(index) for index in scipy.optimize.linear_sum_assignment(distance)[1]]
    # If several assignments have the least sum, take the one in which no two pairs cross.
    return tuple(sorted(matched) if rule == "last_to_last" else matched)


def teacher_layers(
    layers: Sequence[int] | None,
    include_last_layer: bool,
    relative_depths: Sequence[float],
    teacher: Architecture,
) -> tuple[int, ...]:
    """Returns the distilled teacher blocks in ascending order.

    Args:
      layers: Indices of blocks; None for those at `relative_depths`.
      include_last_layer: Adds the last block.
      relative_depths: Relative depths of the method's published layers; 0.75 is block 17 of 24.
      teacher: Architecture of the teacher, for its depth.

    Raises:
      InputError: An index is out of range or appears twice, or there is none.
    """
    depth = teacher.depth
    if layers is None:
        layers = sorted({max(0, round(relative * depth) - 1) for relative in relative_depths})
    layers = [int(layer) for layer in layers]
    if include_last_layer and depth - 1 not in layers:
        layers.append(depth - 1)
    for layer in layers:
        if not 0 <= layer < depth:
            raise InputError(
                f"method.layers: {layer} is out of range, the teacher has blocks 0 to {depth - 1}"
            )
    if len(set(layers)) < len(layers) or sorted(layers) != layers or not layers:
        raise InputError(
            f"method.layers: {tuple(layers)} is invalid; give distinct blocks in ascending order"
        )
    return tuple(layers)


def distilled_layers(
    settings: LayerSettings,
    relative_depths: Sequence[float],
    teacher: Architecture,
    student: Architecture,
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns the distilled teacher blocks and the student blocks matched to them.

    Args:
      settings: Settings of the layers and their mapping.
      relative_depths: Relative depths of the method's published layers.
      teacher, student: Architectures, for their depths.

    Raises:
      InputError: The layers are invalid for `teacher_layers` or `match_layers`.
    """
    layers = teacher_layers(settings.layers, settings.include_last_layer, relative_depths, teacher)
    return layers, match_layers(settings.layer_mapping, layers, teacher.depth, student.depth)


def freeze(module: nnx.Module, *names: str) -> None:
    """Turns parameters of a module into frozen variables, which are saved and never trained.

    Args:
      module: The module.
      names: Attributes of the module to freeze; without names, all parameters in it.
    """
    for path, node in nnx.iter_modules(module):
        for name in names or list(vars(node)):
            value = getattr(node, name, None)
            if isinstance(value, nnx.Param) and not (names and path):
                setattr(node, name, FrozenVariable(value[...]))


def linear_adapters(
    layers: Sequence[int], in_features: int, out_features: int, rngs: nnx.Rngs
) -> nnx.Dict:
    """Makes a `linear_adapter` for each student block."""
    each = {str(layer): linear_adapter(in_features, out_features, rngs) for layer in layers}
    return nnx.Dict(each)


def linear_adapter(in_features: int, out_features: int, rngs: nnx.Rngs) -> nnx.Linear:
    """Makes a float32 linear map from student to teacher width, with PyTorch's initialisation."""
    uniform = jax.nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
    bound = in_features**-0.5
    return nnx.Linear(
        in_features,
        out_features,
        kernel_init=uniform,
        bias_init=lambda key, shape, dtype: jax.random.uniform(
            key, shape, dtype, minval=-bound, maxval=bound
        ),
        rngs=rngs,
    )
