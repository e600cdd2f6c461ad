"""Is a data set installed as it should be? Counts, classes, unreadable images, a contact sheet.

  python -m singer_jax.main --config=configs/check_data.py --workdir=runs/data \
      --config.data.path=/data

looks for every data set of Table 1 below /data; `--config.data.source=ade20k` (or a folder) checks
one. Every image is decoded once, and those that cannot be read are listed (status 1);
`--config.decode=False` only counts.
"""

from ml_collections import ConfigDict

from singer_jax.config import check_data


def get_config(protocol: str = "recommended") -> ConfigDict:
    """All of Table 1."""
    return check_data()
