"""Compares several runs in one table and one page: methods by tasks, mean and std over seeds.

  python -m singer_jax.main --config=configs/compare.py --workdir=runs/comparison \
      --config.runs="('runs/singer_0', 'runs/singer_1', 'runs/fitnet_0')"

The job reads the results that `evaluate` wrote into RUN/evaluation. Runs that differ only in the
seed share a row.
"""

from ml_collections import ConfigDict

from singer_jax.config import compare


def get_config(protocol: str = "recommended") -> ConfigDict:
    """Returns the job's keys; set `runs`."""
    return compare()
