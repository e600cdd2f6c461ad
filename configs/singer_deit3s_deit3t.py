"""SiNGER: DeiT-III-S/16 -> DeiT-III-Ti/16 on ImageNet-1k.

  python -m singer_jax.main --config=configs/singer_deit3s_deit3t.py \
      --workdir=runs/singer_deit3s_deit3t

The paper's Table 1 (quoted, not measured here): ImageNet 63.50, ADE20K mIoU 20.67, NYUd RMSE
0.9827, iNaturalist 37.68, domain shift 32.28, fine-grained 64.32. `:paper` runs the official code's
protocol; the default is what this project recommends (singer_jax/config.py names each difference).
On a folder of your own images: --config.data.source=/path/to/images.
"""

from ml_collections import ConfigDict

from singer_jax.config import default


def get_config(protocol: str = "recommended") -> ConfigDict:
    """Distils teacher blocks 8 and 11."""
    config = default(protocol)
    config.method.name = "singer"
    config.teacher.model = "deit3_small_patch16_224"
    config.teacher.weights = "timm/deit3_small_patch16_224.fb_in22k_ft_in1k"
    config.student.model = "deit3_tiny_patch16_224"
    return config
