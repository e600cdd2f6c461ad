"""Evaluates a run or any timm weights: Table 1 of the paper, or probe and kNN on one source.

  python -m singer_jax.main --config=configs/evaluate.py --config.run=runs/singer_vitl_vitt \
      --config.data.path=/data --workdir=runs/singer_vitl_vitt/evaluation

The job runs every task whose data is below /data (docs/data.md); `--config.data.source=FOLDER`
evaluates on one labelled source instead. `--config.weights=NAME_OR_FILE` evaluates other weights
with the same protocol; add `--config.model=TIMM_NAME` if the name does not state the model.

The default is the published probe: 150 epochs (200 for ADE20K and NYUd) on new crops at a learning
rate of 0.5. `--config.probe.protocol=fast` runs the backbone once.
`--config.probe.learning_rates="(0.1, 0.5, 2.0)"` trains all rates at once and reports the best one
on held-out training images.
"""

from ml_collections import ConfigDict

from singer_jax.config import evaluation


def get_config(protocol: str = "recommended") -> ConfigDict:
    """Returns the job's keys; all tasks run unless `tasks` or `data.source` is set."""
    return evaluation(protocol)
