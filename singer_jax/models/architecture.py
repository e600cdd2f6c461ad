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
ACTIVATIONS = ("gelu", "quick_gelu", "gelu_tanh", "silu")
MLPS = ("mlp", "swiglu_packed", "swiglu")
NORMS = ("layernorm", "rmsnorm")
POOLS = ("token", "avg", "map")
ROPES = ("dinov3", "cat", "mixed")

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
    distilled: bool = setting(
        False, Flag(), "a distillation token after the class token, with its own head (DeiT)"
    )
    reg_tokens: int = setting(
        0, Range(0, 2**10, whole=True), "register tokens, after the class token"
    )
    pos_embed: bool = setting(True, Flag(), "whether a learned position embedding is added")
    no_embed_class: bool = setting(
        False, Flag(), "the position embedding covers patches only (DeiT-III, registers)"
    )
    rel_pos_bias: bool = setting(
        False, Flag(), "timm's class Beit: every block learns a bias for each relative position"
    )
    rope_type: str | None = setting(
        None,
        optional(OneOf(ROPES)),
        "rotary positions: `dinov3`, `cat` (EVA-02, axial), `mixed` (learned); None: none",
    )
    rope_temperature: float = setting(
        100.0, Range(1, 1e9, low_open=True), "largest period of rotary positions"
    )
    rope_grid_offset: float = setting(
        0.0, Range(-1e6, 1e6), "added to the coordinates of `cat` positions", "patches"
    )
    rope_grid_indexing: str = setting(
        "ij", OneOf(("ij", "xy")), "`ij`: rotary positions count the row first; `xy`: the column"
    )
    ref_feat_shape: tuple[int, int] | None = setting(
        None,
        optional(Each(SIDE, length=2)),
        "grid to which the coordinates of `cat` positions are scaled; None: not scaled",
    )
    pre_norm: bool = setting(
        False,
        Flag(),
        "LayerNorm before the first block, and no bias in the patch embedding (CLIP)",
    )
    embed_norm: bool = setting(False, Flag(), "a norm after the patch embedding (AIMv2)")
    final_norm: bool = setting(True, Flag(), "a norm after the last block")
    fc_norm: bool = setting(False, Flag(), "the last norm follows the pooling")
    init_values: float | None = setting(
        None, optional(NOT_NEGATIVE), "initial LayerScale factor; None leaves LayerScale out"
    )
    attn_only_layer_scale: bool = setting(False, Flag(), "LayerScale after attention only")
    norm_layer: str = setting("layernorm", OneOf(NORMS), "kind of every norm")
    norm_eps: float = setting(1e-6, Range(0, 1, low_open=True), "epsilon of every norm")
    post_norm: bool = setting(
        False, Flag(), "the norms of a block follow attention and MLP instead of preceding them"
    )
    act_layer: str = setting("gelu", OneOf(ACTIVATIONS), "activation of the MLP")
    mlp_layer: str = setting(
        "mlp", OneOf(MLPS), "`swiglu_packed` as in DINOv2 giant, `swiglu` as in DINOv3"
    )
    swiglu_align_to: int = setting(
        0, Range(0, 2**10, whole=True), "the hidden width of `swiglu` is a multiple of it; 0: any"
    )
    qkv_bias: bool = setting(True, Flag(), "whether attention projects with a bias")
    k_bias: bool = setting(True, Flag(), "whether that bias covers the keys")
    qkv_fused: bool = setting(True, Flag(), "one matrix for query, key and value")
    num_kv_heads: tuple[int, ...] | None = setting(
        None,
        optional(Each(Range(1, 2**12, whole=True), least=1)),
        "heads of key and value in each block; None: `num_heads`",
    )
    qk_norm: bool = setting(False, Flag(), "a norm of each head's query and key")
    scale_attn_norm: bool = setting(False, Flag(), "a norm before attention's last projection")
    scale_mlp_norm: bool = setting(False, Flag(), "a norm of the hidden layer of the MLP")
    proj_bias: bool = setting(True, Flag(), "biases in the MLP and in attention's last projection")
    global_pool: str = setting(
        "token",
        OneOf(POOLS),
        "what the head reads after the norm: the class token, the mean of the patches (`avg`) or "
        "attention pooling (`map`, SigLIP)",
    )
    pool_include_prefix: bool = setting(False, Flag(), "the pooling covers prefix tokens too")
    attn_pool_num_heads: int | None = setting(
        None, optional(Range(1, 2**12, whole=True)), "heads of `map`; None: `num_heads`"
    )
    attn_pool_mlp_ratio: float | None = setting(
        None, optional(Range(0, 64, low_open=True)), "of the MLP of `map`; None: `mlp_ratio`"
    )
    eva: bool = setting(
        False, Flag(), "timm's class Eva, which names some arguments and parameters its own way"
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
        for name in ("ref_feat_shape", "num_kv_heads"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, tuple(getattr(self, name)))
        for reason, wrong in self._contradictions():
            if wrong:
                raise ValueError(reason)
        if self.planted and self.planted_after >= self.depth:
            raise ValueError(f"planted_after {self.planted_after} of {self.depth} blocks")
        if self.planted and self.planted_patches > self.num_patches:
            raise ValueError(
                f"planted_patches {self.planted_patches} of {self.num_patches} patches"
            )

    def _contradictions(self) -> list[tuple[str, bool]]:
        """Combinations that cannot be, and whether this is one."""
        dim, heads, kv_heads = self.embed_dim, self.num_heads, self.num_kv_heads or ()
        pool_heads = self.attn_pool_num_heads or heads
        return [
            (f"embed_dim {dim} is not a multiple of num_heads {heads}", bool(dim % heads)),
            (
                f"embed_dim {dim} x mlp_ratio {self.mlp_ratio} leaves the MLP empty",
                self.hidden_dim < 1,
            ),
            (
                f"embed_dim {dim} x mlp_ratio {self.mlp_ratio} gives an odd hidden width",
                self.mlp_layer == "swiglu_packed" and not self.eva and bool(self.hidden_dim % 2),
            ),
            (
                "rotary positions need a head width that is a multiple of 4",
                self.rope_type is not None and bool(dim // heads % 4),
            ),
            (
                "global_pool 'token' needs a class token",
                self.global_pool == "token" and not self.class_token,
            ),
            (
                "distilled needs a class token, global_pool 'token' and no registers",
                self.distilled
                and (not self.class_token or self.global_pool != "token" or self.reg_tokens > 0),
            ),
            (
                f"num_kv_heads needs one divisor of {heads} for each of {self.depth} blocks",
                bool(kv_heads)
                and (len(kv_heads) != self.depth or any(heads % number for number in kv_heads)),
            ),
            (
                "num_kv_heads needs qkv_fused False and another rope_type than 'mixed'",
                bool(kv_heads) and (self.qkv_fused or self.rope_type == "mixed"),
            ),
            (
                f"embed_dim {dim} is not a multiple of attn_pool_num_heads {pool_heads}",
                self.global_pool == "map" and bool(dim % pool_heads),
            ),
            (
                "rel_pos_bias needs a class token and no other prefix token",
                self.rel_pos_bias and self.num_prefix_tokens != 1,
            ),
        ]

    @property
    def hidden_dim(self) -> int:
        """Width that `mlp_ratio` gives the hidden layer of an MLP."""
        return int(self.embed_dim * self.mlp_ratio)

    @property
    def blocks_alike(self) -> bool:
        """Whether all blocks have parameters of the same shapes."""
        return self.num_kv_heads is None or len(set(self.num_kv_heads)) == 1

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.img_size[0] // self.patch_size, self.img_size[1] // self.patch_size

    @property
    def num_patches(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens before the patches: class token, distillation token and registers."""
        return self.class_token + self.distilled + self.reg_tokens

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
