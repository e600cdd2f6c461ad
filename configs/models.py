"""Prints a table of all models: name, parameters, GFLOPs, input size and statistics, use.

python -m singer_jax.main --config=configs/models.py
"""

from ml_collections import ConfigDict

from singer_jax.config import models


def get_config(protocol: str = "recommended") -> ConfigDict:
    """Returns the job's keys; there is nothing to set."""
    return models()
