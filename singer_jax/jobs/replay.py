"""The job `replay`: a step that went wrong once more, with every operation looked at."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import traceback
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from etils import epath

from singer_jax.data.registry import open_source
from singer_jax.data.sources import TRAIN, Source
from singer_jax.errors import InputError, RunError
from singer_jax.io.files import as_path
from singer_jax.io.limits import read_object
from singer_jax.jobs.distill import device_batches, load_teacher, measured
from singer_jax.models.params import Params
from singer_jax.platform import parallel
from singer_jax.runs import verify
from singer_jax.runs.checkpoints import Checkpoints
from singer_jax.runs.metrics import LOG
from singer_jax.runs.workdir import checkpoints_folder, origins_file
from singer_jax.settings.ranges import TEXT, OneOf
from singer_jax.settings.settings import Settings, setting
from singer_jax.training.capture import Captured, read
from singer_jax.training.program import jit_step
from singer_jax.training.setup import Setups, setup_students
from singer_jax.training.step import Students, TrainState


@dataclasses.dataclass(frozen=True)
class ReplaySettings(Settings):
    """Which step."""

    job: str = setting("replay", OneOf(("replay",)), "the command")
    run: str = setting("", TEXT, "a work directory; empty: --workdir itself")
    student: str = setting("", TEXT, "one of several students of the run")


def replay(settings: ReplaySettings, workdir: epath.Path) -> None:
    """Runs the recorded step of a run with `jax_debug_nans`; writes nothing.

    Args:
      settings: which run.
      workdir: without `run` the run itself.

    Raises:
      InputError: nothing was recorded, or nothing is left to start from.
      RunError: which operation made the first number that is none; or that there is none here.
    """
    folder = as_path(settings.run) if settings.run else workdir
    if jax.process_count() > 1:
        raise InputError("replay: one process replays a step; start it alone")
    captured = read(folder, settings.student)
    with parallel.computing(captured.settings.precision):
        _replay(folder, captured)


def _replay(folder: epath.Path, captured: Captured) -> None:
    run_settings, name, step = captured.settings, captured.student, captured.step
    LOG.info("%s: %s", folder, captured.found)
    source = open_source(run_settings.data, TRAIN)
    at_a_time = run_settings.batch_size // run_settings.grad_accum_steps
    mesh = parallel.make_mesh(math.gcd(at_a_time, jax.device_count()))
    run = setup_students(run_settings, len(source), source.num_classes, mesh)
    teacher = load_teacher(run_settings, run, source, read_object(origins_file(folder)))
    states = {name: _state_before(folder, run, source, captured, teacher)}
    students = Students({name: run.each[name].distillation})
    done = int(states[name].step)
    LOG.info("step %d, from the state after step %d", step, done)
    program = jit_step(students, mesh, states, teacher)
    with contextlib.closing(device_batches(run_settings, run, source, done)) as batches:
        for _ in range(done + 1, step):
            states, _ = program(states, teacher, next(batches)[0], np.bool_(False))
        batch, _ = next(batches)
    with _looked_at(captured):
        # Not donated: where its result is no number, JAX computes it again by single operations.
        _, metrics = jax.jit(students.step)(states, teacher, batch, np.bool_(False))
    raise RunError(_told(step, {key: float(value) for key, value in metrics[name].items()}))


def _state_before(
    folder: epath.Path, run: Setups, source: Source, captured: Captured, teacher: Params | None
) -> TrainState:
    """The latest kept state of the student before the step, or the one before the first step."""
    name, step = captured.student, captured.step
    if not verify.finished(checkpoints_folder(folder)):
        found = measured(captured.settings, run, source, teacher)
        return run.init_states(teacher, found)[name]
    with contextlib.closing(Checkpoints(folder, read_only=True)) as checkpoints:
        # A student that was stopped among several keeps its state in all later checkpoints.
        usable = [n for n in checkpoints.manager.all_steps() if name or n < step]
        if usable:
            abstract = run.each[name].state
            found = checkpoints.restore(max(usable), {name: abstract} if name else abstract)
            state = found[name] if name else found
            if int(state.step) < step:
                return state
    raise InputError(f"run: no checkpoint of {folder} holds a state before step {step}")


@contextlib.contextmanager
def _looked_at(captured: Captured) -> Iterator[None]:
    """Stops at the first operation that gives NaN or, where that was found, infinity."""
    infinite = " is nan " not in captured.found
    try:
        with jax.debug_nans(True), jax.debug_infs(infinite):
            yield
    except FloatingPointError as error:
        traceback.print_exc()
        reason = str(error).splitlines()[0]
        raise RunError(f"step {captured.step}: {reason} {_where(error)}") from error


def _where(error: BaseException) -> str:
    """The last line of this package that an error passed."""
    package = str(Path(__file__).parents[1])
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if f.filename.startswith(package) and f.filename != __file__]
    return f"(in {own[-1].filename}:{own[-1].lineno}, {own[-1].name})" if own else ""


def _told(step: int, metrics: dict[str, float]) -> str:
    wrong = [f"{name} is {value}" for name, value in metrics.items() if not math.isfinite(value)]
    kind = jax.devices()[0].device_kind
    if wrong:
        return f"step {step}: {', '.join(wrong)}, but no single operation gives such a number"
    return f"step {step} is finite when it is replayed on {kind}: try the devices of the run"
