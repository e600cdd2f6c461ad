"""Saves, kills, corruption and restarts in any order, compared with a simple reference model."""

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
from singer_jax.runs import verify
from singer_jax.runs.checkpoints import Checkpoints
from singer_jax.runs.verify import finished
from tests.damage import files, flip, warned

KEEP = 3
MESHES = [(1, 1), (4, 2), (2, 1)]


def values(step: int, run: int) -> dict[str, np.ndarray]:
    """Returns the state after a step of a run that is identified by a number."""
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


def _overwrite(folder: Path) -> None:
    """Changes half of each file that may hold arrays; some of these files are never read."""
    for file in files(folder / "state"):
        if file.parent.name == "d":
            content = np.frombuffer(file.read_bytes(), np.uint8).copy()
            content[len(content) // 2 :] ^= 0xFF
            file.write_bytes(content.tobytes())


# Each certainly changes the contents; changes of any bit are tested in runs/test_verify.py.
DAMAGES = {
    "overwritten": _overwrite,
    "emptied": lambda folder: (folder / "meta" / "metadata").write_bytes(b""),
    "gone": lambda folder: shutil.rmtree(folder / "state"),
}


class Resuming(RuleBasedStateMachine):
    """A work directory, and the starts of a run in it.

    The model is `kept`: what each checkpoint holds, or None where its contents were damaged; the
    latest `KEEP` stay. `described` are the checkpoints with a manifest, `changed` those of them of
    which a file without contents was changed since. `aside` counts those that were set aside.
    """

    @initialize()
    def new_work_directory(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="singer_jax_resuming_"))
        self.kept: dict[int, dict[str, np.ndarray] | None] = {}
        self.described: set[int] = set()
        self.changed: set[int] = set()
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
        """Starts the run as `distill` does, on any devices."""
        self.mesh = parallel.make_mesh(*devices)
        self.checkpoints = Checkpoints(self.folder, KEEP)
        self.checkpoints.watch.started = lambda step: None  # `verify` does it at a known time
        whole = [step for step, state in self.kept.items() if state]
        if self.kept and not whole:
            with pytest.raises(RunError, match="no checkpoint is whole"):
                self.checkpoints.newest_whole()
            assert set(finished(epath.Path(self.folder / "checkpoints"))) == set(self.kept)
            self.teardown()
            self.new_work_directory()
            return
        with warned() as lines:
            self.step = self.checkpoints.newest_whole() or 0
        assert self.step == max(whole, default=0)
        assert len(lines) == (self.step in self.changed)
        assert all(": 1, first _CHECKPOINT_METADATA" in line for line in lines)
        self.checkpoints.set_aside()
        for step in [step for step in self.kept if step > self.step]:
            self.forget(step)
            self.aside += 1
        self.described |= {self.step} - {0}
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
        """Saves steps; a save may not be finished when the next one starts."""
        for count in steps:
            self.step += count
            self.saves += 1
            state = values(self.step, self.saves)
            placed = jax.tree.map(jax.device_put, state, shardings(self.mesh))
            self.checkpoints.save(placed, self.step, {"saves": self.saves})
            self.kept[self.step] = state
            for step in sorted(self.kept)[:-KEEP]:
                self.forget(step)

    def forget(self, step: int) -> None:
        del self.kept[step]
        self.described.discard(step)
        self.changed.discard(step)

    @precondition(lambda self: self.checkpoints and self.kept)
    @rule()
    def verify(self) -> None:
        """Verifies a checkpoint as the thread does after a save during training."""
        self.checkpoints.wait()
        for step in (max(self.kept), min(self.kept)):
            if self.kept[step] and step not in self.changed:
                folder = self.checkpoints.manager.directory / str(step)
                assert verify.find_corruption(folder, record=True) is None
                self.described.add(step)

    @precondition(lambda self: self.checkpoints and self.kept)
    @rule(how=st.sampled_from(["stopped", "killed", "killed during a save"]))
    def end(self, how: str) -> None:
        """Ends the run; if it is killed, nothing is closed and partly written files remain."""
        if how == "stopped":
            self.checkpoints.close()
        else:
            self.checkpoints.wait()  # its threads live on in this process
        if how == "killed during a save":
            last = self.folder / "checkpoints" / str(max(self.kept))
            shutil.rmtree(last / "meta")
            last.rename(last.with_name(f"{last.name}.orbax-checkpoint-tmp"))
            self.forget(max(self.kept))
        self.checkpoints = None

    @precondition(lambda self: not self.checkpoints and any(self.kept.values()))
    @rule(newest=st.booleans(), kind=st.sampled_from(sorted(DAMAGES)))
    def damage(self, newest: bool, kind: str) -> None:
        step = self.whole(newest)
        DAMAGES[kind](self.folder / "checkpoints" / str(step))
        self.kept[step] = None

    @precondition(lambda self: not self.checkpoints and any(self.kept.values()))
    @rule(newest=st.booleans(), place=st.integers(0, 2000))
    def change_a_file_without_contents(self, newest: bool, place: int) -> None:
        step = self.whole(newest)
        if step not in self.changed:  # a second flip may undo the first
            file = self.folder / "checkpoints" / str(step) / "_CHECKPOINT_METADATA"
            flip(file, place // 8, place % 8)
            self.changed |= {step} & self.described

    def whole(self, newest: bool) -> int:
        steps = [step for step, state in self.kept.items() if state]
        return max(steps) if newest else min(steps)

    @precondition(lambda self: not self.checkpoints)
    @invariant()
    def nothing_is_lost(self) -> None:
        assert set(finished(epath.Path(self.folder / "checkpoints"))) == set(self.kept)
        aside = self.folder / "checkpoints.damaged"
        found = [path for path in aside.iterdir() if path.is_dir()] if aside.is_dir() else []
        assert len(found) == self.aside


TestResuming = pytest.mark.slow(Resuming.TestCase)
TestResuming.settings = hypothesis.settings(
    deadline=None, max_examples=20, stateful_step_count=15, print_blob=True
)
