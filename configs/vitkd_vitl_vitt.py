"""ViTKD: ViT-L/16 (augreg) -> ViT-Ti/16 on ImageNet-1k.

  python -m singer_jax.main --config=configs/vitkd_vitl_vitt.py --workdir=runs/vitkd_vitl_vitt

The paper's Table 1 (quoted, not measured here): ImageNet 5.07, ADE20K mIoU 11.92, NYUd RMSE 1.1903,
iNaturalist 23.69, domain shift 2.08, fine-grained 33.52. `:paper` runs the official code's
protocol; the default is what this project recommends (singer_jax/config.py names each difference).
On a folder of your own images: --config.data.source=/path/to/images.
"""

from ml_collections import ConfigDict

from singer_jax.config import default


def get_config(protocol: str = "recommended") -> ConfigDict:
    """Mimics teacher blocks 0 and 2, generates block 23 from a masked student."""
    config = default(protocol)
    config.method.name = "vitkd"
    config.teacher.model = "vit_large_patch16_224"
    config.teacher.weights = "timm/vit_large_patch16_224.augreg_in21k_ft_in1k"
    config.student.model = "vit_tiny_patch16_224"
    return config
