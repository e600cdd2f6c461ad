"""Which starts continue a run, and which are another one."""

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
    """Compares a start with the checkpoint that it continues: only that binds a work directory.

    `former_data` is the digest that older versions gave the same images, where it was another one.
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


# A run may be continued with other values of these; any other difference is another run.
_RESUMABLE = (
    "steps",
    "epochs",
    "data.path",
    "data.decode",
    "data.workers",
    "data.fail_on_unreadable",
    "mesh.",
    "checkpoint.",
    "log.",
    "evals.",
    "students.execution",
)


def _resumable(key: str) -> bool:
    return any(key == one or (one.endswith(".") and key.startswith(one)) for one in _RESUMABLE)


def _differences(settings: DistillSettings, saved: dict[str, Any]) -> list[str]:
    """Keys whose values make these settings another run than the saved one, and both values.

    Settings that the run does not read make no difference.
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
    """Compares the teacher's weights with those of the checkpoint that a start continues."""
    # Checkpoints of older versions say nothing of them.
    if "teacher" in saved and saved["teacher"] != meta.get("teacher"):
        raise InputError(
            f"{workdir} was trained with other teacher weights than {settings.teacher.weights} now "
            "holds; use a new --workdir or the same weights"
        )
