"""Format of an evaluation's `results.json`: the numbers, the weights, the data and the settings."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from etils import epath

from singer_jax.errors import InputError
from singer_jax.io.limits import read_object
from singer_jax.settings.settings import flatten

VERSION = 2
"""Version of the evaluation's code.

Increment it whenever the same weights, data and settings give different numbers.
"""

_SHOWN = ("top1", "knn_top1", "miou", "rmse")


@dataclasses.dataclass(frozen=True)
class Results:
    """Content of a `results.json`.

    Files of version 1 do not state how they were made: `version`, `step` and `digest` are None, and
    `settings` and `data` are empty.

    Attributes:
      row: numbers by column: the columns of Table 1, then one column per task and metric.
      version: `VERSION` of the code that evaluated.
      settings: settings of the evaluation by dotted key.
      data: digest of the data of each task.
      step: step of the evaluated checkpoint; None for a weight file.
      digest: `checkpoints.fingerprint` of the weights.
    """

    row: dict[str, float]
    version: int | None
    settings: dict[str, Any]
    data: dict[str, str]
    step: int | None
    digest: str | None


def provenance(
    settings: Mapping[str, Any], data: Mapping[str, str], step: int | None, digest: str
) -> dict[str, Any]:
    """Returns the part of `results.json` that states how its numbers were made.

    Args:
      settings: settings of the evaluation, as nested dicts.
      data: digest of the data of each task.
      step: step of the checkpoint; None for a weight file.
      digest: `checkpoints.fingerprint` of the weights.
    """
    return {
        "version": VERSION,
        "settings": settings,
        "data": data,
        "weights": {"step": step, "digest": digest},
    }


def read_results(file: epath.Path) -> Results | None:
    """Reads a `results.json`, also of version 1; returns None if there is no such file.

    Raises:
      InputError: the file is not a `results.json` of an evaluation.
    """
    if not file.is_file():
        return None
    content = read_object(file)
    try:
        row = {name: value for name, value in content["table1"].items() if value is not None}
        row |= {
            f"{task} {metric}": metrics[metric]
            for task, metrics in content["tasks"].items()
            for metric in _SHOWN
            if metrics.get(metric) is not None
        }
        weights = content.get("weights", {})
        found = Results(
            row,
            content.get("version"),
            flatten(content.get("settings", {})),
            {task: str(digest) for task, digest in content.get("data", {}).items()},
            weights.get("step"),
            weights.get("digest"),
        )
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise InputError(f"{file}: not a results.json of the job evaluate: {error!r}") from error
    wrong = next((name for name, value in row.items() if not isinstance(value, int | float)), None)
    if wrong is not None:
        raise InputError(f"{file}: {wrong} is not a number; evaluate again")
    if not all(value is None or isinstance(value, int) for value in (found.version, found.step)):
        raise InputError(f"{file}: version and weights.step must be integers; evaluate again")
    return found
