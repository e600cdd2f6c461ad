"""What a distillation would take on a TPU slice, compiled for it here, without one.

  pip install libtpu
  python -m singer_jax.main --config=configs/plan.py --config.plan=configs/singer_vitl_vitt.py \
      --config.topology=v5e:16x16

Prints, for each chip, memory, operations, memory traffic and collectives of the step that the
trainer runs, and from the chip's data sheet the time of a step and of the whole run. Settings of
the distillation are changed by --config.overrides='mesh.fsdp=8 student.remat=True';
--config.batch_size=max finds the largest batch that fits.
"""

from ml_collections import ConfigDict

from singer_jax.config import plan


def get_config(protocol: str = "recommended") -> ConfigDict:
    """A topology, and nothing to plan; the protocol stands behind the name of what is planned."""
    return plan()
