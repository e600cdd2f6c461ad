"""What each key of a configuration may be: one table, for every job.

Checked as a whole before any work (`singer_jax.config.check`). What depends on other values, such
as a rank on the teacher's width, is checked where both are known.
"""

from __future__ import annotations

from collections.abc import Mapping

from singer_jax.ranges import Allowed, Each, Either, Flag, OneOf, Range, Text, optional

METHODS = ("singer", "fitnet", "vitkd", "vitkd_official", "logit_kd", "supervised")
TASKS = (
    *("imagenet", "imagenet_v2", "imagenet_r", "ade20k", "nyud"),
    *("inat19", "aircraft", "pet", "food", "flowers"),
)

_COUNT = Range(1, 2**31, high_open=True, whole=True)
_FROM_ZERO = Range(0, 2**31, high_open=True, whole=True)
_SEED = Range(0, 2**32, high_open=True, whole=True)
_POSITIVE = Range(0, low_open=True)
_NOT_NEGATIVE = Range(0)
_SHARE = Range(0, 1)
_BETWEEN = Range(0, 1, low_open=True, high_open=True)
_DECAY = Range(0, 1, high_open=True)
_TEXT = Text()
_NAME = Text(".*\\S.*", "a name or folder")
_SOURCE = OneOf(("mlp", "mlp_norm", "block"))
_NUMBER = r"(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?"
_THRESHOLD = Text(
    f"(quantile|absolute|relative|rank)={_NUMBER}",
    "rule=number with the rule quantile, absolute, relative or rank",
)

# Fields of `models.architecture.Architecture`; the bounds are far above any published model.
ARCHITECTURE: Mapping[str, Allowed] = {
    "img_size": Either(
        (Range(1, 2**14, whole=True), Each(Range(1, 2**14, whole=True), length=2)),
    ),
    "patch_size": Range(1, 2**12, whole=True),
    "embed_dim": Range(1, 2**16, whole=True),
    "depth": Range(1, 1000, whole=True),
    "num_heads": Range(1, 2**12, whole=True),
    "mlp_ratio": Range(0, 64, low_open=True),
    "num_classes": Range(0, 2**24, whole=True),
    "class_token": Flag(),
    "reg_tokens": Range(0, 2**10, whole=True),
    "no_embed_class": Flag(),
    "pre_norm": Flag(),
    "init_values": optional(_NOT_NEGATIVE),
    "norm_eps": Range(0, 1, low_open=True),
    "act_layer": OneOf(("gelu", "quick_gelu")),
    "mlp_layer": OneOf(("mlp", "swiglu_packed", "swiglu")),
    "qkv_bias": Flag(),
    "global_pool": OneOf(("token", "avg", "map")),
    "eva": Flag(),
}

# What is read of timm's config.json beside weights; `model_args` are fields of `ARCHITECTURE`.
HUB_CONFIG: Mapping[str, Allowed] = {
    "architecture": Text("\\S+", "the name of a model"),
    "num_classes": ARCHITECTURE["num_classes"],
    "pretrained_cfg.input_size": Each(Range(1, 2**14, whole=True), length=3),
    "pretrained_cfg.mean": Each(Range(), length=3),
    "pretrained_cfg.std": Each(_POSITIVE, length=3),
}

CONFIGURATION: Mapping[str, Allowed] = {
    "job": _NAME,
    "seed": _SEED,
    "steps": optional(_COUNT),
    "epochs": _COUNT,
    "batch_size": _COUNT,
    "accumulation": _COUNT,
    "precision": OneOf(("bfloat16", "float32")),
    "teacher.model": _TEXT,
    "teacher.weights": _TEXT,
    "student.model": _TEXT,
    "student.weights": _TEXT,
    "student.remat": Flag(),
    "method.name": OneOf(METHODS),
    **{f"method.terms.{name}": _NOT_NEGATIVE for name in METHODS},
    "method.layers": optional(Each(_FROM_ZERO)),
    "method.append_last": Flag(),
    "method.matching": OneOf(("last_to_last", "official")),
    "method.resample_grids": Flag(),
    "method.rank": _COUNT,
    "method.quantile": _BETWEEN,
    "method.weights.kd": optional(_NOT_NEGATIVE),
    "method.weights.outlier": _NOT_NEGATIVE,
    "method.weights.info": _NOT_NEGATIVE,
    "method.weights.ce": optional(_NOT_NEGATIVE),
    "method.weights.mimic": optional(_NOT_NEGATIVE),
    "method.weights.generation": optional(_NOT_NEGATIVE),
    "method.nullspace.use": OneOf(("project", "soft", "init", "random")),
    "method.nullspace.source": _SOURCE,
    "method.nullspace.rule": OneOf(("quantile", "absolute", "relative", "rank")),
    "method.nullspace.threshold": _NOT_NEGATIVE,
    "method.nullspace.start": optional(OneOf(("identity", "official"))),
    "method.nullspace.order": OneOf(("most_null", "official")),
    "method.mimic_layers": Each(_FROM_ZERO),
    "method.mask_ratio": _BETWEEN,
    "method.train_generator": Flag(),
    "method.temperature": _POSITIVE,
    "data.source": _NAME,
    "data.path": _TEXT,
    "data.workers": optional(Range(0, 1024, whole=True)),
    "data.normalisation": OneOf(("model", "imagenet")),
    "data.image_size": optional(Range(1, 2**14, whole=True)),
    "data.crop_area": Each(Range(0, 1, low_open=True), length=2, ascending=True),
    "data.crop_ratio": Each(Range(0, 100, low_open=True), length=2, ascending=True),
    "data.flip": _SHARE,
    "data.strict": Flag(),
    "optimizer.name": OneOf(("adamw", "sgd")),
    "optimizer.learning_rate": _NOT_NEGATIVE,
    "optimizer.b1": _DECAY,
    "optimizer.b2": _DECAY,
    "optimizer.eps": _NOT_NEGATIVE,
    "optimizer.weight_decay": _NOT_NEGATIVE,
    "optimizer.momentum": _DECAY,
    "optimizer.clip_norm": _NOT_NEGATIVE,
    "schedule.name": OneOf(("cosine", "multistep")),
    "schedule.warmup_epochs": _FROM_ZERO,
    "schedule.final_ratio": _SHARE,
    "schedule.milestones": Each(_COUNT),
    "schedule.gamma": _POSITIVE,
    "mesh.data": optional(_COUNT),
    "mesh.fsdp": _COUNT,
    "checkpoint.every": _COUNT,
    "checkpoint.keep": _COUNT,
    "evals.every": _FROM_ZERO,
    "evals.images": _COUNT,
    "log.every": _COUNT,
    "log.wandb": Flag(),
    # Of other jobs.
    "run": _TEXT,
    "weights": _TEXT,
    "model": _TEXT,
    "step": optional(_COUNT),
    "stablehlo": Flag(),
    "tasks": Each(OneOf(TASKS)),
    "baselines": Each(_NAME),
    "runs": Each(_NAME),
    "images": _COUNT,
    "layers": optional(Each(_FROM_ZERO)),
    "append_last": Flag(),
    "rank": _COUNT,
    "quantile": _BETWEEN,
    "sources": Each(_SOURCE, least=1),
    "thresholds": Each(_THRESHOLD, least=1),
    "probe.epochs": optional(_COUNT),
    "probe.batch_size": _COUNT,
    "probe.learning_rates": Each(_POSITIVE, least=1),
    "probe.held_out": _BETWEEN,
    "probe.weight_decay": _NOT_NEGATIVE,
    "probe.token": optional(OneOf(("cls", "avg", "pooled"))),
    "probe.protocol": OneOf(("paper", "fast")),
    "probe.views": _FROM_ZERO,
    "probe.depth_zero_as_bin": Flag(),
    "probe.knn_k": _COUNT,
    "probe.knn_temperature": _POSITIVE,
}
