"""ViTKD: mimic the teacher's first blocks, generate its last from a masked student.

"ViTKD: Feature-based Knowledge Distillation for Vision Transformers", CVPR Workshops 2024, in the
two forms of the SiNGER repository: its own (`ViTKD`) and that of the authors of ViTKD
(`ViTKDOfficial`).
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from singer_jax.errors import InputError
from singer_jax.methods.base import (
    Batch,
    Forward,
    Method,
    Scalars,
    freeze,
    linear_adapter,
    match_layers,
    mean_squared_error,
)
from singer_jax.methods.tokens import match_tokens
from singer_jax.models.architecture import Architecture
from singer_jax.models.vit import VisionTransformer


class Generator(nnx.Module):
    """3x3 convolution, ReLU, 3x3 convolution on a grid of tokens, zero padding."""

    def __init__(self, dim: int, rngs: nnx.Rngs) -> None:
        self.conv1 = nnx.Conv(dim, dim, kernel_size=(3, 3), rngs=rngs)
        self.conv2 = nnx.Conv(dim, dim, kernel_size=(3, 3), rngs=rngs)

    def __call__(
        self, patches: Float[Array, "batch patches dim"], grid: tuple[int, int]
    ) -> Float[Array, "batch patches dim"]:
        image = patches.reshape(patches.shape[0], *grid, patches.shape[-1])
        return self.conv2(nnx.relu(self.conv1(image))).reshape(patches.shape)


def masking_noise(key: jax.Array, shape: tuple[int, ...]) -> Float[Array, "..."]:
    """Uniform numbers that decide which tokens are masked."""
    return jax.random.uniform(key, shape)


class _Masked(Method):
    """What both forms share: layers, tokens, weights, a generator and a mask token."""

    _weights: tuple[float, float]

    def __init__(
        self, teacher: VisionTransformer, student: Architecture, config: Any, rngs: nnx.Rngs
    ) -> None:
        arch = teacher.arch
        last = arch.depth - 1
        mimic = tuple(int(layer) for layer in config.mimic_layers)
        for layer in mimic:
            if not 0 <= layer < last:
                raise InputError(
                    f"method.mimic_layers: {layer} is not in 0..{last - 1} (the teacher's last "
                    f"block, {last}, is generated)"
                )
        matched = match_layers(config.matching, mimic, arch.depth, student.depth)
        (generated,) = match_layers(config.matching, (last,), arch.depth, student.depth)
        if generated in matched:
            raise InputError(
                f"method.mimic_layers: student block {generated} would both mimic and generate; "
                "mimic earlier blocks or take a deeper student"
            )
        self.teacher_layers = (*mimic, last)
        self.student_layers = (*matched, generated)
        self.tokens = match_tokens(student, arch, config)
        self.mask_ratio = config.mask_ratio
        self.mimic_weight, self.generation_weight = (
            default if weight is None else weight
            for default, weight in zip(
                self._weights, (config.weights.mimic, config.weights.generation), strict=True
            )
        )
        self.mask_token = nnx.Param(
            jax.nn.initializers.normal(0.02)(rngs.params(), (1, 1, arch.embed_dim))
        )


class ViTKD(_Masked):
    """Mean squared errors of all tokens: two mimicked blocks, and the masked tokens of the last."""

    _weights = (1.0, 1.0)

    def __init__(
        self, teacher: VisionTransformer, student: Architecture, config: Any, rngs: nnx.Rngs
    ) -> None:
        super().__init__(teacher, student, config, rngs)
        dim = teacher.arch.embed_dim
        self.adapter = nnx.Dict(
            {
                str(layer): linear_adapter(student.embed_dim, dim, rngs)
                for layer in self.student_layers
            }
        )
        self.generator = nnx.Dict({str(self.student_layers[-1]): Generator(dim, rngs)})
        if not config.train_generator:
            freeze(self.generator)
            freeze(self, "mask_token")

    def loss(self, teacher: Forward | None, student: Forward, batch: Batch) -> Scalars:
        """Terms `mimic` and `generation`."""
        matched = [
            (
                self.adapter[str(own)](self.tokens.of_student(student.features[own])),
                self.tokens.of_teacher(teacher.features[layer]),
            )
            for layer, own in zip(self.teacher_layers, self.student_layers, strict=True)
        ]
        *mimicked, (aligned, target) = matched
        mimic = sum(mean_squared_error(*pair) for pair in mimicked)
        masked = masking_noise(batch.key, (*aligned.shape[:2], 1)) <= self.mask_ratio
        tokens = jnp.where(masked, self.mask_token[...], aligned)
        prefix, patches = jnp.split(tokens, [self.tokens.num_prefix_tokens], axis=1)
        generator = self.generator[str(self.student_layers[-1])]
        generated = jnp.concatenate([prefix, generator(patches, teacher.model.arch.grid)], axis=1)
        squared = jnp.square(generated - target.astype(jnp.float32))
        elements = jnp.maximum(jnp.sum(masked), 1) * generated.shape[-1]
        generation = jnp.sum(jnp.where(masked, squared, 0.0)) / elements
        return {
            "mimic": self.mimic_weight * mimic,
            "generation": self.generation_weight * generation,
        }


class ViTKDOfficial(_Masked):
    """Squared errors of the patches, summed over an image; a fixed number of patches is masked."""

    _weights = (3e-5, 3e-6)

    def __init__(
        self, teacher: VisionTransformer, student: Architecture, config: Any, rngs: nnx.Rngs
    ) -> None:
        super().__init__(teacher, student, config, rngs)
        dim = teacher.arch.embed_dim
        self.mimic = nnx.Dict(
            {
                str(index): linear_adapter(student.embed_dim, dim, rngs)
                for index in range(len(self.teacher_layers) - 1)
            }
        )
        self.align = linear_adapter(student.embed_dim, dim, rngs)
        self.generator = Generator(dim, rngs)
        if not config.train_generator:
            for part in (self.mimic, self.align, self.generator):
                freeze(part)
            freeze(self, "mask_token")

    def loss(self, teacher: Forward | None, student: Forward, batch: Batch) -> Scalars:
        """Terms `mimic` and `generation`."""
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
        masked = self._masked(masking_noise(batch.key, aligned.shape[:2]))[..., None]
        generated = self.generator(
            jnp.where(masked, self.mask_token[...], aligned), teacher.model.arch.grid
        )
        generation = jnp.sum(jnp.where(masked, jnp.square(generated - of_teacher[-1]), 0.0))
        return {
            "mimic": self.mimic_weight * mimic / images,
            "generation": self.generation_weight / self.mask_ratio * generation / images,
        }

    def _masked(self, noise: Float[Array, "batch patches"]) -> Bool[Array, "batch patches"]:
        """All but the patches of lowest noise, of which int(P (1 - ratio)) are kept."""
        kept = math.floor(noise.shape[1] * (1 - self.mask_ratio))
        lowest = jax.lax.top_k(-noise, kept)[1]
        return jnp.all(jnp.arange(noise.shape[1]) != lowest[..., None], axis=1)
