"""Vision transformers in Flax NNX, equal to timm's `VisionTransformer`.

Module attributes carry timm's names, so that a timm state-dict key and an NNX path differ only by
a general rule (`models/weights.py`). Axis names used throughout: batch, height, width, tokens
(prefix tokens first, then patches row by row), patches, dim (the width of the residual stream),
heads, classes.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn import initializers
from jax.typing import DTypeLike
from jaxtyping import Array, Float


@dataclasses.dataclass(frozen=True)
class Architecture:
    """What timm's keyword arguments of the same names say about a vision transformer.

    Attributes:
      img_size: input height and width in pixels.
      patch_size: side of a square patch in pixels.
      embed_dim: width of the residual stream.
      depth: number of blocks.
      num_heads: attention heads; `embed_dim` is a multiple of it.
      mlp_ratio: hidden width of the MLP over `embed_dim`.
      num_classes: outputs of the head; 0 leaves the head out.
      no_embed_class: the position embedding covers patches only (DeiT-III).
      init_values: initial LayerScale factor; None leaves LayerScale out.
      norm_eps: epsilon of every LayerNorm.

    Raises:
      ValueError: if the image is not a whole number of patches or the width of heads.
    """

    img_size: tuple[int, int] = (224, 224)
    patch_size: int = 16
    embed_dim: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_ratio: float = 4.0
    num_classes: int = 1000
    no_embed_class: bool = False
    init_values: float | None = None
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        if any(side <= 0 or side % self.patch_size for side in self.img_size):
            raise ValueError(
                f"img_size {self.img_size} is not a multiple of patch_size {self.patch_size}"
            )
        if self.embed_dim % self.num_heads:
            raise ValueError(
                f"embed_dim {self.embed_dim} is not a multiple of num_heads {self.num_heads}"
            )

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.img_size[0] // self.patch_size, self.img_size[1] // self.patch_size

    @property
    def num_patches(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens before the patches: the class token."""
        return 1


@dataclasses.dataclass(frozen=True)
class Numerics:
    """How a model computes.

    Attributes:
      dtype: of activations and matrix products. LayerNorm statistics and the softmax stay float32.
      param_dtype: in which parameters are stored.
      remat: recompute each block in the backward pass instead of keeping its activations.
    """

    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32
    remat: bool = False


class _Linear(nnx.Linear):
    """`nnx.Linear` on flattened tokens: XLA on the CPU copies less where one axis is contracted."""

    def __call__(self, x: Float[Array, "*axes in"]) -> Float[Array, "*axes out"]:
        flat = super().__call__(x.reshape(-1, x.shape[-1]))
        return flat.reshape(*x.shape[:-1], flat.shape[-1])


def _linear(in_features: int, out_features: int, numerics: Numerics, rngs: nnx.Rngs) -> nnx.Linear:
    return _Linear(
        in_features,
        out_features,
        kernel_init=initializers.truncated_normal(0.02),
        dtype=numerics.dtype,
        param_dtype=numerics.param_dtype,
        rngs=rngs,
    )


def _layer_norm(arch: Architecture, numerics: Numerics, rngs: nnx.Rngs) -> nnx.LayerNorm:
    return nnx.LayerNorm(
        arch.embed_dim,
        epsilon=arch.norm_eps,
        dtype=numerics.dtype,
        param_dtype=numerics.param_dtype,
        # E[(x - E[x])^2] as in PyTorch: E[x^2] - E[x]^2 cancels on tokens of huge norm.
        use_fast_variance=False,
        rngs=rngs,
    )


class PatchEmbed(nnx.Module):
    """Non-overlapping patches times one matrix (timm `PatchEmbed`)."""

    def __init__(self, arch: Architecture, numerics: Numerics, rngs: nnx.Rngs) -> None:
        self.proj = nnx.Conv(
            3,
            arch.embed_dim,
            kernel_size=(arch.patch_size, arch.patch_size),
            kernel_init=initializers.variance_scaling(1 / 3, "fan_in", "uniform"),
            param_dtype=numerics.param_dtype,
            rngs=rngs,
        )

    def __call__(
        self, images: Float[Array, "batch height width 3"]
    ) -> Float[Array, "batch patches dim"]:
        # A matrix product, because the gradient of the equal convolution is slow on the CPU.
        kernel = self.proj.kernel[...].astype(images.dtype)
        size, _, channels, dim = kernel.shape
        batch, height, width, _ = images.shape
        x = images.reshape(batch, height // size, size, width // size, size, channels)
        x = x.swapaxes(2, 3).reshape(batch, -1, size * size * channels)
        return x @ kernel.reshape(-1, dim) + self.proj.bias[...].astype(x.dtype)


def _attention(
    query: Float[Array, "batch heads tokens head_dim"],
    key: Float[Array, "batch heads tokens head_dim"],
    value: Float[Array, "batch heads tokens head_dim"],
) -> Float[Array, "batch heads tokens head_dim"]:
    """Scaled dot-product attention; divides by the softmax's sum after the product with `value`.

    That is one pass over the tokens x tokens matrix less than `jax.nn.dot_product_attention`, and
    twice as fast on the CPU (benchmarks/RESULTS.md).
    """
    query = query * query.shape[-1] ** -0.5
    logits = jnp.einsum("bhqd,bhkd->bhqk", query, key, preferred_element_type=jnp.float32)
    weights = jnp.exp(logits - jax.lax.stop_gradient(logits.max(-1, keepdims=True)))
    mixed = jnp.einsum(
        "bhqk,bhkd->bhqd",
        weights.astype(value.dtype),
        value,
        preferred_element_type=jnp.float32,
    )
    return (mixed / weights.sum(-1, keepdims=True)).astype(value.dtype)


class Attention(nnx.Module):
    """Multi-head self-attention with one projection for query, key and value (timm `Attention`)."""

    def __init__(self, arch: Architecture, numerics: Numerics, rngs: nnx.Rngs) -> None:
        self.num_heads = arch.num_heads
        self.qkv = _linear(arch.embed_dim, 3 * arch.embed_dim, numerics, rngs)
        self.proj = _linear(arch.embed_dim, arch.embed_dim, numerics, rngs)

    def __call__(self, x: Float[Array, "batch tokens dim"]) -> Float[Array, "batch tokens dim"]:
        batch, tokens, dim = x.shape
        query, key, value = (
            part.reshape(batch, tokens, self.num_heads, -1).swapaxes(1, 2)
            for part in jnp.split(self.qkv(x), 3, axis=-1)
        )
        x = _attention(query, key, value)
        return self.proj(x.swapaxes(1, 2).reshape(batch, tokens, dim))


@jax.checkpoint
def _gelu(x: Float[Array, "*axes"]) -> Float[Array, "*axes"]:
    """Exact GELU, x Phi(x); keeps only x for the backward pass."""
    return 0.5 * x * (1 + jax.lax.erf(x * 0.5**0.5))


class Mlp(nnx.Module):
    """Two linear maps around an exact GELU (timm `Mlp`)."""

    def __init__(self, arch: Architecture, numerics: Numerics, rngs: nnx.Rngs) -> None:
        hidden = int(arch.embed_dim * arch.mlp_ratio)
        self.fc1 = _linear(arch.embed_dim, hidden, numerics, rngs)
        self.fc2 = _linear(hidden, arch.embed_dim, numerics, rngs)

    def __call__(self, x: Float[Array, "batch tokens dim"]) -> Float[Array, "batch tokens dim"]:
        return self.fc2(_gelu(self.fc1(x)))


class LayerScale(nnx.Module):
    """A learned factor per channel (timm `LayerScale`)."""

    def __init__(self, arch: Architecture, numerics: Numerics) -> None:
        self.gamma = nnx.Param(jnp.full((arch.embed_dim,), arch.init_values, numerics.param_dtype))

    def __call__(self, x: Float[Array, "*axes dim"]) -> Float[Array, "*axes dim"]:
        return x * self.gamma[...].astype(x.dtype)


class Block(nnx.Module):
    """A pre-norm transformer block (timm `Block`)."""

    def __init__(self, arch: Architecture, numerics: Numerics, rngs: nnx.Rngs) -> None:
        self.norm1 = _layer_norm(arch, numerics, rngs)
        self.attn = Attention(arch, numerics, rngs)
        self.norm2 = _layer_norm(arch, numerics, rngs)
        self.mlp = Mlp(arch, numerics, rngs)
        if arch.init_values is not None:
            self.ls1 = LayerScale(arch, numerics)
            self.ls2 = LayerScale(arch, numerics)
        self.scaled = arch.init_values is not None

    def __call__(self, x: Float[Array, "batch tokens dim"]) -> Float[Array, "batch tokens dim"]:
        attended = self.attn(self.norm1(x))
        x = _barrier(x + (self.ls1(attended) if self.scaled else attended))
        mixed = self.mlp(self.norm2(x))
        return _barrier(x + (self.ls2(mixed) if self.scaled else mixed))


def _barrier(x: Float[Array, "*axes"]) -> Float[Array, "*axes"]:
    """Makes XLA keep the residual stream instead of recomputing it in each of its consumers.

    Without it the backward pass on the CPU adds the whole chain up again for every weight
    gradient, quadratic in the depth (takes effect with `parallel.compiler_options`).
    """
    return jax.lax.optimization_barrier(x)


class VisionTransformer(nnx.Module):
    """A vision transformer whose every block can be read and called alone.

    `features` gives the raw residual stream after each block, `apply_block` runs one block,
    `head_output` turns the last feature into what timm's `model(images)` returns.

    Args:
      arch: sizes and variants.
      numerics: dtypes and rematerialisation.
      rngs: stream `params`; initialised as timm does by default.
    """

    def __init__(
        self, arch: Architecture, numerics: Numerics = Numerics(), *, rngs: nnx.Rngs
    ) -> None:
        self.arch = arch
        self.numerics = numerics
        dim, dtype = arch.embed_dim, numerics.param_dtype
        positions = arch.num_patches + (0 if arch.no_embed_class else arch.num_prefix_tokens)
        self.patch_embed = PatchEmbed(arch, numerics, rngs)
        self.cls_token = nnx.Param(initializers.normal(1e-6)(rngs.params(), (1, 1, dim), dtype))
        self.pos_embed = nnx.Param(
            initializers.truncated_normal(0.02)(rngs.params(), (1, positions, dim), dtype)
        )
        self.blocks = nnx.List([Block(arch, numerics, rngs) for _ in range(arch.depth)])
        self.norm = _layer_norm(arch, numerics, rngs)
        if arch.num_classes:
            self.head = _linear(dim, arch.num_classes, numerics, rngs)

    def embed(
        self, images: Float[Array, "batch height width 3"]
    ) -> Float[Array, "batch tokens dim"]:
        """The tokens that enter the first block: prefix tokens, patches, position embedding."""
        x = self.patch_embed(images.astype(self.numerics.dtype))
        pos_embed = self.pos_embed[...].astype(x.dtype)
        prefix = jnp.broadcast_to(self.cls_token[...].astype(x.dtype), (x.shape[0], 1, x.shape[-1]))
        if self.arch.no_embed_class:
            return jnp.concatenate([prefix, x + pos_embed], axis=1)
        return jnp.concatenate([prefix, x], axis=1) + pos_embed

    def apply_block(
        self, index: int, x: Float[Array, "batch tokens dim"]
    ) -> Float[Array, "batch tokens dim"]:
        """Block `index` alone, applied to any residual stream."""
        apply = nnx.remat(Block.__call__) if self.numerics.remat else Block.__call__
        return apply(self.blocks[index], x.astype(self.numerics.dtype))

    def features(
        self, images: Float[Array, "batch height width 3"], blocks: int | None = None
    ) -> tuple[Float[Array, "batch tokens dim"], ...]:
        """The raw residual stream after each of the first `blocks` blocks (default: all).

        Args:
          images: normalised with the model's own mean and standard deviation.
          blocks: how many blocks to run.
        """
        x = self.embed(images)
        features = []
        for index in range(self.arch.depth if blocks is None else blocks):
            x = self.apply_block(index, x)
            features.append(x)
        return tuple(features)

    def head_output(
        self, x: Float[Array, "batch tokens dim"]
    ) -> Float[Array, "batch classes"] | Float[Array, "batch dim"]:
        """Class logits from the last feature, or its pooled embedding where there is no head."""
        pooled = self.norm(x)[:, 0]
        return self.head(pooled) if self.arch.num_classes else pooled

    def __call__(
        self, images: Float[Array, "batch height width 3"]
    ) -> Float[Array, "batch classes"] | Float[Array, "batch dim"]:
        """What timm's `model(images)` returns."""
        return self.head_output(self.features(images)[-1])
