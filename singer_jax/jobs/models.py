"""The job `models`: a table of all of them."""

from __future__ import annotations

from typing import Any

from etils import epath

from singer_jax.models.summary import models_table


def models(config: Any, workdir: epath.Path) -> None:
    """Prints the table; neither argument matters."""
    print(models_table())
