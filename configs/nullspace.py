"""Does a teacher have artifacts, and does its null space hold them? Before training.

  python -m singer_jax.main --config=configs/nullspace.py --workdir=runs/nullspace \
      --config.teacher.model=vit_large_patch16_224 \
      --config.teacher.weights=timm/vit_large_patch16_224.augreg_in21k_ft_in1k \
      --config.data.source=/path/to/images

Prints, for each layer, the median of the patch norms, their 99th percentile and largest value over
the median of their image, and the share of patches above 3 and 5 medians; then a verdict in one
line. Draws the norms of a few images, norms.png.

`--config.details=True` also prints, for each distilled layer, source and threshold, the singular
values, how many lie below the threshold, the share of the outliers' energy that `project` and
`soft` would keep, and the angle between the outliers and the direction that the blocks before,
linearised, amplify most. nullspace.json holds all of it, nullspace.png the singular values.

The source `calibrated` finds `rank` directions in half of the images and is measured on the others.
"""

from ml_collections import ConfigDict

from singer_jax.config import null_spaces


def get_config(protocol: str = "recommended") -> ConfigDict:
    """All sources and the usual thresholds."""
    return null_spaces(protocol)
