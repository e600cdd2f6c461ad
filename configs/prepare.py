"""Turns images into records that are read in any order, fast, also from shared disks.

  python -m singer_jax.main --config=configs/prepare.py --workdir=/data/imagenet_records \
      --config.data.source=/data/imagenet_download

`data.source` is a folder of images, ImageNet's tar files as they are downloaded, WebDataset shards
(.tar), or a Hugging Face data set's Parquet shards. The records lie in the work directory; a run
reads them with `--config.data.source=/data/imagenet_records`. The same command continues a run that
was stopped, and checks the records of one that is done.
"""

from ml_collections import ConfigDict

from singer_jax.config import prepare


def get_config(protocol: str = "recommended") -> ConfigDict:
    """Returns the job's keys; `data.source` is to be given."""
    return prepare()
