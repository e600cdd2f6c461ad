"""One SiNGER training step against the same step in PyTorch with timm models.

  pip install ".[bench]" && pip install --no-deps timm torchvision==0.28.0
  python -m benchmarks.step --teacher vit_large_patch16_224 --student vit_tiny_patch16_224 --batch 4
  python -m benchmarks.step --breakdown --peers jax

All peers start from the same weights and see the same images; their first losses must agree. All
reuse the teacher's own next feature in the info loss, which the official code computes again.
PyTorch uses its fused attention (timm's default). Each peer runs in its own process, and they take
turns, one step each, so that noise of the machine and waiting threads affect all alike. The table
shows median seconds per step, the peak memory of each process (of the device, if there is one), the
step's FLOP/s relative to a product of large matrices, and ratios to the fastest PyTorch form.

Peers: `jax`, this project; `int8` and `fp8`, with a quantised teacher; `eager` and `compiled`,
PyTorch in the same precision (autocast); `official`, PyTorch in float32, as the official code runs.
The benchmark imports models, methods, training and platform, but no grain, clu, ml_collections,
orbax or TFDS.
"""

from benchmarks.step.arguments import parser
from benchmarks.step.breakdown import breakdown
from benchmarks.step.peers import TORCH, measure, rows
from benchmarks.step.torch_step import import_timm

__all__ = ["TORCH", "breakdown", "import_timm", "measure", "parser", "rows"]
