"""Table 1 of the paper: tasks, columns, and numbers (quoted, never measured here)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from singer_jax.data import dense
from singer_jax.models.zoo import IMAGENET_MEAN, IMAGENET_STD, architecture_name


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """Task of Table 1.

    Attributes:
      data: name of its data set.
      kind: `classification`, `segmentation`, `depth`, or `transfer`, which reuses ImageNet's head
        without training.
      metric: metric that the table shows.
      epochs: number of epochs of the published probe.
      mean: mean of the official code's image normalisation.
      std: standard deviation of the official code's image normalisation.
    """

    data: str
    kind: str = "classification"
    metric: str = "top1"
    epochs: int = 150
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD


TASKS: dict[str, Benchmark] = {
    "imagenet": Benchmark("imagenet2012"),
    "imagenet_v2": Benchmark("imagenet_v2", "transfer"),
    "imagenet_r": Benchmark("imagenet_r", "transfer"),
    "ade20k": Benchmark("ade20k", "segmentation", "miou", 200, dense.ADE20K_MEAN, dense.ADE20K_STD),
    "nyud": Benchmark("nyud", "depth", "rmse", 200, dense.NYUD_MEAN),
    "inat19": Benchmark("inat19"),
    "aircraft": Benchmark("aircraft"),
    "pet": Benchmark("pet"),
    "food": Benchmark("food"),
    "flowers": Benchmark("flowers"),
}

# Generated images of `data.source=scenes` with each kind of label. They are not part of the table,
# and their number of epochs is our choice.
SCENES: dict[str, Benchmark] = {
    "scenes": Benchmark("scenes", epochs=20),
    "scenes_masks": Benchmark("scenes_masks", "segmentation", "miou", 20),
    "scenes_depth": Benchmark("scenes_depth", "depth", "rmse", 20),
}

# Tasks whose mean is each column. DS is domain shift, FG fine-grained.
COLUMNS: dict[str, tuple[str, ...]] = {
    "IN-val": ("imagenet",),
    "ADE mIoU": ("ade20k",),
    "NYUd RMSE": ("nyud",),
    "iNat19": ("inat19",),
    "DS": ("imagenet_v2", "imagenet_r"),
    "FG": ("aircraft", "pet", "food", "flowers"),
}

NOTE = (
    "Published numbers are the paper's. Those of ADE20K and NYUd come from data preparation with "
    "faults (docs/differences.md) and are not directly comparable."
)

_VIT_L, _VIT_S, _VIT_T = (f"vit_{size}_patch16_224" for size in ("large", "small", "tiny"))
_DEIT_L, _DEIT_B, _DEIT_S, _DEIT_T = (
    f"deit3_{size}_patch16_224" for size in ("large", "base", "small", "tiny")
)

# Keyed by (method, teacher, student), or by the name of a model that was not distilled.
PUBLISHED: dict[Any, tuple[float, ...]] = {
    _VIT_L: (79.58, 26.57, 0.9157, 71.42, 54.20, 82.27),
    _VIT_S: (76.05, 19.57, 1.1065, 65.28, 44.48, 77.39),
    _VIT_T: (58.03, 14.20, 1.1807, 43.95, 28.75, 62.02),
    ("fitnet", _VIT_L, _VIT_S): (72.50, 25.15, 0.9903, 52.12, 40.21, 71.13),
    ("singer", _VIT_L, _VIT_S): (79.13, 30.06, 0.9026, 57.21, 48.91, 77.59),
    ("fitnet", _VIT_L, _VIT_T): (62.43, 18.73, 1.0093, 40.02, 32.32, 62.48),
    ("vitkd", _VIT_L, _VIT_T): (5.07, 11.92, 1.1903, 23.69, 2.08, 33.52),
    ("singer", _VIT_L, _VIT_T): (70.59, 21.76, 0.9406, 41.11, 38.87, 64.61),
    _DEIT_L: (84.10, 26.11, 1.2311, 57.59, 56.95, 75.35),
    _DEIT_B: (82.50, 25.14, 1.1781, 56.41, 54.73, 74.65),
    _DEIT_S: (78.90, 20.28, 1.2961, 45.39, 49.50, 67.84),
    ("fitnet", _DEIT_L, _DEIT_B): (60.00, 26.79, 1.1625, 50.04, 31.53, 74.78),
    ("vitkd", _DEIT_L, _DEIT_B): (66.54, 19.58, 1.2525, 30.78, 35.77, 58.36),
    ("singer", _DEIT_L, _DEIT_B): (79.37, 29.47, 1.1514, 53.50, 49.14, 75.41),
    ("fitnet", _DEIT_S, _DEIT_T): (51.41, 16.06, 1.2920, 32.81, 23.74, 58.53),
    ("vitkd", _DEIT_S, _DEIT_T): (35.56, 8.71, 1.4487, 19.93, 15.31, 45.13),
    ("singer", _DEIT_S, _DEIT_T): (63.50, 20.67, 0.9827, 37.68, 32.28, 64.32),
}


def row(tasks: Mapping[str, Mapping[str, Any]]) -> dict[str, float | None]:
    """Returns the columns of the table from the metrics by task.

    A column is None if one of its tasks has no metric.
    """
    found: dict[str, float | None] = {}
    for column, names in COLUMNS.items():
        measured = [tasks[name][TASKS[name].metric] for name in names if name in tasks]
        complete = len(measured) == len(names) and None not in measured
        found[column] = sum(measured) / len(names) if complete else None
    return found


def published(run: Mapping[str, Any] | None, model: str) -> tuple[str, dict[str, float]] | None:
    """Returns the paper's row for a run, or for weights that were not distilled.

    Args:
      run: configuration of the run that made the model, as nested dicts.
      model: timm name of the model, used if there is no run.

    Returns:
      the name of the row and its columns; None if the paper has no such row.
    """
    key: Any = architecture_name(model)
    if run and any(run["method"].get("method_weights", {}).values()):
        return None
    if run:
        key = (
            run["method"]["name"],
            architecture_name(run["teacher"]["model"]),
            architecture_name(run["student"]["model"]),
        )
    if key not in PUBLISHED:
        return None
    name = key if isinstance(key, str) else f"{key[0]} {key[1]} -> {key[2]}"
    return name, dict(zip(COLUMNS, PUBLISHED[key], strict=True))


def format_rows(rows: Mapping[str, Mapping[str, float | None]]) -> str:
    """Returns a table as text, with a dash for each missing number."""
    width = max(len(name) for name in rows)
    lines = [" " * width + "".join(f"{column:>12}" for column in COLUMNS)]
    for name, values in rows.items():
        cells = ("-" if values[c] is None else f"{values[c]:.4g}" for c in COLUMNS)
        lines.append(f"{name:{width}}" + "".join(f"{cell:>12}" for cell in cells))
    return "\n".join(lines)
