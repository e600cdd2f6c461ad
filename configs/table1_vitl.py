"""Trains the paper's rows with teacher ViT-L/16 in one run: five students, one teacher pass.

  python -m singer_jax.main --config=configs/table1_vitl.py --workdir=runs/table1_vitl

The paper's Table 1 (quoted, not measured here):

                    ImageNet  ADE20K   NYUd  iNaturalist  domain shift  fine-grained
  FitNet, ViT-S        72.50   25.15  0.9903       52.12         40.21         71.13
  SiNGER, ViT-S        79.13   30.06  0.9026       57.21         48.91         77.59
  FitNet, ViT-Ti       62.43   18.73  1.0093       40.02         32.32         62.48
  ViTKD, ViT-Ti         5.07   11.92  1.1903       23.69          2.08         33.52
  SiNGER, ViT-Ti       70.59   21.76  0.9406       41.11         38.87         64.61

`:paper` runs the official code's protocol. On a folder of your own images:
--config.data.source=/path/to/images.
"""

from ml_collections import ConfigDict

from singer_jax.config import default

STUDENTS = {
    "vits_fitnet": ("vit_small_patch16_224", "fitnet"),
    "vits_singer": ("vit_small_patch16_224", "singer"),
    "vitt_fitnet": ("vit_tiny_patch16_224", "fitnet"),
    "vitt_vitkd": ("vit_tiny_patch16_224", "vitkd"),
    "vitt_singer": ("vit_tiny_patch16_224", "singer"),
}


def get_config(protocol: str = "recommended") -> ConfigDict:
    """Returns a run whose students are trained as in `configs/METHOD_vitl_MODEL.py`."""
    config = default(protocol)
    config.teacher.model = "vit_large_patch16_224"
    config.teacher.weights = "timm/vit_large_patch16_224.augreg_in21k_ft_in1k"
    for name, (model, method) in STUDENTS.items():
        config.students[name] = {"model": model, "method": {"name": method}}
    return config
