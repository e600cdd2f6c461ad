"""ViTKD: DeiT-III-S/16 -> DeiT-III-Ti/16 on ImageNet-1k.

  python -m singer_jax.main --config=configs/vitkd_deit3s_deit3t.py \
      --workdir=runs/vitkd_deit3s_deit3t

The paper's Table 1 (quoted, not measured here): ImageNet 35.56, ADE20K mIoU 8.71, NYUd RMSE 1.4487,
iNaturalist 19.93, domain shift 15.31, fine-grained 45.13. `:paper` runs the official code's
protocol; the default is what this project recommends (singer_jax/config.py names each difference).
On a folder of your own images: --config.data.source=/path/to/images.
"""

from ml_collections import ConfigDict

from singer_jax.config import default


def get_config(protocol: str = "recommended") -> ConfigDict:
    """Mimics teacher blocks 0 and 2, generates block 11 from a masked student."""
    config = default(protocol)
    config.method.name = "vitkd"
    config.teacher.model = "deit3_small_patch16_224"
    config.teacher.weights = "timm/deit3_small_patch16_224.fb_in22k_ft_in1k"
    config.student.model = "deit3_tiny_patch16_224"
    return config
