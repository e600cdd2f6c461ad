"""Measures a teacher's artifacts and the share that its null space holds, before training.

  python -m singer_jax.main --config=configs/nullspace.py --workdir=runs/nullspace \
      --config.teacher.model=vit_large_patch16_224 \
      --config.teacher.weights=timm/vit_large_patch16_224.augreg_in21k_ft_in1k \
      --config.data.source=/path/to/images

For each layer, the job prints the median of the patch norms, their 99th percentile and largest
value relative to the median of their image, and the share of patches above 3 and 5 medians. A
verdict in one line follows. norms.png shows the norms of a few images.

`--config.details=True` also prints, for each distilled layer, source and threshold: the singular
values, how many lie below the threshold, the share of the outliers' energy that `project` and
`soft` keep, and the angle between the outliers and the singular defect of the preceding blocks.
nullspace.json holds all numbers, nullspace.png shows the singular values.

The source `calibrated` finds `rank` directions in half of the images and is measured on the others.
"""

from ml_collections import ConfigDict

from singer_jax.config import null_spaces


def get_config(protocol: str = "recommended") -> ConfigDict:
    """Returns the job's keys; the default measures all sources at four thresholds."""
    return null_spaces(protocol)
