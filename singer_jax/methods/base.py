"""What distillation methods share: the interface, the matching of layers, the adapters.

A method is an NNX module. Its `nnx.Param`s are trained; its `FrozenVariable`s are computed once,
saved and left alone. Adding one is a file with its settings and a subclass of `Method`, and a
line in `methods/__init__.py`. Axis names: batch, tokens, patches, dim, classes as in
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
    """A part of a method that is saved with it and never trained; `Method.absorb` may change it."""


@dataclasses.dataclass(frozen=True)
class ModelFeatures:
    """A model and its features of one batch: the raw residual stream after each block by index.

    Attributes:
      model: the model.
      features: by block.
      registers: of a teacher with test-time registers the token that was added to each feature.
    """

    model: VisionTransformer
    features: Mapping[int, Float[Array, "batch tokens dim"]]
    registers: Mapping[int, Float[Array, "batch 1 dim"]] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(
        cls, model: VisionTransformer, images: Num[Array, "batch height width 3"]
    ) -> ModelFeatures:
        """A model that knows its `spec`, and all its features of images in 0..255."""
        return cls(model, dict(enumerate(model.features(model.spec.prepare(images)))))

    @classmethod
    def of_streams(
        cls, model: VisionTransformer, streams: Mapping[int, Float[Array, "batch tokens dim"]]
    ) -> ModelFeatures:
        """A model and its features, as `VisionTransformer.streams_at` gives them."""
        parts = {layer: model.split_register(x) for layer, x in streams.items()}
        added = {layer: register for layer, (register, _) in parts.items() if register is not None}
        return cls(model, {layer: feature for layer, (_, feature) in parts.items()}, added)

    def next_block(
        self, layer: int, x: Float[Array, "batch tokens dim"]
    ) -> Float[Array, "batch tokens dim"]:
        """What the block after `layer` makes of `x` in the place of that feature.

        A token that was added to the feature goes with it. Features that are means over views
        (`models.views`) are not what this gives of the feature before: the mean of a block is not
        the block of a mean.
        """
        return self.model.apply_block(layer + 1, x, self.registers.get(layer))

    def head_output(self) -> Float[Array, "batch outputs"]:
        """What the model's head makes of its last feature."""
        return self.model.head_output(self.features[self.model.arch.depth - 1])


@dataclasses.dataclass(frozen=True)
class Batch:
    """What a method may need of a batch, or of a micro-batch, beside the features.

    Random numbers are drawn for all images of the step at once, and `own` selects those of this
    micro-batch: so they depend neither on the number of micro-batches nor on that of processes.

    Attributes:
      labels: class of each image, where the data has labels.
      key: for this step's random numbers, the same for all of its micro-batches.
      rows: index of each image in the step's batch; None: it is the whole batch, in order.
      parts: number of the step's micro-batches, all of one size.
    """

    labels: Int[Array, " batch"] | None = None
    key: jax.Array | None = None
    rows: Int[Array, " batch"] | None = None
    parts: int = 1

    def own(self, of_step: Shaped[Array, "images ..."]) -> Shaped[Array, "batch ..."]:
        """Selects this micro-batch's rows of an array with a row for each image of the step."""
        return of_step if self.rows is None else of_step[self.rows]


class MethodRequirements(NamedTuple):
    """What a method looks at.

    Attributes:
      teacher: whether there is one.
      logits: the student's head, and with it every block.
      labels: of the images.
      teacher_logits: the teacher's head, with the student's classes.
      measured: what `Method.measure` finds in the first batches, before the method is made.
    """

    teacher: bool = True
    logits: bool = False
    labels: bool = False
    teacher_logits: bool = False
    measured: bool = False


@dataclasses.dataclass(frozen=True)
class TokenSettings(Settings):
    """How student and teacher are compared, by every method that compares tokens."""

    layer_mapping: str = setting(
        "last_to_last",
        OneOf(("last_to_last", "official")),
        "which student block learns from a teacher block (`methods.base.match_layers`)",
    )
    interpolate_patch_grid: bool = setting(
        False, Flag(), "compare models of other grids on the teacher's grid"
    )


@dataclasses.dataclass(frozen=True)
class LayerSettings(TokenSettings):
    """Which blocks are distilled."""

    layers: tuple[int, ...] | None = setting(
        None,
        optional(Each(FROM_ZERO)),
        "teacher blocks from 0, ascending; None: at the published relative depths",
    )
    include_last_layer: bool = setting(True, Flag(), "also distil the teacher's last block")


class Method(nnx.Module):
    """A distillation loss with trainable parts.

    A subclass names the class of its settings and is made by `Subclass(teacher, student, settings,
    rngs)`: the teacher (None for a method without one), the student's architecture, its settings,
    NNX random streams; one that needs it also takes `measured`. It may run under `jax.jit`.

    Attributes:
      Settings: the class of its settings, all of which have defaults.
      teacher_layers, student_layers: the distilled blocks, matched one to one.
      tokens: which tokens are compared; None where no features are.
    """

    Settings: ClassVar[type[Settings]] = Settings
    teacher_layers: tuple[int, ...] = ()
    student_layers: tuple[int, ...] = ()
    tokens: TokenMatch | None = None

    @classmethod
    def needs(cls, settings: Any) -> MethodRequirements:
        """What `loss` will look at."""
        return MethodRequirements()

    @classmethod
    def measure(cls, teacher: ModelFeatures, settings: Any) -> dict[str, Array]:
        """What a method that needs it must know of a batch; that of several batches adds up."""
        return {}

    @property
    def teacher_reads(self) -> tuple[int, ...]:
        """The teacher's blocks whose features `loss` and `diagnose` look at."""
        return self.teacher_layers

    def loss(self, teacher: ModelFeatures | None, student: ModelFeatures, batch: Batch) -> Scalars:
        """Named loss terms, already weighted, whose sum is minimised."""
        raise NotImplementedError

    def observe(self, teacher: ModelFeatures | None) -> dict[str, Any]:
        """Means over the images of a training batch that the method keeps statistics of.

        Of a step's micro-batches they are averaged. None by default.
        """
        return {}

    def absorb(self, means: dict[str, Any]) -> None:
        """Takes what `observe` gave into the method's `FrozenVariable`s.

        A micro-batch's before its loss, in a copy; a step's, all together, after its update.
        """

    def diagnose(self, teacher: ModelFeatures | None) -> Scalars:
        """Further metrics, which are computed only in steps that are logged."""
        return {}

    def report(self, metrics: Mapping[str, float]) -> list[tuple[int, str]]:
        """What a user should know when a run starts, as lines with a `logging` level.

        Args:
          metrics: of the first step, diagnostics included.
        """
        if self.tokens is None:
            return []
        layers = ", ".join(
            f"{own} <- {layer}"
            for layer, own in zip(self.teacher_layers, self.student_layers, strict=True)
        )
        line = f"student blocks {layers}; compared tokens: {self.tokens.describe()}"
        return [(logging.INFO, line)]


def match_layers(
    rule: str, teacher_layers: Sequence[int], teacher_depth: int, student_depth: int
) -> tuple[int, ...]:
    """The student block that learns from each distilled teacher block.

    The one-to-one assignment with the least sum of distances between relative depths.

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
            f"{student_depth} blocks"
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
    # Of several assignments with the least sum, the one in which no two pairs cross.
    return tuple(sorted(matched) if rule == "last_to_last" else matched)


def teacher_layers(
    layers: Sequence[int] | None,
    include_last_layer: bool,
    relative_depths: Sequence[float],
    teacher: Architecture,
) -> tuple[int, ...]:
    """Distilled teacher blocks, ascending.

    Args:
      layers: indices of blocks; None: at `relative_depths`.
      include_last_layer: also the last block.
      relative_depths: of the method's published layers; 0.75 is block 17 of 24.
      teacher: for its depth.

    Raises:
      InputError: an index out of range or twice, or none at all.
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
            f"method.layers: {tuple(layers)} must be distinct, ascending and not empty"
        )
    return tuple(layers)


def distilled_layers(
    settings: LayerSettings,
    relative_depths: Sequence[float],
    teacher: Architecture,
    student: Architecture,
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Distilled teacher blocks and the student blocks matched to them.

    Args:
      settings: which layers, and how they are matched.
      relative_depths: of the method's published layers.
      teacher, student: for their depths.

    Raises:
      InputError: as `teacher_layers` and `match_layers`.
    """
    layers = teacher_layers(settings.layers, settings.include_last_layer, relative_depths, teacher)
    return layers, match_layers(settings.layer_mapping, layers, teacher.depth, student.depth)


def freeze(module: nnx.Module, *names: str) -> None:
    """Turns parameters of a module into constants, which are saved and never trained.

    Args:
      module: whose attributes `names`, or all parameters in it.
      names: attributes; none: everything.
    """
    for path, node in nnx.iter_modules(module):
        for name in names or list(vars(node)):
            value = getattr(node, name, None)
            if isinstance(value, nnx.Param) and not (names and path):
                setattr(node, name, FrozenVariable(value[...]))


def linear_adapters(
    layers: Sequence[int], in_features: int, out_features: int, rngs: nnx.Rngs
) -> nnx.Dict:
    """A `linear_adapter` for each student block."""
    each = {str(layer): linear_adapter(in_features, out_features, rngs) for layer in layers}
    return nnx.Dict(each)


def linear_adapter(in_features: int, out_features: int, rngs: nnx.Rngs) -> nnx.Linear:
    """A linear map from student to teacher width in float32, initialised as PyTorch's `Linear`."""
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
