"""The training step: one pure function of (state, teacher, batch), for one student or several."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from singer_jax.methods import Batch, FrozenVariable, Method, ModelFeatures
from singer_jax.models.network import Network
from singer_jax.models.params import Keys, Params, split
from singer_jax.runs.metrics import StepMetrics

Features = Mapping[int, Float[Array, "batch tokens dim"]]
"""Raw residual streams by block, as `VisionTransformer.streams_at` returns them."""

Metrics = dict[str, Float[Array, ""]]

Logged = Bool[Array, ""] | bool | None
"""True for a step with diagnostics. They are 0 in other steps; None: in a program without them."""

PARTS = ("teacher", "student", "method", "optimizer")
"""The scopes of a step; the method's passes through the teacher's blocks count as `method`."""


class TrainState(NamedTuple):
    """The complete state of a training run, which a checkpoint stores.

    Attributes:
      step: Number of completed steps.
      params: Trained parameters, under `student` and `method`.
      constants: Variables that the optimiser does not update: student parameters outside the
        distilled path, null spaces, statistics of the teacher's tokens.
      opt_state: State of the optax optimiser.
    """

    step: Int[Array, ""]
    params: Params
    constants: Params
    opt_state: optax.OptState


class StepOutput(NamedTuple):
    """Metrics and gradients of a student for a batch, averaged over the micro-batches.

    Attributes:
      metrics: Metrics of the state before the step.
      gradients: Gradients of the state's `params`.
      means: Means for the statistics of the method (`Method.observe`); empty for most methods.
    """

    metrics: Metrics
    gradients: Params
    means: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Distillation:
    """The static part of a student's training step: everything except arrays.

    Attributes:
      student, teacher: Networks; the teacher is None for a method that needs none.
      method: Graph definition of the method.
      optimizer: Optimiser of the state's `params`.
      schedule: Learning rate by step, for the metrics.
      blocks, head: Number of the student's blocks that the loss reads, and True if it reads the
        head.
      teacher_reads: Teacher blocks whose features the method reads.
      seed: Seed of the random numbers of the steps.
      grad_accum_steps: Number of micro-batches per step, over which losses and gradients are
        averaged.
    """

    student: Network
    teacher: Network | None
    method: nnx.GraphDef
    optimizer: optax.GradientTransformation
    schedule: optax.Schedule
    blocks: int
    head: bool
    teacher_reads: tuple[int, ...]
    seed: int = 0
    grad_accum_steps: int = 1

    def teach(self, teacher: Params | None, batch: Any) -> Features:
        """Returns the frozen teacher's features that the method reads; empty without a teacher."""
        return teach(self.teacher, self.teacher_reads, teacher, batch)

    def loss(
        self,
        params: Params,
        constants: Params,
        teacher: Params | None,
        features: Features,
        batch: Any,
        key: jax.Array,
    ) -> tuple[Float[Array, ""], Metrics]:
        """Returns the sum of the method's loss terms, and each term as `loss_<name>`.

        Args:
          params, constants: Parts of a state.
          teacher: Parameters of the teacher.
          features: Features as `teach` returns them.
          batch: A batch as for `step`; a micro-batch also has `row`, the index of each image in the
            batch of the step.
          key: Key of the method's random numbers.
        """
        method: Method = nnx.merge(self.method, params["method"], constants["method"])
        student = self.student.merge(params["student"], constants["student"])
        with jax.named_scope("student"):
            own = student.features(self.student.spec.prepare(batch["image"]), self.blocks)
        seen = ModelFeatures(student, dict(enumerate(own)))
        taught = self._taught(teacher, features)
        rows = batch.get("row")
        given = Batch(batch["label"], key, rows, 1 if rows is None else self.grad_accum_steps)
        with jax.named_scope("method"):
            terms = method.loss(taught, seen, given)
        return sum(terms.values()), {f"loss_{name}": value for name, value in terms.items()}

    def diagnose(self, state: TrainState, teacher: Params | None, features: Features) -> Metrics:
        """Returns the method's diagnostics of a batch, from features as `teach` returns them."""
        with jax.named_scope("method"):
            return self._method(state).diagnose(self._taught(teacher, features))

    def observe(
        self, state: TrainState, teacher: Params | None, features: Features
    ) -> dict[str, Any]:
        """Returns the `means` of a batch for the statistics of the method."""
        if self.teacher is None:
            return {}
        with jax.named_scope("method"):
            return self._method(state).observe(self._taught(teacher, features))

    def absorb(self, state: TrainState, means: dict[str, Any]) -> TrainState:
        """Returns the state with the method's statistics updated with the means of a batch."""
        if not means:
            return state
        method = self._method(state)
        with jax.named_scope("method"):
            method.absorb(means)
        constants = nnx.to_pure_dict(nnx.state(method, FrozenVariable))
        return state._replace(constants=state.constants | {"method": constants})

    def _taught(self, teacher: Params | None, features: Features) -> ModelFeatures | None:
        if self.teacher is None:
            return None
        return ModelFeatures.of_streams(self.teacher.merge(teacher), features)

    def _method(self, state: TrainState) -> Method:
        return nnx.merge(self.method, state.params["method"], state.constants["method"])

    def gradients(
        self,
        state: TrainState,
        teacher: Params | None,
        batch: Any,
        logged: Logged = True,
    ) -> tuple[Metrics, Params]:
        """Returns metrics and gradients of `state.params`, averaged over the micro-batches."""
        return Students({"": self}).gradients({"": state}, teacher, batch, logged)[""][:2]

    def step(
        self,
        state: TrainState,
        teacher: Params | None,
        batch: Any,
        logged: Logged = True,
    ) -> tuple[TrainState, Metrics]:
        """Runs `Students.step` for this student only."""
        states, metrics = Students({"": self}).step({"": state}, teacher, batch, logged)
        return states[""], metrics[""]

    def update(self, state: TrainState, found: StepOutput) -> tuple[TrainState, Metrics]:
        """Returns the state after a step, and the metrics with `grad_norm` and `learning_rate`."""
        metrics, gradients, means = found
        with jax.named_scope("optimizer"):
            updates, opt_state = self.optimizer.update(gradients, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
        metrics = metrics | {
            "grad_norm": optax.tree.norm(gradients),
            "learning_rate": self.schedule(state.step),
        }
        constants = self.absorb(state, means).constants
        return TrainState(state.step + 1, params, constants, opt_state), metrics

    def init(self, student: Params, method: Method) -> TrainState:
        """Returns the state before the first step; traceable."""
        trained, untouched = self.split_path(student)
        _, parts, constants = nnx.split(method, nnx.Param, FrozenVariable)
        params = {"student": trained, "method": nnx.to_pure_dict(parts)}
        constants = {"student": untouched, "method": nnx.to_pure_dict(constants)}
        return TrainState(jnp.int32(0), params, constants, self.optimizer.init(params))

    def split_path(self, student: Params) -> tuple[Params, Params]:
        """Splits the student's parameters into those on the distilled path and the others.

        No gradient reaches the others. They are not updated, not even by weight decay (as in the
        official code). A synthetic outlier vector is not updated either.
        """

        def on_path(keys: Keys) -> bool:
            if keys[0] == "blocks":
                return keys[1] < self.blocks
            if keys[0] == "planted":
                return False
            return self.head or keys[0] not in ("norm", "fc_norm", "attn_pool", "head", "head_dist")

        return split(student, on_path)


@dataclasses.dataclass(frozen=True)
class Students:
    """The static part of a step of several students that share the teacher's forward pass.

    Attributes:
      each: Distillations by name of the student, with the same teacher and number of micro-batches.
      sequential: True to compute the gradients of one student after the other, so that only the
        activations of one are in memory at a time.
    """

    each: Mapping[str, Distillation]
    sequential: bool = False

    @property
    def teacher(self) -> Network | None:
        """The teacher of all students; None if no method reads one."""
        return next((own.teacher for own in self.each.values() if own.teacher), None)

    @property
    def teacher_reads(self) -> tuple[int, ...]:
        """Teacher blocks whose features any of the methods reads."""
        return tuple(sorted({layer for own in self.each.values() for layer in own.teacher_reads}))

    def teach(self, teacher: Params | None, batch: Any) -> Features:
        """Returns the frozen teacher's features that any method reads; empty without a teacher."""
        return teach(self.teacher, self.teacher_reads, teacher, batch)

    def gradients(
        self,
        states: Mapping[str, TrainState],
        teacher: Params | None,
        batch: Any,
        logged: Logged = True,
    ) -> dict[str, StepOutput]:
        """Returns the output of each student for a batch.

        The statistics of a method are updated with a micro-batch before its loss is computed.
        """
        keys = {
            name: jax.random.fold_in(jax.random.key(own.seed), states[name].step)
            for name, own in self.each.items()
        }

        def of_micro_batch(batch: Any) -> Any:
            seen = self.teach(teacher, batch), batch
            found: dict[str, StepOutput] = {}
            for name, own in self.each.items():
                if self.sequential and found:
                    # The computation of this student starts after that of the previous student.
                    last = next(reversed(found))
                    seen, found[last] = jax.lax.optimization_barrier((seen, found[last]))
                features, examples = seen
                means = own.observe(states[name], teacher, features)
                state = own.absorb(states[name], means)
                diagnostics = _only_if(
                    logged, functools.partial(own.diagnose, state, teacher, features)
                )
                (loss, metrics), gradients = jax.value_and_grad(own.loss, has_aux=True)(
                    state.params,
                    state.constants,
                    teacher,
                    features,
                    examples,
                    keys[name],
                )
                metrics = metrics | diagnostics | {"loss": loss}
                found[name] = StepOutput(metrics, gradients, means)
            return found

        return self._mean(of_micro_batch, batch)

    def diagnose(
        self, states: Mapping[str, TrainState], teacher: Params | None, batch: Any
    ) -> dict[str, Metrics]:
        """Returns the diagnostics of each student that `gradients` computes in a logged step."""

        def of_micro_batch(batch: Any) -> dict[str, Metrics]:
            features, found = self.teach(teacher, batch), {}
            for name, own in self.each.items():
                means = own.observe(states[name], teacher, features)
                found[name] = own.diagnose(own.absorb(states[name], means), teacher, features)
            return found

        return self._mean(of_micro_batch, batch)

    def _mean(self, of_micro_batch: Callable[[Any], Any], batch: Any) -> Any:
        """Returns the mean of a function's results over the micro-batches of a batch."""
        count = next(iter(self.each.values())).grad_accum_steps
        if count == 1:
            return of_micro_batch(batch)
        rows = jnp.arange(len(batch["label"]), dtype=jnp.int32)
        parts = micro_batches(batch | {"row": rows}, count)

        def add(total: Any, part: Any) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, of_micro_batch(part)), None

        zeros = _zeros(of_micro_batch, jax.tree.map(lambda x: x[0], parts))
        total, _ = jax.lax.scan(add, zeros, parts)
        return jax.tree.map(lambda x: x / count, total)

    def step(
        self,
        states: Mapping[str, TrainState],
        teacher: Params | None,
        batch: Any,
        logged: Logged = True,
    ) -> tuple[dict[str, TrainState], StepMetrics]:
        """Updates the state of every student.

        If there are several students, one with a non-finite loss or gradient keeps its state in
        this and all later steps; its count of steps stays behind that of the others.

        Args:
          states: States before the step; donated if the step is jitted.
          teacher: Frozen parameters of the teacher.
          batch: `image` [batch, height, width, 3] in 0..255 and `label` [batch].
          logged: True if the metrics are logged; the diagnostics of the methods are 0 in other
            steps. None leaves their computation out of the program (`diagnose`).

        Returns:
          The states after the step, and metrics of the parameters before it.
        """
        found = self.gradients(states, teacher, batch, logged)
        after, each = {}, {}
        for name, own in self.each.items():
            after[name], each[name] = own.update(states[name], found[name])
        metrics = StepMetrics.pack(each)
        if len(self.each) > 1:
            done = functools.reduce(jnp.maximum, [state.step for state in states.values()])
            for index, name in enumerate(self.each):
                before = states[name]
                keep = metrics.finite[index] & (before.step == done)
                after[name] = jax.tree.map(
                    lambda new, old, keep=keep: jnp.where(keep, new, old), after[name], before
                )
        return after, metrics


def micro_batches(batch: Any, count: int) -> Any:
    """Splits a batch into `count` parts along a new first axis.

    Every `count`-th example belongs to the same part, so that each device splits its own examples.
    """
    return jax.tree.map(lambda x: x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1), batch)


def teach(
    network: Network | None, reads: Sequence[int], params: Params | None, batch: Any
) -> Features:
    """Returns a frozen teacher's features after the blocks `reads`; empty without a teacher."""
    if network is None:
        return {}
    model = network.merge(params)
    with jax.named_scope("teacher"):
        return model.streams_at(network.spec.prepare(batch["image"]), reads)


def _only_if(condition: Logged, compute: Callable[[], Any]) -> Any:
    """Returns the result of `compute` if the condition is true, else zeros of the same shapes."""
    zeros = _zeros(compute)
    if condition is None:
        return zeros
    return jax.lax.cond(jnp.asarray(condition), compute, lambda: zeros)


def _zeros(function: Callable[..., Any], *given: Any) -> Any:
    """Returns zeros of the shapes that a function returns."""
    shapes = jax.eval_shape(function, *given)
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
