"""Exports a student for timm, transformers, ONNX and JAX, with a model card.

  python -m singer_jax.main --config=configs/export.py --config.run=runs/singer_vitl_vitt \
      --workdir=runs/singer_vitl_vitt --config.formats="('timm','huggingface','onnx','stablehlo')"

The job writes into student/ of the work directory:

  README.md                                          model card
  model.safetensors, config.json                     format timm (default)
  features.stablehlo                                 format stablehlo (default), runs with JAX only
  model.onnx                                         format onnx, needs the extra onnx
  huggingface/model.safetensors, config.json,        format huggingface, for
    preprocessor_config.json, README.md                AutoModel.from_pretrained

`--config.weights=NAME_OR_FILE` exports timm weights instead of a run. `--config.step=N` exports
another checkpoint than the latest. `hf upload OWNER/NAME FOLDER` publishes a folder.
"""

from ml_collections import ConfigDict

from singer_jax.config import export


def get_config(protocol: str = "recommended") -> ConfigDict:
    """Returns the job's keys; the default exports the latest checkpoint of `run`."""
    return export()
