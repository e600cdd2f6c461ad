"""ViTKD: the student mimics the teacher's first blocks and generates its last from masked tokens.

"ViTKD: Feature-based Knowledge Distillation for Vision Transformers", CVPR Workshops 2024, in the
two forms of the SiNGER repository: its own (`ViTKD`) and that of the authors of ViTKD
(`ViTKDOfficial`).
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from singer_jax.errors import InputError
from singer_jax.methods.base import (
    Batch,
    ModelFeatures,
    Scalars,
    TokenSettings,
    freeze,
    linear_adapter,
    linear_adapters,
    match_layers,
)
from singer_jax.methods.match import Comparison, MatchSettings, TokenMethod
from singer_jax.methods.tokens import match_tokens
from singer_jax.models.architecture import Architecture
from singer_jax.models.vit import VisionTransformer
from singer_jax.settings.ranges import BETWEEN, FROM_ZERO, NOT_NEGATIVE, Each, Flag
from singer_jax.settings.settings import Settings, section, setting


@dataclasses.dataclass(frozen=True)
class ViTKDWeights(Settings):
    """Weights of ViTKD's loss terms."""

    mimic: float = setting(1.0, NOT_NEGATIVE, "Weight of the loss of the mimicked first blocks.")
    generation: float = setting(
        1.0, NOT_NEGATIVE, "Weight of the loss of the generated last block."
    )


@dataclasses.dataclass(frozen=True)
class MaskedSettings(TokenSettings):
    """Settings of both forms of ViTKD."""

    mimic_layers: tuple[int, ...] = setting(
        (0, 2), Each(FROM_ZERO), "Teacher blocks, 0-based, that the student mimics."
    )
    mask_ratio: float = setting(0.5, BETWEEN, "Fraction of the tokens that is masked.")
    train_generator: bool = setting(
        True, Flag(), "Train the generator; the official code leaves it at its initialisation."
    )
    loss_weights: ViTKDWeights = section(ViTKDWeights())


@dataclasses.dataclass(frozen=True)
class ViTKDSettings(MaskedSettings):
    """Settings of ViTKD as in the SiNGER repository; `match` applies only to mimicked blocks."""

    match: MatchSettings = section(MatchSettings())


@dataclasses.dataclass(frozen=True)
class ViTKDOfficialSettings(MaskedSettings):
    """Settings of ViTKD as its authors published it."""

    loss_weights: ViTKDWeights = section(ViTKDWeights(mimic=3e-5, generation=3e-6))


class Generator(nnx.Module):
    """A generator on a grid of tokens: 3x3 convolution, ReLU, 3x3 convolution, zero padding."""

    def __init__(self, dim: int, rngs: nnx.Rngs) -> None:
        self.conv1 = nnx.Conv(dim, dim, kernel_size=(3, 3), rngs=rngs)
        self.conv2 = nnx.Conv(dim, dim, kernel_size=(3, 3), rngs=rngs)

    def __call__(
        self, patches: Float[Array, "batch patches dim"], grid: tuple[int, int]
    ) -> Float[Array, "batch patches dim"]:
        image = patches.reshape(patches.shape[0], *grid, patches.shape[-1])
        return self.conv2(nnx.relu(self.conv1(image))).reshape(patches.shape)


def masking_noise(key: jax.Array, shape: tuple[int, ...]) -> Float[Array, "..."]:
    """Returns uniform random numbers that select the masked tokens."""
    return jax.random.uniform(key, shape)


class _Masked(TokenMethod):
    """The common base of both forms: layers, tokens, weights, a generator and a mask token."""

    def __init__(
        self,
        teacher: VisionTransformer,
        student: Architecture,
        settings: MaskedSettings,
        rngs: nnx.Rngs,
    ) -> None:
        arch = teacher.arch
        last = arch.depth - 1
        mimic = tuple(int(layer) for layer in settings.mimic_layers)
        for layer in mimic:
            if not 0 <= layer < last:
                raise InputError(
                    f"method.mimic_layers: {layer} is not in 0..{last - 1} (the teacher's last "
                    f"block, {last}, is generated)"
                )
        matched = match_layers(settings.layer_mapping, mimic, arch.depth, student.depth)
        (generated,) = match_layers(settings.layer_mapping, (last,), arch.depth, student.depth)
        if generated in matched:
            raise InputError(
                f"method.mimic_layers: student block {generated} would both mimic and generate; "
                "mimic earlier blocks or use a deeper student"
            )
        self.teacher_layers = (*mimic, last)
        self.student_layers = (*matched, generated)
        self.tokens = match_tokens(student, arch, settings.interpolate_patch_grid)
        self.mask_ratio = settings.mask_ratio
        self.weights = settings.loss_weights
        self.mask_token = nnx.Param(
            jax.nn.initializers.normal(0.02)(rngs.params(), (1, 1, arch.embed_dim))
        )


class ViTKD(_Masked):
    """ViTKD of the SiNGER repository.

    The losses are those of all tokens of the mimicked blocks and of the masked tokens of the last.
    """

    Settings = ViTKDSettings

    def __init__(
        self,
        teacher: VisionTransformer,
        student: Architecture,
        settings: ViTKDSettings,
        rngs: nnx.Rngs,
    ) -> None:
        super().__init__(teacher, student, settings, rngs)
        self.compare = Comparison(settings.match, self.tokens, self.teacher_layers[:-1])
        dim = teacher.arch.embed_dim
        self.adapter = linear_adapters(self.student_layers, student.embed_dim, dim, rngs)
        self.generator = nnx.Dict({str(self.student_layers[-1]): Generator(dim, rngs)})
        if not settings.train_generator:
            freeze(self.generator)
            freeze(self, "mask_token")

    def loss(self, teacher: ModelFeatures | None, student: ModelFeatures, batch: Batch) -> Scalars:
        """Returns the terms `mimic` and `generation`."""
        *mimicked, aligned = (
            self.adapter[str(own)](self.tokens.of_student(student.features[own]))
            for own in self.student_layers
        )
        *mimic_layers, last = self.teacher_layers
        mimic = sum(
            self.compare(predicted, teacher, layer)
            for predicted, layer in zip(mimicked, mimic_layers, strict=True)
        )
        target = self.tokens.of_teacher(teacher.features[last])
        images, tokens = aligned.shape[:2]
        of_step = masking_noise(batch.key, (batch.parts * images, tokens, 1)) <= self.mask_ratio
        masked = batch.own(of_step)
        tokens = jnp.where(masked, self.mask_token[...], aligned)
        prefix, patches = jnp.split(tokens, [self.tokens.num_prefix_tokens], axis=1)
        generator = self.generator[str(self.student_layers[-1])]
        generated = jnp.concatenate([prefix, generator(patches, teacher.model.arch.grid)], axis=1)
        squared = jnp.square(generated - target.astype(jnp.float32))
        # This micro-batch's share of the mean over all masked tokens of the step.
        elements = jnp.maximum(jnp.sum(of_step), 1) * generated.shape[-1]
        generation = batch.parts * jnp.sum(jnp.where(masked, squared, 0.0)) / elements
        return {
            "mimic": self.weights.mimic * mimic,
            "generation": self.weights.generation * generation,
        }


class ViTKDOfficial(_Masked):
    """ViTKD as its authors published it.

    The losses are squared errors of the patches, summed over an image; a fixed number of patches is
    masked.
    """

    Settings = ViTKDOfficialSettings

    def __init__(
        self,
        teacher: VisionTransformer,
        student: Architecture,
        settings: ViTKDOfficialSettings,
        rngs: nnx.Rngs,
    ) -> None:
        super().__init__(teacher, student, settings, rngs)
        dim = teacher.arch.embed_dim
        self.mimic = nnx.Dict(
            {
                str(index): linear_adapter(student.embed_dim, dim, rngs)
                for index in range(len(self.teacher_layers) - 1)
            }
        )
        self.align = linear_adapter(student.embed_dim, dim, rngs)
        self.generator = Generator(dim, rngs)
        if not settings.train_generator:
            for part in (self.mimic, self.align, self.generator):
                freeze(part)
            freeze(self, "mask_token")

    def loss(self, teacher: ModelFeatures | None, student: ModelFeatures, batch: Batch) -> Scalars:
        """Returns the terms `mimic` and `generation`."""
        prefix = self.tokens.num_prefix_tokens
        of_student = [
            self.tokens.of_student(student.features[own])[:, prefix:] for own in self.student_layers
        ]
        of_teacher = [
            self.tokens.of_teacher(teacher.features[layer])[:, prefix:].astype(jnp.float32)
            for layer in self.teacher_layers
        ]
        images = len(of_teacher[0])
        mimic = sum(
            jnp.sum(jnp.square(self.mimic[str(index)](own) - target))
            for index, (own, target) in enumerate(
                zip(of_student[:-1], of_teacher[:-1], strict=True)
            )
        )
        aligned = self.align(of_student[-1])
        noise = masking_noise(batch.key, (batch.parts * images, aligned.shape[1]))
        masked = self._masked(batch.own(noise))[..., None]
        generated = self.generator(
            jnp.where(masked, self.mask_token[...], aligned), teacher.model.arch.grid
        )
        generation = jnp.sum(jnp.where(masked, jnp.square(generated - of_teacher[-1]), 0.0))
        return {
            "mimic": self.weights.mimic * mimic / images,
            "generation": self.weights.generation / self.mask_ratio * generation / images,
        }

    def _masked(self, noise: Float[Array, "batch patches"]) -> Bool[Array, "batch patches"]:
        """Masks all but the int(P (1 - ratio)) patches of lowest noise."""
        kept = math.floor(noise.shape[1] * (1 - self.mask_ratio))
        lowest = jax.lax.top_k(-noise, kept)[1]
        return jnp.all(jnp.arange(noise.shape[1]) != lowest[..., None], axis=1)
