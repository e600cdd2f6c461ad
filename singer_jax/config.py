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
from singer_jax.settings import reference
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

# Sections of a job that hold the settings of a whole distillation.
_RUNS = {
    "quickstart": ("base", "teacher", "distilled"),
    "study": ("base", "tuned", "distilled"),
}

# Keys in one table of docs/configuration.md; longer lists have a table for each section.
_LONG = 20

# Arguments that set the keys of tuples in docs/configuration.md, by the last part of the key.
EXAMPLES = {
    "layers": '--config.method.layers="(17, 23)"',
    "mimic_layers": '--config.method.mimic_layers="(0, 2)"',
    "crop_area": '--config.data.crop_area="(0.35, 1.0)"',
    "crop_ratio": '--config.data.crop_ratio="(0.8, 1.25)"',
    "milestones": '--config.schedule.milestones="(30, 60, 90)"',
    "tasks": "--config.tasks=\"('ade20k', 'nyud')\"",
    "learning_rates": '--config.probe.learning_rates="(0.1, 0.5, 2.0)"',
    "baselines": "--config.baselines=\"('runs/fitnet',)\"",
    "runs": "--config.runs=\"('runs/seed0', 'runs/seed1')\"",
    "formats": "--config.formats=\"('timm', 'onnx')\"",
    "weight_matrices": "--config.weight_matrices=\"('mlp', 'calibrated')\"",
    "thresholds": "--config.thresholds=\"('quantile=0.5', 'rank=64')\"",
    "teachers": "--config.teachers=\"('none', 'null-random-20')\"",
    "main": "--config.main=\"('fitnet', 'singer')\"",
    "variants_on": "--config.variants_on=\"('random-random-20',)\"",
    "cleaners": "--config.cleaners=\"('registers',)\"",
    "cleaned": "--config.cleaned=\"('fitnet',)\"",
}
OF_JOB = {"nullspace": {"layers": '--config.layers="(17, 23)"'}}
OF_OVERRIDES = {
    "img_size": "{'img_size': (224, 448)}",
    "ref_feat_shape": "{'ref_feat_shape': (16, 16)}",
    "num_kv_heads": "{'num_kv_heads': (6, 6, 3)}",
}

_INTRODUCTION = """\
# Configuration

This page lists every key of every command. There are two ways to set a key:

- on the command line, `--config.batch_size=256`. A value that is not a number, a word or a path is
  written in Python's syntax inside quotes: `--config.method.layers="(17, 23)"`,
  `--config.teacher.overrides="{'img_size': 518}"`, `--config.data.image_size=None`;
- in a file like those in `configs/`, `config.batch_size = 256`.

All settings are checked before any data is loaded. An unknown key or an invalid value ends the
command with exit status 2 and one line that names the key and the allowed values.

How to read the tables:

- `float in (0, 1]` excludes 0 and includes 1. An `int` without an upper bound is below 2**31.
- The default is that of the protocol `recommended`. If the protocol `paper`, which is chosen with
  `--config=configs/singer_vitl_vitt.py:paper`, has another default, it follows.
- `job`, the name of the command, is set by the file and is left out.
- The jobs `quickstart` and `study` contain whole distillations: `base`, `teacher` and `distilled`
  of `quickstart`, and `base`, `tuned` and `distilled` of `study`, have the keys of `distill`.

Several students of one run are dicts. The keys of a student are those of `student`, and `seed`,
`method` and `optimizer`; a key that a student does not set has the value of the run
([students.md](students.md)):

    config.students.fitnet = {"method": {"name": "fitnet"}}
    config.students.small = {"model": "vit_small_patch16_224", "optimizer": {"learning_rate": 5e-4}}

This page is generated: `python -m singer_jax.config > docs/configuration.md`."""

_OVERRIDES = """\
## overrides

`teacher.overrides` and `student.overrides` are dicts that change fields of the timm model's
architecture, for example `--config.student.overrides="{'depth': 6, 'img_size': 160}"`. Fields that
are not given keep the values of the timm model.
"""


def default(protocol: str = "recommended", job: str = "distill") -> ConfigDict:
    """Returns the configuration of a job with the default of every key.

    Args:
      protocol: `recommended`, or `paper` for the settings of the official code, except where it is
        plainly broken (docs/differences.md).
      job: name of the command.

    Raises:
      InputError: the protocol or the job is unknown.
    """
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


# `default` of each other job.
check_data = functools.partial(default, job="check_data")
check_run = functools.partial(default, job="check_run")
compare = functools.partial(default, job="compare")
evaluation = functools.partial(default, job="evaluate")
export = functools.partial(default, job="export")
models = functools.partial(default, job="models")
null_spaces = functools.partial(default, job="nullspace")
plan = functools.partial(default, job="plan")
prepare = functools.partial(default, job="prepare")
quickstart = functools.partial(default, job="quickstart")
replay = functools.partial(default, job="replay")
report = functools.partial(default, job="report")
study = functools.partial(default, job="study")


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
    lines = [_INTRODUCTION]
    for job in JOBS:
        runs = tuple(f"{run}." for run in _RUNS.get(job, ()))
        known = {key: one for key, one in _keys(job).items() if not key.startswith(runs)}
        shown = {
            key: setting
            for key, setting in known.items()
            if key != "job" and setting.default is not ABSENT
        }
        module = importlib.import_module(f"singer_jax.jobs.{job}")
        purpose = " ".join(module.__doc__.partition("\n\n")[0].split()).partition(": ")[2]
        lines += ["", f"## {job}", "", f"{purpose[:1].upper()}{purpose[1:]}"]
        for title, part in _parts(job, shown):
            lines += ["", f"### {title}"] if title else []
            lines += [
                "",
                *reference.table(part, _PAPER.get(job, {}), EXAMPLES | OF_JOB.get(job, {})),
            ]
    lines += ["", _OVERRIDES]
    fields = {key: dataclasses.replace(field, default=ABSENT) for key, field in FIELDS.items()}
    return "\n".join([*lines, *reference.table(fields, {}, OF_OVERRIDES)]) + "\n"


def _parts(job: str, keys: Mapping[str, Setting]) -> list[tuple[str, dict[str, Setting]]]:
    """Returns the keys of a job in tables with a title: one for each section of a long list."""
    if len(keys) <= _LONG:
        return [("", dict(keys))]
    parts: dict[str, dict[str, Setting]] = {}
    for key, setting in keys.items():
        section = key.partition(".")[0] if "." in key else "general"
        parts.setdefault(section, {})[key] = setting
    return [(f"{job}: {section}", part) for section, part in parts.items()]


if __name__ == "__main__":
    print(documentation(), end="")
