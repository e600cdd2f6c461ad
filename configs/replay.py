"""The step of a run in which a loss or gradient first was no finite number, once more.

  python -m singer_jax.main --config=configs/replay.py --config.run=runs/mine

goes on from the last good checkpoint to the step before, runs that step with `jax_debug_nans`, and
says which operation, in which line, made the first number that is none. One process, on the
devices that are here; nothing is written. Of several students `--config.student=NAME` says which.
"""

from ml_collections import ConfigDict

from singer_jax.config import replay


def get_config(protocol: str = "recommended") -> ConfigDict:
    """What `run` recorded in its folder nan/."""
    return replay()
