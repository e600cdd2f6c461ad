"""From a configuration to everything a run needs, failing early and saying why."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from singer_jax import backends, methods, parallel
from singer_jax.errors import InputError
from singer_jax.methods import Method, Needs
from singer_jax.models.architecture import PRECISIONS, Numerics
from singer_jax.models.network import Network, resolve_model
from singer_jax.models.params import Params
from singer_jax.models.vit import VisionTransformer
from singer_jax.models.weights import (
    abstract_model,
    load_model,
)
from singer_jax.models.zoo import ModelSpec
from singer_jax.training.optimizer import make_optimizer, make_schedule
from singer_jax.training.step import Distillation, TrainState


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


def setup(config: Any, examples: int, num_classes: int, mesh: Mesh | None = None) -> Setup:
    """Checks a configuration and prepares its run.

    Args:
      config: as `singer_jax.config.default` describes it.
      examples: size of the training split.
      num_classes: of its labels; 0 without labels.
      mesh: of the devices that will compute, which may be only described; None: as configured, of
        the devices that are here.

    Raises:
      InputError: anything in the configuration that cannot work; before any long work.
    """
    needs = methods.needs(config.method)
    if needs.labels and not num_classes:
        raise InputError(
            "the method needs labels, but the images have none; put them into one folder a class"
        )
    mesh = mesh or parallel.make_mesh(config.mesh.data, config.mesh.fsdp)
    if config.batch_size % (mesh.size * config.accumulation):
        raise InputError(
            f"batch_size: {config.batch_size} is not divisible by {mesh.size} devices x "
            f"{config.accumulation} micro-batches"
        )
    steps_per_epoch = math.ceil(examples / config.batch_size)
    steps = config.epochs * steps_per_epoch if config.steps is None else config.steps
    learning_rate = config.optimizer.learning_rate
    schedule = make_schedule(config.schedule, learning_rate, steps, steps_per_epoch)
    optimizer = make_optimizer(config.optimizer, schedule)

    dtype = PRECISIONS[config.precision]
    teacher, abstract_teacher, teacher_weights = None, None, None
    backend = parallel.platform(mesh)
    teacher_numerics = Numerics(
        dtype, dtype, backend=backend, stacked=backends.choices(backend).stack_frozen
    )
    if needs.teacher:
        teacher_spec, teacher_weights = _resolve("teacher", config)
        if not teacher_weights:
            raise InputError("teacher.weights: empty; give a hub name, a file or a run")
        graph, abstract_teacher = abstract_model(teacher_spec.arch, teacher_numerics)
        teacher = Network(teacher_spec, graph)

    student_spec, student_weights = _resolve("student", config)
    if not student_weights and "num_classes" not in config.student.overrides:
        classes = teacher.spec.arch.num_classes if needs.teacher_logits else num_classes
        arch = dataclasses.replace(student_spec.arch, num_classes=classes * needs.logits)
        student_spec = dataclasses.replace(student_spec, arch=arch)
    _check_heads(needs, student_spec, teacher, num_classes)
    student_numerics = Numerics(dtype, jnp.float32, config.student.remat, backend)
    student = Network(student_spec, abstract_model(student_spec.arch, student_numerics)[0])

    def place(abstract: Params) -> Params:
        return parallel.tree_shardings(mesh, abstract)

    def load(network: Network, weights: Path, numerics: Numerics) -> Params:
        return load_model(network.spec, weights, numerics, place)[1]

    def make_method(teacher_params: Params | None) -> Method:
        model = teacher.merge(teacher_params) if teacher else None
        rngs = nnx.Rngs(params=jax.random.fold_in(init_key(config.seed), 1))
        return methods.make(model, student_spec.arch, config.method, rngs)

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
        seed=config.seed,
        accumulation=config.accumulation,
    )

    def random_student() -> Params:
        rngs = nnx.Rngs(params=jax.random.fold_in(init_key(config.seed), 0))
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


def _resolve(role: str, config: Any) -> tuple[ModelSpec, Path | None]:
    chosen, data = config[role], config.data
    settings = (chosen.model, chosen.weights, dict(chosen.overrides))
    return resolve_model(role, *settings, data.image_size, data.normalisation)


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
