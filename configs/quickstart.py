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
        "img_size": 32,
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
    config.batch_size = 32
    config.optimizer.learning_rate = 4e-3
    config.optimizer.weight_decay = 0.05
    config.schedule.warmup_epochs = 1
    config.checkpoint.every_steps = 1000
    config.evals.every_steps = 0
    return config


def get_config(protocol: str = "recommended") -> ConfigDict:
    """Returns the runs `base`, `teacher` and `distilled`."""
    config = quickstart(protocol)
    for name, steps, rate in (("base", 450, 2e-3), ("teacher", 150, 1e-3)):
        config[name] = _run(protocol, embed_dim=48, depth=4)
        config[name].method.name = "supervised"
        config[name].steps = steps
        config[name].optimizer.learning_rate = rate
    config.artifact, config.patches = "null-background-20", 2
    config.distilled = _run(protocol, embed_dim=32, depth=3)
    config.distilled.steps = 400
    config.distilled.method.rank = 16
    config.distilled.method.outlier_quantile = 0.95  # three of 64 patches are above
    students = config.distilled.students
    for name, quantile in (("fitnet", 1.0), ("fitnet_clip", 0.9)):
        students[name] = {"method": {"name": "fitnet", "match": {"norm_clip_quantile": quantile}}}
    students.singer = {"method": {"name": "singer"}}
    return config
