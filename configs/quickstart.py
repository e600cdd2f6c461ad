"""Trains a teacher with a synthetic artifact and three students on scikit-learn's digits.

  bash launch/run.sh

A model this small does not develop high-norm tokens on its own. Therefore a trained teacher is
fine-tuned while a vector of about 20 median norms is added to two background patches of every image
(`models.synthetic_outlier`). This is the paper's premise by construction: the vector is the
direction to which the next block is least sensitive. FitNet as published learns the artifact.
FitNet with clipped norms and SiNGER do not.

benchmarks/quickstart.md has the results of three seeds and the CPU time. The artifact is longer
than those of most real teachers. docs/study.md compares methods with other artifacts, too.

The images are digits, because a teacher of generated scenes (`data.source=scenes`) takes longer:
with 64 x 64 pixels, patches of 8, width 64 and depth 3, 600 steps of 64 images took 119 CPU seconds
and reached 18 % top-1, where chance is 10 %.
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
