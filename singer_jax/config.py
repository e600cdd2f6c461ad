"""Converts a job's settings into an ml_collections `ConfigDict`, and back.

A file in configs/ starts from one of these configurations, which hold every key with its default
(docs/configuration.md lists them), and sets the keys that its run needs.

  python -m singer_jax.config > docs/configuration.md
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import typing
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from singer_jax.errors import unknown
from singer_jax.jobs import JOBS
from singer_jax.methods import METHODS
from singer_jax.models.architecture import FIELDS
from singer_jax.settings import settings as settings_lib
from singer_jax.settings.ranges import Allowed, Each, Either, Range
from singer_jax.settings.settings import ABSENT, Setting, Settings

PROTOCOLS = ("recommended", "paper")

# Settings of the official code, except where it is plainly broken (docs/differences.md).
_PAPER: dict[str, dict[str, Any]] = {
    "distill": {
        "precision": "float32",
        "method.layer_mapping": "official",
        "method.match.norm_clip_quantile": 1.0,
        "method.nullspace.mode": "init",
        "method.nullspace.threshold_type": "absolute",
        "method.nullspace.threshold": 0.05,
        "method.nullspace.direction_order": "official",
        "method.loss_scale": "absolute",
        "method.loss_weights.ce": 0.0,
        "method.train_generator": False,
        "data.normalisation": "imagenet",
        "data.decode": "exact",
    },
    "evaluate": {
        "data.normalisation": "imagenet",
        "probe.depth_zero_as_bin": True,
        "probe.depth_drop_saturated": True,
    },
    "nullspace": {"precision": "float32", "data.normalisation": "imagenet"},
}
_PAPER["quickstart"] = {
    f"{run}.{key}": value
    for run in ("base", "teacher", "distilled")
    for key, value in _PAPER["distill"].items()
}


def default(protocol: str = "recommended") -> ConfigDict:
    """Returns the configuration of the job `distill`.

    Args:
      protocol: `recommended`, or `paper` for the settings of the official code, except where it is
        plainly broken (docs/differences.md).

    Raises:
      InputError: the protocol is unknown.
    """
    return _of_job("distill", protocol)


def evaluation(protocol: str = "recommended") -> ConfigDict:
    """Returns the configuration of the job `evaluate`; raises as `default`."""
    return _of_job("evaluate", protocol)


def probe(protocol: str = "recommended") -> ConfigDict:
    """Returns the configuration of a probe; raises as `default`."""
    return evaluation(protocol).probe


def export() -> ConfigDict:
    """Returns the configuration of the job `export`."""
    return _of_job("export")


def report() -> ConfigDict:
    """Returns the configuration of the job `report`."""
    return _of_job("report")


def compare() -> ConfigDict:
    """Returns the configuration of the job `compare`."""
    return _of_job("compare")


def prepare() -> ConfigDict:
    """Returns the configuration of the job `prepare`."""
    return _of_job("prepare")


def check_data() -> ConfigDict:
    """Returns the configuration of the job `check_data`."""
    return _of_job("check_data")


def check_run() -> ConfigDict:
    """Returns the configuration of the job `check_run`."""
    return _of_job("check_run")


def replay() -> ConfigDict:
    """Returns the configuration of the job `replay`."""
    return _of_job("replay")


def models() -> ConfigDict:
    """Returns the configuration of the job `models`."""
    return _of_job("models")


def null_spaces(protocol: str = "recommended") -> ConfigDict:
    """Returns the configuration of the job `nullspace`; raises as `default`."""
    return _of_job("nullspace", protocol)


def plan() -> ConfigDict:
    """Returns the configuration of the job `plan`."""
    return _of_job("plan")


def quickstart(protocol: str = "recommended") -> ConfigDict:
    """Returns the configuration of the job `quickstart`; raises as `default`."""
    return _of_job("quickstart", protocol)


def study() -> ConfigDict:
    """Returns the configuration of the job `study`."""
    return _of_job("study")


def settings_of(config: Any) -> Settings:
    """Checks a configuration and returns its settings.

    Raises:
      InputError: a key is unknown, missing or has an invalid value. The message states the first
        such key, its value and the allowed values.
    """
    settings = defaults(str(config.get("job")))
    flat = settings_lib.flatten(config, empty=True)  # a section may hold nothing but students
    settings_lib.check(_keys(settings.job), flat)
    return settings_lib.from_flat(settings, flat)


def defaults(job: str) -> Settings:
    """Returns the settings of a job with their defaults.

    Raises:
      InputError: the job is unknown.
    """
    if job not in JOBS:
        raise unknown("job", job, JOBS)
    function = getattr(importlib.import_module(f"singer_jax.jobs.{job}"), job)
    return typing.get_type_hints(function)["settings"]()


def _keys(job: str) -> Mapping[str, Setting]:
    """Returns every key of a job with its default; a method that is added has its keys, too."""
    return _keys_with(job, tuple(METHODS))


@functools.cache
def _keys_with(job: str, methods: tuple[str, ...]) -> Mapping[str, Setting]:
    return settings_lib.leaves(defaults(job))


def _of_job(job: str, protocol: str = "recommended") -> ConfigDict:
    if protocol not in PROTOCOLS:
        raise unknown("protocol", protocol, PROTOCOLS)
    settings = defaults(job)
    config = ConfigDict(settings_lib.to_dict(settings))
    for key, known in _keys(job).items():
        if known.default is None:
            section, _, name = key.rpartition(".")
            within = config
            for part in filter(None, section.split(".")):
                within = within[part]
            within[name] = placeholder(_type(known.allowed))
    if protocol == "paper":
        config.update_from_flattened_dict(_PAPER.get(job, {}))
    return config


def _type(allowed: Allowed) -> type:
    """Returns the type of a key's values other than None."""
    match allowed:
        case Either(kinds):
            return _type(kinds[0])
        case Range(whole=whole):
            return int if whole else float
        case Each():
            return tuple
    return str


def documentation() -> str:
    """Returns the text of docs/configuration.md."""
    lines = [
        "# Configuration",
        "",
        "This page lists every key of every command. Set a key with `--config.key=value`, or in a",
        "file like those in `configs/`. If the protocol `:paper` has another default, it follows",
        "the recommended one. The runs of `quickstart` (`base`, `teacher` and `distilled`) and of",
        "`study` (`base`, `tuned` and `distilled`) are sections with the keys of `distill`. One of",
        "several students,",
        "`students.NAME`, has the keys of `student` (`students.NAME.model`), and `seed`, `method`",
        "and `optimizer`. Keys that it does not set have the run's values.",
        "",
        "This page is generated: `python -m singer_jax.config > docs/configuration.md`.",
    ]
    for job in JOBS:
        if job == "quickstart":
            continue
        known = _keys(job)
        if job == "study":
            runs = ("base.", "tuned.", "distilled.")
            known = {key: one for key, one in known.items() if not key.startswith(runs)}
        shown = {key: setting for key, setting in known.items() if setting.default is not ABSENT}
        lines += ["", f"## {job}", "", *_table(shown, _PAPER.get(job, {}))]
    lines += ["", "## teacher.overrides, student.overrides", ""]
    lines += ["Fields that are not given keep the values of the timm model.", ""]
    fields = {key: dataclasses.replace(field, default=ABSENT) for key, field in FIELDS.items()}
    return "\n".join([*lines, *_table(fields, {})]) + "\n"


def _table(known: Mapping[str, Setting], paper: Mapping[str, Any]) -> list[str]:
    rows = ["| key | default | description | allowed values |", "|---|---|---|---|"]
    for key, setting in known.items():
        default = "" if setting.default is ABSENT else f"`{setting.default!r}`"
        if key in paper:
            default += f", paper `{paper[key]!r}`"
        meaning = setting.meaning.removesuffix(".") + "."
        if setting.unit:
            meaning += f" Unit: {setting.unit}."
        rows.append(f"| `{key}` | {default} | {meaning} | {setting.allowed} |")
    return rows


if __name__ == "__main__":
    print(documentation(), end="")
