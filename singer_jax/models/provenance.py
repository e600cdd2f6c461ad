"""Where a model's weights come from: proof that they are the ones that were meant."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from singer_jax.models.weight_files import open_weights
from singer_jax.models.zoo import ModelSpec

Provenance = Mapping[str, Any]


def provenance(spec: ModelSpec, weights: str, file: Path | None) -> Provenance:
    """What is known of a model's weights before they are read; reads the file once for its sha256.

    Args:
      spec: of the model that takes them.
      weights: as the user named them.
      file: where they were found; None: the model is random.

    Returns:
      `model`, `mean`, `std`; of a file also `weights`, `file`, `sha256`, `revision` (the commit of
      a hub repository, else None), `tensors` and `parameters` in it, and `position_embeddings`
      (how they are resampled, else None). Everything can be written as JSON.
    """
    found: dict[str, Any] = {
        "model": spec.name,
        "mean": list(spec.mean),
        "std": list(spec.std),
    }
    if file is None:
        return found
    tensors = open_weights(file)
    with file.open("rb") as stream:
        sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
    return found | {
        "weights": weights,
        "file": str(file),
        "sha256": sha256,
        "revision": _revision(file),
        "tensors": len(tensors),
        "parameters": sum(math.prod(tensor.shape) for tensor in tensors.values()),
        "position_embeddings": _resampled(spec, tensors),
    }


def told(found: Provenance) -> str:
    """`provenance` in one line."""
    statistics = f"input mean {_numbers(found['mean'])}, std {_numbers(found['std'])}"
    if "file" not in found:
        return f"{found['model']}: random weights, {statistics}"
    revision = f", revision {found['revision']}" if found["revision"] else ""
    positions = found["position_embeddings"] or "as they are"
    return (
        f"{found['model']}: {found['file']}{revision}, sha256 {found['sha256']}, "
        f"{found['tensors']} tensors, {found['parameters']:,} parameters, position embeddings "
        f"{positions}, {statistics}"
    )


def _numbers(values: list[float]) -> str:
    return "/".join(f"{value:.4g}" for value in values)


def _revision(file: Path) -> str | None:
    """Of a file in the Hugging Face cache: .../snapshots/REVISION/model.safetensors."""
    return file.parent.name if file.parent.parent.name == "snapshots" else None


def _resampled(spec: ModelSpec, tensors: Mapping[str, Any]) -> str | None:
    stored = tensors.get("pos_embed")
    if not spec.arch.pos_embed or stored is None:
        return None
    prefix = spec.arch.num_embedded_prefix_tokens
    if stored.shape[1] == prefix + spec.arch.num_patches:
        return None
    side = math.isqrt(stored.shape[1] - prefix)
    rows, columns = spec.arch.grid
    return f"resampled from {side} x {side} to {rows} x {columns}"


def origin(
    weights: Mapping[str, Provenance], student: str, method: str, steps: int
) -> dict[str, Any]:
    """What an export says of the student in it: the weights of a run, its method and steps.

    Args:
      weights: of the run's teacher and students, by name.
      student: its name; empty where it is the only one.
      method: by which it was distilled.
      steps: done.
    """
    return {
        "method": method,
        "steps": steps,
        "teacher": weights.get("teacher"),
        "student": weights.get(student or "student"),
    }
