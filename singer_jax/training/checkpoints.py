"""Checkpoints of a run: orbax, asynchronous, with a checksum per leaf.

A flipped bit in stored array data is usually not noticed by the storage layer, so every leaf is
compared with a checksum that was taken on the device when it was saved.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jaxtyping import Array, UInt32

from singer_jax import parallel
from singer_jax.errors import RunError
from singer_jax.models.params import Params, join, split
from singer_jax.training.step import TrainState


def checksum(leaf: Array) -> UInt32[Array, ""]:
    """sum_i bits_i (2 i + 1) mod 2^32: any flipped bit changes it, on any number of devices."""
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[leaf.dtype.itemsize]
    bits = jax.lax.bitcast_convert_type(leaf, unsigned).astype(jnp.uint32)
    index = jnp.uint32(0)
    for axis, size in enumerate(leaf.shape):
        index = index * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
    return jnp.sum(bits * (2 * index + 1), dtype=jnp.uint32)


def _by_name(tree: Any) -> dict[str, Any]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {parallel.leaf_name(path): leaf for path, leaf in leaves}


@jax.jit
def _checksums(state: Any) -> dict[str, UInt32[Array, ""]]:
    return {name: checksum(leaf) for name, leaf in _by_name(state).items()}


class Checkpoints:
    """The checkpoints of a work directory.

    Args:
      folder: of the work directory; `checkpoints/` below it is made.
      keep: how many of the latest ones stay; None: all.
    """

    def __init__(self, folder: Path, keep: int | None = None) -> None:
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, cleanup_tmp_directories=True, enable_async_checkpointing=True
        )
        self.manager = ocp.CheckpointManager(
            (folder / "checkpoints").absolute(),
            options=options,
            item_handlers={
                "state": ocp.PyTreeCheckpointHandler(),
                "meta": ocp.JsonCheckpointHandler(),
            },
        )

    def latest_step(self) -> int | None:
        """Steps done in the latest finished checkpoint; None where there is none."""
        return self.manager.latest_step()

    def save(self, state: TrainState, step: int, meta: dict[str, Any]) -> None:
        """Starts to save; `meta` is stored as JSON beside the state."""
        checksums = {key: int(value) for key, value in jax.device_get(_checksums(state)).items()}
        self.manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.PyTreeSave(state),
                meta=ocp.args.JsonSave(meta | {"checksums": checksums}),
            ),
        )

    def meta(self, step: int) -> dict[str, Any]:
        """What was stored beside the state."""
        return self.manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())).meta

    def restore(self, step: int, abstract: Any) -> Any:
        """A saved state, or a part of it, onto the shardings of `abstract`.

        Args:
          step: of the checkpoint.
          abstract: `jax.ShapeDtypeStruct`s with shardings; a `TrainState`, or a dict of some of its
            fields with some of their entries.

        Raises:
          RunError: a leaf has another shape, dtype or checksum than when it was saved.
        """
        where = f"checkpoint {step} in {self.manager.directory}"
        saved = _by_name(self.manager.item_metadata(step).state.tree)
        for name, leaf in _by_name(abstract).items():
            # Orbax would cast silently.
            if name not in saved or (leaf.shape, leaf.dtype) != (
                saved[name].shape,
                saved[name].dtype,
            ):
                raise RunError(f"{where} holds no {leaf.dtype}{list(leaf.shape)} at {name}")
        arguments = ocp.args.PyTreeRestore(
            abstract,
            restore_args=ocp.checkpoint_utils.construct_restore_args(abstract),
            partial_restore=True,
        )
        try:
            state = self.manager.restore(step, args=ocp.args.Composite(state=arguments)).state
        except (ValueError, OSError) as error:
            raise RunError(f"{where} cannot be read: {error}") from error
        expected = self.meta(step)["checksums"]
        for name, value in jax.device_get(_checksums(state)).items():
            if int(value) != expected[name]:
                raise RunError(f"{where}: the checksum of {name} does not match, it is damaged")
        return state

    def restore_student(self, step: int, abstract: Params) -> Params:
        """The student's parameters alone, trained and untouched; raises as `restore`."""
        saved = _by_name(self.manager.item_metadata(step).state.tree)
        trained, untouched = split(
            abstract, lambda keys: f"params/student/{'/'.join(map(str, keys))}" in saved
        )
        state = self.restore(
            step, {"params": {"student": trained}, "constants": {"student": untouched}}
        )
        return join(state["params"]["student"], state["constants"]["student"])

    def wait(self) -> None:
        """Until everything is on disk."""
        self.manager.wait_until_finished()

    def close(self) -> None:
        """Waits and lets go."""
        self.manager.close()
