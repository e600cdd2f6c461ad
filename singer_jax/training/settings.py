"""The settings of a distillation of one student or of several."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from singer_jax import methods
from singer_jax.data.registry import TrainingDataSettings
from singer_jax.errors import InputError
from singer_jax.methods.section import MethodSection
from singer_jax.methods.singer import SingerSettings
from singer_jax.models.architecture import PRECISIONS
from singer_jax.models.network import StudentSettings, TeacherSettings
from singer_jax.platform import parallel
from singer_jax.runs.metrics import LogSettings
from singer_jax.settings import settings as settings_lib
from singer_jax.settings.ranges import COUNT, SEED, Elsewhere, OneOf, optional
from singer_jax.settings.renamed import current
from singer_jax.settings.settings import (
    ABSENT,
    Setting,
    Settings,
    flatten,
    from_flat,
    leaves,
    section,
    setting,
    to_dict,
)
from singer_jax.training.loop import CheckpointSettings, EvalsSettings
from singer_jax.training.optimizer import OptimizerSettings, ScheduleSettings

EXECUTIONS = ("parallel", "sequential")


@dataclasses.dataclass(frozen=True)
class StudentVariant(StudentSettings):
    """Settings in which the students of a run may differ."""

    seed: int = setting(
        0, SEED, "Seed of the student's initial parameters and of its method's random numbers."
    )
    method: Settings = section(SingerSettings(), MethodSection())
    optimizer: OptimizerSettings = section(OptimizerSettings())


@dataclasses.dataclass(frozen=True)
class StudentsSettings:
    """Settings of several students of a run; empty if the run has only its `student`.

    Attributes:
      named: Settings of each student by its name, which is also the name of a folder.
      execution: Execution of the students in a step, `parallel` or `sequential`; None to choose by
        the device.

    Raises:
      InputError: A name is not a valid file name, or two names differ only in case.
    """

    named: Mapping[str, StudentVariant] = dataclasses.field(default_factory=dict)
    execution: str | None = None

    def __post_init__(self) -> None:
        seen = {"teacher": "the teacher", "execution": "a key beside them"}
        for name in self.named:
            if not re.fullmatch(r"[A-Za-z0-9][\w-]{0,63}", name, re.ASCII):
                raise InputError(
                    f"students: {name!r} is not a valid name; use up to 64 letters, digits, _ and -"
                )
            if name.lower() in seen:
                raise InputError(
                    f"students: {name!r} is also the name of {seen[name.lower()]}; use another name"
                )
            seen[name.lower()] = f"the student {name!r}"


class _Students:
    """The key `execution`, and under the name of each student its keys that differ from the run."""

    def leaves(self, value: StudentsSettings, prefix: str) -> dict[str, Setting]:
        meaning = (
            "Execution of several students in a step: `parallel`, or `sequential` in less memory. "
            "None: `parallel` if it fits into memory and the backend does not prefer `sequential`."
        )
        known = {"execution": Setting(value.execution, optional(OneOf(EXECUTIONS)), meaning)}
        for key in _shared():
            known[f"NAME.{key}"] = Setting(ABSENT, Elsewhere("once for the run"), "")
        for key, own in leaves(StudentVariant()).items():
            known[f"NAME.{key}"] = dataclasses.replace(own, default=ABSENT)
        return {prefix + key: one for key, one in known.items()}

    def to_dict(self, value: StudentsSettings) -> dict[str, Any]:
        students = {name: to_dict(student) for name, student in value.named.items()}
        return {"execution": value.execution} | students

    def from_flat(
        self, value: StudentsSettings, flat: Mapping[str, Any], prefix: str
    ) -> StudentsSettings:
        of_run = settings_lib.below(flat, prefix.removesuffix("students."))
        common = settings_lib.below(of_run, "student.") | {
            key: given for key, given in of_run.items() if key.startswith(_OWN)
        }
        given = settings_lib.below(flat, prefix)
        execution = given.pop("execution", value.execution)
        named = dict(value.named)
        for name in dict.fromkeys(key.partition(".")[0] for key in given):
            own = settings_lib.below(given, f"{name}.")
            # A student's own method replaces the run's weighted sum of methods.
            sums = "method.name" in own and not settings_lib.below(own, "method.method_weights.")
            of_run = {
                k: v for k, v in common.items() if not (sums and "method.method_weights." in k)
            }
            named[name] = from_flat(named.get(name, StudentVariant()), of_run | own)
        return StudentsSettings(named, execution)


_OWN = ("seed", "method.", "optimizer.")


def _shared() -> list[str]:
    """Returns the keys of a run that all of its students share."""
    found = []
    for field in dataclasses.fields(DistillSettings):
        if field.name in ("student", "students", "seed", "method", "optimizer"):
            continue
        if "setting" in field.metadata:
            found.append(field.name)
        else:
            kind, default = field.metadata["section"], field.default_factory()
            found += kind.leaves(default, f"{field.name}.")
    return found


@dataclasses.dataclass(frozen=True)
class DistillSettings(Settings):
    """Settings of a distillation."""

    job: str = setting("distill", OneOf(("distill",)), "Name of the command.")
    seed: int = setting(0, SEED, "Seed of all random numbers.")
    steps: int | None = setting(
        None,
        optional(COUNT),
        "Number of training steps. None: epochs x ceil(examples / batch_size).",
    )
    epochs: int = setting(
        100, COUNT, "Number of passes over the training images if `steps` is None."
    )
    batch_size: int = setting(
        512, COUNT, "Global batch size: number of images per step, summed over all devices."
    )
    grad_accum_steps: int = setting(
        1, COUNT, "Number of micro-batches per step over which gradients are accumulated."
    )
    precision: str = setting(
        "bfloat16",
        OneOf(tuple(PRECISIONS)),
        "Precision of activations and of the teacher's parameters.",
    )
    teacher: TeacherSettings = section(TeacherSettings())
    student: StudentSettings = section(StudentSettings())
    students: StudentsSettings = section(StudentsSettings(), _Students())
    method: Settings = section(SingerSettings(), MethodSection())
    data: TrainingDataSettings = section(TrainingDataSettings())
    optimizer: OptimizerSettings = section(OptimizerSettings())
    schedule: ScheduleSettings = section(ScheduleSettings())
    mesh: parallel.MeshSettings = section(parallel.MeshSettings())
    checkpoint: CheckpointSettings = section(CheckpointSettings())
    evals: EvalsSettings = section(EvalsSettings())
    log: LogSettings = section(LogSettings())

    @property
    def method_name(self) -> str:
        """Names of the methods of each student, those of a sum joined by +."""
        return ", ".join(" + ".join(methods.chosen(own.method)) for own in self.each().values())

    def each(self) -> dict[str, DistillSettings]:
        """Returns the settings of each student's run by name; the only student has the name ""."""
        own = [field.name for field in dataclasses.fields(StudentSettings)]
        return {
            name: dataclasses.replace(
                self,
                students=StudentsSettings(),
                seed=one.seed,
                student=StudentSettings(**{key: getattr(one, key) for key in own}),
                method=one.method,
                optimizer=one.optimizer,
            )
            for name, one in self.students.named.items()
        } or {"": self}


# Values for runs that are older than these keys, if they differ from the current defaults.
_FORMER = {"method.match.norm_clip_quantile": 1.0}


def of_saved(config: Mapping[str, Any]) -> DistillSettings:
    """Returns the settings of a saved run; keys newer than the run get their former behaviour."""
    flat = _FORMER | current(flatten(config))
    return from_flat(DistillSettings(), flat | _former_clipping(flat))


def _former_clipping(flat: Mapping[str, Any]) -> dict[str, float]:
    """Returns the norm clipping of SiNGER in runs from before 0.2.0, which did not clip by default.

    Such a run has no `loss_scale`. In a sum with FitNet, whose default is 0.9, the key is left.
    """
    found = {}
    for key, name in flat.items():
        section = key.removesuffix("name")
        if not key.endswith("method.name") or f"{section}loss_scale" in flat:
            continue
        weights = {
            one: flat.get(f"{section}method_weights.{one}", 0) for one in ("singer", "fitnet")
        }
        singer = name == "singer" or weights["singer"] > 0
        clip = f"{section}match.norm_clip_quantile"
        if singer and not weights["fitnet"] and flat.get(clip) is None:
            found[clip] = 1.0
    return found
