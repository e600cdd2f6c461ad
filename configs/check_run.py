"""Verifies every checkpoint and file of a work directory.

  python -m singer_jax.main --config=configs/check_run.py --config.run=runs/singer_vitl_vitt

The job reads every checkpoint back and compares each leaf with its checksum. It reads config.json,
metrics.jsonl and the exports, and compares weights with their recorded sha256. It prints one line
for each of them; the exit status is 1 if one is corrupt. It changes nothing, and the run may be
active.
"""

from ml_collections import ConfigDict

from singer_jax.config import check_run


def get_config(protocol: str = "recommended") -> ConfigDict:
    """Returns the job's keys; set `run`."""
    return check_run()
