"""Linear probe and kNN of a run's student, or of any timm weights.

  python -m singer_jax.main --config=configs/evaluate.py --config.run=runs/singer_vitl_vitt \
      --workdir=runs/singer_vitl_vitt/evaluation

`--config.weights=NAME_OR_FILE` (and `--config.model=TIMM_NAME`, where the name does not say it)
measures a stranger's model the same way. The defaults are the published protocol: 150 epochs on new
crops at a learning rate of 0.5. With `--config.probe.augment=False` the backbone runs once, and
`--config.probe.learning_rates=[0.1,0.5,2]` trains all rates at once and says which one won on
held-out training images.
"""

from ml_collections import ConfigDict

from singer_jax.config import evaluation


def get_config(protocol: str = "recommended") -> ConfigDict:
    """ImageNet-1k unless --config.data.source says otherwise."""
    return evaluation(protocol)
