"""Compares methods and artifact removal on teachers with synthetic artifacts.

  python -m singer_jax.main --config=configs/study.py --workdir=runs/study
  python -m benchmarks.study runs/study/results.jsonl

  python -m singer_jax.main --config=configs/study.py:photos --workdir=runs/study_photos \
      --config.given.weights=vit_small_patch14_dinov2.safetensors \
      --config.distilled.data.path=cifar10

All models are trained from scratch, except the teacher of `:photos`, which is used without
modification. If it does not have 12 blocks, FitNet needs the `method.layers` of SiNGER. Sizes:

  digits  scikit-learn's digits, on which students reach nearly the score of their teacher.
          The default.
  scenes  Generated scenes, which also measure segmentation and depth.
  photos  A given ViT-S/14 on a folder of photos with the subfolders train/CLASS and test/CLASS.
  full    Generated scenes with larger models, for an accelerator.

The same command resumes a stopped study. The results and their cost are in docs/study.md.
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
      source: source of the images.
      image_size: side of the images, in pixels.
      patch_size: side of the patches, in pixels.
      teacher: width, depth and number of heads of the teacher.
      student: width, depth and number of heads of the students.
      base_steps: number of steps of the base teacher.
      tuned_steps: number of steps of the fine-tuned teachers.
      steps: number of steps of the students.
      teacher_batch: batch size of the teachers.
      student_batch: batch size of the students.
      rates: learning rates of the teachers and of the students.
      rank: rank of SiNGER's refiner.
      quantile: outlier quantile of SiNGER, at most 1 - (patches + 1) / all patches of an image.
      patches: number of patches with the synthetic outlier.
      teachers: names as the job takes them; the first one also trains the other students.
      train: number of training scenes.
      test: number of test scenes.
      tested: number of test images; None: all.
      seeds: number of seeds of the main students.
      variant_seeds: number of seeds of the other students.
    """

    source: str
    image_size: int
    patch_size: int
    teacher: tuple[int, int, int]
    student: tuple[int, int, int]
    base_steps: int
    tuned_steps: int
    steps: int
    teacher_batch: int
    student_batch: int
    rates: tuple[float, float]
    rank: int
    quantile: float
    patches: int
    teachers: tuple[str, ...]
    train: int = 10000
    test: int = 2000
    tested: int | None = None
    seeds: int = 5
    variant_seeds: int = 2


SIZES = {
    "digits": Size(
        source="digits",
        image_size=24,
        patch_size=4,
        teacher=(48, 4, 2),
        student=(32, 3, 2),
        base_steps=600,
        tuned_steps=200,
        steps=400,
        teacher_batch=32,
        student_batch=32,
        rates=(2e-3, 4e-3),
        rank=16,
        quantile=0.9,
        patches=2,
        teachers=("random-random-20", "null-random-20", "visible-random-20", "none"),
    ),
    "scenes": Size(
        source="scenes",
        image_size=48,
        patch_size=8,
        teacher=(64, 4, 2),
        student=(32, 4, 2),
        base_steps=4400,
        tuned_steps=660,
        steps=2400,
        teacher_batch=64,
        student_batch=32,
        rates=(1e-3, 2e-3),
        rank=16,
        quantile=0.9,
        patches=2,
        teachers=("random-random-20", "null-random-20", "visible-random-20", "none"),
        train=7000,
    ),
    "full": Size(
        source="scenes",
        image_size=96,
        patch_size=8,
        teacher=(384, 12, 6),
        student=(192, 12, 3),
        base_steps=11760,
        tuned_steps=1960,
        steps=10000,
        teacher_batch=256,
        student_batch=256,
        rates=(1e-3, 2e-3),
        rank=64,
        quantile=0.96,
        patches=4,
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
        train=50000,
        test=5000,
        variant_seeds=5,
    ),
}

# With this image size, the given teacher has as many patches as the small ones.
SIZES["photos"] = SIZES["scenes"]._replace(
    source="folder",
    image_size=84,
    patch_size=14,
    student=(96, 4, 3),
    steps=1500,
    teachers=("given",),
    tested=1000,
    seeds=3,
)

_CLIP, _FINAL_NORM = {"norm_clip_quantile": 0.9}, {"target_space": "final_norm"}
_CALIBRATED = {"weight_matrix": "calibrated"}
_ENERGY = {"threshold_type": "energy", "threshold": 2.0}

# Settings that differ from each method's defaults; FitNet also gets the blocks of SiNGER.
MAIN: dict[str, dict[str, Any]] = {
    "fitnet": {"name": "fitnet"},
    "fitnet_clip": {"name": "fitnet", "match": _CLIP},
    "fitnet_final_norm": {"name": "fitnet", "match": _FINAL_NORM},
    "singer": {"name": "singer"},
    "singer_clip": {"name": "singer", "match": _CLIP},
    "singer_final_norm": {"name": "singer", "match": _FINAL_NORM},
    "singer_calibrated_clip": {"name": "singer", "match": _CLIP, "nullspace": _CALIBRATED},
    "singer_energy_clip": {"name": "singer", "match": _CLIP, "nullspace": _ENERGY},
    "singer_relative_clip": {"name": "singer", "match": _CLIP, "loss_scale": "relative"},
    "singer_fitted_clip": {"name": "singer", "match": _CLIP, "nullspace": {"init": "fitted"}},
}
ON_PHOTOS = ("fitnet", "fitnet_clip", "fitnet_final_norm", "singer", "singer_clip")
# The frontier: SiNGER without clipping, so that the score shows what the refiner leaves.
VARIANTS: dict[str, dict[str, Any]] = {
    "mlp_quarter": {"name": "singer", "nullspace": {"threshold": 0.25}},
    "mlp_three_quarters": {"name": "singer", "nullspace": {"threshold": 0.75}},
    "mlp_energy_1": {"name": "singer", "nullspace": _ENERGY | {"threshold": 1.0}},
    "mlp_energy_4": {"name": "singer", "nullspace": _ENERGY | {"threshold": 4.0}},
    "mlp_rank_8": {"name": "singer", "rank": 8},
    "mlp_outlier_1": {"name": "singer", "loss_weights": {"outlier": 1.0}},
    "calibrated": {"name": "singer", "nullspace": _CALIBRATED},
    "calibrated_tenth_ridge": {"name": "singer", "nullspace": _CALIBRATED | {"ridge": 0.1}},
    "calibrated_tenfold_ridge": {"name": "singer", "nullspace": _CALIBRATED | {"ridge": 10.0}},
    "calibrated_rank_8": {"name": "singer", "rank": 8, "nullspace": _CALIBRATED},
    "calibrated_outlier_1": {
        "name": "singer",
        "nullspace": _CALIBRATED,
        "loss_weights": {"outlier": 1.0},
    },
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
    config.data.source = size.source
    config.data.scenes.size = size.image_size
    config.data.scenes.train, config.data.scenes.test = size.train, size.test
    if size.source == "digits":
        config.data.flip = 0.0  # a mirrored digit is not a digit
    config.data.crop_area = (0.6, 1.0)
    config.data.crop_ratio = (0.8, 1.25)
    config.data.workers = 0
    config.batch_size = size.teacher_batch
    config.schedule.warmup_epochs = 1
    config.optimizer.weight_decay = 0.05
    config.checkpoint.every_steps = 2000
    config.log.every_steps = 100
    config.evals.every_steps = 0
    return config


def get_config(size: str = "digits") -> ConfigDict:
    """Returns the configuration of a size: `digits`, `scenes`, `photos` or `full`.

    Raises:
      InputError: the size is unknown.
    """
    if size not in SIZES:
        raise unknown("size of the study", size, SIZES)
    chosen, config = SIZES[size], study()
    for name, steps in (("base", chosen.base_steps), ("tuned", chosen.tuned_steps)):
        config[name] = _run(chosen, chosen.teacher)
        config[name].method.name = "supervised"
        config[name].steps = steps
        config[name].optimizer.learning_rate = chosen.rates[0]
    config.distilled = _run(chosen, chosen.student)
    config.distilled.steps, config.distilled.batch_size = chosen.steps, chosen.student_batch
    config.distilled.schedule.warmup_epochs = 0
    config.distilled.optimizer.learning_rate = chosen.rates[1]
    config.distilled.checkpoint.every_steps = -(-chosen.steps // 8)  # for removed_over_steps
    config.distilled.checkpoint.keep = 8
    config.distilled.method.match.norm_clip_quantile = 1.0
    config.distilled.method.rank = chosen.rank
    config.distilled.method.outlier_quantile = chosen.quantile
    named = MAIN | VARIANTS
    if size == "photos":  # the pass of this teacher is expensive
        named, config.images = {name: MAIN[name] for name in ON_PHOTOS}, 1000
    for name, method in named.items():
        config.distilled.students[name] = {"method": method}
    students = config.distilled.students
    config.teachers = chosen.teachers
    teacher = config.base.student
    if size == "photos":
        teacher = config.given
        teacher.model, teacher.overrides = (
            "vit_small_patch14_dinov2",
            {"img_size": chosen.image_size},
        )
    arch = lookup(teacher.model, teacher.overrides.to_dict()).arch
    for name in named:
        # FitNet's default has one more block, which precedes the synthetic outlier.
        if students[name].method["name"] == "fitnet":
            students[name].method["layers"] = teacher_layers(None, False, DEPTHS, arch)
    config.patches = chosen.patches
    config.seeds, config.variant_seeds = chosen.seeds, chosen.variant_seeds
    config.main = tuple(name for name in named if name in MAIN)
    config.tested = chosen.tested
    config.variants_on = chosen.teachers[:1]
    if size == "full":
        config.cleaners = ("synthetic_outlier", "shift_average", "registers")
        config.cleaned = ("fitnet",)
    config.distilled.teacher.registers.images, config.distilled.teacher.registers.neurons = 300, 4
    return config
