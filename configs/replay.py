"""Repeats the step in which a run first had a non-finite loss or gradient.

  python -m singer_jax.main --config=configs/replay.py --config.run=runs/mine

The job resumes from the last good checkpoint up to the preceding step, repeats the failed step with
`jax_debug_nans`, and reports the operation and source line that made the first non-finite value. It
runs in one process on the local devices and writes nothing. If the run has several students,
`--config.student=NAME` selects one.
"""

from ml_collections import ConfigDict

from singer_jax.config import replay


def get_config(protocol: str = "recommended") -> ConfigDict:
    """Returns the job's keys; `run` must hold a record in its folder nan/."""
    return replay()
