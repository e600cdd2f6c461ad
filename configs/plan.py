"""Predicts memory, time and cost of a distillation on a TPU slice, without the slice.

  pip install libtpu
  python -m singer_jax.main --config=configs/plan.py --config.plan=configs/singer_vitl_vitt.py \
      --config.topology=v5e:16x16

The job compiles the trainer's step for the chips. For each chip it prints memory, operations,
memory traffic and collectives. From the chip's data sheet it predicts the time of a step and of the
whole run. --config.overrides='mesh.fsdp=8 student.remat=True' changes settings of the distillation;
--config.batch_size=max finds the largest batch that fits.
"""

from ml_collections import ConfigDict

from singer_jax.config import plan


def get_config(protocol: str = "recommended") -> ConfigDict:
    """Returns the job's keys; set `plan`, optionally followed by `:protocol`."""
    return plan()
