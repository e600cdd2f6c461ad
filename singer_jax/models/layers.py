"""The parts of a vision transformer, equal to timm's modules of the same names.

Axis names: batch, tokens (prefix tokens first, then patches row by row), patches, dim (the width of
the residual stream), heads.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.nn import initializers
from jaxtyping import Array, Float

from singer_jax.models import quantised
from singer_jax.models.architecture import Architecture, ComputePolicy
from singer_jax.models.attention import attend, has_fused_attention

Rotation = Float[Array, "2 patches head_dim"]
"""Sine and cosine of the angle by which each patch turns each pair of channels."""

_ROPE_BASE = 100.0
_SWIGLU_MULTIPLE = 8


class _FlatLinear(nnx.Linear):
    """`nnx.Linear` on flattened tokens (`backends.Choices.flat_linear`)."""

    def __call__(self, x: Float[Array, "*axes in"]) -> Float[Array, "*axes out"]:
        flat = super().__call__(x.reshape(-1, x.shape[-1]))
        return flat.reshape(*x.shape[:-1], flat.shape[-1])


def linear(
    in_features: int,
    out_features: int,
    policy: ComputePolicy,
    rngs: nnx.Rngs,
    use_bias: bool = True,
    product: quantised.Product = jax.lax.dot_general,
) -> nnx.Linear:
    """A linear map with timm's initialisation; `product` of its input and its kernel."""
    kind = _FlatLinear if policy.choices.flat_linear else nnx.Linear
    return kind(
        in_features,
        out_features,
        use_bias=use_bias,
        kernel_init=initializers.truncated_normal(0.02),
        dtype=policy.dtype,
        param_dtype=policy.param_dtype,
        dot_general=product,
        rngs=rngs,
    )


def layer_norm(arch: Architecture, policy: ComputePolicy, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """LayerNorm over the residual stream."""
    return nnx.LayerNorm(
        arch.embed_dim,
        epsilon=arch.norm_eps,
        dtype=policy.dtype,
        param_dtype=policy.param_dtype,
        # E[(x - E[x])^2] as in PyTorch: E[x^2] - E[x]^2 cancels on tokens of huge norm.
        use_fast_variance=False,
        rngs=rngs,
    )


class PatchEmbed(nnx.Module):
    """Non-overlapping patches times one matrix (timm `PatchEmbed`)."""

    def __init__(self, arch: Architecture, policy: ComputePolicy, rngs: nnx.Rngs) -> None:
        self.proj = nnx.Conv(
            3,
            arch.embed_dim,
            kernel_size=(arch.patch_size, arch.patch_size),
            use_bias=not arch.pre_norm,
            kernel_init=initializers.variance_scaling(1 / 3, "fan_in", "uniform"),
            param_dtype=policy.param_dtype,
            rngs=rngs,
        )

    def __call__(
        self, images: Float[Array, "batch height width 3"]
    ) -> Float[Array, "batch patches dim"]:
        x = patch_products(images, self.proj.kernel[...].astype(images.dtype))
        return x if self.proj.bias is None else x + self.proj.bias[...].astype(x.dtype)


def patch_products(
    images: Float[Array, "batch height width 3"], kernel: Float[Array, "size size 3 dim"]
) -> Float[Array, "batch patches dim"]:
    """The convolution of non-overlapping patches, as a product of matrices.

    Each patch is taken row by row, as its pixels lie in memory. The convolution has a slow gradient
    on the CPU. On a TPU it moves 0.1 GB less at 128 images, but with few images XLA unrolls it into
    programs of 100 MB, which take minutes to compile (benchmarks/RESULTS.md).
    """
    size, _, channels, dim = kernel.shape
    batch, height, width, _ = images.shape
    x = images.reshape(batch, height // size, size, width // size, size * channels)
    return x.swapaxes(2, 3).reshape(batch, -1, size * size * channels) @ kernel.reshape(-1, dim)


def rotation(grid: tuple[int, int], head_dim: int) -> Rotation:
    """DINOv3's rotary position embedding in float32 (timm `RotaryEmbeddingDinoV3`).

    Patch centres have coordinates in [-1, 1]; the first quarter of the channels turns with the row,
    the second with the column, and the other half repeats both.
    """
    rows, columns = ((2 * np.arange(side) + 1) / side - 1 for side in grid)
    centres = np.stack(np.meshgrid(rows, columns, indexing="ij"), axis=-1).reshape(-1, 2, 1)
    periods = _ROPE_BASE ** (4 * np.arange(head_dim // 4) / head_dim)
    angles = np.tile((2 * math.pi * centres / periods).reshape(len(centres), -1), 2)
    return jnp.asarray(np.stack([np.sin(angles), np.cos(angles)]), jnp.float32)


def _rotate(x: Float[Array, "batch tokens heads head_dim"], by: Rotation) -> Array:
    """Turns the patches by their angles; prefix tokens stay."""
    prefix, patches = jnp.split(x, [x.shape[1] - by.shape[1]], axis=1)
    first, second = jnp.split(patches.astype(jnp.float32), 2, axis=-1)
    sine, cosine = by[:, :, None]
    turned = jnp.concatenate([first, second], -1) * cosine
    turned += jnp.concatenate([-second, first], -1) * sine
    return jnp.concatenate([prefix, turned.astype(x.dtype)], axis=1)


def _split_heads(
    x: Float[Array, "batch tokens dim"], parts: int, num_heads: int
) -> list[Float[Array, "batch tokens heads head_dim"]]:
    return [part.reshape(*part.shape[:2], num_heads, -1) for part in jnp.split(x, parts, axis=-1)]


class Attention(nnx.Module):
    """Multi-head self-attention with one projection for query, key and value.

    timm `Attention`; with `arch.eva` `EvaAttention`: rotary positions, and biases (if any) of query
    and value only.
    """

    def __init__(self, arch: Architecture, policy: ComputePolicy, rngs: nnx.Rngs) -> None:
        dim = arch.embed_dim
        self.num_heads = arch.num_heads
        bias = arch.qkv_bias and not arch.eva
        self.qkv = linear(dim, 3 * dim, policy, rngs, bias, policy.product)
        self.separate_bias = arch.qkv_bias and arch.eva
        if self.separate_bias:
            self.q_bias = nnx.Param(jnp.zeros(dim, policy.param_dtype))
            self.v_bias = nnx.Param(jnp.zeros(dim, policy.param_dtype))
        self.proj = linear(dim, dim, policy, rngs)
        self.apart = policy.choices.project_apart
        self.fused = policy.choices.fused_attention and has_fused_attention()

    def __call__(
        self, x: Float[Array, "batch tokens dim"], by: Rotation | None = None
    ) -> Float[Array, "batch tokens dim"]:
        query, key, value = self._heads(x)
        if by is not None:
            query, key = _rotate(query, by), _rotate(key, by)
        mixed = attend(query, key, value, self.fused)
        if not self.apart:
            return self.proj(mixed.reshape(x.shape))
        kernel = self.proj.kernel[...].astype(x.dtype)
        # Over heads and channels: batch, tokens, dim.
        kernel = kernel.reshape(*mixed.shape[2:], -1)
        x = self.proj.dot_general(mixed, kernel, (((2, 3), (0, 1)), ((), ())))
        return x + self.proj.bias[...].astype(x.dtype)

    def _heads(
        self, x: Float[Array, "batch tokens dim"]
    ) -> list[Float[Array, "batch tokens heads head_dim"]]:
        """Query, key and value."""
        bias = None if self.qkv.bias is None else self.qkv.bias[...]
        if self.separate_bias:
            q_bias, v_bias = self.q_bias[...], self.v_bias[...]
            bias = jnp.concatenate([q_bias, jnp.zeros_like(q_bias), v_bias])
        if not self.apart:
            qkv = self.qkv(x)
            if self.separate_bias:
                qkv += bias.astype(qkv.dtype)
            return _split_heads(qkv, 3, self.num_heads)
        kernel = self.qkv.kernel[...].astype(x.dtype)
        kernel = kernel.reshape(x.shape[-1], 3, self.num_heads, -1)
        over_dim = (((2,), (0,)), ((), ()))  # batch, tokens, heads, channels
        parts = [self.qkv.dot_general(x, kernel[:, part], over_dim) for part in range(3)]
        if bias is None:
            return parts
        biases = bias.astype(x.dtype).reshape(3, self.num_heads, -1)
        return [part + own for part, own in zip(parts, biases, strict=True)]


@jax.checkpoint
def _gelu(x: Float[Array, "*axes"]) -> Float[Array, "*axes"]:
    """Exact GELU, x Phi(x), in float32 (1 + erf cancels); keeps only x for the backward pass."""
    wide = x.astype(jnp.float32)
    return (0.5 * wide * (1 + jax.lax.erf(wide * 0.5**0.5))).astype(x.dtype)


@jax.checkpoint
def _quick_gelu(x: Float[Array, "*axes"]) -> Float[Array, "*axes"]:
    """x sigmoid(1.702 x), as CLIP was trained, in float32."""
    wide = x.astype(jnp.float32)
    return (wide * jax.nn.sigmoid(1.702 * wide)).astype(x.dtype)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {"gelu": _gelu, "quick_gelu": _quick_gelu}


Move = Callable[[Float[Array, "batch tokens hidden"]], Float[Array, "batch tokens hidden"]]
"""A change of the hidden layer of an MLP, such as `registers.move`."""


class _Mlp(nnx.Module):
    """What every MLP does with its hidden layer."""

    def __call__(self, x: Float[Array, "*axes dim"], move: Move | None = None) -> Array:
        hidden = self.hidden(x)
        return self.fc2(hidden if move is None else move(hidden))


class Mlp(_Mlp):
    """Two linear maps around an activation (timm `Mlp`)."""

    def __init__(self, arch: Architecture, policy: ComputePolicy, rngs: nnx.Rngs) -> None:
        hidden = int(arch.embed_dim * arch.mlp_ratio)
        self.activation = ACTIVATIONS[arch.act_layer]
        self.fc1 = linear(arch.embed_dim, hidden, policy, rngs, product=policy.product)
        self.fc2 = linear(hidden, arch.embed_dim, policy, rngs)

    def hidden(self, x: Float[Array, "*axes dim"]) -> Float[Array, "*axes hidden"]:
        """What `fc2` reads."""
        return self.activation(self.fc1(x))

    def input_maps(self) -> tuple[Float[Array, "dim hidden"], ...]:
        """The linear maps that read the tokens, one for each factor of the hidden layer."""
        return (self.fc1.kernel[...],)


class SwiGLUPacked(_Mlp):
    """silu(first half) x second half of one projection (timm `SwiGLUPacked`)."""

    def __init__(self, arch: Architecture, policy: ComputePolicy, rngs: nnx.Rngs) -> None:
        hidden = int(arch.embed_dim * arch.mlp_ratio)
        self.fc1 = linear(arch.embed_dim, hidden, policy, rngs, product=policy.product)
        self.fc2 = linear(hidden // 2, arch.embed_dim, policy, rngs)

    def hidden(self, x: Float[Array, "*axes dim"]) -> Float[Array, "*axes hidden"]:
        """What `fc2` reads."""
        gate, value = jnp.split(self.fc1(x), 2, axis=-1)
        return jax.nn.silu(gate) * value

    def input_maps(self) -> tuple[Float[Array, "dim hidden"], ...]:
        """Of gate and value."""
        return tuple(jnp.split(self.fc1.kernel[...], 2, axis=-1))


class SwiGLU(_Mlp):
    """silu(gate) x value of two projections (timm `SwiGLU`)."""

    def __init__(self, arch: Architecture, policy: ComputePolicy, rngs: nnx.Rngs) -> None:
        hidden = int(arch.embed_dim * arch.mlp_ratio)
        hidden += -hidden % _SWIGLU_MULTIPLE
        self.fc1_g = linear(arch.embed_dim, hidden, policy, rngs, product=policy.product)
        self.fc1_x = linear(arch.embed_dim, hidden, policy, rngs, product=policy.product)
        self.fc2 = linear(hidden, arch.embed_dim, policy, rngs)

    def hidden(self, x: Float[Array, "*axes dim"]) -> Float[Array, "*axes hidden"]:
        """What `fc2` reads."""
        return jax.nn.silu(self.fc1_g(x)) * self.fc1_x(x)

    def input_maps(self) -> tuple[Float[Array, "dim hidden"], ...]:
        """Of gate and value."""
        return self.fc1_g.kernel[...], self.fc1_x.kernel[...]


MLPS: dict[str, type[nnx.Module]] = {
    "mlp": Mlp,
    "swiglu_packed": SwiGLUPacked,
    "swiglu": SwiGLU,
}


class LayerScale(nnx.Module):
    """A learned factor per channel (timm `LayerScale`)."""

    def __init__(self, arch: Architecture, policy: ComputePolicy) -> None:
        self.gamma = nnx.Param(jnp.full((arch.embed_dim,), arch.init_values, policy.param_dtype))


class Block(nnx.Module):
    """A pre-norm transformer block (timm `Block`; with `arch.eva` `EvaBlock`)."""

    def __init__(self, arch: Architecture, policy: ComputePolicy, rngs: nnx.Rngs) -> None:
        self.norm1 = layer_norm(arch, policy, rngs)
        self.attn = Attention(arch, policy, rngs)
        self.norm2 = layer_norm(arch, policy, rngs)
        self.mlp = MLPS[arch.mlp_layer](arch, policy, rngs)
        if arch.init_values is not None and arch.eva:
            self.gamma_1 = LayerScale(arch, policy).gamma
            self.gamma_2 = LayerScale(arch, policy).gamma
        elif arch.init_values is not None:
            self.ls1 = LayerScale(arch, policy)
            self.ls2 = LayerScale(arch, policy)
        self.keep_residual = policy.choices.keep_residual

    def scales(self) -> tuple[Float[Array, " dim"] | None, Float[Array, " dim"] | None]:
        """LayerScale factors after attention and after the MLP; None where there is none."""
        if hasattr(self, "gamma_1"):
            return self.gamma_1[...], self.gamma_2[...]
        if hasattr(self, "ls1"):
            return self.ls1.gamma[...], self.ls2.gamma[...]
        return None, None

    def __call__(
        self,
        x: Float[Array, "batch tokens dim"],
        by: Rotation | None = None,
        move: Move | None = None,
    ) -> Float[Array, "batch tokens dim"]:
        x = self._attended(x, by)
        return self._kept(x + _scaled(self.mlp(self.norm2(x), move), self.scales()[1]))

    def hidden(
        self, x: Float[Array, "batch tokens dim"], by: Rotation | None = None
    ) -> Float[Array, "batch tokens hidden"]:
        """The hidden layer of its MLP."""
        return self.mlp.hidden(self.norm2(self._attended(x, by)))

    def _attended(self, x: Float[Array, "batch tokens dim"], by: Rotation | None) -> Array:
        return self._kept(x + _scaled(self.attn(self.norm1(x), by), self.scales()[0]))

    def _kept(self, x: Float[Array, "batch tokens dim"]) -> Array:
        # Without the barrier XLA may recompute the residual stream in each of its consumers.
        return jax.lax.optimization_barrier(x) if self.keep_residual else x


def _scaled(x: Float[Array, "*axes dim"], scale: Float[Array, " dim"] | None) -> Array:
    return x if scale is None else x * scale.astype(x.dtype)


class AttentionPool(nnx.Module):
    """One learned query attends to all tokens, then an MLP (timm `AttentionPoolLatent`)."""

    def __init__(self, arch: Architecture, policy: ComputePolicy, rngs: nnx.Rngs) -> None:
        dim = arch.embed_dim
        self.num_heads = arch.num_heads
        start = initializers.truncated_normal(dim**-0.5)
        self.latent = nnx.Param(start(rngs.params(), (1, 1, dim), policy.param_dtype))
        self.q = linear(dim, dim, policy, rngs)
        self.kv = linear(dim, 2 * dim, policy, rngs)
        self.proj = linear(dim, dim, policy, rngs)
        self.norm = layer_norm(arch, policy, rngs)
        self.mlp = Mlp(arch, policy, rngs)

    def __call__(self, x: Float[Array, "batch tokens dim"]) -> Float[Array, "batch dim"]:
        latent = jnp.broadcast_to(self.latent[...].astype(x.dtype), (x.shape[0], 1, x.shape[-1]))
        (query,) = _split_heads(self.q(latent), 1, self.num_heads)
        key, value = _split_heads(self.kv(x), 2, self.num_heads)
        pooled = self.proj(attend(query, key, value).reshape(latent.shape))
        return (pooled + self.mlp(self.norm(pooled)))[:, 0]
