"""What is computed differently per backend: every such choice, with what was measured for it.

All forms compute the same numbers up to rounding (tests/models/test_backends.py). The numbers of
the TPU are those of programs compiled for a v5e chip, one ViT-L block at 128 images in bfloat16
(benchmarks/RESULTS.md); those of the CPU come from `python -m benchmarks.choices`.
The choices of a GPU were not compared on one; it takes what suits an accelerator.
"""

from __future__ import annotations

import dataclasses

import jax


@dataclasses.dataclass(frozen=True)
class Choices:
    """How one backend computes.

    Attributes:
      flat_linear: linear maps on flattened tokens. XLA on the CPU copies less where one axis is
        contracted; on a TPU the flattening moves 197 tokens in tiles of 8: 5.1 GB of memory
        traffic a block instead of 2.5, forward.
      keep_residual: an optimization barrier behind each residual sum. Without it the backward pass
        on the CPU adds the whole chain up again for every weight gradient, quadratic in the depth.
      stack_frozen: the blocks of a frozen model as one loop over stacked parameters: a compiler for
        TPUs takes long for a block, and the loop does not add to the traffic. Not those of a
        trained model, whose backward pass would keep 1.9 x the memory. On the CPU the loop would
        copy each block's parameters.
      project_apart: query, key and value as products of their own, already split into heads, and
        the heads joined by the last product. On a TPU the one product for all three is written,
        read and written again in other tiles: a ViT-L block moves 1.7 GB instead of 2.1 forward,
        7.6 instead of 9.3 with the gradient of its input; small models see no difference.
      fused_attention: cuDNN's kernel, where it is found (`models.attention`). A TPU's compiler
        fuses the softmax with its products by itself and writes 0.2 GB of weights a block in
        bfloat16.
      sequential: several students of a step after each other even where all fit into memory. The
        CPU asks for its temporaries anew in each step, and the system clears them: four students
        took 0.91 of the time of four runs together, 0.66 one by one (benchmarks/RESULTS.md).
      compiler_options: for `jax.jit` of a function with a backward pass. The CPU drops barriers
        before it fuses, and its YNN library multiplies narrow matrices more slowly than Eigen.
    """

    flat_linear: bool = False
    keep_residual: bool = False
    stack_frozen: bool = False
    project_apart: bool = False
    fused_attention: bool = False
    sequential: bool = False
    compiler_options: tuple[tuple[str, str], ...] = ()


_CHOICES = {
    "cpu": Choices(
        flat_linear=True,
        keep_residual=True,
        sequential=True,
        compiler_options=(
            ("xla_disable_hlo_passes", "cse_barrier_expander"),
            ("xla_cpu_experimental_ynn_fusion_type", "LIBRARY_FUSION_TYPE_REDUCE"),
        ),
    ),
    "gpu": Choices(fused_attention=True),
    "tpu": Choices(stack_frozen=True, project_apart=True),
}


def choices(platform: str = "") -> Choices:
    """Those of a platform as a device names it; empty: of the default device."""
    return _CHOICES.get(platform or jax.default_backend(), _CHOICES["gpu"])
