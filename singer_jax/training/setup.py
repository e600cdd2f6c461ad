"""From settings to everything a run needs, failing early and saying why."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

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
from singer_jax.models.quantised import check_installed
from singer_jax.models.vit import VisionTransformer
from singer_jax.models.weight_files import WeightsFile
from singer_jax.models.weights import abstract_model, load_model
from singer_jax.models.zoo import ModelSpec
from singer_jax.platform import backends, parallel
from singer_jax.training.optimizer import make_optimizer, make_schedule
from singer_jax.training.settings import DistillSettings
from singer_jax.training.step import Distillation, Students, TrainState, teach

if TYPE_CHECKING:  # a step needs no orbax
    from singer_jax.runs.checkpoints import Checkpoints


@dataclasses.dataclass(frozen=True)
class Teacher:
    """A frozen teacher before its parameters are in memory.

    Attributes:
      network: what it is.
      params: abstract, with shardings; test-time registers are among them.
      policy: how it computes.
      weights: their file; None of a step that is only compiled.
      mesh: of the devices.
    """

    network: Network
    params: Params
    policy: ComputePolicy
    weights: WeightsFile | None
    mesh: Mesh

    @property
    def uncleaned(self) -> Network:
        """It without what cleans its features."""
        plain = dataclasses.replace(self.policy, artifact_removal=None)
        return Network(self.network.spec, abstract_model(self.network.spec.arch, plain)[0])

    def load(self) -> Params:
        """Reads the parameters of `uncleaned` into their shardings; raises as `load_model`."""
        place = functools.partial(parallel.tree_shardings, self.mesh)
        plain = dataclasses.replace(self.policy, artifact_removal=None)
        return load_model(self.network.spec, self.weights, plain, place)[1]

    def with_neurons(self, params: Params, neurons: registers.Neurons) -> Params:
        """Its own parameters, from those that `load` gives and its register neurons."""
        place = self.params.get(registers.NAME)
        if place is None:
            return params
        marked = registers.marked(neurons, place.shape)
        return params | {registers.NAME: parallel.put(marked, place.sharding)}


@dataclasses.dataclass(frozen=True)
class Setup:
    """A student's run before its first step; no parameters are in memory yet.

    Attributes:
      distillation: the static half of its step.
      mesh: of the devices.
      steps: of the whole run.
      steps_per_epoch: ceil(examples / batch size).
      state: abstract, with shardings: what a checkpoint is read into.
      teacher_model: its teacher; None for a method without one.
      weights: the file of the student's parameters before the first step; None: random ones.
      draw_student: the jitted program of a random student, from a seed.
      init_student: the student's parameters before the first step.
      measured: what `measure` gives, abstract; empty for a method that needs nothing of batches.
      measure: of the teacher's features of a batch (`methods.measure`).
      make_method: from the teacher and the sum of what is measured, traceable.
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

    @property
    def image_size(self) -> int:
        """Side of the crops that the loader makes, in pixels; the larger model's."""
        return Setups({"": self}).image_size

    @property
    def teacher(self) -> Params | None:
        """The teacher's parameters, abstract, with shardings; None for a method without one."""
        return Setups({"": self}).teacher

    def load_teacher(self) -> Params | None:
        """As `Setups.load_teacher`."""
        return Setups({"": self}).load_teacher()

    def init_state(self, teacher: Params | None) -> TrainState:
        """As `Setups.init_states`, of this one."""
        return Setups({"": self}).init_states(teacher)[""]


@dataclasses.dataclass(frozen=True)
class Setups:
    """A run of one student or of several before its first step; they share all but themselves.

    Attributes:
      each: by the student's name; of a single one it is empty.
    """

    each: Mapping[str, Setup]

    @property
    def students(self) -> Students:
        """The static half of a step of all."""
        return Students({name: own.distillation for name, own in self.each.items()})

    @property
    def any(self) -> Setup:
        """One of them, for what they share."""
        return next(iter(self.each.values()))

    @property
    def teacher_model(self) -> Teacher | None:
        """Their teacher; None where no method reads one."""
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
        """Abstract, with shardings: what a checkpoint is read into."""
        return {name: own.state for name, own in self.each.items()}

    @property
    def teacher(self) -> Params | None:
        """The teacher's parameters, abstract, with shardings; None where no method reads one."""
        return self.teacher_model.params if self.teacher_model else None

    def load_teacher(self, neurons: registers.Neurons = ()) -> Params | None:
        """Reads the teacher's parameters into their shardings; None where no method reads one.

        Args:
          neurons: those of its test-time registers.
        """
        teacher_model = self.teacher_model
        return teacher_model.with_neurons(teacher_model.load(), neurons) if teacher_model else None

    def make_states(self) -> Callable[..., dict[str, TrainState]]:
        """The jitted program of the states before the first step.

        Its arguments are the parameters of the teacher and, by name, of the students, and what was
        measured for these. What several students read of one layer is decomposed once.
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
        """The states before the first step.

        Args:
          teacher: its parameters.
          measured: as `training.calibration.measure` gives it; None where no method needs any.
        """
        students = {name: own.init_student() for name, own in self.each.items()}
        return self.make_states()(teacher, students, measured)


def saved_tree(states: Mapping[str, Any]) -> Any:
    """What a checkpoint holds of the students' states: of a single one its state alone."""
    return states[""] if "" in states else dict(states)


def restore_states(checkpoints: Checkpoints, step: int, run: Setups) -> dict[str, TrainState]:
    """The states of a checkpoint of `saved_tree`; raises as `Checkpoints.restore`."""
    found = checkpoints.restore(step, saved_tree(run.states))
    return {"": found} if "" in run.each else found


def setup(
    settings: DistillSettings, examples: int, num_classes: int, mesh: Mesh | None = None
) -> Setup:
    """`setup_students` of a run with one student."""
    return setup_students(settings, examples, num_classes, mesh).each[""]


def setup_students(
    settings: DistillSettings,
    examples: int,
    num_classes: int,
    mesh: Mesh | None = None,
    weights_needed: bool = True,
) -> Setups:
    """Checks settings against models and devices, and prepares their run.

    Args:
      settings: of the run.
      examples: size of the training split.
      num_classes: of its labels; 0 without labels.
      mesh: of the devices that will compute, which may be only described; None: as configured, of
        the devices that are here.
      weights_needed: False for a step that is only compiled: the teacher may be without weights.

    Raises:
      InputError: anything in the settings that cannot work; before any long work.
    """
    mesh = mesh or parallel.make_mesh(settings.mesh.data, settings.mesh.fsdp)
    if settings.batch_size % (mesh.size * settings.grad_accum_steps):
        raise InputError(
            f"batch_size: {settings.batch_size} is not divisible by {mesh.size} devices x "
            f"{settings.grad_accum_steps} micro-batches"
        )
    students = settings.each()
    for own in students.values():
        if own.student.model:  # a mistyped name is told before the teacher's weights are fetched
            zoo.lookup(own.student.model, own.student.overrides)
    teacher = None
    if any(methods.needs(own.method).teacher for own in students.values()):
        teacher = _teacher(settings, mesh, weights_needed)
    each = {}
    for name, own in students.items():
        try:
            each[name] = _student(own, teacher, examples, num_classes, mesh)
        except InputError as error:
            raise InputError(f"students.{name}: {error}" if name else str(error)) from error
    return Setups(each)


def _teacher(settings: DistillSettings, mesh: Mesh, weights_needed: bool) -> Teacher:
    spec, weights = _resolve("teacher", settings)
    if settings.teacher.artifact_removal == "planted" and not spec.arch.planted:
        raise InputError(
            f"teacher.artifact_removal: planted, but nothing is planted in {spec.name}"
        )
    if weights_needed and not weights:
        raise InputError("teacher.weights: empty; give a hub name, a file or a run")
    dtype, backend = PRECISIONS[settings.precision], parallel.platform(mesh)
    stacked = backends.choices(backend).stack_frozen and spec.arch.blocks_alike
    quantised = settings.teacher.precision
    if quantised:
        check_installed(quantised)
    policy = ComputePolicy(
        dtype,
        dtype,
        quantised=quantised,
        backend=backend,
        stacked=stacked,
        artifact_removal=settings.teacher.artifact_removal,
        gathered=parallel.replicated(mesh) if mesh.shape["fsdp"] > 1 else None,
    )
    graph, params = abstract_model(spec.arch, policy)
    params = parallel.with_shardings(mesh, params)
    return Teacher(Network(spec, graph), params, policy, weights, mesh)


def _student(
    settings: DistillSettings,
    teacher_model: Teacher | None,
    examples: int,
    num_classes: int,
    mesh: Mesh,
) -> Setup:
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

    spec, weights = _resolve("student", settings)
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
        rngs = nnx.Rngs(params=jax.random.fold_in(init_key(settings.seed), 1))
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
    return Setup(
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
    """The program of random students: one for all that differ in their seeds alone."""

    def draw(seed: UInt32[Array, ""]) -> Params:
        rngs = nnx.Rngs(params=jax.random.fold_in(init_key(seed), 0))
        return nnx.to_pure_dict(nnx.state(VisionTransformer(arch, policy, rngs=rngs)))

    abstract = abstract_model(arch, policy)[1]
    return jax.jit(draw, out_shardings=parallel.tree_shardings(mesh, abstract))


def init_key(seed: int | UInt32[Array, ""]) -> jax.Array:
    """The key of everything drawn before the first step; no step number folds into the same."""
    return jax.random.fold_in(jax.random.key(seed), 2**32 - 1)


def _resolve(role: str, settings: DistillSettings) -> tuple[ModelSpec, WeightsFile | None]:
    data = settings.data
    return resolve_model(role, getattr(settings, role), data.image_size, data.normalisation)


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
