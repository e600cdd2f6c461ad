"""Trains the paper's rows with a DeiT-III teacher in one run: three methods, one teacher pass.

  python -m singer_jax.main --config=configs/table1_deit3.py --workdir=runs/table1_deit3l
  python -m singer_jax.main --config=configs/table1_deit3.py:small --workdir=runs/table1_deit3s

The paper's Table 1 (quoted, not measured here): DeiT-III-L to B, and S to Ti with `:small`:

                    ImageNet  ADE20K   NYUd  iNaturalist  domain shift  fine-grained
  FitNet, L to B       60.00   26.79  1.1625       50.04         31.53         74.78
  ViTKD,  L to B       66.54   19.58  1.2525       30.78         35.77         58.36
  SiNGER, L to B       79.37   29.47  1.1514       53.50         49.14         75.41
  FitNet, S to Ti      51.41   16.06  1.2920       32.81         23.74         58.53
  ViTKD,  S to Ti      35.56    8.71  1.4487       19.93         15.31         45.13
  SiNGER, S to Ti      63.50   20.67  0.9827       37.68         32.28         64.32

`:paper` and `:small,paper` run the official code's protocol. On a folder of your own images:
--config.data.source=/path/to/images.
"""

from ml_collections import ConfigDict

from singer_jax.config import default


def get_config(which: str = "recommended") -> ConfigDict:
    """Returns a run whose students are trained as in `configs/METHOD_deit3*.py`.

    Args:
      which: a protocol, `small`, or both as `small,PROTOCOL`.
    """
    small = which.split(",")[0] == "small"
    config = default(which.removeprefix("small").removeprefix(",") or "recommended")
    teacher, student = ("small", "tiny") if small else ("large", "base")
    config.teacher.model = f"deit3_{teacher}_patch16_224"
    config.teacher.weights = f"timm/deit3_{teacher}_patch16_224.fb_in22k_ft_in1k"
    config.student.model = f"deit3_{student}_patch16_224"
    for method in ("fitnet", "vitkd", "singer"):
        config.students[method] = {"method": {"name": method}}
    return config
