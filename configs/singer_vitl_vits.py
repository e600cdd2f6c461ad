"""SiNGER: ViT-L/16 (augreg) -> ViT-S/16 on ImageNet-1k.

  python -m singer_jax.main --config=configs/singer_vitl_vits.py --workdir=runs/singer_vitl_vits

The paper's Table 1 (quoted, not measured here): ImageNet 79.13, ADE20K mIoU 30.06, NYUd RMSE
0.9026, iNaturalist 57.21, domain shift 48.91, fine-grained 77.59. `:paper` runs the official code's
protocol; the default is what this project recommends (singer_jax/config.py names each difference).
On a folder of your own images: --config.data.source=/path/to/images.
"""

from ml_collections import ConfigDict

from singer_jax.config import default


def get_config(protocol: str = "recommended") -> ConfigDict:
    """Distils teacher blocks 17 and 23."""
    config = default(protocol)
    config.method.name = "singer"
    config.teacher.model = "vit_large_patch16_224"
    config.teacher.weights = "timm/vit_large_patch16_224.augreg_in21k_ft_in1k"
    config.student.model = "vit_small_patch16_224"
    return config
