"""FitNet: ViT-L/16 (augreg) -> ViT-Ti/16 on ImageNet-1k.

  python -m singer_jax.main --config=configs/fitnet_vitl_vitt.py --workdir=runs/fitnet_vitl_vitt

The paper's Table 1 (quoted, not measured here): ImageNet 62.43, ADE20K mIoU 18.73, NYUd RMSE
1.0093, iNaturalist 40.02, domain shift 32.32, fine-grained 62.48. `:paper` runs the official code's
protocol; the default is what this project recommends (singer_jax/config.py names each difference).
On a folder of your own images: --config.data.source=/path/to/images.
"""

from ml_collections import ConfigDict

from singer_jax.config import default


def get_config(protocol: str = "recommended") -> ConfigDict:
    """Distils teacher blocks 11, 17 and 23."""
    config = default(protocol)
    config.method.name = "fitnet"
    config.teacher.model = "vit_large_patch16_224"
    config.teacher.weights = "timm/vit_large_patch16_224.augreg_in21k_ft_in1k"
    config.student.model = "vit_tiny_patch16_224"
    return config
