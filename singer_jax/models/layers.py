"""Parts of a vision transformer, equal to timm's modules of the same names.

Axis names: batch, tokens (prefix tokens first, then patches row by row), patches, dim (the width of
the residual stream), heads.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn import initializers
from jaxtyping import Array, Float

from singer_jax.models import quantised
from singer_jax.models.architecture import Architecture, ComputePolicy
from singer_jax.models.attention import attend, has_fused_attention
from singer_jax.models.positions import Rotation, relative_positions, rotate

# Relative positions that involve the class token, stored after those of patches (timm `Beit`).
NUM_CLASS_DISTANCES = 3


class Linear(nnx.Linear):
    """`nnx.Linear` whose matmul can also be applied to a part of its kernel.

    Args:
      flat: flatten the tokens (`backends.Choices.flat_linear`).
      **others: arguments of `nnx.Linear`.
    """

    def __init__(self, *args: Any, flat: bool, **others: Any) -> None:
        super().__init__(*args, **others)
        self.flat = flat

    def __call__(self, x: Float[Array, "*axes in"]) -> Float[Array, "*axes out"]:
        rows = x.reshape(-1, x.shape[-1]) if self.flat else x
        y = self.product(rows.astype(self.dtype), self.kernel[...].astype(self.dtype))
        y = y if self.bias is None else y + self.bias[...].astype(self.dtype)
        return y.reshape(*x.shape[:-1], y.shape[-1])

    def product(
        self, x: Float[Array, "*axes in"], kernel: Float[Array, "in ..."]
    ) -> Float[Array, "*axes ..."]:
        """Returns the matmul of tokens and (a part of) the kernel."""
        return self.dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ())))


class _Fp8Linear(Linear):
    """`Linear` with a matmul in fp8 (`quantised.fp8_product`).

    Attributes:
      scales: Scales of input and kernel, which `models.weights.with_scales` computes.
    """

    def __init__(self, *args: Any, **others: Any) -> None:
        super().__init__(*args, **others)
        self.scales = nnx.Param(jnp.full(2, 2.0**-3))  # fit random parameters

    def product(self, x: Array, kernel: Array) -> Array:
        dimension_numbers = (((x.ndim - 1,), (0,)), ((), ()))
        return quantised.fp8_product(x, kernel, self.scales[...], dimension_numbers)


def linear(
    in_features: int,
    out_features: int,
    policy: ComputePolicy,
    rngs: nnx.Rngs,
    use_bias: bool = True,
    format: str | None = None,
) -> Linear:
    """Returns a linear map with timm's initialisation and a matmul in `quantised.FORMATS`."""
    kind = _Fp8Linear if format == "fp8" else Linear
    return kind(
        in_features,
        out_features,
        flat=policy.choices.flat_linear,
        use_bias=use_bias,
        kernel_init=initializers.truncated_normal(0.02),
        dtype=policy.dtype,
        param_dtype=policy.param_dtype,
        dot_general=quantised.int8_product if format == "int8" else jax.lax.dot_general,
        rngs=rngs,
    )


NORMS = {"layernorm": nnx.LayerNorm, "rmsnorm": nnx.RMSNorm}


def layer_norm(
    arch: Architecture, policy: ComputePolicy, rngs: nnx.Rngs, width: int | None = None
) -> nnx.LayerNorm | nnx.RMSNorm:
    """Returns the model's norm over the residual stream, or over `width` channels."""
    return NORMS[arch.norm_layer](
        width or arch.embed_dim,
        epsilon=arch.norm_eps,
        dtype=policy.dtype,
        param_dtype=policy.param_dtype,
        # E[(x - E[x])^2] as in PyTorch: E[x^2] - E[x]^2 cancels on tokens of huge norm.
        use_fast_variance=False,
        rngs=rngs,
    )


def identity(x: Array) -> Array:
    """Identity in place of a norm that a model does not have."""
    return x


def _input_format(arch: Architecture, policy: ComputePolicy) -> str | None:
    """Returns the format of the matmuls that read a block's input, if a norm bounds it."""
    return None if arch.post_norm else policy.quantised


class PatchEmbed(nnx.Module):
    """Patch embedding as a single matmul of non-overlapping patches (timm `PatchEmbed`)."""

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
        self.norm = layer_norm(arch, policy, rngs) if arch.embed_norm else identity

    def __call__(
        self, images: Float[Array, "batch height width 3"]
    ) -> Float[Array, "batch patches dim"]:
        x = patch_products(images, self.proj.kernel[...].astype(images.dtype))
        return self.norm(x if self.proj.bias is None else x + self.proj.bias[...].astype(x.dtype))


def patch_products(
    images: Float[Array, "batch height width 3"], kernel: Float[Array, "size size 3 dim"]
) -> Float[Array, "batch patches dim"]:
    """Computes the convolution of non-overlapping patches as a matmul.

    Patches are multiplied row by row, in the memory order of their pixels. A convolution has a slow
    gradient on the CPU. On a TPU it moves 0.1 GB less for 128 images. For few images, however, XLA
    unrolls it into programs of 100 MB, which take minutes to compile (benchmarks/README.md).
    """
    size, _, channels, dim = kernel.shape
    batch, height, width, _ = images.shape
    x = images.reshape(batch, height // size, size, width // size, size * channels)
    return x.swapaxes(2, 3).reshape(batch, -1, size * size * channels) @ kernel.reshape(-1, dim)


def _split_heads(
    x: Float[Array, "batch tokens dim"], parts: int, num_heads: int
) -> list[Float[Array, "batch tokens heads head_dim"]]:
    return [part.reshape(*part.shape[:2], num_heads, -1) for part in jnp.split(x, parts, axis=-1)]


class Attention(nnx.Module):
    """Multi-head self-attention, equal to the timm modules that `Architecture` describes.

    timm `Attention`, `EvaAttention`, `AttentionRope` and the `Attention` of `beit`.

    Args:
      arch: sizes and variants.
      policy: numerical policy.
      rngs: random streams for the parameters.
      num_kv_heads: number of key and value heads, each shared by equally many query heads.
    """

    def __init__(
        self, arch: Architecture, policy: ComputePolicy, rngs: nnx.Rngs, num_kv_heads: int
    ) -> None:
        dim = arch.embed_dim
        self.num_heads, self.num_kv_heads = arch.num_heads, num_kv_heads
        format = _input_format(arch, policy)
        if arch.qkv_fused:
            bias = arch.qkv_bias and arch.k_bias
            self.qkv = linear(dim, 3 * dim, policy, rngs, bias, format)
        else:
            width = dim // arch.num_heads * num_kv_heads
            bias = arch.qkv_bias
            self.q_proj = linear(dim, dim, policy, rngs, bias, format)
            self.k_proj = linear(dim, width, policy, rngs, bias and arch.k_bias, format)
            self.v_proj = linear(dim, width, policy, rngs, bias, format)
        self.separate_bias = arch.qkv_bias and not arch.k_bias and arch.qkv_fused
        if self.separate_bias:
            self.q_bias = nnx.Param(jnp.zeros(dim, policy.param_dtype))
            self.v_bias = nnx.Param(jnp.zeros(dim, policy.param_dtype))
        head_norm = functools.partial(layer_norm, arch, policy, rngs, dim // arch.num_heads)
        self.q_norm = head_norm() if arch.qk_norm else identity
        self.k_norm = head_norm() if arch.qk_norm else identity
        self.norm = layer_norm(arch, policy, rngs) if arch.scale_attn_norm else identity
        self.proj = linear(dim, dim, policy, rngs, arch.proj_bias)
        if arch.rel_pos_bias:
            distances = math.prod(2 * side - 1 for side in arch.grid) + NUM_CLASS_DISTANCES
            table = jnp.zeros((distances, arch.num_heads), policy.param_dtype)
            self.relative_position_bias_table = nnx.Param(table)
            self.grid = arch.grid
        self.apart = policy.choices.project_apart and arch.qkv_fused
        self.sliced = policy.choices.slice_frozen and policy.frozen and arch.qkv_fused
        self.project_heads = policy.choices.project_apart and not arch.scale_attn_norm
        self.half_turns = arch.rope_type == "dinov3"
        self.fused = policy.choices.fused_attention and has_fused_attention()
        self.heads_first = policy.choices.heads_first

    def __call__(
        self, x: Float[Array, "batch tokens dim"], by: Rotation | None = None
    ) -> Float[Array, "batch tokens dim"]:
        query, key, value = self._heads(x)
        query, key = self.q_norm(query), self.k_norm(key)
        if by is not None:
            query, key = (rotate(part, by, self.half_turns) for part in (query, key))
        if self.num_kv_heads != self.num_heads:
            served = self.num_heads // self.num_kv_heads
            key, value = (jnp.repeat(part, served, axis=2) for part in (key, value))
        bias = self._bias(x.shape[1])
        mixed = attend(query, key, value, self.fused, bias, self.heads_first)
        if not self.project_heads:
            return self.proj(self.norm(mixed.reshape(x.shape)))
        kernel = self.proj.kernel[...].astype(x.dtype)
        # Contract heads and channels; axes: batch, tokens, dim.
        kernel = kernel.reshape(*mixed.shape[2:], -1)
        x = self.proj.dot_general(mixed, kernel, (((2, 3), (0, 1)), ((), ())))
        return x if self.proj.bias is None else x + self.proj.bias[...].astype(x.dtype)

    def input_maps(self) -> tuple[Float[Array, "dim out"], ...]:
        """Returns the linear maps that read the tokens: query, key and value."""
        if hasattr(self, "qkv"):
            return tuple(jnp.split(self.qkv.kernel[...], 3, axis=1))
        return tuple(each.kernel[...] for each in (self.q_proj, self.k_proj, self.v_proj))

    def value_map(self) -> Float[Array, "dim dim"]:
        """Returns the linear map from a token to its values, in the layout that `proj` reads."""
        value = self.input_maps()[2]
        heads = value.reshape(value.shape[0], self.num_kv_heads, -1)
        return jnp.repeat(heads, self.num_heads // self.num_kv_heads, 1).reshape(len(value), -1)

    def output_map(self) -> Float[Array, "dim dim"]:
        """Returns the linear map from mixed values to the residual stream with the norm's scale."""
        kernel = self.proj.kernel[...]
        return kernel if self.norm is identity else self.norm.scale[...][:, None] * kernel

    def _bias(self, tokens: int) -> Float[Array, "heads tokens tokens"] | None:
        """Returns the bias of each pair of tokens; tokens before the class token have none."""
        if not hasattr(self, "relative_position_bias_table"):
            return None
        index = relative_positions(self.grid)
        bias = self.relative_position_bias_table[...][index].transpose(2, 0, 1)
        added = tokens - len(index)
        return jnp.pad(bias, ((0, 0), (added, 0), (added, 0)))

    def _heads(
        self, x: Float[Array, "batch tokens dim"]
    ) -> list[Float[Array, "batch tokens heads head_dim"]]:
        """Returns query, key and value."""
        if not hasattr(self, "qkv"):
            (query,) = _split_heads(self.q_proj(x), 1, self.num_heads)
            others = (self.k_proj(x), self.v_proj(x))
            return [query, *(_split_heads(part, 1, self.num_kv_heads)[0] for part in others)]
        bias = None if self.qkv.bias is None else self.qkv.bias[...]
        if self.separate_bias:
            q_bias, v_bias = self.q_bias[...], self.v_bias[...]
            bias = jnp.concatenate([q_bias, jnp.zeros_like(q_bias), v_bias])
        if self.sliced:
            return self._heads_of_slices(x, bias)
        if not self.apart:
            qkv = self.qkv(x)
            if self.separate_bias:
                qkv += bias.astype(qkv.dtype)
            return _split_heads(qkv, 3, self.num_heads)
        kernel = self.qkv.kernel[...].astype(x.dtype)
        kernel = kernel.reshape(x.shape[-1], 3, self.num_heads, -1)
        # Axes: batch, tokens, heads, channels.
        parts = [self.qkv.product(x, kernel[:, part]) for part in range(3)]
        if bias is None:
            return parts
        biases = bias.astype(x.dtype).reshape(3, self.num_heads, -1)
        return [part + own for part, own in zip(parts, biases, strict=True)]

    def _heads_of_slices(
        self, x: Float[Array, "batch tokens dim"], bias: Float[Array, " out"] | None
    ) -> list[Float[Array, "batch tokens heads head_dim"]]:
        """Returns query, key and value from three products with slices of the kernel."""
        flat, shape = x.reshape(-1, x.shape[-1]), (*x.shape[:2], self.num_heads, -1)
        parts = []
        for part in range(3):
            own = slice(part * x.shape[-1], (part + 1) * x.shape[-1])
            kernel = self.qkv.kernel[:, own].astype(x.dtype)
            found = self.qkv.product(flat, kernel)
            parts.append(found if bias is None else found + bias[own].astype(x.dtype))
        return [part.reshape(shape) for part in parts]


@jax.checkpoint
def _gelu(x: Float[Array, "*axes"]) -> Float[Array, "*axes"]:
    """Computes exact GELU, x Phi(x), in float32 (1 + erf cancels); backward keeps only x."""
    wide = x.astype(jnp.float32)
    return (0.5 * wide * (1 + jax.lax.erf(wide * 0.5**0.5))).astype(x.dtype)


@jax.checkpoint
def _quick_gelu(x: Float[Array, "*axes"]) -> Float[Array, "*axes"]:
    """Computes x sigmoid(1.702 x) in float32, the activation of CLIP."""
    wide = x.astype(jnp.float32)
    return (wide * jax.nn.sigmoid(1.702 * wide)).astype(x.dtype)


@jax.checkpoint
def _gelu_tanh(x: Float[Array, "*axes"]) -> Float[Array, "*axes"]:
    """Computes the tanh approximation of GELU in float32, the activation of SigLIP 2."""
    return jax.nn.gelu(x.astype(jnp.float32), approximate=True).astype(x.dtype)


def _gelu_of_product(x: Float[Array, "*axes"]) -> Float[Array, "*axes"]:
    """Computes the tanh approximation of GELU in the form that cuBLASLt computes after a product.

    cuBLASLt computes it in float32 before it rounds to `x.dtype`.
    """
    return jax.nn.gelu(x, approximate=True)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": _gelu,
    "quick_gelu": _quick_gelu,
    "gelu_tanh": _gelu_tanh,
    "silu": jax.nn.silu,
}


Move = Callable[[Float[Array, "batch tokens hidden"]], Float[Array, "batch tokens hidden"]]
"""A function that changes the hidden layer of an MLP, such as `registers.move`."""


class _Mlp(nnx.Module):
    """Base class of all MLPs, which maps the hidden layer to the residual stream."""

    def __call__(self, x: Float[Array, "*axes dim"], move: Move | None = None) -> Array:
        hidden = self.hidden(x)
        return self.fc2(hidden if move is None else move(hidden))

    def hidden(self, x: Float[Array, "*axes dim"]) -> Float[Array, "*axes hidden"]:
        """Returns the hidden layer, the input of `fc2`."""
        return self.norm(self._hidden(x))

    def output_map(self, norm: bool = False) -> Float[Array, "hidden dim"]:
        """Returns the linear map from the hidden layer to the residual stream.

        Args:
          norm: include the scale of the norm of the hidden layer, if there is one.
        """
        kernel = self.fc2.kernel[...]
        scaled = norm and self.norm is not identity
        return self.norm.scale[...][:, None] * kernel if scaled else kernel


class Mlp(_Mlp):
    """MLP of two linear maps with an activation between them (timm `Mlp`)."""

    def __init__(self, arch: Architecture, policy: ComputePolicy, rngs: nnx.Rngs) -> None:
        dim, hidden = arch.embed_dim, arch.hidden_dim
        self.activation = ACTIVATIONS[arch.act_layer]
        if policy.approximate_gelu and arch.act_layer == "gelu":
            in_product = policy.choices.fused_gelu and policy.frozen
            self.activation = _gelu_of_product if in_product else _gelu_tanh
        format = _input_format(arch, policy)
        self.fc1 = linear(dim, hidden, policy, rngs, arch.proj_bias, format)
        self.norm = _hidden_norm(arch, policy, rngs, hidden)
        self.fc2 = linear(hidden, dim, policy, rngs, arch.proj_bias)

    def _hidden(self, x: Float[Array, "*axes dim"]) -> Float[Array, "*axes hidden"]:
        return self.activation(self.fc1(x))

    def input_maps(self) -> tuple[Float[Array, "dim hidden"], ...]:
        """Returns the linear maps that read the tokens, one for each factor of the hidden layer."""
        return (self.fc1.kernel[...],)


class SwiGLUPacked(_Mlp):
    """MLP with the hidden layer silu(first half) x second half (timm `SwiGLUPacked`).

    `mlp_ratio` gives the total width of both halves; in timm's class Eva the width of each half.
    """

    def __init__(self, arch: Architecture, policy: ComputePolicy, rngs: nnx.Rngs) -> None:
        dim, hidden = arch.embed_dim, arch.hidden_dim if arch.eva else arch.hidden_dim // 2
        format = _input_format(arch, policy)
        self.fc1 = linear(dim, 2 * hidden, policy, rngs, arch.proj_bias, format)
        self.norm = _hidden_norm(arch, policy, rngs, hidden)
        self.fc2 = linear(hidden, dim, policy, rngs, arch.proj_bias)

    def _hidden(self, x: Float[Array, "*axes dim"]) -> Float[Array, "*axes hidden"]:
        gate, value = jnp.split(self.fc1(x), 2, axis=-1)
        return jax.nn.silu(gate) * value

    def input_maps(self) -> tuple[Float[Array, "dim hidden"], ...]:
        """Returns the linear maps of gate and value."""
        return tuple(jnp.split(self.fc1.kernel[...], 2, axis=-1))


class SwiGLU(_Mlp):
    """MLP with the hidden layer silu(gate) x value of two projections (timm `SwiGLU`)."""

    def __init__(self, arch: Architecture, policy: ComputePolicy, rngs: nnx.Rngs) -> None:
        dim, hidden = arch.embed_dim, arch.hidden_dim
        if arch.swiglu_align_to:
            hidden += -hidden % arch.swiglu_align_to
        format = _input_format(arch, policy)
        self.fc1_g = linear(dim, hidden, policy, rngs, arch.proj_bias, format)
        self.fc1_x = linear(dim, hidden, policy, rngs, arch.proj_bias, format)
        self.norm = _hidden_norm(arch, policy, rngs, hidden)
        self.fc2 = linear(hidden, dim, policy, rngs, arch.proj_bias)

    def _hidden(self, x: Float[Array, "*axes dim"]) -> Float[Array, "*axes hidden"]:
        return jax.nn.silu(self.fc1_g(x)) * self.fc1_x(x)

    def input_maps(self) -> tuple[Float[Array, "dim hidden"], ...]:
        """Returns the linear maps of gate and value."""
        return self.fc1_g.kernel[...], self.fc1_x.kernel[...]


def _hidden_norm(
    arch: Architecture, policy: ComputePolicy, rngs: nnx.Rngs, hidden: int
) -> Callable[[Array], Array]:
    return layer_norm(arch, policy, rngs, hidden) if arch.scale_mlp_norm else identity


MLPS: dict[str, type[nnx.Module]] = {
    "mlp": Mlp,
    "swiglu_packed": SwiGLUPacked,
    "swiglu": SwiGLU,
}


class LayerScale(nnx.Module):
    """Learned factor per channel (timm `LayerScale`)."""

    def __init__(self, arch: Architecture, policy: ComputePolicy) -> None:
        self.gamma = nnx.Param(jnp.full((arch.embed_dim,), arch.init_values, policy.param_dtype))


class Block(nnx.Module):
    """Transformer block (timm `Block`, `ResPostBlock`, `EvaBlock`, `EvaBlockPostNorm`).

    Args:
      arch: sizes and variants.
      policy: numerical policy.
      rngs: random streams for the parameters.
      index: index of the block.
    """

    def __init__(
        self, arch: Architecture, policy: ComputePolicy, rngs: nnx.Rngs, index: int = 0
    ) -> None:
        num_kv_heads = arch.num_kv_heads[index] if arch.num_kv_heads else arch.num_heads
        self.norm1 = layer_norm(arch, policy, rngs)
        self.attn = Attention(arch, policy, rngs, num_kv_heads)
        self.norm2 = layer_norm(arch, policy, rngs)
        self.mlp = MLPS[arch.mlp_layer](arch, policy, rngs)
        self.post_norm = arch.post_norm
        scaled = arch.init_values is not None and not arch.post_norm
        if scaled and (arch.eva or arch.rel_pos_bias):
            self.gamma_1 = LayerScale(arch, policy).gamma
            if not arch.attn_only_layer_scale:
                self.gamma_2 = LayerScale(arch, policy).gamma
        elif scaled:
            self.ls1 = LayerScale(arch, policy)
            self.ls2 = LayerScale(arch, policy)
        self.keep_residual = policy.choices.keep_residual

    def scales(self) -> tuple[Float[Array, " dim"] | None, Float[Array, " dim"] | None]:
        """Returns the factors of the outputs of attention and MLP; None: no factor.

        The factors are those of LayerScale, or of the norms in blocks with `post_norm`.
        """
        if self.post_norm:
            return self.norm1.scale[...], self.norm2.scale[...]
        if hasattr(self, "ls1"):
            return self.ls1.gamma[...], self.ls2.gamma[...]
        first, second = getattr(self, "gamma_1", None), getattr(self, "gamma_2", None)
        return tuple(None if gamma is None else gamma[...] for gamma in (first, second))

    def input_scales(self) -> tuple[Float[Array, " dim"], Float[Array, " dim"]]:
        """Returns the factors of the inputs of attention and MLP: the norms' scales, or ones."""
        scales = self.norm1.scale[...], self.norm2.scale[...]
        return tuple(map(jnp.ones_like, scales)) if self.post_norm else scales

    def __call__(
        self,
        x: Float[Array, "batch tokens dim"],
        by: Rotation | None = None,
        move: Move | None = None,
    ) -> Float[Array, "batch tokens dim"]:
        x = self._attended(x, by)
        if self.post_norm:
            return self._kept(x + self.norm2(self.mlp(x, move)))
        return self._kept(x + _scaled(self.mlp(self.norm2(x), move), self.scales()[1]))

    def hidden(
        self, x: Float[Array, "batch tokens dim"], by: Rotation | None = None
    ) -> Float[Array, "batch tokens hidden"]:
        """Returns the hidden layer of the block's MLP."""
        x = self._attended(x, by)
        return self.mlp.hidden(x if self.post_norm else self.norm2(x))

    def _attended(self, x: Float[Array, "batch tokens dim"], by: Rotation | None) -> Array:
        if self.post_norm:
            return self._kept(x + self.norm1(self.attn(x, by)))
        return self._kept(x + _scaled(self.attn(self.norm1(x), by), self.scales()[0]))

    def _kept(self, x: Float[Array, "batch tokens dim"]) -> Array:
        # Without the barrier XLA may recompute the residual stream in each of its consumers.
        return jax.lax.optimization_barrier(x) if self.keep_residual else x


def _scaled(x: Float[Array, "*axes dim"], scale: Float[Array, " dim"] | None) -> Array:
    return x if scale is None else x * scale.astype(x.dtype)


class AttentionPool(nnx.Module):
    """Attention pooling: a learned query attends to all tokens (timm `AttentionPoolLatent`)."""

    def __init__(self, arch: Architecture, policy: ComputePolicy, rngs: nnx.Rngs) -> None:
        dim = arch.embed_dim
        self.num_heads = arch.attn_pool_num_heads or arch.num_heads
        start = initializers.truncated_normal(dim**-0.5)
        self.latent = nnx.Param(start(rngs.params(), (1, 1, dim), policy.param_dtype))
        self.q = linear(dim, dim, policy, rngs)
        self.kv = linear(dim, 2 * dim, policy, rngs)
        self.proj = linear(dim, dim, policy, rngs)
        self.norm = layer_norm(arch, policy, rngs)
        plain = {"mlp_ratio": arch.attn_pool_mlp_ratio or arch.mlp_ratio, "mlp_layer": "mlp"}
        plain |= {"scale_mlp_norm": False, "proj_bias": True}
        unquantised = dataclasses.replace(policy, quantised=None)
        self.mlp = Mlp(dataclasses.replace(arch, **plain), unquantised, rngs)

    def __call__(self, x: Float[Array, "batch tokens dim"]) -> Float[Array, "batch dim"]:
        latent = jnp.broadcast_to(self.latent[...].astype(x.dtype), (x.shape[0], 1, x.shape[-1]))
        (query,) = _split_heads(self.q(latent), 1, self.num_heads)
        key, value = _split_heads(self.kv(x), 2, self.num_heads)
        pooled = self.proj(attend(query, key, value).reshape(latent.shape))
        return (pooled + self.mlp(self.norm(pooled)))[:, 0]
