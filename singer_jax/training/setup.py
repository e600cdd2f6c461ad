"""From settings to everything a run needs, failing early and saying why."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from singer_jax import backends, methods, parallel
from singer_jax.checkpoints import CheckpointSettings
from singer_jax.data.registry import TrainingDataSettings
from singer_jax.errors import InputError
from singer_jax.methods import Method, Needs
from singer_jax.methods.section import MethodSection
from singer_jax.methods.singer import SingerSettings
from singer_jax.models.architecture import PRECISIONS, Numerics
from singer_jax.models.network import ModelSettings, Network, StudentSettings, resolve_model
from singer_jax.models.params import Params
from singer_jax.models.vit import VisionTransformer
from singer_jax.models.weights import (
    abstract_model,
    load_model,
)
from singer_jax.models.zoo import ModelSpec
from singer_jax.ranges import COUNT, SEED, OneOf, optional
from singer_jax.settings import Settings, section, setting
from singer_jax.telemetry import LogSettings
from singer_jax.training.loop import EvalsSettings
from singer_jax.training.optimizer import (
    OptimizerSettings,
    ScheduleSettings,
    make_optimizer,
    make_schedule,
)
from singer_jax.training.step import Distillation, TrainState


@dataclasses.dataclass(frozen=True)
class DistillSettings(Settings):
    """All of a distillation."""

    job: str = setting("distill", OneOf(("distill",)), "the command")
    seed: int = setting(0, SEED, "of everything random")
    steps: int | None = setting(
        None, optional(COUNT), "of the run; None: epochs x ceil(examples / batch_size)"
    )
    epochs: int = setting(100, COUNT, "passes over the images, where `steps` is None")
    batch_size: int = setting(512, COUNT, "of all devices together", "images")
    accumulation: int = setting(1, COUNT, "micro-batches a step")
    precision: str = setting(
        "bfloat16",
        OneOf(tuple(PRECISIONS)),
        "of activations, and of the teacher's parameters",
    )
    teacher: ModelSettings = section(ModelSettings())
    student: StudentSettings = section(StudentSettings())
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
        """The method's name, or those of the summed ones."""
        return " + ".join(methods.chosen(self.method))


@dataclasses.dataclass(frozen=True)
class Setup:
    """A run before its first step; no parameters are in memory yet.

    Attributes:
      distillation: the static half of the step.
      mesh: of the devices.
      steps: of the whole run.
      steps_per_epoch: ceil(examples / batch size).
      image_size: side of the crops that the loader makes, in pixels; the larger model's.
      state, teacher: abstract, with shardings: what a checkpoint and the weights are read into;
        no teacher for a method without one.
      draw_student, make_state: the jitted programs of a random student, and of the state before the
        first step from the parameters of teacher and student.
      load_teacher: reads the teacher's parameters into their shardings; None without a teacher.
      init_student: the student's parameters before the first step.
      init_state: the state before the first step, from the teacher's parameters.
    """

    distillation: Distillation
    mesh: Mesh
    steps: int
    steps_per_epoch: int
    image_size: int
    state: TrainState
    teacher: Params | None
    draw_student: Callable[[], Params]
    make_state: Callable[[Params | None, Params], TrainState]
    load_teacher: Callable[[], Params | None]
    init_student: Callable[[], Params]
    init_state: Callable[[Params | None], TrainState]


def setup(
    settings: DistillSettings, examples: int, num_classes: int, mesh: Mesh | None = None
) -> Setup:
    """Checks settings against models and devices, and prepares their run.

    Args:
      settings: of the run.
      examples: size of the training split.
      num_classes: of its labels; 0 without labels.
      mesh: of the devices that will compute, which may be only described; None: as configured, of
        the devices that are here.

    Raises:
      InputError: anything in the settings that cannot work; before any long work.
    """
    needs = methods.needs(settings.method)
    if needs.labels and not num_classes:
        raise InputError(
            "the method needs labels, but the images have none; put them into one folder a class"
        )
    mesh = mesh or parallel.make_mesh(settings.mesh.data, settings.mesh.fsdp)
    if settings.batch_size % (mesh.size * settings.accumulation):
        raise InputError(
            f"batch_size: {settings.batch_size} is not divisible by {mesh.size} devices x "
            f"{settings.accumulation} micro-batches"
        )
    steps_per_epoch = math.ceil(examples / settings.batch_size)
    steps = settings.epochs * steps_per_epoch if settings.steps is None else settings.steps
    learning_rate = settings.optimizer.learning_rate
    schedule = make_schedule(settings.schedule, learning_rate, steps, steps_per_epoch)
    optimizer = make_optimizer(settings.optimizer, schedule)

    dtype = PRECISIONS[settings.precision]
    teacher, abstract_teacher, teacher_weights = None, None, None
    backend = parallel.platform(mesh)
    teacher_numerics = Numerics(
        dtype, dtype, backend=backend, stacked=backends.choices(backend).stack_frozen
    )
    if needs.teacher:
        teacher_spec, teacher_weights = _resolve("teacher", settings)
        if not teacher_weights:
            raise InputError("teacher.weights: empty; give a hub name, a file or a run")
        graph, abstract_teacher = abstract_model(teacher_spec.arch, teacher_numerics)
        teacher = Network(teacher_spec, graph)

    student_spec, student_weights = _resolve("student", settings)
    if not student_weights and "num_classes" not in settings.student.overrides:
        classes = teacher.spec.arch.num_classes if needs.teacher_logits else num_classes
        arch = dataclasses.replace(student_spec.arch, num_classes=classes * needs.logits)
        student_spec = dataclasses.replace(student_spec, arch=arch)
    _check_heads(needs, student_spec, teacher, num_classes)
    student_numerics = Numerics(dtype, jnp.float32, settings.student.remat, backend)
    student = Network(student_spec, abstract_model(student_spec.arch, student_numerics)[0])

    def place(abstract: Params) -> Params:
        return parallel.tree_shardings(mesh, abstract)

    def load(network: Network, weights: Path, numerics: Numerics) -> Params:
        return load_model(network.spec, weights, numerics, place)[1]

    def make_method(teacher_params: Params | None) -> Method:
        model = teacher.merge(teacher_params) if teacher else None
        rngs = nnx.Rngs(params=jax.random.fold_in(init_key(settings.seed), 1))
        return methods.make(model, student_spec.arch, settings.method, rngs)

    abstract_method = nnx.eval_shape(make_method, abstract_teacher)
    distillation = Distillation(
        student=student,
        teacher=teacher,
        method=nnx.graphdef(abstract_method),
        optimizer=optimizer,
        schedule=schedule,
        blocks=student_spec.arch.depth if needs.logits else max(abstract_method.student_layers) + 1,
        head=needs.logits,
        teacher_reads=abstract_method.teacher_reads,
        seed=settings.seed,
        accumulation=settings.accumulation,
    )

    def random_student() -> Params:
        rngs = nnx.Rngs(params=jax.random.fold_in(init_key(settings.seed), 0))
        model = VisionTransformer(student_spec.arch, student_numerics, rngs=rngs)
        return nnx.to_pure_dict(nnx.state(model))

    abstract_student = jax.eval_shape(random_student)
    draw_student = jax.jit(random_student, out_shardings=place(abstract_student))

    def init_student() -> Params:
        if student_weights:
            return load(student, student_weights, student_numerics)
        return draw_student()

    def init(teacher_params: Params | None, student_params: Params) -> TrainState:
        return distillation.init(student_params, make_method(teacher_params))

    abstract_state = jax.eval_shape(init, abstract_teacher, abstract_student)
    make_state = jax.jit(init, out_shardings=parallel.tree_shardings(mesh, abstract_state))

    def load_teacher() -> Params | None:
        return load(teacher, teacher_weights, teacher_numerics) if teacher else None

    def init_state(teacher_params: Params | None) -> TrainState:
        return make_state(teacher_params, init_student())

    return Setup(
        distillation=distillation,
        mesh=mesh,
        steps=steps,
        steps_per_epoch=steps_per_epoch,
        image_size=max(network.image_size for network in (student, teacher) if network),
        state=parallel.with_shardings(mesh, abstract_state),
        teacher=parallel.with_shardings(mesh, abstract_teacher) if teacher else None,
        draw_student=draw_student,
        make_state=make_state,
        load_teacher=load_teacher,
        init_student=init_student,
        init_state=init_state,
    )


def init_key(seed: int) -> jax.Array:
    """The key of everything drawn before the first step; no step number folds into the same."""
    return jax.random.fold_in(jax.random.key(seed), 2**32 - 1)


def _resolve(role: str, settings: DistillSettings) -> tuple[ModelSpec, Path | None]:
    data = settings.data
    return resolve_model(role, getattr(settings, role), data.image_size, data.normalisation)


def _check_heads(
    needs: Needs, student: ModelSpec, teacher: Network | None, num_classes: int
) -> None:
    classes = student.arch.num_classes
    if needs.teacher_logits and not teacher.spec.arch.num_classes:
        raise InputError(
            f"method.name: the weights of the teacher {teacher.spec.name} hold no head, and "
            "logit_kd needs its logits; take weights that were trained to classify"
        )
    if needs.teacher_logits and teacher.spec.arch.num_classes != classes:
        raise InputError(
            f"the teacher {teacher.spec.name} has {teacher.spec.arch.num_classes} classes, the "
            f"student {student.name} {classes}; logit_kd needs the same"
        )
    if needs.labels and classes < num_classes:
        raise InputError(
            f"the student {student.name} has {classes} classes, the images {num_classes}"
        )
