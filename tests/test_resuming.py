"""Saving, dying, damage and going on, in any order, against a model of a few lines."""

import shutil
import tempfile
from pathlib import Path

import hypothesis
import jax
import numpy as np
import pytest
from etils import epath
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from singer_jax.errors import RunError
from singer_jax.platform import parallel
from singer_jax.runs.checkpoints import Checkpoints
from singer_jax.runs.verify import finished
from tests.damage import flip, largest

KEEP = 3
MESHES = [(1, 1), (4, 2), (2, 1)]


def values(step: int, run: int) -> dict[str, np.ndarray]:
    """What a run with nothing but a number for its name holds after a step."""
    rng = np.random.default_rng([step, run])
    return {
        "step": np.int32(step),
        "large": rng.standard_normal((64, 32)).astype(np.float32),
        "small": rng.integers(0, 9, 8).astype(np.int32),
    }


def shardings(mesh: jax.sharding.Mesh) -> dict[str, jax.sharding.NamedSharding]:
    split = jax.sharding.PartitionSpec("data")
    return {
        "step": parallel.replicated(mesh),
        "large": jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data", "fsdp")),
        "small": jax.sharding.NamedSharding(mesh, split),
    }


# Each is noticed for certain; what any bit anywhere does is tested in test_stored.py.
DAMAGES = {
    "flipped": lambda folder, place: flip(largest(folder / "state"), 2000 + place),
    "emptied": lambda folder, place: (folder / "meta" / "metadata").write_bytes(b""),
    "gone": lambda folder, place: shutil.rmtree(folder / "state"),
}


class Resuming(RuleBasedStateMachine):
    """A work directory, and the starts of a run in it.

    The model is `kept`: of each checkpoint what it holds, or None where it was damaged; the latest
    `KEEP` stay. `aside` counts those that were set aside.
    """

    @initialize()
    def new_work_directory(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="singer_jax_resuming_"))
        self.kept: dict[int, dict[str, np.ndarray] | None] = {}
        self.aside, self.saves, self.step = 0, 0, 0
        self.checkpoints: Checkpoints | None = None

    def teardown(self) -> None:
        if hasattr(self, "folder"):
            if self.checkpoints:
                self.checkpoints.close()
            shutil.rmtree(self.folder, ignore_errors=True)  # orbax may still clear it up

    @precondition(lambda self: not self.checkpoints)
    @rule(devices=st.sampled_from(MESHES))
    def start(self, devices: tuple[int, int]) -> None:
        """As `distill` does it, on any devices."""
        self.mesh = parallel.make_mesh(*devices)
        self.checkpoints = Checkpoints(self.folder, KEEP)
        self.checkpoints.watch.started = lambda step: None  # it would find damage at any time
        whole = [step for step, state in self.kept.items() if state]
        if self.kept and not whole:
            with pytest.raises(RunError, match="no checkpoint is whole"):
                self.checkpoints.newest_whole()
            assert set(finished(epath.Path(self.folder / "checkpoints"))) == set(self.kept)
            self.teardown()
            self.new_work_directory()
            return
        self.step = self.checkpoints.newest_whole() or 0
        assert self.step == max(whole, default=0)
        self.checkpoints.set_aside()
        for step in [step for step in self.kept if step > self.step]:
            del self.kept[step]
            self.aside += 1
        if self.step:
            like = jax.tree.map(
                lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
                values(0, 0),
                shardings(self.mesh),
            )
            restored = self.checkpoints.restore(self.step, like)
            jax.tree.map(np.testing.assert_array_equal, restored, self.kept[self.step])
            assert restored["large"].sharding.mesh == self.mesh

    @precondition(lambda self: self.checkpoints)
    @rule(steps=st.lists(st.integers(1, 3), min_size=1, max_size=3))
    def save(self, steps: list[int]) -> None:
        """Each save may still go on when the next thing happens."""
        for count in steps:
            self.step += count
            self.saves += 1
            state = values(self.step, self.saves)
            placed = jax.tree.map(jax.device_put, state, shardings(self.mesh))
            self.checkpoints.save(placed, self.step, {"saves": self.saves})
            self.kept[self.step] = state
            self.kept = dict(sorted(self.kept.items())[-KEEP:])

    @precondition(lambda self: self.checkpoints and self.kept)
    @rule(how=st.sampled_from(["stopped", "killed", "killed during a save"]))
    def end(self, how: str) -> None:
        """Killed: nothing is closed, and what was being written stays behind in part."""
        if how == "stopped":
            self.checkpoints.close()
        else:
            self.checkpoints.wait()  # its threads live on in this process
        if how == "killed during a save":
            last = self.folder / "checkpoints" / str(max(self.kept))
            shutil.rmtree(last / "meta")
            last.rename(last.with_name(f"{last.name}.orbax-checkpoint-tmp"))
            del self.kept[max(self.kept)]
        self.checkpoints = None

    @precondition(lambda self: not self.checkpoints and any(self.kept.values()))
    @rule(newest=st.booleans(), kind=st.sampled_from(sorted(DAMAGES)), place=st.integers(0, 2000))
    def damage(self, newest: bool, kind: str, place: int) -> None:
        whole = [step for step, state in self.kept.items() if state]
        step = max(whole) if newest else min(whole)
        DAMAGES[kind](self.folder / "checkpoints" / str(step), place)
        self.kept[step] = None

    @precondition(lambda self: not self.checkpoints)
    @invariant()
    def nothing_is_lost(self) -> None:
        assert set(finished(epath.Path(self.folder / "checkpoints"))) == set(self.kept)
        aside = self.folder / "checkpoints.damaged"
        found = [path for path in aside.iterdir() if path.is_dir()] if aside.is_dir() else []
        assert len(found) == self.aside


TestResuming = Resuming.TestCase
TestResuming.settings = hypothesis.settings(
    deadline=None, max_examples=20, stateful_step_count=15, print_blob=True
)
