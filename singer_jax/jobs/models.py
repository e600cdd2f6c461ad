"""Job `models`: prints a table of all models."""

from __future__ import annotations

import dataclasses

from etils import epath

from singer_jax.models.summary import models_table
from singer_jax.settings.ranges import OneOf
from singer_jax.settings.settings import Settings, setting


@dataclasses.dataclass(frozen=True)
class ModelsSettings(Settings):
    """Settings of the job `models`."""

    job: str = setting("models", OneOf(("models",)), "Name of the command.")


def models(settings: ModelsSettings, workdir: epath.Path) -> None:
    """Prints the table of all models; neither argument is used."""
    print(models_table())
