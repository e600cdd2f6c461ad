"""timm's families of vision transformers as data: the meaning of their names, and exceptions."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterator, Mapping
from typing import Any

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def _sizes(embed_dim: int, depth: int, num_heads: int, **more: Any) -> dict[str, Any]:
    return {"embed_dim": embed_dim, "depth": depth, "num_heads": num_heads, **more}


# The sizes that words in a name stand for.
_SIZES: Mapping[str, Mapping[str, Any]] = {
    "wee": _sizes(256, 14, 4, mlp_ratio=5.0),
    "little": _sizes(320, 14, 5, mlp_ratio=5.6),
    "tiny": _sizes(192, 12, 3),
    "xsmall": _sizes(256, 10, 4),
    "small": _sizes(384, 12, 6),
    "medium": _sizes(512, 12, 8),
    "mediumd": _sizes(512, 20, 8),
    "betwixt": _sizes(640, 12, 10),
    "base": _sizes(768, 12, 12),
    "so150m": _sizes(896, 18, 14, mlp_ratio=2.572),
    "so150m2": _sizes(832, 21, 13, mlp_ratio=34 / 13),
    "large": _sizes(1024, 24, 16),
    "so400m": _sizes(1152, 27, 16, mlp_ratio=3.7362),
    "huge": _sizes(1280, 32, 16),
    "giant": _sizes(1408, 40, 16, mlp_ratio=48 / 11),
    "giantopt": _sizes(1536, 40, 16),
    "gigantic": _sizes(1664, 48, 16, mlp_ratio=64 / 13),
}

_IMAGENET = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}
_HALF = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
_OPENAI = {
    "mean": (0.48145466, 0.4578275, 0.40821073),
    "std": (0.26862954, 0.26130258, 0.27577711),
}
_AS_THEY_ARE = {"mean": (0.0,) * 3, "std": (1.0,) * 3}
_SATELLITE = {"mean": (0.430, 0.411, 0.296), "std": (0.213, 0.156, 0.143)}
_WHOLE = {"crop_pct": 1.0}
_NEARLY_WHOLE = {"crop_pct": 0.95}
_BILINEAR = {"interpolation": "bilinear"}


@dataclasses.dataclass(frozen=True)
class Family:
    """A family of models whose names state all differences between them.

    In a name, a word of `_SIZES` is the size, `patch16` the size of a patch, `reg4` the number of
    register tokens, and a final number of at least 100 the side length of the image.

    Attributes:
      title: name of the family.
      names: timm's names of the models; `{a,b}` stands for either a or b.
      arch: fields of `Architecture` that all its models share.
      input: fields of `ModelSpec` that all its models share. The default of `crop_pct` is 1 from
        336 pixels and 0.9 below.
      sizes: sizes that differ from `_SIZES` in this family.
    """

    title: str
    names: str
    arch: Mapping[str, Any]
    input: Mapping[str, Any]
    sizes: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)

    def members(self) -> Iterator[str]:
        """Returns the names of all models."""
        for pattern in self.names.split():
            parts = re.split(r"\{(.*?)\}", pattern)
            choices = [part.split(",") if index % 2 else [part] for index, part in enumerate(parts)]
            yield from map("".join, itertools.product(*choices))

    def fields(self, name: str) -> dict[str, Any]:
        """Returns the fields of `Architecture` that one of the names stands for."""
        words, fields = name.split("_"), {}
        for word in words:
            fields |= self.sizes.get(word, _SIZES.get(word, {}))
        fields |= self.arch
        for word, (prefix, field) in itertools.product(words, _NUMBERED):
            if re.fullmatch(rf"{prefix}\d+", word):
                fields[field] = int(word.removeprefix(prefix))
        if words[-1].isdigit() and int(words[-1]) >= 100:
            fields["img_size"] = int(words[-1])
        return fields | _EXCEPTIONS.get(name, {})


_NUMBERED = (("patch", "patch_size"), ("reg", "reg_tokens"))

_EXCEPTIONS: Mapping[str, Mapping[str, Any]] = {
    "vit_small_patch8_224": {"num_classes": 0},
    "vit_large_patch32_224": {"num_classes": 0},
    "vit_huge_patch14_224": {"num_classes": 0},
    "vit_base_patch16_224_miil": {"num_classes": 11221},
    "vit_medium_patch16_gap_240": {"num_classes": 11821},
}

_PATCHES_ONLY = {"class_token": False, "global_pool": "avg"}
_REGISTERS = _PATCHES_ONLY | {"fc_norm": True, "no_embed_class": True, "init_values": 1e-5}
_CLIP = {"pre_norm": True, "norm_eps": 1e-5}
_SIGLIP = {"class_token": False, "global_pool": "map", "num_classes": 0}
_SIGLIP_GAP = _PATCHES_ONLY | {"num_classes": 0}
_DINOV2 = {"img_size": 518, "init_values": 1e-5, "num_classes": 0}
_RADIO = {"img_size": 512, "no_embed_class": True, "final_norm": False, "num_classes": 0}
_SWIGLU_PACKED = {"mlp_ratio": 2.66667 * 2, "mlp_layer": "swiglu_packed"}
_GIANT = {"giant": _sizes(1536, 40, 24)}
_GIANT_SWIGLU = {"giant": _GIANT["giant"] | _SWIGLU_PACKED}
_SO150M2 = _PATCHES_ONLY | {"fc_norm": True, "init_values": 1e-5, "qkv_bias": False}
_AIMV2_SIZES = {
    "large": _sizes(1024, 24, 8, mlp_ratio=2.75),
    "huge": _sizes(1536, 24, 12, mlp_ratio=2.6667),
    "1b": _sizes(2048, 24, 16, mlp_ratio=2.75),
    "3b": _sizes(3072, 24, 24, mlp_ratio=2.6667),
}
_AIMV2 = _PATCHES_ONLY | {
    "num_classes": 0,
    "qkv_bias": False,
    "proj_bias": False,
    "norm_layer": "rmsnorm",
    "norm_eps": 1e-5,
    "embed_norm": True,
    "mlp_layer": "swiglu",
}
_BEIT3 = {
    "scale_attn_norm": True,
    "scale_mlp_norm": True,
    "global_pool": "avg",
    "fc_norm": True,
    "norm_eps": 1e-5,
}
_TEST = {"img_size": 160, "patch_size": 16, "mlp_ratio": 3.0}
_TEST_PATCHES = _TEST | {"class_token": False, "reg_tokens": 1, "init_values": 1e-5}

_EVA = {"eva": True, "k_bias": False}
_EVA_POOLED = _EVA | {"global_pool": "avg", "fc_norm": True}
_EVA02 = {
    "mlp_ratio": 8 / 3,
    "mlp_layer": "swiglu_packed",
    "rope_type": "cat",
    "rope_temperature": 10000.0,
    "ref_feat_shape": (16, 16),
}
_EVA02_SPLIT = _EVA02 | {"qkv_fused": False, "mlp_layer": "swiglu", "scale_mlp_norm": True}
_EVA02_CLIP = _EVA02_SPLIT | {"scale_attn_norm": True}
_ROPE_REGISTERS = (
    _EVA_POOLED
    | _PATCHES_ONLY
    | {
        "init_values": 1e-5,
        "pos_embed": False,
        "rope_type": "cat",
        "rope_temperature": 10000.0,
        "ref_feat_shape": (16, 16),
    }
)
_ROPE_NAVER = {
    "eva": True,
    "init_values": 1e-5,
    "pos_embed": False,
    "rope_type": "cat",
    "rope_grid_indexing": "xy",
}
_MIXED = {"rope_type": "mixed", "rope_temperature": 10.0}
_APE = {"pos_embed": True, "no_embed_class": True}
_PE = {
    "eva": True,
    "pre_norm": True,
    "norm_eps": 1e-5,
    "rope_type": "cat",
    "rope_temperature": 10000.0,
    "rope_grid_indexing": "xy",
}
_PE_CLASS = _PE | {"rope_grid_offset": 1.0}
_PE_CORE = {
    "global_pool": "map",
    "pool_include_prefix": True,
    "attn_pool_num_heads": 8,
    "attn_pool_mlp_ratio": 4.0,
}
_PE_PLAIN = {"global_pool": "avg", "final_norm": False, "num_classes": 0}
_PE_GIGANTIC = _PE | {"class_token": False, "ref_feat_shape": (32, 32)}
_PE_SIZES = {"gigantic": _sizes(1536, 50, 16, mlp_ratio=35 / 6)}
_DINOV3 = _EVA | {
    "img_size": 256,
    "reg_tokens": 4,
    "pos_embed": False,
    "rope_type": "dinov3",
    "qkv_bias": False,
    "init_values": 1e-5,
    "norm_eps": 1e-5,
    "global_pool": "avg",
    "num_classes": 0,
}
_DINOV3_BIASED = _DINOV3 | {"qkv_bias": True}
_DINOV3_PLUS = {"mlp_layer": "swiglu", "swiglu_align_to": 8}
_DINOV3_SIZES = {"huge": _sizes(1280, 32, 20)}
_LINGBOT = _DINOV3_BIASED | {"img_size": 512, "global_pool": "token"}
_SAPIENS2 = _DINOV3_BIASED | {
    "img_size": (1024, 768),
    "reg_tokens": 8,
    "global_pool": "token",
    "k_bias": True,
    "qkv_fused": False,
    "qk_norm": True,
    "mlp_layer": "swiglu_packed",
    "mlp_ratio": 4.0,
    "attn_only_layer_scale": True,
    "init_values": 1.0,
    "norm_layer": "rmsnorm",
    "norm_eps": 1e-6,
}


def _grouped(embed_dim: int, depth: int, num_heads: int) -> dict[str, Any]:
    """Returns a size of Sapiens2; heads share keys and values except in 8 blocks at each end."""
    heads = tuple(num_heads // 2 if 8 <= block < depth - 8 else num_heads for block in range(depth))
    return _sizes(embed_dim, depth, num_heads, num_kv_heads=heads)


_SAPIENS2_SIZES = {
    "base": _grouped(768, 12, 12),
    "large": _grouped(1024, 24, 16),
    "huge": _grouped(1280, 32, 16),
    "giant": _grouped(1536, 40, 24),
    "5b": _grouped(2432, 56, 32),
}
_DEIT3 = {"no_embed_class": True, "init_values": 1e-6}
_BEIT = {
    "rel_pos_bias": True,
    "pos_embed": False,
    "k_bias": False,
    "init_values": 1e-5,
    "global_pool": "avg",
    "fc_norm": True,
}

FAMILIES = (
    # timm's vision_transformer.py
    Family(
        "ViT",
        "vit_{tiny,small,base,large}_patch16_{224,384} vit_{small,base,large}_patch32_{224,384} "
        "vit_{small,base}_patch8_224 vit_{large,huge,giant,gigantic}_patch14_224",
        {},
        _HALF,
    ),
    Family(
        "ViT miil",
        "vit_base_patch16_224_miil",
        {"qkv_bias": False},
        _AS_THEY_ARE | _BILINEAR | {"crop_pct": 0.875},
    ),
    Family(
        "ViT plus",
        "vit_base_patch32_plus_256 vit_base_patch16_plus_240",
        {"embed_dim": 896, "num_heads": 14, "init_values": 1e-5},
        _HALF | _NEARLY_WHOLE,
    ),
    Family(
        "ViT 36 blocks",
        "vit_small_patch16_36x1_224",
        {"depth": 36, "init_values": 1e-5},
        _HALF,
    ),
    Family(
        "ViT res-post-norm",
        "vit_base_patch16_rpn_224",
        _PATCHES_ONLY
        | {"fc_norm": True, "qkv_bias": False, "init_values": 1e-5, "post_norm": True},
        _HALF,
    ),
    Family(
        "ViT gap",
        "vit_medium_patch16_gap_{240,256,384} vit_betwixt_patch16_gap_256",
        _PATCHES_ONLY | {"qkv_bias": False, "init_values": 1e-6},
        _HALF | _NEARLY_WHOLE,
    ),
    Family("ViT gap", "vit_base_patch16_gap_224", _PATCHES_ONLY | {"num_heads": 16}, _HALF),
    Family(
        "I-JEPA",
        "vit_huge_patch14_gap_224 vit_huge_patch16_gap_448 vit_giant_patch16_gap_224",
        _PATCHES_ONLY | {"num_classes": 0},
        _IMAGENET,
    ),
    Family(
        "ViT registers",
        "vit_wee_patch16_reg1_gap_256 vit_little_patch16_{reg1,reg4}_gap_256 "
        "vit_medium_patch16_{reg1,reg4}_gap_256 vit_mediumd_patch16_reg4_gap_{256,384} "
        "vit_betwixt_patch16_{reg1_gap_256,reg4_gap_256,reg4_gap_384}",
        _REGISTERS,
        _HALF,
    ),
    Family(
        "ViT registers",
        "vit_base_patch16_reg4_gap_256",
        _REGISTERS | {"init_values": None},
        _HALF,
    ),
    Family("ViT SO150M", "vit_so150m_patch16_reg4_gap_{256,384}", _PATCHES_ONLY, _HALF),
    Family("ViT SO150M", "vit_so150m_patch16_reg4_map_256", _SIGLIP | {"num_classes": 1000}, _HALF),
    Family("ViT SO150M2", "vit_so150m2_patch16_reg1_gap_{256,384,448}", _SO150M2, _HALF | _WHOLE),
    Family(
        "CLIP",
        "vit_base_patch32_clip_{224,384,448} vit_base_patch16_clip_{224,384} "
        "vit_large_patch14_clip_{224,336} vit_huge_patch14_clip_{224,336}",
        _CLIP,
        _OPENAI,
    ),
    Family(
        "CLIP",
        "vit_xsmall_patch16_clip_224 vit_medium_patch{16,32}_clip_224 "
        "vit_betwixt_patch32_clip_224 vit_base_patch32_clip_256",
        _CLIP | {"num_classes": 512},
        _OPENAI,
    ),
    Family(
        "CLIP",
        "vit_base_patch16_plus_clip_240",
        _CLIP | {"embed_dim": 896, "num_heads": 14, "num_classes": 640},
        _OPENAI | _WHOLE,
    ),
    Family(
        "CLIP",
        "vit_huge_patch14_clip_378 vit_giant_patch14_clip_224",
        _CLIP | {"num_classes": 1024},
        _OPENAI,
    ),
    Family("CLIP", "vit_gigantic_patch14_clip_{224,378}", _CLIP | {"num_classes": 1280}, _OPENAI),
    *(
        Family(
            "CLIP quickgelu",
            names,
            _CLIP | {"act_layer": "quick_gelu", "num_classes": classes},
            _OPENAI,
        )
        for names, classes in (
            ("vit_base_patch{16,32}_clip_quickgelu_224", 512),
            ("vit_large_patch14_clip_quickgelu_{224,336}", 768),
            ("vit_huge_patch14_clip_quickgelu_{224,378}", 1024),
            ("vit_gigantic_patch14_clip_quickgelu_224", 1280),
        )
    ),
    Family(
        "SigLIP",
        "vit_base_patch16_siglip_{224,256,384,512} vit_large_patch16_siglip_{256,384} "
        "vit_so400m_patch14_siglip_{224,378}",
        _SIGLIP,
        _HALF | {"crop_pct": 0.9},
    ),
    Family(
        "SigLIP 2",
        "vit_base_patch32_siglip_256 vit_large_patch16_siglip_512 "
        "vit_so400m_patch16_siglip_{256,384,512} vit_giantopt_patch16_siglip_{256,384}",
        _SIGLIP | {"act_layer": "gelu_tanh"},
        _HALF | {"crop_pct": 0.9},
    ),
    Family(
        "SigLIP gap",
        "vit_base_patch16_siglip_gap_{224,256,384,512} vit_large_patch16_siglip_gap_{256,384} "
        "vit_so400m_patch14_siglip_gap_{224,378}",
        _SIGLIP_GAP,
        _HALF | {"crop_pct": 0.9},
    ),
    Family("SigLIP gap", "vit_so400m_patch14_siglip_gap_{448,896}", _SIGLIP_GAP, _HALF | _WHOLE),
    Family(
        "SigLIP 2 gap",
        "vit_base_patch32_siglip_gap_256 vit_large_patch16_siglip_gap_512 "
        "vit_so400m_patch16_siglip_gap_{256,384,512} vit_giantopt_patch16_siglip_gap_{256,384}",
        _SIGLIP_GAP | {"act_layer": "gelu_tanh"},
        _HALF | {"crop_pct": 0.9},
    ),
    Family(
        "EVA ViT",
        "eva_large_patch14_{196,336}",
        {"global_pool": "avg", "fc_norm": True},
        _OPENAI | _WHOLE,
    ),
    Family(
        "FlexiViT",
        "flexivit_{small,base,large}",
        {"img_size": 240, "no_embed_class": True},
        _HALF | _NEARLY_WHOLE | {"resampling": "bilinear"},
    ),
    Family(
        "DINOv2",
        "vit_{tiny,small,base,large,giant}_patch14_dinov2",
        _DINOV2,
        _IMAGENET,
        _GIANT_SWIGLU,
    ),
    Family(
        "DINOv2 registers",
        "vit_{tiny,small,base,large,giant}_patch14_reg4_dinov2",
        _DINOV2 | {"no_embed_class": True},
        _IMAGENET,
        _GIANT_SWIGLU,
    ),
    Family(
        "TIPSv2",
        "vit_{base,large,so400m,giant}_patch14_reg1_tipsv2",
        _DINOV2 | {"img_size": 448, "init_values": 1.0, "no_embed_class": True},
        _AS_THEY_ARE,
        _GIANT_SWIGLU,
    ),
    Family(
        "InternViT",
        "vit_intern300m_patch14_448",
        _SIZES["large"] | {"init_values": 0.1, "final_norm": False, "num_classes": 0},
        _IMAGENET,
    ),
    Family(
        "AIMv2",
        "aimv2_{large,huge,1b,3b}_patch14_{224,336,448}",
        _AIMV2,
        _OPENAI | _WHOLE,
        _AIMV2_SIZES,
    ),
    Family("BEiT-3", "beit3_{base,large}_patch16_224", _BEIT3, _IMAGENET | _WHOLE),
    Family(
        "BEiT-3",
        "beit3_giant_patch14_{224,336}",
        _BEIT3 | {"mlp_ratio": 4.3637},
        _IMAGENET | _WHOLE,
    ),
    Family(
        "C-RADIOv3",
        "vit_base_patch16_radio_v3",
        _RADIO | {"reg_tokens": 7, "init_values": 1e-5},
        _OPENAI | {"resampling": "bilinear_corners"},
    ),
    Family(
        "C-RADIOv3",
        "vit_large_patch16_radio_v3",
        _RADIO | {"reg_tokens": 7, "init_values": 1e-5},
        _OPENAI | {"resampling": "bilinear"},
    ),
    Family(
        "C-RADIOv3",
        "vit_huge_patch16_radio_v3",
        _RADIO | {"reg_tokens": 7},
        _OPENAI | {"resampling": "bilinear_corners"},
    ),
    Family(
        "C-RADIOv3",
        "vit_giant_patch16_radio_v3",
        _RADIO | {"reg_tokens": 7},
        _OPENAI | {"resampling": "bilinear"},
        _GIANT,
    ),
    Family(
        "C-RADIOv4",
        "vit_{so400m,huge}_patch16_radio_v4",
        _RADIO | {"reg_tokens": 9},
        _OPENAI | {"resampling": "bilinear"},
    ),
    Family("test", "test_vit", _TEST | _sizes(64, 6, 2), _HALF | _NEARLY_WHOLE),
    Family(
        "test",
        "test_vit2",
        _TEST_PATCHES | _sizes(64, 8, 2, global_pool="avg", fc_norm=True),
        _HALF | _NEARLY_WHOLE,
    ),
    Family(
        "test",
        "test_vit3",
        _TEST_PATCHES
        | _sizes(96, 9, 3, mlp_ratio=2.0, global_pool="map", pool_include_prefix=True),
        _HALF | _NEARLY_WHOLE,
    ),
    Family(
        "test",
        "test_vit4",
        _TEST_PATCHES | _sizes(96, 9, 3, global_pool="avg", fc_norm=True, norm_layer="rmsnorm"),
        _HALF | _NEARLY_WHOLE,
    ),
    Family("UNIC", "unic_large_patch14_336", {"num_classes": 0}, _IMAGENET),
    # timm's deit.py
    Family("DeiT", "deit_{tiny,small}_patch16_224 deit_base_patch16_{224,384}", {}, _IMAGENET),
    Family(
        "DeiT distilled",
        "deit_{tiny,small}_distilled_patch16_224 deit_base_distilled_patch16_{224,384}",
        {"distilled": True},
        _IMAGENET,
    ),
    Family(
        "DeiT-III",
        "deit3_{tiny,medium}_patch16_224 deit3_{small,base,large}_patch16_{224,384} "
        "deit3_huge_patch14_224",
        _DEIT3,
        _IMAGENET,
    ),
    # timm's eva.py
    Family("EVA", "eva_giant_patch14_{224,336,560}", _EVA_POOLED, _OPENAI),
    Family("EVA CLIP", "eva_giant_patch14_clip_224", _EVA | {"num_classes": 1024}, _OPENAI),
    Family(
        "EVA-02",
        "eva02_{tiny,small}_patch14_224",
        _EVA_POOLED | _EVA02 | {"num_classes": 0},
        _OPENAI,
    ),
    Family("EVA-02", "eva02_{tiny,small}_patch14_336", _EVA_POOLED | _EVA02, _OPENAI),
    Family(
        "EVA-02",
        "eva02_{base,large}_patch14_224",
        _EVA_POOLED | _EVA02_SPLIT | {"num_classes": 0},
        _OPENAI,
    ),
    Family("EVA-02", "eva02_{base,large}_patch14_448", _EVA_POOLED | _EVA02_SPLIT, _OPENAI),
    Family(
        "EVA-02 CLIP",
        "eva02_base_patch16_clip_224",
        _EVA | _EVA02_CLIP | {"num_classes": 512},
        _OPENAI,
    ),
    Family(
        "EVA-02 CLIP",
        "eva02_large_patch14_clip_{224,336}",
        _EVA | _EVA02_CLIP | {"num_classes": 768},
        _OPENAI,
    ),
    Family(
        "EVA-02 CLIP",
        "eva02_enormous_patch14_clip_224",
        _EVA | _sizes(1792, 64, 16, mlp_ratio=60 / 7, post_norm=True, num_classes=1024),
        _OPENAI,
    ),
    Family(
        "RoPE registers",
        "vit_{medium,base}_patch16_rope_reg1_gap_256 vit_betwixt_patch16_rope_reg4_gap_256",
        _ROPE_REGISTERS,
        _HALF | _NEARLY_WHOLE,
    ),
    Family(
        "RoPE registers",
        "vit_mediumd_patch16_rope_reg1_gap_256",
        _ROPE_REGISTERS | {"qkv_bias": False},
        _HALF | _NEARLY_WHOLE,
    ),
    Family("RoPE", "vit_{small,base,large}_patch16_rope_224", _ROPE_NAVER, _IMAGENET),
    Family("RoPE", "vit_{small,base,large}_patch16_rope_ape_224", _ROPE_NAVER | _APE, _IMAGENET),
    Family(
        "RoPE mixed",
        "vit_{small,base,large}_patch16_rope_mixed_224",
        _ROPE_NAVER | _MIXED,
        _IMAGENET,
    ),
    Family(
        "RoPE mixed",
        "vit_{small,base,large}_patch16_rope_mixed_ape_224",
        _ROPE_NAVER | _MIXED | _APE,
        _IMAGENET,
    ),
    Family(
        "PE core",
        "vit_pe_core_{tiny,small}_patch16_384",
        _PE_CLASS | _PE_CORE | {"ref_feat_shape": (24, 24), "num_classes": 512},
        _HALF,
    ),
    Family(
        "PE core",
        "vit_pe_core_base_patch16_224",
        _PE_CLASS | _PE_CORE | {"ref_feat_shape": (14, 14), "num_classes": 1024},
        _HALF | _WHOLE,
    ),
    Family(
        "PE core",
        "vit_pe_core_large_patch14_336",
        _PE_CLASS | _PE_CORE | {"ref_feat_shape": (24, 24), "num_classes": 1024},
        _HALF,
    ),
    Family(
        "PE core",
        "vit_pe_core_gigantic_patch14_448",
        _PE_GIGANTIC | _PE_CORE | {"num_classes": 1280},
        _HALF,
        _PE_SIZES,
    ),
    Family(
        "PE language",
        "vit_pe_lang_large_patch14_448",
        _PE_CLASS | _PE_PLAIN | {"depth": 23, "ref_feat_shape": (32, 32), "init_values": 0.1},
        _HALF,
    ),
    Family(
        "PE language",
        "vit_pe_lang_gigantic_patch14_448",
        _PE_GIGANTIC | _PE_PLAIN | {"depth": 47, "init_values": 0.1},
        _HALF,
        _PE_SIZES,
    ),
    Family(
        "PE spatial",
        "vit_pe_spatial_{tiny,small,base}_patch16_512 vit_pe_spatial_large_patch14_448",
        _PE_CLASS | _PE_PLAIN | {"ref_feat_shape": (32, 32)},
        _HALF,
    ),
    Family(
        "PE spatial",
        "vit_pe_spatial_gigantic_patch14_448",
        _PE_GIGANTIC | _PE_PLAIN | {"init_values": 0.1},
        _HALF,
        _PE_SIZES,
    ),
    Family(
        "DINOv3",
        "vit_{small,base,large}_patch16_dinov3",
        _DINOV3,
        _IMAGENET | _WHOLE,
    ),
    Family(
        "DINOv3",
        "vit_{tiny,small,base,large}_patch16_dinov3_qkvb",
        _DINOV3_BIASED,
        _IMAGENET | _WHOLE,
    ),
    Family(
        "DINOv3 plus",
        "vit_{small,huge}_plus_patch16_dinov3",
        _DINOV3 | _DINOV3_PLUS,
        _IMAGENET | _WHOLE,
        _DINOV3_SIZES,
    ),
    Family(
        "DINOv3 plus",
        "vit_{small,huge}_plus_patch16_dinov3_qkvb",
        _DINOV3_BIASED | _DINOV3_PLUS,
        _IMAGENET | _WHOLE,
        _DINOV3_SIZES,
    ),
    Family(
        "DINOv3 plus",
        "vit_7b_patch16_dinov3",
        _DINOV3 | _DINOV3_PLUS | _sizes(4096, 40, 32, mlp_ratio=2.0, swiglu_align_to=64),
        _IMAGENET | _WHOLE,
    ),
    Family("LingBot", "vit_{small,base,large}_patch16_lingbot", _LINGBOT, _IMAGENET | _BILINEAR),
    Family(
        "LingBot",
        "vit_giant_patch16_lingbot",
        _LINGBOT | _DINOV3_PLUS | {"qkv_bias": False, "mlp_ratio": 8 / 3},
        _IMAGENET | _BILINEAR,
        _GIANT,
    ),
    Family(
        "Sapiens2",
        "vit_{base,large,huge,giant,5b}_patch16_sapiens2",
        _SAPIENS2,
        _IMAGENET | _BILINEAR,
        _SAPIENS2_SIZES,
    ),
    # timm's beit.py
    Family("BEiT", "beit_base_patch16_{224,384}", _BEIT | {"init_values": 0.1}, _HALF),
    Family("BEiT", "beit_large_patch16_{224,384,512}", _BEIT, _HALF),
    Family("BEiT v2", "beitv2_base_patch16_224", _BEIT, _IMAGENET),
    Family("BEiT v2", "beitv2_large_patch16_224", _BEIT, _IMAGENET | _NEARLY_WHOLE),
)

# Weights tags whose input differs from that of the family: a pattern of the whole name, and fields
# of `ModelSpec`. All matching patterns apply; later ones override earlier ones.
TAGS: tuple[tuple[str, Mapping[str, Any]], ...] = (
    (r".*\.(dino|mae)", _IMAGENET),
    (r".*\.bamboo", _OPENAI | _WHOLE),
    (r"vit_small_patch8_224", _IMAGENET),
    (r"vit_base_patch16_clip_224(\.laion(2b|2b_ft_in1k|400m_e32))", _WHOLE),
    (r"vit_base_patch16_clip_224(\..*_ft_in12k_in1k)?", _NEARLY_WHOLE),
    (r"vit_base_patch\d+_clip_384\.openai_ft_in12k_in1k", _NEARLY_WHOLE),
    (r"vit_base_patch32_clip_256.*", _WHOLE),
    (r"vit_base_patch16_clip_quickgelu_224", _WHOLE),
    (r"vit_\w*clip\w*\.(datacompxl|dfn|metaclip).*", _WHOLE),
    (r"vit_(large|huge|giant|gigantic)_patch14_clip_.*", _WHOLE),
    (r"vit_large_patch14_clip_\d+(\.laion2b.*)?", _HALF),
    (r".*_siglip_\w*\.webli_ft_in1k", _WHOLE),
    (r"vit_so400m_patch14_siglip_gap_378\.webli", _WHOLE),
    (r"vit_(?!base|so150m2|\w*rope)\w*_reg\d_gap_256.*", _NEARLY_WHOLE),
    (r"vit_betwixt_patch16_rope_reg4_gap_256.*", _OPENAI),
    (r"deit3_.*\.fb_in22k_ft_in1k", _WHOLE),
    (r"eva_giant_patch14_\d+\.m30m.*", _IMAGENET),
    (r"eva_giant_patch14_560", _IMAGENET),
    (r".*dinov3\w*\.sat493m", _SATELLITE),
    (r"beitv2_large_patch16_224\.in1k_ft_in22k", {"crop_pct": 0.9}),
)

# Patterns of timm's names that are not supported, and the reasons.
LEFT_OUT = (
    (r"vit_d(p?wee|little)_.*", "differential attention"),
    (r"vit_pwee_.*|vit_.*_(xp|18x2)_\d+", "parallel blocks"),
    (r"vit_so400m_patch14_siglip_(gap_)?384", "384 pixels are not a multiple of its patch size 14"),
    (r"vit_(s?relpos_|.*_(r\d*_s\d+|resnet|window)).*", "a hybrid, or another class of timm"),
)

# Models without a timm name, and the timm model that each is a variant of.
VARIANTS = {
    "deit3_tiny_patch16_224": "deit3_small_patch16_224",
    "vit_tiny_patch14_dinov2": "vit_small_patch14_dinov2",
    "vit_tiny_patch14_reg4_dinov2": "vit_small_patch14_reg4_dinov2",
    "unic_large_patch14_336": "vit_large_patch16_224",
}
