"""The training step: one pure function of (state, teacher, batch)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from singer_jax import parallel
from singer_jax.methods import Batch, Constant, Forward, Method
from singer_jax.models.network import Network
from singer_jax.models.params import Keys, Params, split

Features = Mapping[int, Float[Array, "batch tokens dim"]]
"""Raw residual streams by block."""


class TrainState(NamedTuple):
    """All that changes in a run and all that a checkpoint must hold.

    Attributes:
      step: steps done.
      params: what the optimiser updates, under `student` and `method`.
      constants: what it does not: student parameters outside the distilled path, null spaces.
      opt_state: of optax.
    """

    step: Int[Array, ""]
    params: Params
    constants: Params
    opt_state: optax.OptState


@dataclasses.dataclass(frozen=True)
class Distillation:
    """The static half of a training step: everything but arrays.

    Attributes:
      student, teacher: networks; no teacher for a method that needs none.
      method: graph definition of the method.
      optimizer: of the state's `params`.
      schedule: learning rate by step, for the metrics.
      blocks, head: how many of the student's blocks the loss reads, and whether its head.
      teacher_reads: blocks of the teacher whose features the method reads.
      seed: of the random numbers of the steps.
      accumulation: micro-batches a step; losses and gradients are averaged over them.
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
    accumulation: int = 1

    def teach(self, teacher: Params | None, batch: Any) -> Features:
        """The frozen teacher's features that the method reads; none without a teacher."""
        if self.teacher is None:
            return {}
        model = self.teacher.merge(teacher)
        return model.features_at(self.teacher.spec.prepare(batch["image"]), self.teacher_reads)

    def loss(
        self,
        params: Params,
        constants: Params,
        teacher: Params | None,
        features: Features,
        batch: Any,
        key: jax.Array,
        logged: Bool[Array, ""] | None = None,
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        """The sum of the method's terms, and metrics.

        Args:
          params, constants: of a state.
          teacher: its parameters.
          features: as `teach` gives them.
          batch: as for `step`.
          key: of the method's random numbers.
          logged: whether the method's diagnostics are among the metrics (else they are 0); None
            leaves them out.

        Returns:
          the loss, and each term as `loss_<name>` beside the diagnostics.
        """
        method: Method = nnx.merge(self.method, params["method"], constants["method"])
        student = self.student.merge(params["student"], constants["student"])
        own = student.features(self.student.spec.prepare(batch["image"]), self.blocks)
        seen = Forward(student, dict(enumerate(own)))
        taught = Forward(self.teacher.merge(teacher), features) if self.teacher else None
        terms = method.loss(taught, seen, Batch(batch["label"], key))
        metrics = {f"loss_{name}": value for name, value in terms.items()}
        if logged is not None:
            metrics |= _only_if(logged, lambda: jax.lax.stop_gradient(method.diagnose(taught)))
        return sum(terms.values()), metrics

    def gradients(
        self,
        state: TrainState,
        teacher: Params | None,
        batch: Any,
        logged: Bool[Array, ""] | bool = True,
    ) -> tuple[dict[str, Float[Array, ""]], Params]:
        """Metrics and gradients of `state.params`, averaged over the micro-batches."""
        key = jax.random.fold_in(jax.random.key(self.seed), state.step)

        def of_micro_batch(batch: Any, key: jax.Array) -> tuple[dict[str, Array], Params]:
            features = self.teach(teacher, batch)
            (loss, metrics), gradients = jax.value_and_grad(self.loss, has_aux=True)(
                state.params, state.constants, teacher, features, batch, key, jnp.asarray(logged)
            )
            return metrics | {"loss": loss}, gradients

        if self.accumulation == 1:
            return of_micro_batch(batch, key)
        # Every k-th example, so that each device splits what it already holds.
        micro_batches = jax.tree.map(
            lambda x: x.reshape(-1, self.accumulation, *x.shape[1:]).swapaxes(0, 1), batch
        )
        keys = jax.random.split(key, self.accumulation)

        def add(total: Any, xs: Any) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, of_micro_batch(*xs)), None

        shapes = jax.eval_shape(
            of_micro_batch, *jax.tree.map(lambda x: x[0], (micro_batches, keys))
        )
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        total, _ = jax.lax.scan(add, zeros, (micro_batches, keys))
        return jax.tree.map(lambda x: x / self.accumulation, total)

    def step(
        self,
        state: TrainState,
        teacher: Params | None,
        batch: Any,
        logged: Bool[Array, ""] | bool = True,
    ) -> tuple[TrainState, dict[str, Float[Array, ""]]]:
        """One update of the state.

        Args:
          state: before the step; donated where the step is jitted.
          teacher: its parameters, frozen.
          batch: `image` [batch, height, width, 3] in 0..255 and `label` [batch].
          logged: whether the metrics will be read as a row: the method's diagnostics are 0 in other
            steps.

        Returns:
          the state after the step, and metrics of the parameters before it.
        """
        metrics, gradients = self.gradients(state, teacher, batch, logged)
        updates, opt_state = self.optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics |= {
            "grad_norm": optax.tree.norm(gradients),
            "learning_rate": self.schedule(state.step),
        }
        return TrainState(state.step + 1, params, state.constants, opt_state), metrics

    def init(self, student: Params, method: Method) -> TrainState:
        """The state before the first step; traceable."""
        trained, untouched = self.split_path(student)
        _, parts, constants = nnx.split(method, nnx.Param, Constant)
        params = {"student": trained, "method": nnx.to_pure_dict(parts)}
        constants = {"student": untouched, "method": nnx.to_pure_dict(constants)}
        return TrainState(jnp.int32(0), params, constants, self.optimizer.init(params))

    def split_path(self, student: Params) -> tuple[Params, Params]:
        """Student parameters on the distilled path, and those that no gradient reaches.

        The latter are not updated at all, weight decay included (as in the official code).
        """

        def on_path(keys: Keys) -> bool:
            if keys[0] == "blocks":
                return keys[1] < self.blocks
            return self.head or keys[0] not in ("norm", "attn_pool", "head")

        return split(student, on_path)


def jit_step(
    distillation: Distillation, mesh: Mesh, state: TrainState, teacher: Params | None
) -> Callable:
    """`distillation.step` under `jax.jit` with the shardings of `state` and `teacher` as they are.

    The state is donated; metrics come back replicated. All four arguments are given by position.
    """
    shardings = jax.tree.map(lambda x: x.sharding, (state, teacher))
    return jax.jit(
        distillation.step,
        in_shardings=(*shardings, parallel.batch_sharding(mesh), parallel.replicated(mesh)),
        out_shardings=(shardings[0], parallel.replicated(mesh)),
        donate_argnums=0,
        compiler_options=parallel.compiler_options(mesh),
    )


def _only_if(condition: Bool[Array, ""], compute: Callable[[], Any]) -> Any:
    """What `compute` returns, or zeros without computing it."""
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(compute))
    return jax.lax.cond(condition, compute, lambda: zeros)
