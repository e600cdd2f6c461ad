"""Vision transformers in Flax NNX, equal to timm's `VisionTransformer` and, for DINOv3, `Eva`.

Module attributes carry timm's names, so that a timm state-dict key and an NNX path differ only by
a general rule (`models/weights.py`). Axis names used throughout: batch, height, width, tokens
(prefix tokens first, then patches row by row), patches, dim (the width of the residual stream),
heads, classes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.nn import initializers
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from singer_jax import backends
from singer_jax.models.layers import (
    ACTIVATIONS,
    MLPS,
    AttentionPool,
    Block,
    PatchEmbed,
    layer_norm,
    linear,
    rotation,
)

POOLS = ("token", "avg", "map")


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
      class_token: whether there is one.
      reg_tokens: register tokens, after the class token.
      no_embed_class: the position embedding covers patches only (DeiT-III, registers).
      pre_norm: LayerNorm before the first block, and no bias in the patch embedding (CLIP).
      init_values: initial LayerScale factor; None leaves LayerScale out.
      norm_eps: epsilon of every LayerNorm.
      act_layer: `gelu` or `quick_gelu`.
      mlp_layer: `mlp`, `swiglu_packed` (DINOv2 giant) or `swiglu` (DINOv3).
      qkv_bias: whether attention projects with a bias.
      global_pool: what the head reads after the norm: the class token (`token`), the mean of the
        patches (`avg`) or attention pooling (`map`, SigLIP).
      eva: timm's class Eva as DINOv3 configures it: rotary instead of learned positions, no bias of
        the keys.

    Raises:
      ValueError: if the image is not a whole number of patches, the width not one of heads, or a
        name is unknown.
    """

    img_size: tuple[int, int] = (224, 224)
    patch_size: int = 16
    embed_dim: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_ratio: float = 4.0
    num_classes: int = 1000
    class_token: bool = True
    reg_tokens: int = 0
    no_embed_class: bool = False
    pre_norm: bool = False
    init_values: float | None = None
    norm_eps: float = 1e-6
    act_layer: str = "gelu"
    mlp_layer: str = "mlp"
    qkv_bias: bool = True
    global_pool: str = "token"
    eva: bool = False

    def __post_init__(self) -> None:
        for name in ("patch_size", "embed_dim", "depth", "num_heads"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} {value!r} is not a positive number")
        if any(side <= 0 or side % self.patch_size for side in self.img_size):
            raise ValueError(
                f"img_size {self.img_size} is not a multiple of patch_size {self.patch_size}"
            )
        if self.embed_dim % self.num_heads:
            raise ValueError(
                f"embed_dim {self.embed_dim} is not a multiple of num_heads {self.num_heads}"
            )
        if int(self.embed_dim * self.mlp_ratio) < 1:
            raise ValueError(
                f"embed_dim {self.embed_dim} x mlp_ratio {self.mlp_ratio} leaves the MLP empty"
            )
        if self.mlp_layer == "swiglu_packed" and int(self.embed_dim * self.mlp_ratio) % 2:
            raise ValueError(
                f"embed_dim {self.embed_dim} x mlp_ratio {self.mlp_ratio} gives an odd hidden width"
            )
        if self.eva and self.embed_dim // self.num_heads % 4:
            raise ValueError("rotary positions need a head width that is a multiple of 4")
        for name, known in (
            ("act_layer", ACTIVATIONS),
            ("mlp_layer", MLPS),
            ("global_pool", POOLS),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} {getattr(self, name)!r} is none of {', '.join(known)}")
        if self.global_pool == "token" and not self.class_token:
            raise ValueError("global_pool 'token' needs a class token")

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.img_size[0] // self.patch_size, self.img_size[1] // self.patch_size

    @property
    def num_patches(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens before the patches: class token and registers."""
        return self.class_token + self.reg_tokens

    @property
    def num_embedded_prefix_tokens(self) -> int:
        """Prefix tokens that the learned position embedding covers."""
        return 0 if self.no_embed_class else self.num_prefix_tokens


@dataclasses.dataclass(frozen=True)
class Numerics:
    """How a model computes.

    Attributes:
      dtype: of activations and matrix products. LayerNorm statistics and the softmax stay float32.
      param_dtype: in which parameters are stored.
      remat: recompute each block in the backward pass instead of keeping its activations.
      backend: platform of the devices that will compute; empty: the default device's.
      stacked: the blocks' parameters are one tree with a leading axis over the blocks.
    """

    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32
    remat: bool = False
    # Neither changes what is computed, so neither is part of what a model says of itself.
    backend: str = dataclasses.field(default="", repr=False)
    stacked: bool = dataclasses.field(default=False, repr=False)

    @property
    def choices(self) -> backends.Choices:
        """What is computed differently on this backend."""
        return backends.choices(self.backend)


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
        dim = arch.embed_dim

        def param(std: float, tokens: int) -> nnx.Param:
            start = initializers.truncated_normal(std)
            return nnx.Param(start(rngs.params(), (1, tokens, dim), numerics.param_dtype))

        self.patch_embed = PatchEmbed(arch, numerics, rngs)
        if arch.class_token:
            self.cls_token = param(1e-6, 1)
        if arch.reg_tokens:
            self.reg_token = param(1e-6, arch.reg_tokens)
        if not arch.eva:
            self.pos_embed = param(0.02, arch.num_patches + arch.num_embedded_prefix_tokens)
        if arch.pre_norm:
            self.norm_pre = layer_norm(arch, numerics, rngs)
        blocks = [Block(arch, numerics, rngs) for _ in range(arch.depth)]
        self.blocks = _stack(blocks) if numerics.stacked else nnx.List(blocks)
        self.norm = layer_norm(arch, numerics, rngs)
        if arch.global_pool == "map":
            self.attn_pool = AttentionPool(arch, numerics, rngs)
        if arch.num_classes:
            self.head = linear(dim, arch.num_classes, numerics, rngs)

    def embed(
        self, images: Float[Array, "batch height width 3"]
    ) -> Float[Array, "batch tokens dim"]:
        """The tokens that enter the first block: prefix tokens, patches, position embedding."""
        arch = self.arch
        x = self.patch_embed(images.astype(self.numerics.dtype))
        prefix = []
        if arch.class_token:
            prefix.append(self.cls_token)
        if arch.reg_tokens:
            prefix.append(self.reg_token)
        tokens = [
            jnp.broadcast_to(token[...].astype(x.dtype), (x.shape[0], *token.shape[1:]))
            for token in prefix
        ]
        if arch.eva:
            x = jnp.concatenate([*tokens, x], axis=1)
        elif arch.no_embed_class:
            x = jnp.concatenate([*tokens, x + self.pos_embed[...].astype(x.dtype)], axis=1)
        else:
            x = jnp.concatenate([*tokens, x], axis=1) + self.pos_embed[...].astype(x.dtype)
        return self.norm_pre(x) if arch.pre_norm else x

    def block(self, index: int | Int[Array, ""]) -> Block:
        """Block `index` alone; a traced index needs stacked parameters."""
        if not self.numerics.stacked:
            return self.blocks[index]
        graph, state = nnx.split(self.blocks)
        return nnx.merge(
            graph,
            jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), state),
        )

    def apply_block(
        self, index: int, x: Float[Array, "batch tokens dim"]
    ) -> Float[Array, "batch tokens dim"]:
        """Block `index` alone, applied to any residual stream."""
        return self._apply(self.block(index), x)

    def _apply(
        self, block: Block, x: Float[Array, "batch tokens dim"]
    ) -> Float[Array, "batch tokens dim"]:
        arch = self.arch
        apply = nnx.remat(Block.__call__) if self.numerics.remat else Block.__call__
        by = rotation(arch.grid, arch.embed_dim // arch.num_heads) if arch.eva else None
        return apply(block, x.astype(self.numerics.dtype), by)

    def features(
        self, images: Float[Array, "batch height width 3"], blocks: int | None = None
    ) -> tuple[Float[Array, "batch tokens dim"], ...]:
        """The raw residual stream after each of the first `blocks` blocks (default: all).

        Args:
          images: normalised with the model's own mean and standard deviation.
          blocks: how many blocks to run.
        """
        x = self.embed(images)
        count = self.arch.depth if blocks is None else blocks
        features = []
        for index in range(count):
            x = self.apply_block(index, x)
            features.append(x)
        return tuple(features)

    def features_at(
        self, images: Float[Array, "batch height width 3"], layers: Sequence[int]
    ) -> dict[int, Float[Array, "batch tokens dim"]]:
        """`features` after some blocks only, of a model that is not trained.

        No other feature is kept and no later block runs. Stacked blocks are one loop, through
        which there is no gradient.

        Args:
          images: as for `features`.
          layers: indices of blocks.
        """
        layers = sorted(set(layers))
        if not self.numerics.stacked:
            features = self.features(images, layers[-1] + 1)
            return {layer: jax.lax.stop_gradient(features[layer]) for layer in layers}

        def advance(x: Array, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
            x = jax.lax.fori_loop(*bounds, lambda index, x: self._apply(self.block(index), x), x)
            return x, x

        ends = np.asarray(layers, np.int32) + 1
        starts = np.concatenate([np.zeros(1, np.int32), ends[:-1]])
        found = jax.lax.scan(advance, self.embed(images), (starts, ends))[1]
        return dict(zip(layers, found, strict=True))

    def pooled(self, x: Float[Array, "batch tokens dim"]) -> Float[Array, "batch dim"]:
        """What the head reads, from the last feature: see `Architecture.global_pool`."""
        x = self.norm(x)
        if self.arch.global_pool == "map":
            return self.attn_pool(x)
        if self.arch.global_pool == "avg":
            return x[:, self.arch.num_prefix_tokens :].mean(axis=1)
        return x[:, 0]

    def head_output(
        self, x: Float[Array, "batch tokens dim"]
    ) -> Float[Array, "batch classes"] | Float[Array, "batch dim"]:
        """Class logits from the last feature, or its pooled embedding where there is no head."""
        pooled = self.pooled(x)
        return self.head(pooled) if self.arch.num_classes else pooled

    def __call__(
        self, images: Float[Array, "batch height width 3"]
    ) -> Float[Array, "batch classes"] | Float[Array, "batch dim"]:
        """What timm's `model(images)` returns."""
        return self.head_output(self.features(images)[-1])


def _stack(blocks: Sequence[Block]) -> Block:
    """Equal blocks as one, whose parameters have a leading axis."""
    graph = nnx.graphdef(blocks[0])
    states = [nnx.state(block) for block in blocks]
    return nnx.merge(graph, jax.tree.map(lambda *leaves: jnp.stack(leaves), *states))
