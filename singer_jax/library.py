"""Functions that `import singer_jax` offers: load, create and save models, and distil."""

from __future__ import annotations

import os
from typing import Any

from flax import nnx

from singer_jax.errors import InputError
from singer_jax.evaluation.backbone import ModelSelection, load_backbone
from singer_jax.io.files import as_path, working_disks
from singer_jax.jobs import distill as job
from singer_jax.models import zoo
from singer_jax.models.architecture import PRECISIONS, ComputePolicy
from singer_jax.models.export_timm import export_timm
from singer_jax.models.model_card import write_card
from singer_jax.models.vit import VisionTransformer
from singer_jax.models.weights import to_timm
from singer_jax.platform import parallel
from singer_jax.runs.workdir import checkpoints_folder
from singer_jax.settings import ranges
from singer_jax.training.settings import DistillSettings


def _numerics(precision: str) -> ComputePolicy:
    ranges.check("precision", precision, ranges.OneOf(tuple(PRECISIONS)))
    return ComputePolicy(PRECISIONS[precision])


def list_models() -> list[str]:
    """Returns the known timm names in alphabetical order."""
    return sorted(zoo.MODELS)


def create_model(
    name: str, *, rngs: nnx.Rngs | None = None, precision: str = "float32", **overrides: Any
) -> VisionTransformer:
    """Creates a model with random weights, initialised as in timm.

    Args:
      name: timm name, such as `vit_tiny_patch16_224`.
      rngs: random streams, of which `params` is used; default: seed 0.
      precision: dtype of the activations, `float32` or `bfloat16`.
      **overrides: fields of `Architecture`, such as `img_size=96, num_classes=0`.

    Raises:
      InputError: the name, a field or the precision is unknown, or sizes do not fit together.
    """
    spec = zoo.lookup(name, overrides)
    model = VisionTransformer(spec.arch, _numerics(precision), rngs=rngs or nnx.Rngs(0))
    model.spec = spec
    return model


def load_model(
    name: str | os.PathLike[str],
    *,
    model: str = "",
    student: str = "",
    step: int | None = None,
    precision: str = "float32",
    weights_key: str = "",
    image_size: int | None = None,
) -> VisionTransformer:
    """Loads a pretrained or distilled model.

    `model.features(model.spec.prepare(images))` returns the raw residual streams after each block,
    [batch, tokens, dim]; `model(...)` of the same input returns the output of timm's model.

    Args:
      name: work directory, whose student is loaded; weight file or folder with model.safetensors;
        or Hub repository such as `timm/vit_tiny_patch16_224.augreg_in21k`.
      model: timm name; needed if neither the Hub name nor a config.json beside the weights states
        it.
      student: name of the student, if the work directory holds several.
      step: step of the work directory's checkpoint; None: the newest one without corruption.
      precision: dtype of the activations, `float32` or `bfloat16`.
      weights_key: part of the weights file, such as `state_dict`; empty: averaged weights first.
      image_size: side length of the input in pixels, to which the position embedding is resampled;
        None: the model's own. Not for a work directory.

    Raises:
      InputError: nothing was found, the weights are of another architecture, the image size does
        not fit, or the precision is unknown.
    """
    given = os.fspath(name)
    of_run = checkpoints_folder(as_path(given)).is_dir()
    backbone = load_backbone(
        parallel.make_mesh(1),
        ModelSelection(
            run=given if of_run else "",
            student=student,
            step=step,
            weights="" if of_run else given,
            model=model,
            weights_key=weights_key,
        ),
        _numerics(precision),
        image_size,
    )
    loaded = backbone.network.merge(backbone.params)
    loaded.spec = backbone.network.spec
    return loaded


def save_model(model: VisionTransformer, folder: str | os.PathLike[str]) -> None:
    """Writes `model.safetensors`, `config.json` and `README.md`, as timm and the Hub read them.

    Args:
      model: model from `create_model` or `load_model`, possibly trained further.
      folder: target folder; it is created if it does not exist.

    Raises:
      InputError: the model has no `spec`, or timm cannot load it.
    """
    if model.spec is None:
        raise InputError("model.spec: missing; make the model with create_model or load_model")
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    export_timm(as_path(folder), model.spec, to_timm(params))
    write_card(as_path(folder), model.spec, {})


def distill(settings: DistillSettings, workdir: str | os.PathLike[str]) -> None:
    """Trains a student as the command does; `load_model(workdir)` then loads it.

    Arguments and errors are those of `singer_jax.jobs.distill.distill`; a full disk raises
    `RunError` too. The function restores JAX's matmul precision and other numeric settings before
    it returns.
    """
    folder = as_path(workdir)
    with working_disks(folder):
        parallel.start()
        job.distill(settings, folder)
