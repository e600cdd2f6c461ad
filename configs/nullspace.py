"""Is there a null space, and do the outliers lie in it? Before training, for a teacher and images.

  python -m singer_jax.main --config=configs/nullspace.py --workdir=runs/nullspace \
      --config.teacher.model=vit_large_patch16_224 \
      --config.teacher.weights=timm/vit_large_patch16_224.augreg_in21k_ft_in1k \
      --config.data.source=/path/to/images

Prints, for each distilled layer, source and threshold, the singular values, how many lie below the
threshold, the share of the outlier tokens' energy that `project` and `soft` would keep, and the
angle between the outlier tokens and the direction that the blocks before, linearised, amplify most;
writes nullspace.json and a plot, nullspace.png.

The source `calibrated` finds `rank` directions in half of the images and is measured on the others.
"""

from ml_collections import ConfigDict

from singer_jax.config import null_spaces


def get_config(protocol: str = "recommended") -> ConfigDict:
    """All sources and the usual thresholds."""
    return null_spaces(protocol)
