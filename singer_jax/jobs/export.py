"""The job `export`: a student out of a run, or a model from timm weights, for others to use."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath

from singer_jax.errors import InputError
from singer_jax.evaluation.backbone import load_backbone
from singer_jax.io.files import as_path, make_workdir, replacing, writing
from singer_jax.models.architecture import ComputePolicy
from singer_jax.models.program import features_program
from singer_jax.models.provenance import origin
from singer_jax.models.weight_files import find_weights, open_weights
from singer_jax.models.weights import export_timm, to_timm
from singer_jax.platform import parallel
from singer_jax.runs.checkpoints import Checkpoints
from singer_jax.runs.lock import holding
from singer_jax.runs.telemetry import LOG
from singer_jax.settings.ranges import COUNT, TEXT, Flag, OneOf, optional
from singer_jax.settings.settings import Settings, setting
from singer_jax.training.settings import of_saved

PROGRAM_FILE = "features.stablehlo"
_LARGEST_PROGRAM = 2_000_000_000  # bytes; the format's limit is 2 GiB


@dataclasses.dataclass(frozen=True)
class ExportSettings(Settings):
    """What is exported."""

    job: str = setting("export", OneOf(("export",)), "the command")
    run: str = setting("", TEXT, "a work directory: its student; empty: --workdir itself; or else")
    student: str = setting("", TEXT, "one of several students of the run")
    weights: str = setting("", TEXT, "a hub name or file, and")
    model: str = setting(
        "", TEXT, "its timm name, where neither the hub name nor a config.json says it"
    )
    step: int | None = setting(None, optional(COUNT), "of the checkpoint; None: the latest")
    stablehlo: bool = setting(True, Flag(), "also write features.stablehlo")


def export(settings: ExportSettings, workdir: epath.Path) -> None:
    """Writes `student/` with `model.safetensors`, `config.json` and `features.stablehlo`.

    Args:
      settings: what is exported.
      workdir: where `student/`, of several `students/NAME/`, is made; without `run` and `weights`
        also the run to export.

    Raises:
      InputError: nothing to export, or a folder that cannot be written.
    """
    policy = ComputePolicy()
    if settings.weights:
        dtype = _stored_dtype(find_weights(settings.weights))
        policy = ComputePolicy(param_dtype=dtype)
    backbone = load_backbone(
        parallel.make_mesh(),  # whole on each device, so that process 0 has it all
        run="" if settings.weights else settings.run or str(workdir),
        weights=settings.weights,
        model=settings.model,
        student=settings.student,
        step=settings.step,
        policy=policy,
    )
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(backbone.params))
    if settings.stablehlo and size > _LARGEST_PROGRAM:
        raise InputError(
            f"{size / 2**30:.1f} GiB of parameters do not fit into one StableHLO file (2 GiB); "
            "set --config.stablehlo=False"
        )
    made_from = None
    if not settings.weights:  # all processes open a checkpoint together
        made_from = _origin(as_path(settings.run or str(workdir)), settings)
    if jax.process_index() > 0:
        return
    name = settings.student
    folder = workdir / "students" / name if name else workdir / "student"
    make_workdir(folder)
    with holding(folder), writing(folder):
        export_timm(folder, backbone.network.spec, to_timm(backbone.params), made_from)
        if settings.stablehlo:
            with replacing(folder / PROGRAM_FILE) as file:
                file.write_bytes(features_program(backbone.network, backbone.params))
    LOG.info("%s exported to %s", backbone.network.spec.name, folder)


def _origin(run: epath.Path, settings: ExportSettings) -> dict[str, Any]:
    with contextlib.closing(Checkpoints(run, read_only=True)) as checkpoints:
        step = settings.step or checkpoints.latest_step()
        meta = checkpoints.meta(step)
    its_settings = of_saved(meta["config"]).each()[settings.student]
    return origin(meta.get("weights", {}), settings.student, its_settings.method_name, step)


def _stored_dtype(path: Path) -> Any:
    """The dtype of a file's tensors; float32 where they differ."""
    dtypes = {tensor.dtype for tensor in open_weights(path).values()}
    return dtypes.pop() if len(dtypes) == 1 else jnp.float32
