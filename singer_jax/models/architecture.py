"""What a vision transformer is, and how it computes: settings without parameters."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from singer_jax.models import quantised
from singer_jax.platform import backends
from singer_jax.settings.ranges import (
    NOT_NEGATIVE,
    SIDE,
    Each,
    Either,
    Flag,
    OneOf,
    Range,
    optional,
)
from singer_jax.settings.settings import Settings, setting

# Names of timm's arguments that have a meaning here.
ACTIVATIONS = ("gelu", "quick_gelu")
MLPS = ("mlp", "swiglu_packed", "swiglu")
POOLS = ("token", "avg", "map")

PRECISIONS = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}

CLEANERS = ("registers", "shift_average", "planted")
PLACES = ("random", "background")


@dataclasses.dataclass(frozen=True)
class Architecture(Settings):
    """What timm's keyword arguments of the same names say about a vision transformer.

    The bounds are far above any published model.

    Raises:
      InputError: a value that its field may not have.
      ValueError: the image is not a whole number of patches, or the width not one of heads.
    """

    img_size: tuple[int, int] = setting(
        (224, 224),
        Either((SIDE, Each(SIDE, length=2))),
        "height and width of the input; one number for a square",
        "pixels",
    )
    patch_size: int = setting(16, Range(1, 2**12, whole=True), "side of a square patch", "pixels")
    embed_dim: int = setting(768, Range(1, 2**16, whole=True), "width of the residual stream")
    depth: int = setting(12, Range(1, 1000, whole=True), "number of blocks")
    num_heads: int = setting(
        12, Range(1, 2**12, whole=True), "attention heads; `embed_dim` is a multiple of it"
    )
    mlp_ratio: float = setting(
        4.0, Range(0, 64, low_open=True), "hidden width of the MLP over `embed_dim`"
    )
    num_classes: int = setting(
        1000, Range(0, 2**24, whole=True), "outputs of the head; 0 leaves the head out"
    )
    class_token: bool = setting(True, Flag(), "whether there is a class token")
    reg_tokens: int = setting(
        0, Range(0, 2**10, whole=True), "register tokens, after the class token"
    )
    no_embed_class: bool = setting(
        False, Flag(), "the position embedding covers patches only (DeiT-III, registers)"
    )
    pre_norm: bool = setting(
        False,
        Flag(),
        "LayerNorm before the first block, and no bias in the patch embedding (CLIP)",
    )
    init_values: float | None = setting(
        None, optional(NOT_NEGATIVE), "initial LayerScale factor; None leaves LayerScale out"
    )
    norm_eps: float = setting(1e-6, Range(0, 1, low_open=True), "epsilon of every LayerNorm")
    act_layer: str = setting("gelu", OneOf(ACTIVATIONS), "activation of the MLP")
    mlp_layer: str = setting(
        "mlp", OneOf(MLPS), "`swiglu_packed` as in DINOv2 giant, `swiglu` as in DINOv3"
    )
    qkv_bias: bool = setting(True, Flag(), "whether attention projects with a bias")
    global_pool: str = setting(
        "token",
        OneOf(POOLS),
        "what the head reads after the norm: the class token, the mean of the patches (`avg`) or "
        "attention pooling (`map`, SigLIP)",
    )
    eva: bool = setting(
        False,
        Flag(),
        "timm's class Eva as DINOv3 configures it: rotary instead of learned positions, no bias of "
        "the keys",
    )
    planted: str | None = setting(
        None,
        optional(OneOf(PLACES)),
        "patches to which a vector, `planted.vector` of the weights, is added to study artifacts; "
        "None: none (`models.planted`)",
    )
    planted_after: int = setting(0, Range(0, 1000, whole=True), "the block after which it is")
    planted_patches: int = setting(1, Range(1, 2**14, whole=True), "how many patches of an image")
    planted_length: float = setting(
        0.0, NOT_NEGATIVE, "of the vector, in a random direction, where weights are random"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.img_size, int):
            object.__setattr__(self, "img_size", (self.img_size,) * 2)
        if any(side % self.patch_size for side in self.img_size):
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
        if self.global_pool == "token" and not self.class_token:
            raise ValueError("global_pool 'token' needs a class token")
        if self.planted and self.planted_after >= self.depth:
            raise ValueError(f"planted_after {self.planted_after} of {self.depth} blocks")
        if self.planted and self.planted_patches > self.num_patches:
            raise ValueError(
                f"planted_patches {self.planted_patches} of {self.num_patches} patches"
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
        """Tokens before the patches: class token and registers."""
        return self.class_token + self.reg_tokens

    @property
    def num_embedded_prefix_tokens(self) -> int:
        """Prefix tokens that the learned position embedding covers."""
        return 0 if self.no_embed_class else self.num_prefix_tokens


@dataclasses.dataclass(frozen=True)
class ComputePolicy:
    """How a model computes.

    Attributes:
      dtype: of activations and matrix products. LayerNorm statistics and the softmax stay float32.
      param_dtype: in which parameters are stored.
      remat: recompute each block in the backward pass instead of keeping its activations.
      backend: platform of the devices that will compute; empty: the default device's.
      stacked: the blocks' parameters are one tree with a leading axis over the blocks.
      quantised: format of the products that read normalised tokens (`quantised.FORMATS`); None: as
        dtype. A LayerNorm bounds what they read; what is written into the residual stream, among it
        the tokens of huge norm, keeps its precision.
      artifact_removal: how outlier tokens are taken out of the features, one of `CLEANERS`
        (`models.registers`, `models.views`, or the subtraction of what was `planted`); None: not.
      gathered: sharding of a block's parameters while it computes, of a model that is not trained
        and whose parameters are split over devices; None leaves it to the compiler, which may
        gather the larger activations.
    """

    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32
    remat: bool = False
    # Neither changes what is computed, so neither is part of what a model says of itself.
    backend: str = dataclasses.field(default="", repr=False)
    stacked: bool = dataclasses.field(default=False, repr=False)
    quantised: str | None = None
    artifact_removal: str | None = dataclasses.field(default=None, repr=False)
    gathered: jax.sharding.NamedSharding | None = dataclasses.field(default=None, repr=False)

    @property
    def choices(self) -> backends.Choices:
        """What is computed differently on this backend."""
        return backends.choices(self.backend)

    @property
    def product(self) -> quantised.Product:
        """Of normalised tokens and a kernel."""
        return quantised.product(self.quantised) if self.quantised else jax.lax.dot_general


# What overrides of an architecture may be, by field.
FIELDS = {field.name: field.metadata["setting"] for field in dataclasses.fields(Architecture)}
