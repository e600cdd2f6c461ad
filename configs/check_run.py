"""Whether everything in a work directory is still what was written.

  python -m singer_jax.main --config=configs/check_run.py --config.run=runs/singer_vitl_vitt

reads every checkpoint back and compares each leaf with its checksum, reads config.json,
metrics.jsonl and the exports, and compares weights with their recorded sha256. One line each;
status 1 where something is damaged. Nothing is changed, and the run may be going on.
"""

from ml_collections import ConfigDict

from singer_jax.config import check_run


def get_config(protocol: str = "recommended") -> ConfigDict:
    """The work directory `run`."""
    return check_run()
