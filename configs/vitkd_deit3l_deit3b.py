"""ViTKD: DeiT-III-L/16 -> DeiT-III-B/16 on ImageNet-1k.

  python -m singer_jax.main --config=configs/vitkd_deit3l_deit3b.py \
      --workdir=runs/vitkd_deit3l_deit3b

The paper's Table 1 (quoted, not measured here): ImageNet 66.54, ADE20K mIoU 19.58, NYUd RMSE
1.2525, iNaturalist 30.78, domain shift 35.77, fine-grained 58.36. `:paper` runs the official code's
protocol; the default is what this project recommends (singer_jax/config.py names each difference).
On a folder of your own images: --config.data.source=/path/to/images.
"""

from ml_collections import ConfigDict

from singer_jax.config import default


def get_config(protocol: str = "recommended") -> ConfigDict:
    """Mimics teacher blocks 0 and 2, generates block 23 from a masked student."""
    config = default(protocol)
    config.method.name = "vitkd"
    config.teacher.model = "deit3_large_patch16_224"
    config.teacher.weights = "timm/deit3_large_patch16_224.fb_in22k_ft_in1k"
    config.student.model = "deit3_base_patch16_224"
    return config
