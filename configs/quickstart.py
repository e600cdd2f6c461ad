"""Trains a teacher with a synthetic artifact and three students on scikit-learn's digits.

  bash launch/run.sh

During the teacher's training, a vector of huge norm is added to one patch of every image
(`models.synthetic_outlier`), because a model this small does not develop high-norm tokens on its
own. FitNet learns the artifact. After the teacher's final LayerNorm the artifact disappears. SiNGER
removes most of it from the features.

About 100 CPU seconds. Linear top-1 on the 360 held-out digits: teacher 97 %, FitNet 36 %, FitNet
after the final LayerNorm 94 %, SiNGER 63 %. These are results of one seed, with an artifact much
longer than those of most real teachers. benchmarks/STUDY.md compares methods with error bars.
"""

from ml_collections import ConfigDict

from singer_jax.config import default, quickstart


def _run(protocol: str, embed_dim: int, depth: int) -> ConfigDict:
    config = default(protocol)
    config.student.model = "vit_tiny_patch16_224"
    config.student.overrides = {
        "img_size": 16,
        "patch_size": 4,
        "embed_dim": embed_dim,
        "depth": depth,
        "num_heads": 2,
        "mlp_ratio": 2.0,
    }
    config.precision = "float32"
    config.data.source = "digits"
    config.data.workers = 0
    config.data.flip = 0.0  # a mirrored digit is not a digit
    config.data.crop_area = (0.6, 1.0)
    config.data.crop_ratio = (0.8, 1.25)
    config.epochs = 15
    config.batch_size = 64
    config.optimizer.learning_rate = 4e-3
    config.optimizer.weight_decay = 0.05
    config.schedule.warmup_epochs = 2
    config.checkpoint.every_steps = 500
    config.evals.every_steps = 345  # at the end of the run
    return config


def get_config(protocol: str = "recommended") -> ConfigDict:
    """Returns a `teacher`, its students `distilled` from it in one run, and one `probe` for all."""
    config = quickstart(protocol)
    config.teacher = _run(protocol, embed_dim=64, depth=4)
    config.teacher.method.name = "supervised"
    config.teacher.epochs = 28
    config.teacher.optimizer.learning_rate = 2e-3
    config.teacher.evals.every_steps = 0
    outlier = {
        "synthetic_outlier": "background",
        "synthetic_outlier_after": 2,
        "synthetic_outlier_length": 60.0,
    }
    config.teacher.student.overrides.update(outlier)
    config.distilled = _run(protocol, embed_dim=48, depth=3)
    config.distilled.teacher.model = config.teacher.student.model
    config.distilled.teacher.overrides = config.teacher.student.overrides.to_dict()
    config.distilled.method.match.norm_clip_quantile = 1.0  # FitNet as published
    config.distilled.method.rank = 16
    config.distilled.method.outlier_quantile = 0.85  # two of 16 patches are above
    config.distilled.students.fitnet = {"method": {"name": "fitnet"}}
    config.distilled.students.final_norm = {
        "method": {"name": "fitnet", "match": {"target_space": "final_norm"}}
    }
    config.distilled.students.singer = {
        "method": {"name": "singer", "nullspace": {"weight_matrix": "calibrated"}}
    }
    config.probe.protocol = "fast"
    config.probe.epochs = 50
    config.probe.learning_rates = (0.1, 0.5, 2.0)
    return config
