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
"""Raw residual streams by block, as `VisionTransformer.streams_at` gives them."""

Metrics = dict[str, Float[Array, ""]]

PARTS = ("teacher", "student", "method", "optimizer")
"""The scopes of a step; the method's passes through the teacher's blocks are its own."""


class TrainState(NamedTuple):
    """All that changes in a run and all that a checkpoint must hold.

    Attributes:
      step: steps done.
      params: what the optimiser updates, under `student` and `method`.
      constants: what it does not: student parameters outside the distilled path, null spaces,
        statistics of the teacher's tokens.
      opt_state: of optax.
    """

    step: Int[Array, ""]
    params: Params
    constants: Params
    opt_state: optax.OptState


class StepOutput(NamedTuple):
    """What a student learns from a batch, averaged over the micro-batches.

    Attributes:
      metrics: of the state before the step.
      gradients: of its `params`.
      means: what the method keeps statistics of (`Method.observe`); mostly nothing.
    """

    metrics: Metrics
    gradients: Params
    means: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Distillation:
    """The static half of a student's training step: everything but arrays.

    Attributes:
      student, teacher: networks; no teacher for a method that needs none.
      method: graph definition of the method.
      optimizer: of the state's `params`.
      schedule: learning rate by step, for the metrics.
      blocks, head: how many of the student's blocks the loss reads, and whether its head.
      teacher_reads: blocks of the teacher whose features the method reads.
      seed: of the random numbers of the steps.
      grad_accum_steps: micro-batches a step; losses and gradients are averaged over them.
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
        """The frozen teacher's features that the method reads; none without a teacher."""
        return teach(self.teacher, self.teacher_reads, teacher, batch)

    def loss(
        self,
        params: Params,
        constants: Params,
        teacher: Params | None,
        features: Features,
        batch: Any,
        key: jax.Array,
        logged: Bool[Array, ""] | None = None,
    ) -> tuple[Float[Array, ""], Metrics]:
        """The sum of the method's terms, and metrics.

        Args:
          params, constants: of a state.
          teacher: its parameters.
          features: as `teach` gives them.
          batch: as for `step`; of a micro-batch with `row`, where each image is in the step's.
          key: of the method's random numbers.
          logged: whether the method's diagnostics are among the metrics (else they are 0); None
            leaves them out.

        Returns:
          the loss, and each term as `loss_<name>` beside the diagnostics.
        """
        method: Method = nnx.merge(self.method, params["method"], constants["method"])
        student = self.student.merge(params["student"], constants["student"])
        with jax.named_scope("student"):
            own = student.features(self.student.spec.prepare(batch["image"]), self.blocks)
        seen = ModelFeatures(student, dict(enumerate(own)))
        taught = (
            ModelFeatures.of_streams(self.teacher.merge(teacher), features)
            if self.teacher
            else None
        )
        rows = batch.get("row")
        given = Batch(batch["label"], key, rows, 1 if rows is None else self.grad_accum_steps)
        with jax.named_scope("method"):
            terms = method.loss(taught, seen, given)
        metrics = {f"loss_{name}": value for name, value in terms.items()}
        if logged is not None:
            metrics |= _only_if(logged, lambda: jax.lax.stop_gradient(method.diagnose(taught)))
        return sum(terms.values()), metrics

    def observe(
        self, state: TrainState, teacher: Params | None, features: Features
    ) -> dict[str, Any]:
        """The `means` of a batch."""
        if self.teacher is None:
            return {}
        with jax.named_scope("method"):
            taught = ModelFeatures.of_streams(self.teacher.merge(teacher), features)
            return self._method(state).observe(taught)

    def absorb(self, state: TrainState, means: dict[str, Any]) -> TrainState:
        """The state with the means of a batch in the statistics of its method."""
        if not means:
            return state
        method = self._method(state)
        with jax.named_scope("method"):
            method.absorb(means)
        constants = nnx.to_pure_dict(nnx.state(method, FrozenVariable))
        return state._replace(constants=state.constants | {"method": constants})

    def _method(self, state: TrainState) -> Method:
        return nnx.merge(self.method, state.params["method"], state.constants["method"])

    def gradients(
        self,
        state: TrainState,
        teacher: Params | None,
        batch: Any,
        logged: Bool[Array, ""] | bool = True,
    ) -> tuple[Metrics, Params]:
        """Metrics and gradients of `state.params`, averaged over the micro-batches."""
        return Students({"": self}).gradients({"": state}, teacher, batch, logged)[""][:2]

    def step(
        self,
        state: TrainState,
        teacher: Params | None,
        batch: Any,
        logged: Bool[Array, ""] | bool = True,
    ) -> tuple[TrainState, Metrics]:
        """As `Students.step`, of this one."""
        states, metrics = Students({"": self}).step({"": state}, teacher, batch, logged)
        return states[""], metrics[""]

    def update(self, state: TrainState, found: StepOutput) -> tuple[TrainState, Metrics]:
        """The state after a step, and the metrics with `grad_norm` and `learning_rate`."""
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
        """The state before the first step; traceable."""
        trained, untouched = self.split_path(student)
        _, parts, constants = nnx.split(method, nnx.Param, FrozenVariable)
        params = {"student": trained, "method": nnx.to_pure_dict(parts)}
        constants = {"student": untouched, "method": nnx.to_pure_dict(constants)}
        return TrainState(jnp.int32(0), params, constants, self.optimizer.init(params))

    def split_path(self, student: Params) -> tuple[Params, Params]:
        """Student parameters on the distilled path, and those that no gradient reaches.

        The latter are not updated at all, weight decay included (as in the official code). Nor is
        a planted vector.
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
    """The static half of a step of several students, who learn from one teacher's features.

    Attributes:
      each: their distillations by name, with the same teacher and number of micro-batches.
      sequential: whether a student's gradients are finished before the next one is computed, so
        that the activations of one of them are kept at a time.
    """

    each: Mapping[str, Distillation]
    sequential: bool = False

    @property
    def teacher(self) -> Network | None:
        """Theirs; None where no method reads one."""
        return next((own.teacher for own in self.each.values() if own.teacher), None)

    @property
    def teacher_reads(self) -> tuple[int, ...]:
        """The teacher's blocks whose features any of the methods reads."""
        return tuple(sorted({layer for own in self.each.values() for layer in own.teacher_reads}))

    def teach(self, teacher: Params | None, batch: Any) -> Features:
        """The frozen teacher's features that any of the methods reads; none without a teacher."""
        return teach(self.teacher, self.teacher_reads, teacher, batch)

    def gradients(
        self,
        states: Mapping[str, TrainState],
        teacher: Params | None,
        batch: Any,
        logged: Bool[Array, ""] | bool = True,
    ) -> dict[str, StepOutput]:
        """Of each student. Its method's statistics hold the examples at hand before its loss."""
        grad_accum_steps = next(iter(self.each.values())).grad_accum_steps
        keys = {
            name: jax.random.fold_in(jax.random.key(own.seed), states[name].step)
            for name, own in self.each.items()
        }

        def of_micro_batch(batch: Any) -> Any:
            seen = self.teach(teacher, batch), batch
            found: dict[str, StepOutput] = {}
            for name, own in self.each.items():
                if self.sequential and found:
                    # Nothing of this student starts before all of the last one's is there.
                    last = next(reversed(found))
                    seen, found[last] = jax.lax.optimization_barrier((seen, found[last]))
                features, examples = seen
                means = own.observe(states[name], teacher, features)
                state = own.absorb(states[name], means)
                (loss, metrics), gradients = jax.value_and_grad(own.loss, has_aux=True)(
                    state.params,
                    state.constants,
                    teacher,
                    features,
                    examples,
                    keys[name],
                    jnp.asarray(logged),
                )
                found[name] = StepOutput(metrics | {"loss": loss}, gradients, means)
            return found

        if grad_accum_steps == 1:
            return of_micro_batch(batch)
        rows = jnp.arange(len(batch["label"]), dtype=jnp.int32)
        parts = micro_batches(batch | {"row": rows}, grad_accum_steps)

        def add(total: Any, part: Any) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, of_micro_batch(part)), None

        shapes = jax.eval_shape(of_micro_batch, jax.tree.map(lambda x: x[0], parts))
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        total, _ = jax.lax.scan(add, zeros, parts)
        return jax.tree.map(lambda x: x / grad_accum_steps, total)

    def step(
        self,
        states: Mapping[str, TrainState],
        teacher: Params | None,
        batch: Any,
        logged: Bool[Array, ""] | bool = True,
    ) -> tuple[dict[str, TrainState], StepMetrics]:
        """One update of every student's state.

        Of several students, one whose loss or gradient is not finite keeps its state, then and in
        all later steps: its count of steps stays behind the others'.

        Args:
          states: before the step; donated where the step is jitted.
          teacher: its parameters, frozen.
          batch: `image` [batch, height, width, 3] in 0..255 and `label` [batch].
          logged: whether the metrics will be read as a row: the methods' diagnostics are 0 in other
            steps.

        Returns:
          the states after the step, and metrics of the parameters before it.
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
    """A batch as `count` parts along a new first axis.

    Every `count`-th example goes into one part, so that each device splits what it already holds.
    """
    return jax.tree.map(lambda x: x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1), batch)


def teach(
    network: Network | None, reads: Sequence[int], params: Params | None, batch: Any
) -> Features:
    """The features of a batch after the blocks `reads` of a frozen teacher; none without one."""
    if network is None:
        return {}
    model = network.merge(params)
    with jax.named_scope("teacher"):
        return model.streams_at(network.spec.prepare(batch["image"]), reads)


def _only_if(condition: Bool[Array, ""], compute: Callable[[], Any]) -> Any:
    """What `compute` returns, or zeros without computing it."""
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(compute))
    return jax.lax.cond(condition, compute, lambda: zeros)
