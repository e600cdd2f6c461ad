"""Checks that a start continues the run of its work directory."""

from __future__ import annotations

from typing import Any

from etils import epath

from singer_jax.errors import InputError
from singer_jax.settings.renamed import current
from singer_jax.settings.settings import flatten, to_dict
from singer_jax.training.settings import DistillSettings, of_saved


def check_same_run(
    settings: DistillSettings,
    workdir: epath.Path,
    meta: dict[str, Any],
    saved: dict[str, Any],
    former_data: str = "",
) -> None:
    """Checks that the settings and images are those of the checkpoint that a start continues.

    A work directory without a checkpoint can be used with any settings. `former_data` is the digest
    that older versions computed for the same images, where it differs.

    Raises:
      InputError: They differ from those of the checkpoint.
    """
    changed = _differences(settings, saved["config"])
    if changed:
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        raise InputError(
            f"{workdir} holds the run of another configuration: {'; '.join(changed[:3])}{more}"
            "; use a new --workdir"
        )
    if saved["data"] not in (meta["data"], former_data):
        raise InputError(
            f"{workdir} was trained on other images than {settings.data.source} "
            f"{settings.data.path} now holds; use a new --workdir or the same images"
        )


# Keys whose values may change when a run is continued; no other key may.
_RESUMABLE = (
    "steps",
    "epochs",
    "data.path",
    "data.decode",
    "data.workers",
    "data.fail_on_unreadable",
    "data.max_unreadable",
    "mesh.",
    "checkpoint.",
    "log.",
    "evals.",
    "students.execution",
)


def _resumable(key: str) -> bool:
    return any(key == one or (one.endswith(".") and key.startswith(one)) for one in _RESUMABLE)


def _differences(settings: DistillSettings, saved: dict[str, Any]) -> list[str]:
    """Lists the keys that must not change but differ from the saved run, with both values.

    Settings that the run does not read are ignored.
    """
    theirs = current(flatten(saved))
    theirs |= flatten(to_dict(of_saved(saved)))
    ours = flatten(to_dict(settings))
    return [
        f"{key}: {theirs.get(key)!r} -> {ours.get(key)!r}"
        for key in sorted(ours | theirs)
        if ours.get(key) != theirs.get(key) and not _resumable(key)
    ]


def check_same_teacher(
    settings: DistillSettings, workdir: epath.Path, meta: dict[str, Any], saved: dict[str, Any]
) -> None:
    """Checks that the teacher's weights are those of the checkpoint that a start continues.

    Raises:
      InputError: The weights differ.
    """
    # Checkpoints of older versions do not record the teacher's weights.
    if "teacher" in saved and saved["teacher"] != meta.get("teacher"):
        raise InputError(
            f"{workdir} was trained with other teacher weights than {settings.teacher.weights} now "
            "holds; use a new --workdir or the same weights"
        )
