"""How large models are: parameters and operations, and the table of all of them."""

from __future__ import annotations

import math

from singer_jax.models.architecture import Architecture
from singer_jax.models.params import leaves
from singer_jax.models.weights import abstract_params
from singer_jax.models.zoo import MODELS


def num_parameters(arch: Architecture) -> int:
    """Parameters, head included."""
    return sum(math.prod(leaf.shape) for _, leaf in leaves(abstract_params(arch)))


def features_flops(arch: Architecture, blocks: int, added: int = 0) -> int:
    """Operations of the matrix products of one image's embedding and first `blocks` blocks.

    Two a multiply-add; with `added` tokens more than the model has.
    """
    tokens, dim = added + arch.num_prefix_tokens + arch.num_patches, arch.embed_dim
    block = abstract_params(arch)["blocks"][0]
    linear = sum(math.prod(leaf.shape) for keys, leaf in leaves(block) if keys[-1] == "kernel")
    embedding = arch.num_patches * 3 * arch.patch_size**2 * dim
    return 2 * (embedding + blocks * (tokens * linear + 2 * tokens**2 * dim))


def forward_flops(arch: Architecture) -> int:
    """`features_flops` of all blocks, and the head's (attention pooling not counted)."""
    return features_flops(arch, arch.depth) + 2 * arch.embed_dim * arch.num_classes


def models_table() -> str:
    """Every model: parameters, GFLOPs a forward pass, input, and what it can be used for."""
    rows = [("model", "parameters", "GFLOPs", "input", "mean", "std", "tokens", "use")]
    for name, spec in MODELS.items():
        arch = spec.arch
        prefix = f"{arch.num_prefix_tokens} + " if arch.num_prefix_tokens else ""
        rows.append(
            (
                name,
                f"{num_parameters(arch) / 1e6:.1f} M",
                f"{forward_flops(arch) / 1e9:.1f}",
                f"{arch.img_size[0]} px",
                _numbers(spec.mean),
                _numbers(spec.std),
                f"{prefix}{arch.num_patches}",
                "teacher, student" if arch.class_token else "teacher, student (patches only)",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def _numbers(values: tuple[float, ...]) -> str:
    return " ".join(f"{value:.3f}" for value in values)
