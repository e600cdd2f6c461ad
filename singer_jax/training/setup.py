"""The students of a run before their first step, from settings that are checked early."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, UInt32

from singer_jax import methods
from singer_jax.errors import InputError
from singer_jax.methods import Method, MethodRequirements, ModelFeatures, nullspace
from singer_jax.models import registers, zoo
from singer_jax.models.architecture import PRECISIONS, Architecture, ComputePolicy
from singer_jax.models.network import Network, resolve_model
from singer_jax.models.params import Params
from singer_jax.models.vit import VisionTransformer
from singer_jax.models.weight_files import WeightsFile
from singer_jax.models.weights import abstract_model, load_model
from singer_jax.models.zoo import ModelSpec
from singer_jax.platform import parallel
from singer_jax.training.optimizer import make_optimizer, make_schedule
from singer_jax.training.settings import DistillSettings
from singer_jax.training.step import Distillation, Students, TrainState, teach
from singer_jax.training.teacher import Teacher, make_teacher


@dataclasses.dataclass(frozen=True)
class StudentSetup:
    """A student before its first step; no parameters are in memory yet.

    Attributes:
      distillation: The static half of the student's step.
      mesh: The devices.
      steps: Number of steps of the whole run.
      steps_per_epoch: Number of steps of an epoch, ceil(examples / batch size).
      state: The abstract state with shardings, into which a checkpoint is restored.
      teacher_model: The teacher; None for a method without one.
      weights: The file of the student's parameters before the first step; None: random ones.
      draw_student: The jitted program that makes random parameters from a seed.
      init_student: Returns the student's parameters before the first step.
      measured: The abstract result of `measure`; empty for a method that needs no measurements.
      measure: Measures a batch from the teacher's features (`methods.measure`).
      make_method: Makes the method from the teacher and the summed measurements; traceable.
    """

    distillation: Distillation
    mesh: Mesh
    steps: int
    steps_per_epoch: int
    state: TrainState
    teacher_model: Teacher | None
    weights: WeightsFile | None
    draw_student: Callable[[UInt32[Array, ""]], Params]
    init_student: Callable[[], Params]
    measured: Any
    measure: Callable[[ModelFeatures], Any]
    make_method: Callable[[VisionTransformer | None, Any], Method]

    def method_of(self, state: TrainState) -> Method:
        """Returns the student's method with its parameters in a state."""
        parts = state.params["method"], state.constants["method"]
        return nnx.merge(self.distillation.method, *parts)


@dataclasses.dataclass(frozen=True)
class RunSetup:
    """The students of a run before their first step; they share the data, devices and steps.

    Attributes:
      each: Each student by its name; the name of a single student is empty.
    """

    each: Mapping[str, StudentSetup]

    @property
    def students(self) -> Students:
        """The static half of the step of all students."""
        return Students({name: own.distillation for name, own in self.each.items()})

    @property
    def any(self) -> StudentSetup:
        """One of the students, for the attributes that all share."""
        return next(iter(self.each.values()))

    @property
    def teacher_model(self) -> Teacher | None:
        """The teacher; None where no method reads one."""
        return next((own.teacher_model for own in self.each.values() if own.teacher_model), None)

    @property
    def image_size(self) -> int:
        """Side of the crops that the loader makes, in pixels; the largest model's."""
        networks = [own.distillation.student for own in self.each.values()]
        if self.teacher_model:
            networks.append(self.teacher_model.network)
        return max(network.image_size for network in networks)

    @property
    def states(self) -> dict[str, TrainState]:
        """The abstract states with shardings, into which a checkpoint is restored."""
        return {name: own.state for name, own in self.each.items()}

    @property
    def teacher(self) -> Params | None:
        """The teacher's abstract parameters with shardings; None where no method reads one."""
        return self.teacher_model.params if self.teacher_model else None

    def load_teacher(self, neurons: registers.Neurons = ()) -> Params | None:
        """Reads the teacher's parameters into their shardings; None where no method reads one.

        Args:
          neurons: The neurons of its test-time registers.
        """
        teacher_model = self.teacher_model
        return teacher_model.with_neurons(teacher_model.load(), neurons) if teacher_model else None

    def make_states(self) -> Callable[..., dict[str, TrainState]]:
        """Returns the jitted program that makes the states before the first step.

        Its arguments are the teacher's parameters, the students' parameters by name, and the
        measurements for their methods, by name. A weight matrix that several students read is
        decomposed once.
        """

        def make(
            teacher: Params | None,
            students: dict[str, Params],
            measured: Mapping[str, Any] | None = None,
        ) -> dict[str, TrainState]:
            model = self.teacher_model.network.merge(teacher) if self.teacher_model else None
            with nullspace.decomposing_once():
                return {
                    name: own.distillation.init(
                        students[name],
                        own.make_method(
                            model if own.teacher_model else None, (measured or {}).get(name)
                        ),
                    )
                    for name, own in self.each.items()
                }

        return jax.jit(make, out_shardings=jax.tree.map(lambda x: x.sharding, self.states))

    def init_states(
        self, teacher: Params | None, measured: Mapping[str, Any] | None = None
    ) -> dict[str, TrainState]:
        """Returns the states before the first step.

        Args:
          teacher: The teacher's parameters.
          measured: The measurements that `training.calibration.measure` returns; None if no method
            needs any.
        """
        students = {name: own.init_student() for name, own in self.each.items()}
        return self.make_states()(teacher, students, measured)


def setup_students(
    settings: DistillSettings,
    examples: int,
    num_classes: int,
    mesh: Mesh | None = None,
    weights_needed: bool = True,
) -> RunSetup:
    """Checks settings against models and devices, and prepares the students of the run.

    Args:
      settings: The settings of the run.
      examples: Number of images of the training split.
      num_classes: Number of classes of its labels; 0 without labels.
      mesh: The devices that will compute, which may be only described; None: this machine's
        devices, as configured.
      weights_needed: False for a step that is only compiled: the teacher may have no weights.

    Raises:
      InputError: The settings cannot work; raised before any long computation.
    """
    mesh = mesh or parallel.make_mesh(settings.mesh.data, settings.mesh.fsdp)
    if settings.batch_size % (mesh.size * settings.grad_accum_steps):
        raise InputError(
            f"batch_size: {settings.batch_size} is not divisible by {mesh.size} devices x "
            f"{settings.grad_accum_steps} micro-batches"
        )
    students = settings.each()
    for name, own in students.items():
        if own.student.model:  # a mistyped name fails before the teacher's weights are downloaded
            with _named(name):
                zoo.lookup(own.student.model, own.student.overrides)
    teacher = None
    if any(methods.needs(own.method).teacher for own in students.values()):
        teacher = make_teacher(settings, mesh, weights_needed)
    each = {}
    for name, own in students.items():
        with _named(name):
            each[name] = _student(own, teacher, examples, num_classes, mesh)
    return RunSetup(each)


@contextlib.contextmanager
def _named(student: str) -> Iterator[None]:
    """Names one of several students in the errors that are raised inside."""
    try:
        yield
    except InputError as error:
        raise InputError(f"students.{student}: {error}" if student else str(error)) from error


def _student(
    settings: DistillSettings,
    teacher_model: Teacher | None,
    examples: int,
    num_classes: int,
    mesh: Mesh,
) -> StudentSetup:
    needs = methods.needs(settings.method)
    if needs.labels and not num_classes:
        raise InputError(
            "the method needs labels, but the images have none; put them into one folder a class"
        )
    teacher_model = teacher_model if needs.teacher else None
    teacher = teacher_model.network if teacher_model else None
    steps_per_epoch = math.ceil(examples / settings.batch_size)
    steps = settings.epochs * steps_per_epoch if settings.steps is None else settings.steps
    learning_rate = settings.optimizer.learning_rate
    schedule = make_schedule(settings.schedule, learning_rate, steps, steps_per_epoch)

    spec, weights = resolve_model(
        "student", settings.student, settings.data.image_size, settings.data.normalisation
    )
    if not weights and "num_classes" not in settings.student.overrides:
        classes = teacher.spec.arch.num_classes if needs.teacher_logits else num_classes
        arch = dataclasses.replace(spec.arch, num_classes=classes * needs.logits)
        spec = dataclasses.replace(spec, arch=arch)
    _check_heads(needs, spec, teacher, num_classes)
    dtype, backend = PRECISIONS[settings.precision], parallel.platform(mesh)
    policy = ComputePolicy(dtype, jnp.float32, settings.student.remat, backend)
    place = functools.partial(parallel.tree_shardings, mesh)
    graph, abstract_student = abstract_model(spec.arch, policy)
    draw_student = _drawing(spec.arch, policy, mesh)

    def measure(seen: ModelFeatures) -> Any:
        return methods.measure(seen, settings.method)

    def make_method(model: VisionTransformer | None, measured: Any = None) -> Method:
        rngs = nnx.Rngs(params=jax.random.fold_in(_init_key(settings.seed), 1))
        return methods.make(model, spec.arch, settings.method, rngs, measured)

    measured = _abstract_measured(measure, teacher_model) if needs.measured else {}
    abstract_method = nnx.eval_shape(
        lambda params, measured: make_method(teacher.merge(params) if teacher else None, measured),
        teacher_model.params if teacher_model else None,
        measured,
    )
    distillation = Distillation(
        student=Network(spec, graph),
        teacher=teacher,
        method=nnx.graphdef(abstract_method),
        optimizer=make_optimizer(settings.optimizer, schedule),
        schedule=schedule,
        blocks=spec.arch.depth if needs.logits else max(abstract_method.student_layers) + 1,
        head=needs.logits,
        teacher_reads=abstract_method.teacher_reads,
        seed=settings.seed,
        grad_accum_steps=settings.grad_accum_steps,
    )

    def init_student() -> Params:
        if weights:
            return load_model(spec, weights, policy, place)[1]
        return draw_student(np.uint32(settings.seed))

    state = jax.eval_shape(distillation.init, abstract_student, abstract_method)
    return StudentSetup(
        distillation=distillation,
        mesh=mesh,
        steps=steps,
        steps_per_epoch=steps_per_epoch,
        state=parallel.with_shardings(mesh, state),
        teacher_model=teacher_model,
        weights=weights,
        draw_student=draw_student,
        init_student=init_student,
        measured=measured,
        measure=measure,
        make_method=make_method,
    )


def _abstract_measured(measure: Callable[[ModelFeatures], Any], teacher_model: Teacher) -> Any:
    network = teacher_model.network
    image = jax.ShapeDtypeStruct((1, *network.spec.arch.img_size, 3), jnp.uint8)

    def of_batch(params: Params, image: jax.Array) -> Any:
        features = teach(network, range(network.spec.arch.depth), params, {"image": image})
        return measure(ModelFeatures.of_streams(network.merge(params), features))

    return jax.eval_shape(of_batch, teacher_model.params, image)


@functools.lru_cache(maxsize=32)
def _drawing(
    arch: Architecture, policy: ComputePolicy, mesh: Mesh
) -> Callable[[UInt32[Array, ""]], Params]:
    """Returns the program of random students; all that differ only in their seeds share it."""

    def draw(seed: UInt32[Array, ""]) -> Params:
        rngs = nnx.Rngs(params=jax.random.fold_in(_init_key(seed), 0))
        return nnx.to_pure_dict(nnx.state(VisionTransformer(arch, policy, rngs=rngs)))

    abstract = abstract_model(arch, policy)[1]
    return jax.jit(draw, out_shardings=parallel.tree_shardings(mesh, abstract))


def _init_key(seed: int | UInt32[Array, ""]) -> jax.Array:
    """Returns the key of all random numbers before the first step; no step's key equals it."""
    return jax.random.fold_in(jax.random.key(seed), 2**32 - 1)


def _check_heads(
    needs: MethodRequirements, student: ModelSpec, teacher: Network | None, num_classes: int
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
