"""The job `models`: a table of all of them."""

from __future__ import annotations

import dataclasses

from etils import epath

from singer_jax.models.summary import models_table
from singer_jax.settings.ranges import OneOf
from singer_jax.settings.settings import Settings, setting


@dataclasses.dataclass(frozen=True)
class ModelsSettings(Settings):
    """None."""

    job: str = setting("models", OneOf(("models",)), "the command")


def models(settings: ModelsSettings, workdir: epath.Path) -> None:
    """Prints the table; neither argument matters."""
    print(models_table())
