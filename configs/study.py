"""Compares methods and artifact removal on teachers with synthetic artifacts.

  python -m singer_jax.main --config=configs/study.py --workdir=runs/study
  python -m benchmarks.study runs/study/results.jsonl

  python -m singer_jax.main --config=configs/study.py:real --workdir=runs/study_real \
      --config.given.weights=vit_small_patch14_dinov2.safetensors

All models are trained from scratch on generated scenes, except the teacher of `:real`, which is
used without modification. If it does not have 12 blocks, FitNet needs the `method.layers` of
SiNGER. `:small`, the default, takes about an hour of CPU time on each of two cores; `:full` is for
an accelerator. The same command resumes a stopped study. The results are in benchmarks/STUDY.md.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from ml_collections import ConfigDict

from singer_jax.config import default, study
from singer_jax.errors import unknown
from singer_jax.methods.base import teacher_layers
from singer_jax.methods.singer import DEPTHS
from singer_jax.models.zoo import lookup


class Size(NamedTuple):
    """Size of a study.

    Attributes:
      image_size: side of the images, in pixels.
      patch_size: side of the patches, in pixels.
      teacher: width, depth and number of heads of the teacher.
      student: width, depth and number of heads of the students.
      train: number of training scenes.
      test: number of test scenes.
      base_epochs: number of epochs of the base teacher.
      tuned_epochs: number of epochs of the fine-tuned teachers.
      steps: number of steps of the students.
      teacher_batch: batch size of the teachers.
      student_batch: batch size of the students.
      rank: rank of SiNGER's refiner.
      quantile: outlier quantile of SiNGER, at most 1 - (outliers + 1) / patches.
      patches: number of patches with the synthetic outlier.
      seeds: number of seeds of the main students.
      variant_seeds: number of seeds of the other students.
      teachers: names as the job takes them; the first one with outliers also trains the others.
    """

    image_size: int
    patch_size: int
    teacher: tuple[int, int, int]
    student: tuple[int, int, int]
    train: int
    test: int
    base_epochs: int
    tuned_epochs: int
    steps: int
    teacher_batch: int
    student_batch: int
    rank: int
    quantile: float
    patches: int
    seeds: int
    variant_seeds: int
    teachers: tuple[str, ...]


SIZES = {
    "small": Size(
        image_size=48,
        patch_size=8,
        teacher=(64, 4, 2),
        student=(32, 4, 2),
        train=7000,
        test=2000,
        base_epochs=40,
        tuned_epochs=6,
        steps=600,
        teacher_batch=64,
        student_batch=32,
        rank=16,
        quantile=0.9,
        patches=2,
        seeds=5,
        variant_seeds=2,
        teachers=(
            "random-random-20",
            "none",
            "null-random-20",
            "null-background-5",
            "visible-random-20",
        ),
    ),
    "full": Size(
        image_size=96,
        patch_size=8,
        teacher=(384, 12, 6),
        student=(192, 12, 3),
        train=50000,
        test=5000,
        base_epochs=60,
        tuned_epochs=10,
        steps=10000,
        teacher_batch=256,
        student_batch=256,
        rank=64,
        quantile=0.96,
        patches=4,
        seeds=5,
        variant_seeds=5,
        teachers=(
            "random-random-20",
            "none",
            *(
                f"{direction}-{place}-{ratio}"
                for ratio in (20, 5, 1.5)
                for direction in ("random", "null", "visible")
                for place in ("random", "background")
                if (direction, place, ratio) != ("random", "random", 20)
            ),
        ),
    ),
}

# With this image size, the given teacher has as many patches as the small ones.
SIZES["real"] = SIZES["small"]._replace(
    image_size=84,
    patch_size=14,
    student=(96, 4, 3),
    teachers=("given",),
)

# Settings that differ from each method's defaults; FitNet also gets the blocks of SiNGER.
MAIN: dict[str, dict[str, Any]] = {
    "fitnet": {"name": "fitnet"},
    "fitnet_final_norm": {"name": "fitnet", "match": {"target_space": "final_norm"}},
    "fitnet_l2": {"name": "fitnet", "match": {"target_space": "l2"}},
    "fitnet_clip": {"name": "fitnet", "match": {"norm_clip_quantile": 0.9}},
    "relational": {"name": "relational", "match": {"target_space": "final_norm"}},
    "pooled": {"name": "pooled"},
    "singer": {"name": "singer"},
    "singer_calibrated": {"name": "singer", "nullspace": {"weight_matrix": "calibrated"}},
    "singer_final_norm": {"name": "singer", "match": {"target_space": "final_norm"}},
}
_PUBLISHED = {
    "mode": "init",
    "threshold_type": "absolute",
    "threshold": 0.05,
    "direction_order": "official",
}
VARIANTS: dict[str, dict[str, Any]] = {
    "fitnet_own_blocks": {"name": "fitnet"},
    "fitnet_standardised": {"name": "fitnet", "match": {"target_space": "standardised"}},
    "fitnet_cosine": {
        "name": "fitnet",
        "match": {"target_space": "final_norm", "loss": "cosine_smooth_l1"},
    },
    "vitkd": {"name": "vitkd"},
    "vitkd_frozen": {"name": "vitkd", "train_generator": False},
    "vitkd_official": {"name": "vitkd_official"},
    "singer_soft": {"name": "singer", "nullspace": {"mode": "soft"}},
    "singer_init": {"name": "singer", "nullspace": {"mode": "init"}},
    "singer_random": {"name": "singer", "nullspace": {"mode": "random"}},
    "singer_block": {"name": "singer", "nullspace": {"weight_matrix": "block"}},
    "singer_mlp_norm": {"name": "singer", "nullspace": {"weight_matrix": "mlp_norm"}},
    "singer_quarter": {"name": "singer", "nullspace": {"threshold": 0.25}},
    "singer_three_quarters": {"name": "singer", "nullspace": {"threshold": 0.75}},
    "singer_start": {"name": "singer", "nullspace": {"init": "official"}},
    "singer_half_rank": {"name": "singer"},
    "singer_double_rank": {"name": "singer"},
    "singer_without_outlier": {"name": "singer", "loss_weights": {"outlier": 0.0}},
    "singer_without_info": {"name": "singer", "loss_weights": {"info": 0.0}},
    "singer_matching": {"name": "singer", "layer_mapping": "official"},
    "singer_published": {"name": "singer", "layer_mapping": "official", "nullspace": _PUBLISHED},
}


def _run(size: Size, sizes: tuple[int, int, int]) -> ConfigDict:
    config = default()
    config.student.model = "vit_tiny_patch16_224"
    width, depth, heads = sizes
    config.student.overrides = {
        "img_size": size.image_size,
        "patch_size": size.patch_size,
        "embed_dim": width,
        "depth": depth,
        "num_heads": heads,
        "mlp_ratio": 2.0,
    }
    config.precision = "float32"
    config.data.source = "scenes"
    config.data.scenes.size = size.image_size
    config.data.scenes.train, config.data.scenes.test = size.train, size.test
    config.data.crop_area = (0.6, 1.0)
    config.data.crop_ratio = (0.8, 1.25)
    config.data.workers = 0
    config.batch_size = size.teacher_batch
    config.schedule.warmup_epochs = 1
    config.optimizer.weight_decay = 0.05
    config.checkpoint.every_steps = 2000
    config.evals.every_steps = 0
    return config


def get_config(size: str = "small") -> ConfigDict:
    """Returns the configuration of a size: `small`, `full` or `real`.

    Raises:
      InputError: the size is unknown.
    """
    if size not in SIZES:
        raise unknown("size of the study", size, SIZES)
    chosen, config = SIZES[size], study()
    for name in ("base", "tuned"):
        config[name] = _run(chosen, chosen.teacher)
        config[name].method.name = "supervised"
        config[name].optimizer.learning_rate = 1e-3
    config.base.epochs, config.tuned.epochs = chosen.base_epochs, chosen.tuned_epochs
    config.distilled = _run(chosen, chosen.student)
    config.distilled.steps, config.distilled.batch_size = chosen.steps, chosen.student_batch
    config.distilled.schedule.warmup_epochs = 0
    config.distilled.optimizer.learning_rate = 2e-3
    config.distilled.method.match.norm_clip_quantile = 1.0
    config.distilled.method.rank = chosen.rank
    config.distilled.method.outlier_quantile = chosen.quantile
    for name, method in (MAIN | VARIANTS).items():
        config.distilled.students[name] = {"method": method}
    students = config.distilled.students
    students.singer_half_rank.method["rank"] = chosen.rank // 2
    students.singer_double_rank.method["rank"] = chosen.rank * 2
    config.teachers = chosen.teachers
    teacher = config.base.student
    if size == "real":
        teacher = config.given
        teacher.model, teacher.overrides = (
            "vit_small_patch14_dinov2",
            {"img_size": chosen.image_size},
        )
    arch = lookup(teacher.model, teacher.overrides.to_dict()).arch
    for name in MAIN | VARIANTS:
        # FitNet's default has one more block, which precedes the synthetic outlier.
        if students[name].method["name"] == "fitnet" and name != "fitnet_own_blocks":
            students[name].method["layers"] = teacher_layers(None, False, DEPTHS, arch)
    config.patches = chosen.patches
    config.seeds, config.variant_seeds = chosen.seeds, chosen.variant_seeds
    config.main = tuple(MAIN)
    config.variants_on = chosen.teachers[:1]
    config.cleaners, config.cleaned = (
        ("synthetic_outlier", "shift_average", "registers"),
        ("fitnet",),
    )
    if size == "real":  # this teacher has neither a synthetic outlier nor outliers
        config.cleaners = ("shift_average",)
    config.distilled.teacher.registers.images, config.distilled.teacher.registers.neurons = 300, 4
    return config
