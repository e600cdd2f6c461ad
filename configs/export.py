"""A student for timm, and as a StableHLO program that needs nothing of this project.

  python -m singer_jax.main --config=configs/export.py --config.run=runs/singer_vitl_vitt \
      --workdir=runs/singer_vitl_vitt

writes student/model.safetensors and student/config.json (timm's hub layout) and
student/features.stablehlo below the work directory. `--config.weights=NAME_OR_FILE` exports timm
weights instead of a run, `--config.step=N` another checkpoint than the latest.
"""

from ml_collections import ConfigDict

from singer_jax.config import export


def get_config(protocol: str = "recommended") -> ConfigDict:
    """The latest checkpoint of `run`."""
    return export()
