"""The students' states in checkpoints: the tree that is saved, and how it is restored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from singer_jax.training.step import TrainState

if TYPE_CHECKING:  # the benchmarks of a step need no orbax
    from singer_jax.runs.checkpoints import Checkpoints


def saved_tree(states: Mapping[str, Any]) -> Any:
    """Returns the tree that a checkpoint holds: the state alone of a single, unnamed student."""
    return states[""] if "" in states else dict(states)


def restore_states(
    checkpoints: Checkpoints, step: int, states: Mapping[str, TrainState]
) -> dict[str, TrainState]:
    """Restores the states of students from the checkpoint of a step.

    Args:
      checkpoints: The checkpoints of the run.
      step: The step of the checkpoint.
      states: The abstract states with shardings by the student's name; of several students any
        number.

    Raises:
      As `Checkpoints.restore`.
    """
    found = checkpoints.restore(step, saved_tree(states))
    return {"": found} if "" in states else found
