"""SiNGER: DeiT-III-L/16 -> DeiT-III-B/16 on ImageNet-1k.

  python -m singer_jax.main --config=configs/singer_deit3l_deit3b.py \
      --workdir=runs/singer_deit3l_deit3b

The paper's Table 1 (quoted, not measured here): ImageNet 79.37, ADE20K mIoU 29.47, NYUd RMSE
1.1514, iNaturalist 53.50, domain shift 49.14, fine-grained 75.41. `:paper` runs the official code's
protocol; the default is what this project recommends (singer_jax/config.py names each difference).
On a folder of your own images: --config.data.source=/path/to/images.
"""

from ml_collections import ConfigDict

from singer_jax.config import default


def get_config(protocol: str = "recommended") -> ConfigDict:
    """Distils teacher blocks 17 and 23."""
    config = default(protocol)
    config.method.name = "singer"
    config.teacher.model = "deit3_large_patch16_224"
    config.teacher.weights = "timm/deit3_large_patch16_224.fb_in22k_ft_in1k"
    config.student.model = "deit3_base_patch16_224"
    return config
