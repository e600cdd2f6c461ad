"""Model sizes: parameters, operations, and the table of all families."""

from __future__ import annotations

import math
from collections.abc import Iterable

from singer_jax.models.architecture import Architecture
from singer_jax.models.families import FAMILIES
from singer_jax.models.params import leaves
from singer_jax.models.weights import abstract_params
from singer_jax.models.zoo import MODELS


def num_parameters(arch: Architecture) -> int:
    """Returns the number of parameters, including the head."""
    return sum(math.prod(leaf.shape) for _, leaf in leaves(abstract_params(arch)))


def features_flops(arch: Architecture, blocks: int, added: int = 0) -> int:
    """Returns the operations of the matmuls in the embedding and first `blocks` blocks per image.

    A multiply-add counts as two operations; `added` is the number of additional tokens.
    """
    tokens, dim = added + arch.num_prefix_tokens + arch.num_patches, arch.embed_dim
    of_blocks = abstract_params(arch)["blocks"]
    linear = sum(
        math.prod(leaf.shape)
        for index in range(blocks)
        for keys, leaf in leaves(of_blocks[index])
        if keys[-1] == "kernel"
    )
    embedding = arch.num_patches * 3 * arch.patch_size**2 * dim
    return 2 * (embedding + tokens * linear + blocks * 2 * tokens**2 * dim)


def forward_flops(arch: Architecture) -> int:
    """Returns `features_flops` of all blocks plus those of the head, without attention pooling."""
    return features_flops(arch, arch.depth) + 2 * arch.embed_dim * arch.num_classes


def models_table() -> str:
    """Returns a table of all families: number of models, sizes, input, use and names."""
    rows = [("family", "models", "parameters", "GFLOPs", "input", "use", "names")]
    titles = dict.fromkeys(family.title for family in FAMILIES)
    for title in titles:
        families = [family for family in FAMILIES if family.title == title]
        archs = [MODELS[name].arch for family in families for name in family.members()]
        archs.sort(key=lambda arch: (arch.embed_dim**2 * arch.depth, arch.num_patches))
        ends = archs[0], archs[-1]
        sizes = sorted({arch.img_size[0] for arch in archs})
        rows.append(
            (
                title,
                f"{len(archs)}",
                _ends(num_parameters(arch) / 1e6 for arch in ends) + " M",
                _ends(forward_flops(arch) / 1e9 for arch in ends),
                f"{sizes[0]} to {sizes[-1]} px" if len(sizes) > 1 else f"{sizes[0]} px",
                "teacher, student" if ends[0].class_token else "teacher, student (patches only)",
                " ".join(family.names for family in families),
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
    return "\n".join(
        "  ".join(
            [*(cell.ljust(width) for cell, width in zip(row[:-1], widths, strict=True)), row[-1]]
        )
        for row in rows
    )


def _ends(numbers: Iterable[float]) -> str:
    texts = [f"{number:.1f}" for number in sorted(numbers)]
    return " to ".join(dict.fromkeys(texts))
