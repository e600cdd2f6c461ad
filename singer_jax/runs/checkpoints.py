"""Asynchronous orbax checkpoints of a run, with a checksum per leaf and a manifest of the files.

The storage layer usually does not detect a flipped bit in array data. Therefore every leaf is
compared with a checksum that was computed on the device when it was saved. `singer_jax.runs.verify`
verifies the files.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import hashlib
import logging
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath
from jaxtyping import Array, UInt32

from singer_jax.errors import InputError, RunError
from singer_jax.io.files import as_path, check_takes_checkpoints, failures
from singer_jax.models.params import Params, join, split
from singer_jax.platform import parallel, signals
from singer_jax.runs import manifests, verify
from singer_jax.runs.verify import by_name
from singer_jax.runs.workdir import checkpoints_folder

LOG = logging.getLogger("singer_jax")


def checksum(leaf: Array, version: int = 1) -> UInt32[Array, ""]:
    """Returns a checksum of the bits of an array, the same on any number of devices.

    Version 2 sums `verify.mix(bits_i, i)` mod 2^32. It detects any change of one element, and
    misses changes of several elements with probability 2^-32. Version 1 sums bits_i (2 i + 1) and
    misses some changes of two elements, such as two flipped signs. Older checkpoints contain it,
    and `fingerprint` uses it.
    """
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[leaf.dtype.itemsize]
    bits = jax.lax.bitcast_convert_type(leaf, unsigned).astype(jnp.uint32)
    index = jnp.uint32(0)
    for axis, size in enumerate(leaf.shape):
        index = index * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
    terms = verify.mix(bits, index) if version == 2 else bits * (2 * index + 1)
    return jnp.sum(terms, dtype=jnp.uint32)


@functools.partial(jax.jit, static_argnums=1)
def _checksums(state: Any, version: int = verify.CHECKSUM) -> dict[str, UInt32[Array, ""]]:
    return {name: checksum(leaf, version) for name, leaf in by_name(state).items()}


@functools.partial(jax.jit, static_argnums=1)
def _of_each_block(params: Params, stacked: bool) -> dict[str, UInt32[Array, "..."]]:
    each = jax.vmap(checksum) if stacked else checksum
    return {
        name: (each if name.startswith("blocks/") else checksum)(leaf)
        for name, leaf in by_name(params).items()
    }


def fingerprint(params: Params, stacked: bool = False) -> str:
    """Returns a hash of a model's parameters by name, shape, dtype and checksum.

    It is the same on any mesh.

    Args:
      params: Parameters of the model.
      stacked: `models.architecture.ComputePolicy.stacked` of the model; the result does not depend
        on it.
    """
    found, described = jax.device_get(_of_each_block(params, stacked)), []
    for name, leaf in by_name(params).items():
        shape, dtype = tuple(leaf.shape), str(leaf.dtype)
        if not (stacked and name.startswith("blocks/")):
            described.append((name, shape, dtype, int(found[name])))
            continue
        for number, value in enumerate(found[name].tolist()):
            of_block = name.replace("blocks/", f"blocks/{number}/", 1)
            described.append((of_block, shape[1:], dtype, value))
    return hashlib.blake2b(repr(sorted(described)).encode(), digest_size=16).hexdigest()


def _reason(error: Exception) -> str | None:
    """Returns the message of a storage failure in one line; None for other errors."""
    # Orbax wraps the error of the storage in a bare Exception.
    found = error.__cause__ if type(error) is Exception else error
    if not isinstance(found, (OSError, ValueError)):
        return None
    lines = str(found).split("[tensorstore_spec")[0].strip().splitlines()
    return lines[0] if lines else repr(found)


class _StepNames:
    """Orbax's standard names of checkpoints, without the times of the finished ones.

    Orbax reads the times from `_CHECKPOINT_METADATA` and raises a ValueError for some damages of
    that file. Nothing here depends on the times, and the arrays may be whole.
    """

    def __init__(self) -> None:
        self.standard = ocp.path.step.standard_name_format()

    def build_name(self, step: int) -> str:
        return self.standard.build_name(step)

    def find_all(self, base_path: epath.PathLike) -> Iterator[_Step]:
        return (_Step(found.step, found.path) for found in self.standard.find_all(base_path))

    def find_step(self, base_path: epath.PathLike, step: int) -> _Step:
        found = self.standard.find_step(base_path, step)
        return _Step(found.step, found.path)


class _Step(ocp.path.step.Metadata):
    """A finished checkpoint whose time is not read."""

    commit_timestamp = datetime.datetime.min.replace(tzinfo=datetime.UTC)


class Checkpoints:
    """The checkpoints of a work directory.

    Args:
      folder: The work directory; `checkpoints/` is created in it.
      keep: Number of the latest checkpoints to keep; None for all.
      read_only: Creates and removes nothing, so that a run in progress can be read.

    Raises:
      InputError: The folder is a URL to which orbax cannot write.
    """

    def __init__(
        self, folder: epath.Path, keep: int | None = None, *, read_only: bool = False
    ) -> None:
        check_takes_checkpoints(folder)
        names = _StepNames()
        if read_only:
            options = ocp.CheckpointManagerOptions(read_only=True, step_name_format=names)
        else:
            options = ocp.CheckpointManagerOptions(
                max_to_keep=keep,
                cleanup_tmp_directories=True,
                enable_async_checkpointing=True,
                step_name_format=names,
            )
        self.manager = ocp.CheckpointManager(
            checkpoints_folder(as_path(folder)),
            options=options,
            item_handlers={
                "state": ocp.PyTreeCheckpointHandler(),
                "meta": ocp.JsonCheckpointHandler(),
            },
        )
        self.read_only = read_only
        self.watch = verify.BackgroundVerifier(self.manager.directory)

    def newest_whole(self, before: int | None = None) -> int | None:
        """Returns the step of the latest finished checkpoint without corruption; None without any.

        Later checkpoints are damaged and stay in place until `set_aside`. The first process reads
        them for all processes.

        Args:
          before: Only checkpoints of steps before this one are read; None: all.

        Raises:
          RunError: There are checkpoints, but all are damaged.
        """

        def look() -> int | None:
            found = self.watch.damaged
            for step in reversed(self.manager.all_steps()):
                if before is not None and step >= before:
                    continue
                folder = self.manager.directory / str(step)
                reason = verify.find_corruption(folder, record=not self.read_only)
                if reason is None:
                    return step
                if step in verify.finished(self.manager.directory):  # else the run just removed it
                    found[step] = reason
            if found:
                reasons = "; ".join(f"{step}: {reason}" for step, reason in found.items())
                raise RunError(
                    f"{self.manager.directory}: no checkpoint is whole ({reasons}); use a new "
                    "--workdir, or restore a backup"
                )
            return None

        return parallel.of_first_process(look() if jax.process_index() == 0 else None)

    def step_to_read(self, step: int | None = None, *, before: int | None = None) -> int:
        """Returns the step of the checkpoint that a reader takes; for all processes together.

        It is `step` if it is given, and otherwise that of the newest checkpoint without corruption,
        as for training. A warning names newer checkpoints that are skipped.

        Args:
          step: The step to read; None: the newest without corruption.
          before: Without `step`, only checkpoints of steps before this one are read; None: all.

        Raises:
          InputError: No checkpoint is finished, or there is none of the given step.
          RunError: That of the given step is damaged, or all are.
        """
        run, finished = self.manager.directory.parent, sorted(self.manager.all_steps())
        if not finished:
            raise InputError(f"run: {run} has no finished checkpoint yet; wait for the first one")
        if step is not None:
            if step not in finished:
                raise InputError(f"step: {run} holds checkpoints {finished}, not {step}")
            folder = self.manager.directory / str(step)
            first = jax.process_index() == 0
            reason = parallel.of_first_process(
                verify.find_corruption(folder, record=not self.read_only) if first else None
            )
            if reason is not None:
                raise RunError(f"{folder} is damaged ({reason}); choose another step")
            return step
        found = self.newest_whole(before)
        if found is None:
            which = "any more" if before is None else f"before step {before}"
            raise InputError(f"run: {run} has no finished checkpoint {which}")
        for other, reason in self.watch.damaged.items():
            LOG.warning("checkpoint %d is damaged (%s); %d is read instead", other, reason, found)
        return found

    def set_aside(self) -> None:
        """Moves damaged checkpoints to `checkpoints.damaged/`; called by all processes together."""
        damaged = parallel.of_first_process(dict(self.watch.damaged))
        if not damaged:
            return
        self.wait()
        if jax.process_index() == 0:
            for step, reason in damaged.items():
                self._move_aside(step, reason)
                del self.watch.damaged[step]
        parallel.of_first_process(None)  # a barrier: no process reads the folder before this
        self.manager.reload()

    def _move_aside(self, step: int, reason: str) -> None:
        folder, found = (
            self.manager.directory / str(step),
            f"checkpoint {step} is damaged ({reason})",
        )
        if not folder.is_dir():
            return
        try:
            LOG.warning("%s, moved to %s", found, verify.set_aside(folder, reason))
        except failures(folder) as error:
            raise RunError(f"{found} and cannot be moved away: {error}") from error

    def save(self, state: Any, step: int, meta: dict[str, Any]) -> None:
        """Starts to save a tree of arrays, with `meta` as JSON.

        Raises:
          RunError: This checkpoint or the previous one cannot be written.
        """
        self.set_aside()
        found = jax.device_get(_checksums(state))
        checksums = {key: int(value) for key, value in found.items()}
        meta = meta | {"checksums": checksums, "checksum_version": verify.CHECKSUM}
        arguments = ocp.args.Composite(
            state=ocp.args.PyTreeSave(state),
            meta=ocp.args.JsonSave(manifests.sealed(meta)),
        )
        with self._writing():  # waits for the previous save
            if jax.process_index() == 0:  # left over if a checkpoint was removed by hand
                manifests.remove(self.manager.directory / str(step))
            self.manager.save(step, args=arguments)
        if jax.process_index() == 0:
            self.watch.started(step)

    def meta(self, step: int) -> dict[str, Any]:
        """Returns the metadata of a checkpoint; raises the errors of `restore`."""
        with self._reading(step):
            return self.manager.restore(
                step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())
            ).meta

    def restore(self, step: int, abstract: Any) -> Any:
        """Restores a saved state, or a part of it, with the shardings of `abstract`.

        Args:
          step: Step of the checkpoint.
          abstract: `jax.ShapeDtypeStruct`s with shardings for the whole state, or for a dict of
            some of its fields with some of their entries.

        Raises:
          RunError: A leaf has another shape, dtype or checksum than when it was saved.
        """
        saved = self._saved_leaves(step)
        for name, leaf in by_name(abstract).items():
            # Checked here, because orbax would cast silently.
            found = saved.get(name)
            if found is None or (leaf.shape, leaf.dtype) != (found.shape, found.dtype):
                raise self._damaged(step, f"it holds no {leaf.dtype}{list(leaf.shape)} at {name}")
        arguments = ocp.args.PyTreeRestore(
            abstract,
            restore_args=ocp.checkpoint_utils.construct_restore_args(abstract),
            partial_restore=True,
        )
        with self._reading(step):
            state = self.manager.restore(step, args=ocp.args.Composite(state=arguments)).state
        meta = self.meta(step)
        expected, version = meta.get("checksums", {}), verify.checksum_version(meta)
        for name, value in jax.device_get(_checksums(state, version)).items():
            if name not in expected:
                raise self._damaged(step, f"it holds no checksum of {name}")
            if int(value) != expected[name]:
                raise self._damaged(step, f"the checksum of {name} does not match")
        return state

    def _saved_leaves(self, step: int) -> dict[str, Any]:
        with self._reading(step):
            folder = self.manager.directory / str(step) / "state"
            return by_name(ocp.PyTreeCheckpointHandler().metadata(folder).tree)

    @contextlib.contextmanager
    def _reading(self, step: int) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if (reason := _reason(error)) is None:
                raise
            raise self._damaged(step, reason) from error

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if (reason := _reason(error)) is None:
                raise
            raise RunError(
                f"cannot save to {self.manager.directory}, finished checkpoints are kept: {reason}"
            ) from error

    def _damaged(self, step: int, reason: str) -> RunError:
        folder = self.manager.directory
        return RunError(
            f"checkpoint {step} in {folder} is damaged or of another run: {reason}; the job "
            "check_run lists the undamaged ones"
        )

    def restore_student(self, step: int, abstract: Params, name: str = "") -> Params:
        """Restores only a student's parameters, trained and frozen; raises as `restore`.

        Args:
          step: Step of the checkpoint.
          abstract: The student's parameters as `jax.ShapeDtypeStruct`s with shardings.
          name: Name of the student if the run has several.
        """
        saved, within = self._saved_leaves(step), f"{name}/" if name else ""
        trained, untouched = split(
            abstract, lambda keys: f"{within}params/student/{'/'.join(map(str, keys))}" in saved
        )
        parts = {"params": {"student": trained}, "constants": {"student": untouched}}
        found = self.restore(step, {name: parts} if name else parts)
        found = found[name] if name else found
        return join(found["params"]["student"], found["constants"]["student"])

    def wait(self) -> None:
        """Waits until everything is on disk.

        Raises:
          RunError: A checkpoint cannot be written.
        """
        with self._writing():
            self.manager.wait_until_finished()

    def close(self) -> None:
        """Waits for the last save, verifies it, and closes.

        After a stop request it skips the verification, which the next start then does.

        Raises:
          RunError: The last save cannot be written.
        """
        try:
            self.wait()
            if not signals.requested():
                self.watch.finish()
        finally:
            self.watch.close()
            with self._writing():
                self.manager.close()


def step_to_read(run: epath.Path, step: int | None = None) -> int:
    """Returns `Checkpoints.step_to_read` of a work directory.

    Raises:
      InputError: The directory holds no checkpoints, or `Checkpoints.step_to_read` raises it.
      RunError: `Checkpoints.step_to_read` raises it.
    """
    if not checkpoints_folder(run).is_dir():
        raise InputError(f"run: {run} holds no checkpoints; give the work directory of a run")
    with contextlib.closing(Checkpoints(run, read_only=True)) as checkpoints:
        return checkpoints.step_to_read(step)
