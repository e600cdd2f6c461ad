"""Provenance of a model's weights, which proves that the intended weights were used."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from singer_jax.models.checkpoint import INDEX, shards
from singer_jax.models.layers import NUM_CLASS_DISTANCES
from singer_jax.models.weight_files import WeightsFile, open_weights
from singer_jax.models.weights import model_tensors
from singer_jax.models.zoo import ModelSpec

Provenance = Mapping[str, Any]


def provenance(spec: ModelSpec, weights: str, file: Path | WeightsFile | None) -> Provenance:
    """Returns the provenance of a model's weights without loading them.

    The file is read once to compute its SHA-256.

    Args:
      spec: specification of the model that uses the weights.
      weights: the user's name of the weights.
      file: weights file; None: random initialisation.

    Returns:
      `model`, `mean` and `std`. For a file also `weights`, `file`, `sha256`, `revision` (the commit
      of a Hub repository, else None), the numbers of `tensors` and `parameters`,
      `position_embeddings` (how they are resampled, else None) and `taken` (the part of the file,
      the removed prefix, the original format of the keys, and the unused keys). For an index also
      `shards`, the SHA-256 of each. All values can be written as JSON.
    """
    found: dict[str, Any] = {
        "model": spec.name,
        "mean": list(spec.mean),
        "std": list(spec.std),
    }
    if file is None:
        return found
    opened, tensors = file, open_weights(file)
    file = file.path if isinstance(file, WeightsFile) else file
    if file.name.endswith(INDEX):
        names = sorted(set(shards(file).values()))
        found["shards"] = {name: _sha256(file.parent / name) for name in names}
    return found | {
        "weights": weights,
        "file": str(file),
        "sha256": _sha256(file),
        "revision": _revision(file),
        "tensors": len(tensors),
        "parameters": sum(math.prod(tensor.shape) for tensor in tensors.values()),
        "position_embeddings": _resampled(spec, tensors),
        "taken": str(model_tensors(spec, opened).taken),
    }


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def describe(found: Provenance) -> str:
    """Returns a provenance as one line."""
    statistics = f"input mean {_numbers(found['mean'])}, std {_numbers(found['std'])}"
    if "file" not in found:
        return f"{found['model']}: random weights, {statistics}"
    revision = f", revision {found['revision']}" if found["revision"] else ""
    positions = found["position_embeddings"] or "not resampled"
    taken = f"{found['taken']}, " if found.get("taken") else ""
    return (
        f"{found['model']}: {found['file']}{revision}, sha256 {found['sha256']}, {taken}"
        f"{found['tensors']} tensors, {found['parameters']:,} parameters, position embeddings "
        f"{positions}, {statistics}"
    )


def _numbers(values: list[float]) -> str:
    return "/".join(f"{value:.4g}" for value in values)


def _revision(file: Path) -> str | None:
    """Returns the revision of a file in the Hugging Face cache: .../snapshots/REVISION/FILE."""
    return file.parent.name if file.parent.parent.name == "snapshots" else None


def _resampled(spec: ModelSpec, tensors: Mapping[str, Any]) -> str | None:
    """Returns the grids from which and to which positions are resampled; None: they are not."""
    rows, columns = spec.arch.grid
    stored = tensors.get("pos_embed")
    biases = tensors.get("blocks.0.attn.relative_position_bias_table")
    if spec.arch.pos_embed and stored is not None:
        places = stored.shape[1] - spec.arch.num_embedded_prefix_tokens
        if places == spec.arch.num_patches:
            return None
        side = math.isqrt(places)
    elif spec.arch.rel_pos_bias and biases is not None:
        places = biases.shape[0] - NUM_CLASS_DISTANCES
        if places == (2 * rows - 1) * (2 * columns - 1):
            return None
        side = (math.isqrt(places) + 1) // 2
    else:
        return None
    return f"resampled from {side} x {side} to {rows} x {columns}"


def origin(
    weights: Mapping[str, Provenance],
    student: str,
    method: str,
    steps: int,
    data: Mapping[str, Any],
) -> dict[str, Any]:
    """Returns the origin of an exported student, as JSON.

    Args:
      weights: provenance of the run's teacher and students, by name.
      student: name of the student; empty if it is the only one.
      method: name of the distillation method.
      steps: number of training steps.
      data: training images: `source` and `batch_size`.
    """
    return {
        "method": method,
        "steps": steps,
        "data": dict(data),
        "teacher": weights.get("teacher"),
        "student": weights.get(student or "student"),
    }
