"""Architecture of a vision transformer, and how it computes: settings without parameters."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

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

# Values of timm's arguments that are supported here.
ACTIVATIONS = ("gelu", "quick_gelu", "gelu_tanh", "silu")
MLPS = ("mlp", "swiglu_packed", "swiglu")
NORMS = ("layernorm", "rmsnorm")
POOLS = ("token", "avg", "map")
ROPES = ("dinov3", "cat", "mixed")

PRECISIONS = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}

CLEANERS = ("registers", "shift_average", "synthetic_outlier")
PLACES = ("random", "background")


@dataclasses.dataclass(frozen=True)
class Architecture(Settings):
    """Architecture of a vision transformer, named as timm's keyword arguments.

    The bounds are far above any published model.

    Raises:
      InputError: a value that its field may not have.
      ValueError: sizes do not match, such as img_size and patch_size.
    """

    img_size: tuple[int, int] = setting(
        (224, 224),
        Either((SIDE, Each(SIDE, length=2))),
        "Height and width of the input. One number: a square.",
        "pixels",
    )
    patch_size: int = setting(
        16, Range(1, 2**12, whole=True), "Side length of a square patch.", "pixels"
    )
    embed_dim: int = setting(768, Range(1, 2**16, whole=True), "Width of the residual stream.")
    depth: int = setting(12, Range(1, 1000, whole=True), "Number of transformer blocks.")
    num_heads: int = setting(
        12,
        Range(1, 2**12, whole=True),
        "Number of attention heads. `embed_dim` must be a multiple of it.",
    )
    mlp_ratio: float = setting(
        4.0, Range(0, 64, low_open=True), "Ratio of the MLP's hidden width to `embed_dim`."
    )
    num_classes: int = setting(
        1000, Range(0, 2**24, whole=True), "Number of outputs of the head. 0: no head."
    )
    class_token: bool = setting(True, Flag(), "Use a class token.")
    distilled: bool = setting(
        False,
        Flag(),
        "Use a distillation token after the class token, with a head of its own (DeiT).",
    )
    reg_tokens: int = setting(
        0, Range(0, 2**10, whole=True), "Number of register tokens, which follow the class token."
    )
    pos_embed: bool = setting(True, Flag(), "Add a learned position embedding.")
    no_embed_class: bool = setting(
        False,
        Flag(),
        "Add the position embedding to the patches only (DeiT-III, models with registers).",
    )
    rel_pos_bias: bool = setting(
        False,
        Flag(),
        "Learn an attention bias for each relative position in every block (timm's class Beit).",
    )
    rope_type: str | None = setting(
        None,
        optional(OneOf(ROPES)),
        "Rotary positions: `dinov3`, `cat` (EVA-02, axial) or `mixed` (learned). None: none.",
    )
    rope_temperature: float = setting(
        100.0, Range(1, 1e9, low_open=True), "Largest period of the rotary positions."
    )
    rope_grid_offset: float = setting(
        0.0, Range(-1e6, 1e6), "Offset of the coordinates of `cat` positions.", "patches"
    )
    rope_grid_indexing: str = setting(
        "ij",
        OneOf(("ij", "xy")),
        "Order of the coordinates of rotary positions: row first (`ij`) or column first (`xy`).",
    )
    ref_feat_shape: tuple[int, int] | None = setting(
        None,
        optional(Each(SIDE, length=2)),
        "Grid to which the coordinates of `cat` positions are scaled. None: no scaling.",
    )
    pre_norm: bool = setting(
        False,
        Flag(),
        "Use a LayerNorm before the first block, and no bias in the patch embedding (CLIP).",
    )
    embed_norm: bool = setting(False, Flag(), "Use a norm after the patch embedding (AIMv2).")
    final_norm: bool = setting(True, Flag(), "Use a norm after the last block.")
    fc_norm: bool = setting(False, Flag(), "Apply the last norm after the pooling.")
    init_values: float | None = setting(
        None, optional(NOT_NEGATIVE), "Initial LayerScale factor. None: no LayerScale."
    )
    attn_only_layer_scale: bool = setting(
        False, Flag(), "Apply LayerScale to the attention output only."
    )
    norm_layer: str = setting("layernorm", OneOf(NORMS), "Kind of all norms.")
    norm_eps: float = setting(1e-6, Range(0, 1, low_open=True), "Epsilon of all norms.")
    post_norm: bool = setting(
        False, Flag(), "Apply the norms of a block after attention and MLP instead of before."
    )
    act_layer: str = setting("gelu", OneOf(ACTIVATIONS), "Activation of the MLP.")
    mlp_layer: str = setting(
        "mlp",
        OneOf(MLPS),
        "Kind of MLP. DINOv2 giant has `swiglu_packed`, DINOv3 has `swiglu`.",
    )
    swiglu_align_to: int = setting(
        0,
        Range(0, 2**10, whole=True),
        "Round the hidden width of `swiglu` up to a multiple of this. 0: no rounding.",
    )
    qkv_bias: bool = setting(True, Flag(), "Use biases for query, key and value.")
    k_bias: bool = setting(True, Flag(), "Let the biases of `qkv_bias` cover the keys.")
    qkv_fused: bool = setting(True, Flag(), "Project to query, key and value with a single matrix.")
    num_kv_heads: tuple[int, ...] | None = setting(
        None,
        optional(Each(Range(1, 2**12, whole=True), least=1)),
        "Number of key and value heads in each block. None: `num_heads`.",
    )
    qk_norm: bool = setting(False, Flag(), "Normalise each head's query and key.")
    scale_attn_norm: bool = setting(
        False, Flag(), "Use a norm before the output projection of attention."
    )
    scale_mlp_norm: bool = setting(False, Flag(), "Use a norm on the hidden layer of the MLP.")
    proj_bias: bool = setting(
        True, Flag(), "Use biases in the MLP and in the output projection of attention."
    )
    global_pool: str = setting(
        "token",
        OneOf(POOLS),
        "Input of the head: the class token (`token`), the mean of the patches (`avg`) or "
        "attention pooling (`map`, SigLIP).",
    )
    pool_include_prefix: bool = setting(False, Flag(), "Include the prefix tokens in the pooling.")
    attn_pool_num_heads: int | None = setting(
        None,
        optional(Range(1, 2**12, whole=True)),
        "Number of heads of the attention pooling. None: `num_heads`.",
    )
    attn_pool_mlp_ratio: float | None = setting(
        None,
        optional(Range(0, 64, low_open=True)),
        "MLP ratio of the attention pooling. None: `mlp_ratio`.",
    )
    eva: bool = setting(False, Flag(), "Use the argument and parameter names of timm's class Eva.")
    synthetic_outlier: str | None = setting(
        None,
        optional(OneOf(PLACES)),
        "Choice of the patches that receive a synthetic outlier, the parameter `planted.vector` "
        "(`models.synthetic_outlier`). None: no synthetic outliers.",
    )
    synthetic_outlier_after: int = setting(
        0, Range(0, 1000, whole=True), "Index of the block after which the outlier is added."
    )
    synthetic_outlier_patches: int = setting(
        1, Range(1, 2**14, whole=True), "Number of patches per image that receive the outlier."
    )
    synthetic_outlier_length: float = setting(
        0.0,
        NOT_NEGATIVE,
        "Length of the outlier vector, whose direction is random, when weights are random.",
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
        if self.synthetic_outlier and self.synthetic_outlier_after >= self.depth:
            raise ValueError(
                f"synthetic_outlier_after {self.synthetic_outlier_after} of {self.depth} blocks"
            )
        if self.synthetic_outlier and self.synthetic_outlier_patches > self.num_patches:
            raise ValueError(
                f"synthetic_outlier_patches {self.synthetic_outlier_patches} of "
                f"{self.num_patches} patches"
            )

    def _contradictions(self) -> list[tuple[str, bool]]:
        """Yields invalid combinations with a message, and whether this architecture has each."""
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
        """Returns the hidden width of an MLP with a ratio."""
        return int(self.embed_dim * self.mlp_ratio)

    @property
    def blocks_alike(self) -> bool:
        """Returns whether all blocks have parameters of the same shapes."""
        return self.num_kv_heads is None or len(set(self.num_kv_heads)) == 1

    @property
    def grid(self) -> tuple[int, int]:
        """Returns the numbers of rows and columns of patches."""
        return self.img_size[0] // self.patch_size, self.img_size[1] // self.patch_size

    @property
    def num_patches(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def num_prefix_tokens(self) -> int:
        """Returns the number of class, distillation and register tokens, which come first."""
        return self.class_token + self.distilled + self.reg_tokens

    @property
    def num_embedded_prefix_tokens(self) -> int:
        """Returns the number of prefix tokens that the learned position embedding covers."""
        return 0 if self.no_embed_class else self.num_prefix_tokens


@dataclasses.dataclass(frozen=True)
class ComputePolicy:
    """Numerical policy of a model: dtypes, rematerialisation and quantisation.

    Attributes:
      dtype: dtype of activations and matmuls. LayerNorm statistics and softmax stay in float32.
      param_dtype: dtype in which parameters are stored.
      remat: recompute each block in the backward pass instead of keeping its activations.
      backend: platform of the devices that compute; empty: that of the default device.
      stacked: True if the blocks' parameters are stacked along a leading axis.
      quantised: format of the matmuls that read normalised tokens (`quantised.FORMATS`); None:
        `dtype`. A LayerNorm bounds their input. Matmuls that write into the residual stream,
        which has outlier tokens, are not quantised.
      artifact_removal: method that removes outlier tokens from the features, one of `CLEANERS`
        (`models.registers`, `models.shift_average`, or the subtraction of synthetic outliers);
        None: no removal.
      gathered: sharding of a block's parameters while it computes, for a model that is not trained
        and whose parameters are sharded. None: the compiler decides, and may gather the larger
        activations instead.
      approximate_gelu: True to compute an exact GELU with its tanh approximation.
      batches: sharding of the batches of a trained model, with which the layout of its residual
        stream is constrained where the backend needs it (`Choices.row_major`). None: no constraint.
    """

    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32
    remat: bool = False
    # Neither changes the result, so neither is part of the repr or of comparisons.
    backend: str = dataclasses.field(default="", repr=False)
    stacked: bool = dataclasses.field(default=False, repr=False)
    quantised: str | None = None
    artifact_removal: str | None = dataclasses.field(default=None, repr=False)
    gathered: jax.sharding.NamedSharding | None = dataclasses.field(default=None, repr=False)
    approximate_gelu: bool = dataclasses.field(default=False, repr=False)
    batches: jax.sharding.NamedSharding | None = dataclasses.field(default=None, repr=False)

    @property
    def choices(self) -> backends.Choices:
        """Returns the implementation choices for this backend."""
        return backends.choices(self.backend)

    @property
    def frozen(self) -> bool:
        """Returns True if parameters are stored in less than float32, as no trained model's are."""
        return jnp.dtype(self.param_dtype) != jnp.float32


# The settings that can be overridden, by field.
FIELDS = {field.name: field.metadata["setting"] for field in dataclasses.fields(Architecture)}
