"""Predicts memory, time and cost of a distillation on TPUs or GPUs that are not attached.

  pip install ".[plan]"      # for GPUs, in an environment of its own: pip install ".[plan-gpu]"
  python -m singer_jax.main --config=configs/plan.py --config.plan=configs/singer_vitl_vitt.py \
      --config.topology=v5e:16x16

--config.topology=h100:8 plans for the GPUs of one node. The job compiles the trainer's step for the
chips, which takes minutes. For each chip it prints memory, operations, memory traffic and
collectives. From the chip's data sheet it predicts the time of a step and of the whole run.
--config.overrides='mesh.fsdp=8 student.overrides.depth=3' changes settings of the distillation;
--config.batch_size=max finds the largest batch that fits.
"""

from ml_collections import ConfigDict

from singer_jax.config import plan


def get_config(protocol: str = "recommended") -> ConfigDict:
    """Returns the job's keys; set `plan`, optionally followed by `:protocol`."""
    return plan()
