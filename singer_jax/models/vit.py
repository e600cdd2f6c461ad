"""Vision transformers in Flax NNX, equal to timm's `VisionTransformer` and, for DINOv3, `Eva`.

Module attributes carry timm's names, so that a timm state-dict key and an NNX path differ only by
a general rule (`models/weights.py`). Axis names used throughout: batch, height, width, tokens
(prefix tokens first, then patches row by row), patches, dim (the width of the residual stream),
heads, classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.nn import initializers
from jaxtyping import Array, Float, Int

from singer_jax.models.architecture import Architecture, Numerics
from singer_jax.models.layers import (
    AttentionPool,
    Block,
    PatchEmbed,
    layer_norm,
    linear,
    rotation,
)
from singer_jax.models.zoo import ModelSpec


class VisionTransformer(nnx.Module):
    """A vision transformer whose every block can be read and called alone.

    `features` gives the raw residual stream after each block, `apply_block` runs one block,
    `head_output` turns the last feature into what timm's `model(images)` returns.

    Args:
      arch: sizes and variants.
      numerics: dtypes and rematerialisation.
      rngs: stream `params`; initialised as timm does by default.

    Attributes:
      spec: what `singer_jax.create_model` and `load_model` know of it: its timm name and the
        statistics of its input; else None.
    """

    spec: ModelSpec | None = None

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
