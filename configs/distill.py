"""Distils a teacher into a smaller student on your own images.

  python -m singer_jax.main --config=configs/distill.py --workdir=runs/mine \
      --config.data.source=/data/photos

Labels are not needed. The teacher, DINOv2 ViT-B/14, is downloaded once. Other models of the same
form: --config.teacher.model=NAME --config.teacher.weights=REPOSITORY_OR_FILE
--config.student.model=NAME (names: --config=configs/models.py).
"""

from ml_collections import ConfigDict

from singer_jax.config import default


def get_config(protocol: str = "recommended") -> ConfigDict:
    """Distils three blocks of the teacher by FitNet with clipped norms, at 224 pixels."""
    config = default(protocol)
    config.method.name = "fitnet"
    config.teacher.model = "vit_base_patch14_dinov2"
    config.teacher.weights = "timm/vit_base_patch14_dinov2.lvd142m"
    config.student.model = "vit_small_patch14_dinov2"
    config.data.image_size = 224
    return config
