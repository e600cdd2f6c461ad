"""Job `export`: writes a student of a run, or other weights, for other libraries."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath

from singer_jax.errors import InputError
from singer_jax.evaluation.backbone import Backbone, ModelSelection, load_backbone, resolve_weights
from singer_jax.io.files import as_path, make_workdir, replacing, writing
from singer_jax.models import foreign
from singer_jax.models.architecture import ComputePolicy
from singer_jax.models.export_huggingface import check_huggingface, export_huggingface
from singer_jax.models.export_onnx import check_onnx, export_onnx
from singer_jax.models.export_timm import export_timm, to_hub_config, trained_here
from singer_jax.models.model_card import HUGGINGFACE_FOLDER, PROGRAM_FILE, write_card
from singer_jax.models.params import Params
from singer_jax.models.program import check_program, features_program
from singer_jax.models.provenance import provenance
from singer_jax.models.weight_files import WeightsFile, open_weights
from singer_jax.models.weights import to_timm
from singer_jax.models.zoo import ModelSpec
from singer_jax.platform import parallel
from singer_jax.runs.checkpoints import Checkpoints, step_to_read
from singer_jax.runs.lock import holding
from singer_jax.runs.metrics import LOG
from singer_jax.runs.workdir import export_folder
from singer_jax.settings.ranges import TEXT, Each, OneOf
from singer_jax.settings.settings import setting
from singer_jax.training.provenance import export_origin
from singer_jax.training.settings import of_saved

FORMATS = ("timm", "huggingface", "onnx", "stablehlo")
_LARGEST_PROGRAM = 2_000_000_000  # bytes; StableHLO and ONNX files are limited to 2 GiB


@dataclasses.dataclass(frozen=True)
class ExportSettings(ModelSelection):
    """Settings of the job `export`."""

    job: str = setting("export", OneOf(("export",)), "Name of the command.")
    run: str = setting(
        "", TEXT, "Work directory of a run; its student is exported. Empty: --workdir."
    )
    weights: str = setting(
        "", TEXT, "Weights to export instead of a run's student: Hub repository or file."
    )
    formats: tuple[str, ...] = setting(
        ("timm", "stablehlo"),
        Each(OneOf(FORMATS), least=1),
        "Formats to write. `huggingface` is for transformers; `onnx` needs the extra `onnx`.",
    )


def export(settings: ExportSettings, workdir: epath.Path) -> None:
    """Writes the chosen formats and a model card into `student/` or `students/NAME/`.

    `timm` is `model.safetensors` and `config.json`, `huggingface` a folder of that name, `onnx`
    `model.onnx` and `stablehlo` `features.stablehlo`. Before a file gets its final name, weights
    are read back and compared bit for bit, and both programs are compared with the model.

    Args:
      settings: settings of the job.
      workdir: parent of the output folder; the run to export if neither `run` nor `weights` is
        given.

    Raises:
      InputError: there is nothing to export, the folder cannot be written, or a format cannot hold
        the model.
    """
    if "onnx" in settings.formats:
        check_onnx()
    policy = ComputePolicy()
    if settings.weights:
        spec, file = resolve_weights(settings.weights, settings.model, settings.weights_key)
        _check_formats(settings.formats, spec)
        policy = ComputePolicy(param_dtype=_stored_dtype(file))
    run = None if settings.weights else as_path(settings.run or str(workdir))
    step = step_to_read(run, settings.step) if run else settings.step
    selected = dataclasses.replace(settings, run=str(run or ""), step=step)
    mesh = parallel.make_mesh()  # replicated, so that process 0 holds all parameters
    backbone = load_backbone(mesh, selected, policy)
    _check_size(settings.formats, backbone.params)
    network = backbone.network
    if run:  # every process takes part in opening a checkpoint
        made_from = _origin(run, settings.student, step)
        network = dataclasses.replace(network, spec=trained_here(network.spec))
    else:
        made_from = {"weights": provenance(network.spec, settings.weights, file)}
    _check_formats(settings.formats, network.spec)
    if jax.process_index() > 0:
        return
    folder = export_folder(workdir, settings.student)
    make_workdir(folder)
    with holding(folder), writing(folder):
        _write(folder, settings.formats, dataclasses.replace(backbone, network=network), made_from)
    LOG.info("%s exported to %s: %s", network.spec.name, folder, ", ".join(settings.formats))


def _write(
    folder: epath.Path, formats: tuple[str, ...], backbone: Backbone, made_from: dict[str, Any]
) -> None:
    network, params = backbone.network, backbone.params
    spec, tensors = network.spec, to_timm(params)
    if "timm" in formats:
        export_timm(folder, spec, tensors, None if "weights" in made_from else made_from)
    if "huggingface" in formats:
        theirs = folder / HUGGINGFACE_FOLDER
        export_huggingface(theirs, spec, tensors)
        write_card(theirs, spec, made_from, "huggingface")
    if "stablehlo" in formats:
        program = features_program(network, params)
        check_program(program, network, params)
        with replacing(folder / PROGRAM_FILE) as file:
            file.write_bytes(program)
    if "onnx" in formats:
        difference = export_onnx(folder, network, params)
        LOG.info("onnx: largest difference from the model: %.1e of the largest value", difference)
    if set(formats) - {"huggingface"}:
        write_card(folder, spec, made_from)


def _check_formats(formats: tuple[str, ...], spec: ModelSpec) -> None:
    """Raises `InputError` for a format that cannot say what the model is."""
    if "timm" in formats:
        to_hub_config(spec)
    if "huggingface" in formats:
        check_huggingface(spec)


def _check_size(formats: tuple[str, ...], params: Params) -> None:
    sizes = {
        "stablehlo": sum(leaf.nbytes for leaf in jax.tree.leaves(params)),
        "onnx": sum(4 * leaf.size for leaf in jax.tree.leaves(params)),
    }
    for name, size in sizes.items():
        if name in formats and size > _LARGEST_PROGRAM:
            raise InputError(
                f"formats: {size / 2**30:.1f} GiB of parameters do not fit into one {name} file "
                f"(2 GiB); leave {name} out"
            )


def _origin(run: epath.Path, student: str, step: int) -> dict[str, Any]:
    with contextlib.closing(Checkpoints(run, read_only=True)) as checkpoints:
        meta = checkpoints.meta(step)
    its_settings = of_saved(meta["config"]).each()[student]
    return export_origin(its_settings, meta.get("weights", {}), student, step)


def _stored_dtype(file: WeightsFile) -> Any:
    """Returns the dtype of a file's tensors; float32 if they differ or have an unusual one."""
    tensors = open_weights(file).items()
    dtypes = {tensor.dtype for key, tensor in tensors if key != foreign.PERIODS}
    usual = dtypes <= {jnp.dtype(name) for name in ("float32", "float16", "bfloat16")}
    return dtypes.pop() if len(dtypes) == 1 and usual else jnp.float32
