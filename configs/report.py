"""Writes the page of a run, report/index.html: training, norms, maps of patches, results.

  python -m singer_jax.main --config=configs/report.py --workdir=runs/singer_vitl_vitt \
      --config.baselines="('runs/fitnet_vitl_vitt',)"

The results are those that `evaluate` wrote into RUN/evaluation. The page needs no network and no
other file.
"""

from ml_collections import ConfigDict

from singer_jax.config import report


def get_config(protocol: str = "recommended") -> ConfigDict:
    """Returns the job's keys; the run is the work directory."""
    return report()
