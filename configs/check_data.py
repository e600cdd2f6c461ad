"""Checks data sets: counts, classes, unreadable images, and a contact sheet of each split.

  python -m singer_jax.main --config=configs/check_data.py --workdir=runs/data \
      --config.data.path=/data

This command checks every data set of Table 1 below /data; `--config.data.source=ade20k` (or a
folder) checks one. It decodes every image once and lists the unreadable ones (exit status 1).
`--config.decode=False` only counts the images.
"""

from ml_collections import ConfigDict

from singer_jax.config import check_data


def get_config(protocol: str = "recommended") -> ConfigDict:
    """Returns the configuration for all data sets of Table 1."""
    return check_data()
