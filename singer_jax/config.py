"""The configuration: every key with its default, the two protocols, and what may change on resume.

A file in configs/ starts from `default` and sets what its run needs. `None` means that the default
depends on other keys; the comment says on what.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from singer_jax import ranges
from singer_jax.allowed import ARCHITECTURE, CONFIGURATION, METHODS
from singer_jax.errors import InputError, unknown

PROTOCOLS = ("recommended", "paper")

# A run may be continued with other values of these; any other difference is another run.
_RESUMABLE = (
    "steps",
    "epochs",
    "data.path",
    "data.workers",
    "data.strict",
    "mesh.",
    "checkpoint.",
    "log.",
    "evals.",
)


def default(protocol: str = "recommended") -> ConfigDict:
    """All keys of the job `distill`.

    Args:
      protocol: `recommended`, or `paper`: what the official code does, except where it is plainly
        broken (docs/differences.md).

    Raises:
      InputError: another protocol.
    """
    _check_protocol(protocol)
    config = ConfigDict()
    config.job = "distill"  # see singer_jax/main.py
    config.seed = 0
    config.steps = placeholder(int)  # None: epochs x ceil(examples / batch_size)
    config.epochs = 100
    config.batch_size = 512  # global
    config.accumulation = 1  # micro-batches a step
    config.precision = "bfloat16"  # of activations, and of the teacher's parameters; or float32

    config.teacher = _model()
    config.student = _model()
    config.student.remat = False  # recompute blocks in the backward pass: less memory, more time

    config.method = ConfigDict()
    config.method.name = "singer"  # see singer_jax/methods/__init__.py
    config.method.terms = ConfigDict()  # weights of methods that are summed instead of `name`
    for name in METHODS:
        config.method.terms[name] = 0.0
    config.method.layers = placeholder(tuple)  # teacher blocks from 0; None: the published depths
    config.method.append_last = True  # also distil the teacher's last block
    config.method.matching = "last_to_last"  # or official
    config.method.resample_grids = False  # compare models of other grids on the teacher's
    config.method.rank = 64  # of the refiner
    config.method.quantile = 0.97  # of an image's patch norms; tokens above it are outliers
    config.method.weights = ConfigDict()
    config.method.weights.kd = placeholder(float)  # None: fitnet 10, others 1
    config.method.weights.outlier = 0.01
    config.method.weights.info = 1.0
    config.method.weights.ce = placeholder(float)  # cross-entropy of fitnet; None: no such term
    config.method.weights.mimic = placeholder(float)  # None: vitkd 1, vitkd_official 3e-5
    config.method.weights.generation = placeholder(float)  # None: vitkd 1, vitkd_official 3e-6
    config.method.nullspace = ConfigDict()
    config.method.nullspace.use = "project"  # project, soft, init, random
    config.method.nullspace.source = "mlp"  # mlp, mlp_norm, block
    # How threshold is read: quantile, absolute, relative (to the largest), rank.
    config.method.nullspace.rule = "quantile"
    config.method.nullspace.threshold = 0.5
    config.method.nullspace.start = placeholder(str)  # identity, official; None: by use
    config.method.nullspace.order = "most_null"  # of init: most_null, official

    config.method.mimic_layers = (0, 2)  # of vitkd
    config.method.mask_ratio = 0.5  # of vitkd
    config.method.train_generator = True  # of vitkd; the official code leaves it at its start
    config.method.temperature = 4.0  # of logit_kd

    config.data = _data(protocol)
    config.data.image_size = placeholder(int)  # of both models; None: each one's own
    config.data.crop_area = (0.08, 1.0)
    config.data.crop_ratio = (3 / 4, 4 / 3)
    config.data.flip = 0.5
    config.data.strict = False  # an unreadable image stops the run

    config.optimizer = ConfigDict()
    config.optimizer.name = "adamw"  # or sgd
    config.optimizer.learning_rate = 1e-3
    config.optimizer.b1 = 0.9
    config.optimizer.b2 = 0.999
    config.optimizer.eps = 1e-8
    config.optimizer.weight_decay = 1e-4  # of every parameter
    config.optimizer.momentum = 0.9  # of sgd
    config.optimizer.clip_norm = 0.0  # 0: no clipping

    config.schedule = ConfigDict()
    config.schedule.name = "cosine"  # or multistep
    config.schedule.warmup_epochs = 5
    config.schedule.final_ratio = 1e-4
    config.schedule.milestones = (30, 60, 90)  # epochs, of multistep
    config.schedule.gamma = 0.1

    config.mesh = _mesh()

    config.checkpoint = ConfigDict()
    config.checkpoint.every = 1000  # steps
    config.checkpoint.keep = 2

    config.evals = ConfigDict()
    config.evals.every = 0  # steps; kNN and held-out losses on the test split; 0: never
    config.evals.images = 1000  # of the test split, and of the training split for kNN

    config.log = ConfigDict()
    config.log.every = 50  # steps
    config.log.wandb = False

    if protocol == "paper":
        config.precision = "float32"
        config.method.matching = "official"
        config.method.nullspace.use = "init"
        config.method.nullspace.rule = "absolute"
        config.method.nullspace.threshold = 0.05
        config.method.nullspace.order = "official"
        config.method.weights.ce = 0.0
        config.method.train_generator = False
    return config


def evaluation(protocol: str = "recommended") -> ConfigDict:
    """All keys of the job `evaluate`; raises as `default`."""
    _check_protocol(protocol)
    config = ConfigDict()
    config.job = "evaluate"
    config.seed = 0
    config.run = ""  # a work directory: its student; or else
    config.weights = ""  # a hub name or file, and
    config.model = ""  # its timm name, where neither the hub name nor a config.json says it
    config.precision = "float32"  # of activations; or bfloat16
    config.data = _data(protocol)
    config.data.source = "table1"  # or any one labelled source: digits, folder, a TFDS name
    config.tasks = ()  # of table1; empty: all whose data are below data.path
    config.mesh = _mesh()
    config.probe = probe(protocol)
    return config


def probe(protocol: str = "recommended") -> ConfigDict:
    """The keys of a probe."""
    config = ConfigDict()
    config.epochs = placeholder(int)  # None: the published ones, 150 (ADE20K and NYUd 200)
    config.batch_size = 64
    config.learning_rates = (0.5,)  # several: the best on held-out training images is taken
    config.held_out = 0.1  # share of the training images
    config.weight_decay = 1e-6
    # cls, avg (mean of the patches), pooled (the model's own); None: cls where there is one.
    config.token = placeholder(str)
    # paper: new crops in every epoch, through the backbone; fast: features are extracted once.
    config.protocol = "paper"
    config.views = 0  # of fast: augmented views beside the centre crop; 0 trains on the latter
    config.depth_zero_as_bin = protocol == "paper"  # pixels without depth train the first bin
    config.knn_k = 20
    config.knn_temperature = 0.07
    return config


def export() -> ConfigDict:
    """All keys of the job `export`."""
    config = ConfigDict()
    config.job = "export"
    config.run = ""  # a work directory: its student; empty: --workdir itself; or else
    config.weights = ""  # a hub name or file, and
    config.model = ""  # its timm name, where neither the hub name nor a config.json says it
    config.step = placeholder(int)  # of the checkpoint; None: the latest
    config.stablehlo = True  # also write features.stablehlo
    return config


def report() -> ConfigDict:
    """All keys of the job `report`."""
    config = ConfigDict()
    config.job = "report"
    config.run = ""  # a work directory; empty: --workdir itself
    config.baselines = ()  # other runs, whose students are shown beside
    config.images = 6  # shown
    return config


def compare() -> ConfigDict:
    """All keys of the job `compare`."""
    config = ConfigDict()
    config.job = "compare"
    config.runs = ()  # work directories with an evaluation/
    return config


def check_data() -> ConfigDict:
    """All keys of the job `check_data`."""
    config = ConfigDict()
    config.job = "check_data"
    config.data = _data("recommended")
    config.data.source = "table1"  # all data sets of Table 1, or one
    config.images = 16  # of each split on the contact sheet
    return config


def null_spaces(protocol: str = "recommended") -> ConfigDict:
    """All keys of the job `nullspace`; raises as `default`."""
    distillation = default(protocol)
    config = ConfigDict()
    config.job = "nullspace"
    config.teacher = distillation.teacher
    config.precision = distillation.precision
    config.layers = placeholder(tuple)  # teacher blocks from 0; None: the published depths
    config.append_last = True
    config.rank = distillation.method.rank
    config.quantile = distillation.method.quantile
    config.images = 64  # of the training split, to measure the outliers on
    config.sources = ("mlp", "mlp_norm", "block")
    config.thresholds = ("absolute=0.05", "quantile=0.25", "quantile=0.5", "relative=0.1")
    config.data = _data(protocol)
    config.data.image_size = placeholder(int)
    config.mesh = _mesh()
    return config


_QUICKSTART_RUNS = ("teacher", "fitnet", "singer")
_DEFAULTS: dict[str, Callable[[], ConfigDict]] = {
    "distill": default,
    "evaluate": evaluation,
    "export": export,
    "report": report,
    "compare": compare,
    "check_data": check_data,
    "nullspace": null_spaces,
    "models": lambda: ConfigDict({"job": "models"}),
    "quickstart": lambda: ConfigDict(
        {"job": "quickstart", "probe": probe()} | {name: default() for name in _QUICKSTART_RUNS}
    ),
}


def allowed_of(job: str) -> dict[str, ranges.Allowed]:
    """What every key of a job may be; the keys of `overrides` are not all given."""
    allowed = {}
    for key in flatten(_DEFAULTS[job]()):
        run, _, rest = key.partition(".")
        own = rest if job == "quickstart" and run in _QUICKSTART_RUNS else key
        allowed[key] = CONFIGURATION[own]
        if own in ("teacher.model", "student.model"):
            overrides = key.removesuffix("model") + "overrides"
            allowed |= {f"{overrides}.{field}": value for field, value in ARCHITECTURE.items()}
    return allowed


def check(config: Any) -> None:
    """Checks every key and value of a configuration whose `job` is known.

    Raises:
      InputError: the first key that is unknown, missing or has a value that it may not have; its
        name, the value and what is allowed.
    """
    allowed, given = allowed_of(config.job), flatten(config)
    for key, value in given.items():
        section, _, field = key.rpartition(".")
        if key not in allowed and section.endswith("overrides"):
            raise unknown(f"architecture field of {section}", field, ARCHITECTURE)
        if key not in allowed:
            raise unknown("configuration key", key, allowed)
        ranges.check(key, value, allowed[key])
    missing = [key for key in allowed if key not in given and ".overrides." not in key]
    if missing:
        raise InputError(
            f"{missing[0]}: missing; start from singer_jax.config, which has all keys of the job "
            f"{config.job}"
        )


def _check_protocol(protocol: str) -> None:
    if protocol not in PROTOCOLS:
        raise unknown("protocol", protocol, PROTOCOLS)


def _data(protocol: str) -> ConfigDict:
    data = ConfigDict()
    data.source = "imagenet2012"  # digits, folder (or its path), a TFDS name
    data.path = ""  # the folder; for TFDS its data directory
    data.workers = placeholder(int)  # decoding processes; None: one a spare core; 0: a thread
    # model: each model's own mean and std; imagenet: ImageNet's for both (official code).
    data.normalisation = "imagenet" if protocol == "paper" else "model"
    return data


def _mesh() -> ConfigDict:
    mesh = ConfigDict()
    mesh.data = placeholder(int)  # None: all devices / fsdp
    mesh.fsdp = 1
    return mesh


def _model() -> ConfigDict:
    model = ConfigDict()
    model.model = ""  # timm name; empty: as the config.json beside the weights says
    model.weights = ""  # hub name, file, or run; empty: random
    model.overrides = ConfigDict()  # of fields of models.architecture.Architecture
    return model


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted keys and their values; lists as tuples, so that a config equals its JSON."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if hasattr(value, "items"):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = tuple(value) if isinstance(value, list) else value
    return flat


def differences(config: Any, other: Any) -> list[str]:
    """Keys whose values make `other` another run than `config`, as `key: value -> value`."""
    ours, theirs = flatten(config), flatten(other)
    return [
        f"{key}: {theirs.get(key)!r} -> {ours.get(key)!r}"
        for key in sorted(ours | theirs)
        if ours.get(key) != theirs.get(key) and not key.startswith(_RESUMABLE)
    ]
