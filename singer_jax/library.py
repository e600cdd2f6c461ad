"""What `import singer_jax` offers beside classes: models in and out, and a distillation."""

from __future__ import annotations

import os
from typing import Any

from flax import nnx

from singer_jax.errors import InputError
from singer_jax.evaluation.backbone import load_backbone
from singer_jax.io.files import as_path
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
    """The timm names that are known, in alphabetical order."""
    return sorted(zoo.MODELS)


def create_model(
    name: str, *, rngs: nnx.Rngs | None = None, precision: str = "float32", **overrides: Any
) -> VisionTransformer:
    """A model with random weights, as timm initialises it.

    Args:
      name: of timm, such as `vit_tiny_patch16_224`.
      rngs: stream `params`; default: seed 0.
      precision: of activations, `float32` or `bfloat16`.
      **overrides: fields of `Architecture`, such as `img_size=96, num_classes=0`.

    Raises:
      InputError: unknown name, field or precision, or sizes that do not fit together.
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
) -> VisionTransformer:
    """A pretrained or distilled model.

    `model.features(model.spec.prepare(images))` are the raw residual streams after its blocks,
    [batch, tokens, dim]; `model(...)` of the same what timm's model returns.

    Args:
      name: a work directory, whose student it is; a file of weights, or a folder with
        model.safetensors; or a hub name such as `timm/vit_tiny_patch16_224.augreg_in21k`.
      model: its timm name, where neither the hub name nor a config.json beside the weights says it.
      student: the name of one of several students of a work directory.
      step: the step of the work directory's checkpoint; None: the newest without corruption.
      precision: of activations, `float32` or `bfloat16`.
      weights_key: part of the weights' file, such as `state_dict`; empty: averaged weights first.

    Raises:
      InputError: nothing there, weights of another architecture, or an unknown precision.
    """
    given = os.fspath(name)
    of_run = checkpoints_folder(as_path(given)).is_dir()
    backbone = load_backbone(
        parallel.make_mesh(1),
        run=given if of_run else "",
        weights="" if of_run else given,
        model=model,
        weights_key=weights_key,
        student=student,
        step=step,
        policy=_numerics(precision),
    )
    loaded = backbone.network.merge(backbone.params)
    loaded.spec = backbone.network.spec
    return loaded


def save_model(model: VisionTransformer, folder: str | os.PathLike[str]) -> None:
    """Writes `model.safetensors`, `config.json` and a `README.md`, which timm and the hub open.

    Args:
      model: of `create_model` or `load_model`, trained further or not.
      folder: is made if it is not there.

    Raises:
      InputError: a model that does not say what it is, or that timm could not load.
    """
    if model.spec is None:
        raise InputError("the model does not say which timm model it is; make it by create_model")
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    export_timm(as_path(folder), model.spec, to_timm(params))
    write_card(as_path(folder), model.spec, {})


def distill(settings: DistillSettings, workdir: str | os.PathLike[str]) -> None:
    """Trains a student, as the command does; `load_model(workdir)` is it then.

    Arguments and errors are those of `singer_jax.jobs.distill.distill`. Precision and other numeric
    settings of JAX are as before when it returns.
    """
    parallel.start()
    job.distill(settings, as_path(workdir))
