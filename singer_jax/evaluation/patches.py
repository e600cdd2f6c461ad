"""Statistics of a model's patch tokens: their norms and their similarity to the teacher's."""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Array, Float

from singer_jax.data.images import EvalTransform
from singer_jax.data.sources import Source
from singer_jax.evaluation.backbone import Backbone
from singer_jax.models.vit import VisionTransformer

PatchTokens = Float[np.ndarray, "images patches dim"]


@dataclasses.dataclass(frozen=True)
class _Patches:
    """Task whose features are the raw patch tokens."""

    def features(
        self, model: VisionTransformer, tokens: Float[Array, "batch tokens dim"]
    ) -> Float[Array, "batch patches dim"]:
        return tokens[:, model.arch.num_prefix_tokens :]


def patch_tokens(backbone: Backbone, source: Source) -> PatchTokens:
    """Returns the last block's patch tokens of every image of a source, in order."""
    return backbone.extract(source, _Patches(), EvalTransform(backbone.image_size)).features


def norm_ratio(tokens: PatchTokens) -> float:
    """Returns the ratio of the 99th percentile to the median of the patch norms."""
    norms = np.linalg.norm(tokens, axis=-1)
    return float(np.quantile(norms, 0.99) / np.median(norms))


def linear_map(tokens: PatchTokens, teacher: PatchTokens) -> Float[np.ndarray, "dim_1 teacher_dim"]:
    """Fits the affine least-squares map from a model's patch tokens to the teacher's.

    With the map, models of any width can be compared with the teacher, including models that were
    never trained against it.
    """
    return np.linalg.lstsq(_affine(tokens), teacher.reshape(-1, teacher.shape[-1]), rcond=None)[0]


def cosine_to_teacher(
    tokens: PatchTokens,
    teacher: PatchTokens,
    mapping: Float[np.ndarray, "dim_1 teacher_dim"] | None = None,
) -> Float[np.ndarray, "images patches"]:
    """Returns each patch token's cosine similarity to the teacher's, after `mapping` if given."""
    mapped = tokens if mapping is None else (_affine(tokens) @ mapping).reshape(teacher.shape)
    norms = np.linalg.norm(mapped, axis=-1) * np.linalg.norm(teacher, axis=-1)
    return np.sum(mapped * teacher, axis=-1) / np.maximum(norms, np.finfo(np.float32).tiny)


def _affine(tokens: PatchTokens) -> Float[np.ndarray, "tokens dim_1"]:
    flat = tokens.reshape(-1, tokens.shape[-1])
    return np.concatenate([flat, np.ones_like(flat[:, :1])], axis=1)
