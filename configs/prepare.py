"""Converts images into records for fast random access, also from shared disks.

  python -m singer_jax.main --config=configs/prepare.py --workdir=/data/imagenet_records \
      --config.data.source=/data/imagenet_download

`data.source` is a folder of images, ImageNet's tar files as downloaded, WebDataset shards (.tar),
or the Parquet shards of a Hugging Face data set. The job writes the records into the work
directory; a run reads them with `--config.data.source=/data/imagenet_records`. The same command
resumes a stopped job, and verifies the records of a finished one.
"""

from ml_collections import ConfigDict

from singer_jax.config import prepare


def get_config(protocol: str = "recommended") -> ConfigDict:
    """Returns the job's keys; set `data.source`."""
    return prepare()
