"""Vision transformers in Flax NNX, equal to timm's `VisionTransformer`, `Eva` and `Beit`.

Module attributes have timm's names, so that a timm state-dict key and an NNX path differ only by a
general rule (`models/weights.py`). Axis names used throughout: batch, height, width, tokens
(prefix tokens first, then patches row by row), patches, dim (the width of the residual stream),
heads, classes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.nn import initializers
from jaxtyping import Array, Float, Int

from singer_jax.models import registers, synthetic_outlier
from singer_jax.models.architecture import Architecture, ComputePolicy
from singer_jax.models.layers import (
    AttentionPool,
    Block,
    Move,
    PatchEmbed,
    identity,
    layer_norm,
    linear,
)
from singer_jax.models.positions import MixedFrequencies, Rotation, fixed_rotation
from singer_jax.models.shift_average import averaged
from singer_jax.models.zoo import ModelSpec


def _exact(method: Callable[..., Any]) -> Callable[..., Any]:
    """Computes the matmuls of a float32 model in full precision, regardless of JAX's default."""

    @functools.wraps(method)
    def computed(self: VisionTransformer, *given: Any, **named: Any) -> Any:
        if jnp.dtype(self.policy.dtype) != jnp.float32:
            return method(self, *given, **named)
        with jax.default_matmul_precision("highest"):
            return method(self, *given, **named)

    return computed


class VisionTransformer(nnx.Module):
    """Vision transformer in which every block can be read and called separately.

    `features` returns the raw residual stream after each block, `apply_block` runs one block, and
    `head_output` converts the last feature to the output of timm's `model(images)`.

    Args:
      arch: sizes and variants.
      policy: dtypes and rematerialisation.
      rngs: random streams; `params` is used for timm's default initialisation.

    Attributes:
      spec: specification with the timm name and the input statistics, set by
        `singer_jax.create_model` and `load_model`; otherwise None.
    """

    spec: ModelSpec | None = None

    def __init__(
        self, arch: Architecture, policy: ComputePolicy = ComputePolicy(), *, rngs: nnx.Rngs
    ) -> None:
        self.arch = arch
        self.policy = policy
        dim = arch.embed_dim

        def param(std: float, tokens: int) -> nnx.Param:
            start = initializers.truncated_normal(std)
            return nnx.Param(start(rngs.params(), (1, tokens, dim), policy.param_dtype))

        self.patch_embed = PatchEmbed(arch, policy, rngs)
        if arch.class_token:
            self.cls_token = param(1e-6, 1)
        if arch.distilled:
            self.dist_token = param(1e-6, 1)
        if arch.reg_tokens:
            self.reg_token = param(1e-6, arch.reg_tokens)
        if arch.pos_embed:
            self.pos_embed = param(0.02, arch.num_patches + arch.num_embedded_prefix_tokens)
        if arch.rope_type == "mixed":
            self.rope = MixedFrequencies(arch, policy.param_dtype, rngs)
        if arch.pre_norm:
            self.norm_pre = layer_norm(arch, policy, rngs)
        if policy.stacked and not arch.blocks_alike:
            raise ValueError("blocks of different shapes cannot be stacked")
        blocks = [Block(arch, policy, rngs, index) for index in range(arch.depth)]
        self.blocks = _stack(blocks) if policy.stacked else nnx.List(blocks)
        if policy.artifact_removal == "registers":
            shape = arch.depth, blocks[0].mlp.fc2.in_features + bool(arch.synthetic_outlier)
            self.register_neurons = registers.RegisterNeurons(jnp.zeros(shape, jnp.uint8))
        final = layer_norm(arch, policy, rngs) if arch.final_norm else identity
        self.norm, self.fc_norm = (identity, final) if arch.fc_norm else (final, identity)
        if arch.global_pool == "map":
            self.attn_pool = AttentionPool(arch, policy, rngs)
        if arch.num_classes:
            self.head = linear(dim, arch.num_classes, policy, rngs)
        if arch.num_classes and arch.distilled:
            self.head_dist = linear(dim, arch.num_classes, policy, rngs)
        # It is made last, so that all other parameters are drawn as without it. Saved weights and
        # checkpoints hold its vector as `planted.vector`.
        if arch.synthetic_outlier:
            self.planted = synthetic_outlier.SyntheticOutlier(arch, policy.param_dtype, rngs)

    @_exact
    def embed(
        self, images: Float[Array, "batch height width 3"]
    ) -> Float[Array, "batch tokens dim"]:
        """Returns the input of the first block: prefix tokens and patches, with positions added."""
        arch = self.arch
        x = self.patch_embed(images.astype(self.policy.dtype))
        prefix = []
        if arch.class_token:
            prefix.append(self.cls_token)
        if arch.distilled:
            prefix.append(self.dist_token)
        if arch.reg_tokens:
            prefix.append(self.reg_token)
        tokens = [
            jnp.broadcast_to(token[...].astype(x.dtype), (x.shape[0], *token.shape[1:]))
            for token in prefix
        ]
        if not arch.pos_embed:
            x = jnp.concatenate([*tokens, x], axis=1)
        elif arch.no_embed_class:
            x = jnp.concatenate([*tokens, x + self.pos_embed[...].astype(x.dtype)], axis=1)
        else:
            x = jnp.concatenate([*tokens, x], axis=1) + self.pos_embed[...].astype(x.dtype)
        return self.norm_pre(x) if arch.pre_norm else x

    def block(self, index: int | Int[Array, ""]) -> Block:
        """Returns block `index`; a traced index needs stacked parameters."""
        stacked, gathered = self.policy.stacked, self.policy.gathered
        if not stacked and gathered is None:
            return self.blocks[index]
        graph, state = nnx.split(self.blocks if stacked else self.blocks[index])
        if stacked:
            state = jax.tree.map(
                lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), state
            )
        if gathered is not None:
            state = jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, gathered), state)
        return nnx.merge(graph, state)

    def apply_block(
        self,
        index: int,
        x: Float[Array, "batch tokens dim"],
        register: Float[Array, "batch 1 dim"] | None = None,
    ) -> Float[Array, "batch tokens dim"]:
        """Applies block `index` alone to a residual stream.

        Args:
          index: index of the block.
          x: residual stream without an added token.
          register: the added token of the stream (`split_register`); None: the block runs as in a
            model without artifact removal.
        """
        if register is None:
            return self._apply(index, x)
        return self._advance(index, jnp.concatenate([register.astype(x.dtype), x], axis=1))[:, 1:]

    @_exact
    def hidden(
        self,
        index: int | Int[Array, ""],
        x: Float[Array, "batch tokens dim"],
        images: Float[Array, "batch height width 3"],
    ) -> Float[Array, "batch tokens hidden"]:
        """Returns the hidden layer of the MLP of block `index` for a residual stream.

        A synthetic outlier is represented by an additional last neuron. After block
        `arch.synthetic_outlier_after` its activation is the length of the outlier vector.

        Args:
          index: index of the block.
          x: residual stream without an added token.
          images: images as for `features`.
        """
        hidden = self.block(index).hidden(x.astype(self.policy.dtype), self._rotation(index))
        if not self.arch.synthetic_outlier:
            return hidden
        length = jnp.linalg.norm(self.planted.vector[...])
        fires = jnp.where(
            index == self.arch.synthetic_outlier_after, length * self._marked(images), 0
        )
        return jnp.concatenate([hidden, fires.astype(hidden.dtype)], axis=-1)

    def _advance(
        self,
        index: int | Int[Array, ""],
        x: Float[Array, "batch tokens dim"],
        added: Float[Array, "batch tokens dim"] | None = None,
    ) -> Float[Array, "batch tokens dim"]:
        """Applies block `index` to a stream of `_enter`, and adds that of `_outlier_update`."""
        if added is not None:
            x = self._advance(index, x)
            here = index == self.arch.synthetic_outlier_after
            return x + jnp.where(here, added, 0).astype(x.dtype)
        if not self.num_added_tokens:
            return self._apply(index, x)
        neurons = self.register_neurons[...][index]
        move = functools.partial(
            registers.move,
            neurons=neurons[:-1] if self.arch.synthetic_outlier else neurons,
            first_patch=self._first_patch,
        )
        return self._apply(index, x, move)

    @_exact
    def _apply(
        self,
        index: int | Int[Array, ""],
        x: Float[Array, "batch tokens dim"],
        move: Move | None = None,
    ) -> Float[Array, "batch tokens dim"]:
        block = self.block(index)
        x, by = x.astype(self.policy.dtype), self._rotation(index)
        if move is not None:
            return block(x, by, move)  # for a model that is not trained
        apply = nnx.remat(Block.__call__) if self.policy.remat else Block.__call__
        return apply(block, x, by)

    def _rotation(self, index: int | Int[Array, ""]) -> Rotation | None:
        """Returns the rotation of the patches in block `index`; None without rotary positions."""
        if self.arch.rope_type is None:
            return None
        if self.arch.rope_type == "mixed":
            return self.rope.rotation(self.arch, index)
        return jnp.asarray(fixed_rotation(self.arch))

    @property
    def num_added_tokens(self) -> int:
        """Returns the number of test-time registers, which come first in `streams_at`."""
        return int(self.policy.artifact_removal == "registers")

    @property
    def _first_patch(self) -> int:
        return self.num_added_tokens + self.arch.num_prefix_tokens

    def split_register(
        self, x: Float[Array, "batch tokens dim"]
    ) -> tuple[Float[Array, "batch 1 dim"] | None, Float[Array, "batch tokens dim"]]:
        """Returns the added token of a stream, or None, and the feature without it."""
        return (x[:, :1], x[:, 1:]) if self.num_added_tokens else (None, x)

    def _enter(
        self, images: Float[Array, "batch height width 3"]
    ) -> Float[Array, "batch tokens dim"]:
        x = self.embed(images)
        if not self.num_added_tokens:
            return x
        return jnp.pad(x, ((0, 0), (self.num_added_tokens, 0), (0, 0)))

    def _outlier_update(
        self, images: Float[Array, "batch height width 3"]
    ) -> Float[Array, "batch tokens dim"] | None:
        """Returns the synthetic outliers to add to a stream; None: no outliers."""
        if not self.arch.synthetic_outlier:
            return None
        marked = self._marked(images)
        if self.num_added_tokens:
            neuron = self.register_neurons[...][self.arch.synthetic_outlier_after, -1:]
            marked = registers.move(marked, neuron, self._first_patch)
        return marked * self.planted.vector[...]

    def _marked(
        self, images: Float[Array, "batch height width 3"]
    ) -> Float[Array, "batch tokens 1"]:
        """Returns a mask with 1 at the patches that receive the outlier vector."""
        marked = synthetic_outlier.marked_patches(images, self.arch).astype(jnp.float32)
        return jnp.pad(marked, ((0, 0), (self._first_patch, 0)))[..., None]

    def _streams(
        self, images: Float[Array, "batch height width 3"], blocks: int
    ) -> tuple[Float[Array, "batch tokens dim"], ...]:
        x, added = self._enter(images), self._outlier_update(images)
        streams = []
        for index in range(blocks):
            x = self._advance(index, x, added)
            streams.append(x)
        return tuple(self._cleaned(x, index, added) for index, x in enumerate(streams))

    def _cleaned(
        self,
        x: Float[Array, "batch tokens dim"],
        index: int,
        added: Float[Array, "batch tokens dim"] | None,
    ) -> Float[Array, "batch tokens dim"]:
        """Returns the stream after block `index`, minus synthetic outliers if these are removed."""
        subtracted = (
            self.policy.artifact_removal == "synthetic_outlier"
            and index >= self.arch.synthetic_outlier_after
        )
        return x - added.astype(x.dtype) if subtracted else x

    def _viewed(self, compute: Callable[[Array], Any], images: Array) -> Any:
        """Returns `compute(images)`, or its mean over the views of the images."""
        if self.policy.artifact_removal != "shift_average":
            return compute(images)
        return averaged(compute, images, self.arch)

    def features(
        self, images: Float[Array, "batch height width 3"], blocks: int | None = None
    ) -> tuple[Float[Array, "batch tokens dim"], ...]:
        """Returns the raw residual stream after each of the first `blocks` blocks (default: all).

        Args:
          images: images normalised with the model's own mean and standard deviation.
          blocks: number of blocks to run.
        """
        count = self.arch.depth if blocks is None else blocks
        streams = self._viewed(lambda images: self._streams(images, count), images)
        return tuple(self.split_register(x)[1] for x in streams)

    def features_at(
        self, images: Float[Array, "batch height width 3"], layers: Sequence[int]
    ) -> dict[int, Float[Array, "batch tokens dim"]]:
        """Returns `features` after selected blocks only, for a model that is not trained.

        Other features are not kept, and later blocks do not run. Stacked blocks run in a loop that
        has no gradient.

        Args:
          images: images as for `features`.
          layers: indices of the blocks.
        """
        streams = self.streams_at(images, layers)
        return {layer: self.split_register(x)[1] for layer, x in streams.items()}

    def streams_at(
        self, images: Float[Array, "batch height width 3"], layers: Sequence[int]
    ) -> dict[int, Float[Array, "batch tokens dim"]]:
        """Returns `features_at` with the token that test-time registers add (`split_register`)."""
        layers = sorted(set(layers))
        return self._viewed(lambda images: self._streams_at(images, layers), images)

    def _streams_at(
        self, images: Float[Array, "batch height width 3"], layers: Sequence[int]
    ) -> dict[int, Float[Array, "batch tokens dim"]]:
        if not self.policy.stacked:
            streams = self._streams(images, layers[-1] + 1)
            return {layer: jax.lax.stop_gradient(streams[layer]) for layer in layers}

        added = self._outlier_update(images)

        def advance(x: Array, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
            x = jax.lax.fori_loop(*bounds, lambda index, x: self._advance(index, x, added), x)
            return x, x

        ends = np.asarray(layers, np.int32) + 1
        starts = np.concatenate([np.zeros(1, np.int32), ends[:-1]])
        found = jax.lax.scan(advance, self._enter(images), (starts, ends))[1]
        of_layers = zip(layers, found, strict=True)
        return {layer: self._cleaned(x, layer, added) for layer, x in of_layers}

    @_exact
    def pooled(self, x: Float[Array, "batch tokens dim"]) -> Float[Array, "batch dim"]:
        """Returns the input of the head for the last feature (see `Architecture.global_pool`)."""
        arch, x = self.arch, self.norm(x)
        if arch.global_pool == "token":
            return self.fc_norm(x[:, : 1 + arch.distilled].mean(axis=1))
        x = x if arch.pool_include_prefix else x[:, arch.num_prefix_tokens :]
        return self.attn_pool(x) if arch.global_pool == "map" else self.fc_norm(x.mean(axis=1))

    @_exact
    def head_output(
        self, x: Float[Array, "batch tokens dim"]
    ) -> Float[Array, "batch classes"] | Float[Array, "batch dim"]:
        """Returns class logits from the last feature, or the pooled feature if there is no head.

        With a distillation token, the logits are the mean over both heads.
        """
        if self.arch.num_classes and self.arch.distilled:
            tokens = self.fc_norm(self.norm(x))
            return (self.head(tokens[:, 0]) + self.head_dist(tokens[:, 1])) / 2
        pooled = self.pooled(x)
        return self.head(pooled) if self.arch.num_classes else pooled

    def __call__(
        self, images: Float[Array, "batch height width 3"]
    ) -> Float[Array, "batch classes"] | Float[Array, "batch dim"]:
        """Returns the output of timm's `model(images)`."""
        return self.head_output(self.features(images)[-1])


def _stack(blocks: Sequence[Block]) -> Block:
    """Returns equal blocks as one block whose parameters have a leading axis."""
    graph = nnx.graphdef(blocks[0])
    states = [nnx.state(block) for block in blocks]
    return nnx.merge(graph, jax.tree.map(lambda *leaves: jnp.stack(leaves), *states))
