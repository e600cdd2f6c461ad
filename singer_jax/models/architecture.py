"""What a vision transformer is, and how it computes: settings without parameters."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jax.typing import DTypeLike

from singer_jax import backends

# Names of timm's arguments that have a meaning here.
ACTIVATIONS = ("gelu", "quick_gelu")
MLPS = ("mlp", "swiglu_packed", "swiglu")
POOLS = ("token", "avg", "map")

PRECISIONS = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


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
