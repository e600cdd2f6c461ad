"""A student for timm, transformers, ONNX and JAX, with a model card.

  python -m singer_jax.main --config=configs/export.py --config.run=runs/singer_vitl_vitt \
      --workdir=runs/singer_vitl_vitt --config.formats="('timm','huggingface','onnx','stablehlo')"

writes below student/ of the work directory:

  README.md                                          the model card
  model.safetensors, config.json                     timm, by default
  features.stablehlo                                 stablehlo, by default: JAX alone runs it
  model.onnx                                         onnx, with the extra onnx
  huggingface/model.safetensors, config.json,        huggingface: AutoModel.from_pretrained
    preprocessor_config.json, README.md

`--config.weights=NAME_OR_FILE` exports timm weights instead of a run, `--config.step=N` another
checkpoint than the latest. `hf upload OWNER/NAME FOLDER` publishes a folder.
"""

from ml_collections import ConfigDict

from singer_jax.config import export


def get_config(protocol: str = "recommended") -> ConfigDict:
    """The latest checkpoint of `run`."""
    return export()
