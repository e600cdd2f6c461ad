"""Implementation choices that differ between backends, with the measurements behind them.

All choices compute the same numbers up to rounding (tests/models/test_backends.py). The numbers for
the TPU are those of programs compiled for a v5e chip: one ViT-L block at 128 images in bfloat16
(benchmarks/README.md). Those for the CPU come from `python -m benchmarks.choices`. The choices for
the GPU were not compared on a GPU.
"""

from __future__ import annotations

import dataclasses

import jax


@dataclasses.dataclass(frozen=True)
class Choices:
    """The choices of one backend.

    Attributes:
      flat_linear: Applies linear maps to flattened tokens. XLA on the CPU copies less if one axis
        is contracted. On a TPU the flattening moves 197 tokens in tiles of 8: 5.1 GB of memory
        traffic per block instead of 2.5 GB in the forward pass.
      keep_residual: Puts an optimization barrier after each residual sum. Without it the backward
        pass on the CPU recomputes the whole chain of sums for every weight gradient, which is
        quadratic in the depth.
      stack_frozen: Runs the blocks of a frozen model as one loop over stacked parameters. It saves
        compile time on TPUs and adds no memory traffic. The blocks of a trained model are not
        stacked, because their backward pass would need 1.9 x the memory. On the CPU the loop would
        copy each block's parameters.
      project_apart: Computes query, key and value as separate products, already split into heads,
        and merges the heads in the output projection. On a TPU the result of one product for all
        three is written, read and written again with another tiling. A ViT-L block moves 1.7 GB
        instead of 2.1 in the forward pass, and 7.6 instead of 9.3 with the gradient of its input.
        For small models there is no difference.
      row_major: Constrains the layout of a student's residual stream before the first block to the
        order batch, tokens, channels. Without it a GPU's compiler lets the gradient of the position
        embedding, a sum over the batch, decide the layout of the whole stream, and transposes the
        input and output of each matrix product.
      slice_frozen: Computes query, key and value of a frozen model in bfloat16 as three products
        with slices of the kernel. Their outputs are the inputs of the attention without a copy.
      fused_gelu: Writes the tanh approximation of GELU of a frozen model in bfloat16 so that
        cuBLASLt computes it after the product.
      fused_attention: Uses cuDNN's kernel if it is available (`models.attention`). A TPU's compiler
        fuses the softmax with its products itself and writes 0.2 GB of attention weights per block
        in bfloat16.
      heads_first: Transposes the inputs and the result of attention, so that the heads are a
        leading axis of its products. The CPU otherwise transposes the products: 8 % of the time of
        a ViT-S's forward pass, 2 % of a ViT-Ti's forward and backward pass. On a TPU the transposed
        inputs are 3 % more memory traffic with the gradient.
      sequential: Executes several students of a step sequentially even if all fit into memory. The
        CPU allocates its temporaries anew in each step. Relative to four separate runs, four
        students took 0.91 of the time in parallel and 0.66 sequentially (benchmarks/README.md;
        measured before `platform.allocator`).
      separate_diagnostics: Computes the diagnostics of logged steps in a program of their own. In
        the program of the step they would be a branch, for which a GPU waits in the middle of each
        step, and which cuts its CUDA graph in two. The own program runs the teacher once more.
      compiler_options: Options of `jax.jit`. On the CPU they are for functions with a backward
        pass: the CPU removes barriers before fusion, and its YNN library multiplies narrow matrices
        more slowly than Eigen. On a GPU they leave all matrix products to cuBLASLt: XLA wraps each
        product in a Triton kernel before it looks for a bias, a residual or a GELU that cuBLASLt
        could compute in the same kernel. Two bugs in cuBLASLt's bias epilogue are known
        (openxla/xla 46110 and 46897), so `benchmarks/accelerator.sh` compares loss and gradients
        with those of float32. XLA would also merge the products of `slice_frozen` again.
    """

    flat_linear: bool = False
    keep_residual: bool = False
    stack_frozen: bool = False
    project_apart: bool = False
    row_major: bool = False
    slice_frozen: bool = False
    fused_gelu: bool = False
    fused_attention: bool = False
    heads_first: bool = False
    sequential: bool = False
    separate_diagnostics: bool = False
    compiler_options: tuple[tuple[str, str | int | bool], ...] = ()


_CHOICES = {
    "cpu": Choices(
        flat_linear=True,
        keep_residual=True,
        heads_first=True,
        sequential=True,
        compiler_options=(
            ("xla_disable_hlo_passes", "cse_barrier_expander"),
            ("xla_cpu_experimental_ynn_fusion_type", "LIBRARY_FUSION_TYPE_REDUCE"),
        ),
    ),
    "gpu": Choices(
        flat_linear=True,
        row_major=True,
        slice_frozen=True,
        fused_gelu=True,
        fused_attention=True,
        separate_diagnostics=True,
        compiler_options=(
            ("xla_gpu_enable_triton_gemm", False),
            ("xla_gpu_dot_merger_threshold_mb", 0),
        ),
    ),
    "tpu": Choices(stack_frozen=True, project_apart=True),
}


def choices(platform: str = "") -> Choices:
    """Returns the choices for a `device.platform`; empty for that of the default device."""
    return _CHOICES.get(platform or jax.default_backend(), _CHOICES["gpu"])
