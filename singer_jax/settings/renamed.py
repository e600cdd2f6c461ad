"""Renamed settings and metrics, so that older runs can still be read.

`config.json` and `metrics.jsonl` of an older run hold the former names. A command line that uses a
former name is refused with the current one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

# Fields of `Architecture`, which a dict of overrides or timm's config.json holds.
_FIELDS = {
    "planted": "synthetic_outlier",
    "planted_after": "synthetic_outlier_after",
    "planted_patches": "synthetic_outlier_patches",
    "planted_length": "synthetic_outlier_length",
}
_METHOD = {
    "nullspace.use": "nullspace.mode",
    "nullspace.source": "nullspace.weight_matrix",
    "nullspace.rule": "nullspace.threshold_type",
    "nullspace.start": "nullspace.init",
    "nullspace.order": "nullspace.direction_order",
    "nullspace.epsilon": "nullspace.ridge",
    "match.space": "match.target_space",
    "match.clip": "match.norm_clip_quantile",
    "matching": "layer_mapping",
    "append_last": "include_last_layer",
    "quantile": "outlier_quantile",
    "terms": "method_weights",
    "weights": "loss_weights",
    "resample_grids": "interpolate_patch_grid",
}
_KEYS = {f"method.{old}": f"method.{new}" for old, new in _METHOD.items()} | {
    "optimizer.clip_norm": "optimizer.max_grad_norm",
    "log.every": "log.every_steps",
    "checkpoint.every": "checkpoint.every_steps",
    "evals.every": "evals.every_steps",
    "schedule.final_ratio": "schedule.min_lr_ratio",
    "students.schedule": "students.execution",
    "teacher.clean": "teacher.artifact_removal",
    "probe.held_out": "probe.val_fraction",
    "probe.token": "probe.pooling",
    "data.strict": "data.fail_on_unreadable",
    "accumulation": "grad_accum_steps",
    **{f"overrides.{old}": f"overrides.{new}" for old, new in _FIELDS.items()},
}
# Settings of single jobs, which are in no section.
_OF_JOBS = {
    "append_last": "include_last_layer",
    "quantile": "outlier_quantile",
    "epsilon": "ridge",
    "sources": "weight_matrices",
    "change": "overrides",
    "stablehlo": "formats",
}
_VALUES = {
    "students.execution": {"together": "parallel", "one_by_one": "sequential"},
    "teacher.artifact_removal": {"planted": "synthetic_outlier"},
}

# The former key, alone or below the section of a run or a student; a section has keys below it.
_PATTERNS = [
    (re.compile(rf"(?P<before>|.+\.){re.escape(old)}(?P<below>|\..+)"), new)
    for old, new in _KEYS.items()
]


def current_key(key: str) -> str:
    """Returns the current name of a setting, which is the given name unless it was renamed."""
    if key in _OF_JOBS:
        return _OF_JOBS[key]
    for pattern, new in _PATTERNS:
        match = pattern.fullmatch(key)
        if match:
            return f"{match['before']}{new}{match['below']}"
    return key


def current_field(name: str) -> str:
    """Returns the current name of a field of `Architecture`."""
    return _FIELDS.get(name, name)


def current(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings of an older `config.json`, by dotted key, under their current names."""
    found = {}
    for key, value in flat.items():
        new = current_key(key)
        of_key = next((of for name, of in _VALUES.items() if new.endswith(name)), {})
        found[new] = of_key.get(value, value) if isinstance(value, str) else value
    return found


def current_metric(name: str) -> str:
    """Returns the current name of a metric of an older `metrics.jsonl`."""
    group, *rest = name.split("/")
    if group == "train" and rest[-1:] == ["waiting"]:
        rest[-1] = "data_wait_fraction"
    elif group == "eval" and "held_out" in rest:
        rest[rest.index("held_out")] = "val"
    return "/".join([group, *rest])
