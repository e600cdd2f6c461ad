"""Table 1 of the paper, or linear probe and kNN on one source, of a run or of any timm weights.

  python -m singer_jax.main --config=configs/evaluate.py --config.run=runs/singer_vitl_vitt \
      --config.data.path=/data --workdir=runs/singer_vitl_vitt/evaluation

Every task whose data is below /data (docs/data.md) is measured; `--config.data.source=FOLDER`
measures one labelled source instead. `--config.weights=NAME_OR_FILE` (and
`--config.model=TIMM_NAME`, where the name does not say it) measures a stranger's model the same
way. The default is the published probe: 150 epochs (ADE20K and NYUd 200) on new crops at a learning
rate of 0.5. `--config.probe.protocol=fast` runs the backbone once, and
`--config.probe.learning_rates="(0.1, 0.5, 2.0)"` trains all rates at once and takes the one that
won on held-out training images.
"""

from ml_collections import ConfigDict

from singer_jax.config import evaluation


def get_config(protocol: str = "recommended") -> ConfigDict:
    """All tasks unless --config.tasks or --config.data.source says otherwise."""
    return evaluation(protocol)
