"""The refiner of SiNGER: a low-rank update of the teacher's patches inside a null space."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.lax import Precision
from jaxtyping import Array, Float

from singer_jax.methods import fitted, nullspace
from singer_jax.methods.base import FrozenVariable
from singer_jax.methods.calibration import Moments
from singer_jax.methods.nullspace import NullSpaceSettings


class Refiner(nnx.Module):
    """A low-rank update of the patch tokens: F + F A B Q (paper section 3.1).

    Args:
      space: Null space of the layer.
      rank: Rank of the update.
      settings: Settings of the use of the null space.
      rngs: Random streams; `params` is used for random directions.

    Attributes:
      down, up: A [dim, rank] and B [rank, dim].
      projection: Q [dim, dim] for the modes `project` and `soft`; absent otherwise.
      singular_values, threshold, null_dim: Singular values [directions], tau, and the number of
        values below tau, for reports.
      left, ridge: `NullSpace.left` and `NullSpace.ridge`; absent if they are None.
    """

    def __init__(
        self, space: nullspace.NullSpace, rank: int, settings: NullSpaceSettings, rngs: nnx.Rngs
    ) -> None:
        tau = nullspace.threshold_value(space, settings.threshold_type, settings.threshold)
        self.singular_values = FrozenVariable(space.values)
        self.threshold = FrozenVariable(tau)
        self.null_dim = FrozenVariable(nullspace.null_dim(space, tau))
        self.projected = settings.mode in ("project", "soft")
        dim = space.vectors.shape[0]
        if self.projected:
            rows = space.vectors.T[::-1][:rank]
            soft = settings.mode == "soft"
            self.projection = FrozenVariable(
                nullspace.soft_filter(space, tau) if soft else nullspace.projector(space, tau, rank)
            )
        elif settings.mode == "init":
            rows = nullspace.directions(space, tau, rank, settings.direction_order, rngs.params())
        else:
            rows = nullspace.random_directions(rngs.params(), rank, dim)
        start = settings.init or ("identity" if self.projected else "official")
        if space.left is not None:
            self.left = FrozenVariable(space.left)
        if space.ridge is not None:
            self.ridge = FrozenVariable(space.ridge)
        self.down = nnx.Param(rows.T)
        self.up = nnx.Param(rows if start == "official" else jnp.zeros_like(rows))

    def update(
        self, patches: Float[Array, "batch patches dim"]
    ) -> Float[Array, "batch patches dim"]:
        """Returns F A B Q in float32, which lies in the null space up to float32 rounding."""
        up = self.up[...]
        if self.projected:
            up = jnp.matmul(up, self.projection[...], precision=Precision.HIGHEST)
        inner = patches.astype(jnp.float32) @ self.down[...]
        return jnp.matmul(inner, up, precision=Precision.HIGHEST)

    def fit(
        self,
        space: nullspace.NullSpace,
        linear_map: Float[Array, "dim out"],
        moments: Moments,
        decomposition: str,
    ) -> None:
        """Sets the update to that of `fitted.fitted_update`, whose arguments these are.

        Components that it leaves out start without an update.
        """
        rank = self.up.shape[0]
        selected = nullspace.selected(space, self.threshold[...], rank)
        down, up = fitted.fitted_update(space, selected, linear_map, moments, rank, decomposition)
        used = jnp.any(up != 0, axis=1)
        self.down[...] = jnp.where(used, down, self.down[...])
        self.up[...] = up

    @property
    def platform(self) -> str:
        """Platform of the devices that hold the refiner."""
        values = self.singular_values[...]
        if isinstance(values, jax.Array) and not isinstance(values, jax.core.Tracer):
            return next(iter(values.devices())).platform
        return jax.default_backend()


def refine(
    refiner: Refiner, features: Float[Array, "batch tokens dim"], num_prefix_tokens: int
) -> Float[Array, "batch tokens dim"]:
    """Returns the features F^ with refined patches and unchanged prefix tokens, in float32."""
    update = refiner.update(features[:, num_prefix_tokens:])
    update = jnp.pad(update, ((0, 0), (num_prefix_tokens, 0), (0, 0)))
    return features.astype(jnp.float32) + update
