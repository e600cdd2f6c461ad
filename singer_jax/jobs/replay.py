"""The job `replay`: repeats a step with a non-finite loss, and checks every operation."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import traceback
from collections.abc import Iterator
from pathlib import Path

import jax
from etils import epath

from singer_jax.data.registry import open_source
from singer_jax.data.sources import TRAIN, Source
from singer_jax.errors import InputError, RunError
from singer_jax.io.files import as_path
from singer_jax.io.limits import read_object
from singer_jax.models.params import Params
from singer_jax.platform import parallel
from singer_jax.runs import verify
from singer_jax.runs.checkpoints import Checkpoints
from singer_jax.runs.metrics import LOG
from singer_jax.runs.workdir import checkpoints_folder, origins_file
from singer_jax.settings.ranges import TEXT, OneOf
from singer_jax.settings.settings import Settings, setting
from singer_jax.training.artifact_removal import load_teacher
from singer_jax.training.batches import device_batches
from singer_jax.training.calibration import measure_first_batches
from singer_jax.training.failed_step import Captured, read
from singer_jax.training.program import jit_step, unlogged
from singer_jax.training.restore import restore_states
from singer_jax.training.setup import RunSetup, setup_students
from singer_jax.training.step import Students, TrainState


@dataclasses.dataclass(frozen=True)
class ReplaySettings(Settings):
    """The step that is replayed."""

    job: str = setting("replay", OneOf(("replay",)), "Name of the command.")
    run: str = setting("", TEXT, "Work directory of the run. Empty: --workdir.")
    student: str = setting("", TEXT, "Name of the student if the run has several.")


def replay(settings: ReplaySettings, workdir: epath.Path) -> None:
    """Runs the recorded step of a run with `jax_debug_nans`; writes nothing.

    Args:
      settings: The run and the student.
      workdir: The run, where `settings.run` is empty.

    Raises:
      InputError: No step was recorded, or no checkpoint before it is left.
      RunError: Always at the end, with the operation that made the first non-finite number, or
        with the message that the step is finite here.
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
    micro_batch = run_settings.batch_size // run_settings.grad_accum_steps
    mesh = parallel.make_mesh(math.gcd(micro_batch, jax.device_count()))
    run = setup_students(run_settings, len(source), source.num_classes, mesh)
    weights = read_object(origins_file(folder))
    layers = run.students.teacher_reads
    teacher = load_teacher(run.teacher_model, run_settings, source, layers, weights)
    states = {name: _state_before(folder, run, source, captured, teacher)}
    students = Students({name: run.each[name].distillation})
    done = int(states[name].step)
    LOG.info("step %d, from the state after step %d", step, done)
    program = jit_step(students, mesh, states, teacher)
    with contextlib.closing(device_batches(run_settings, run, source, done)) as batches:
        for _ in range(done + 1, step):
            states, _ = program(states, teacher, next(batches)[0], unlogged(mesh))
        batch, _ = next(batches)
    with _checked_operations(captured):
        # Nothing is donated, because JAX repeats a non-finite program operation by operation.
        _, metrics = jax.jit(students.step)(states, teacher, batch, unlogged(mesh))
    raise RunError(_outcome(step, {key: float(value) for key, value in metrics[name].items()}))


def _state_before(
    folder: epath.Path, run: RunSetup, source: Source, captured: Captured, teacher: Params | None
) -> TrainState:
    """Returns the latest saved state of the student before the step, or its initial state."""
    name, step = captured.student, captured.step
    if not verify.finished(checkpoints_folder(folder)):
        measured = measure_first_batches(captured.settings, run, source, teacher)
        return run.init_states(teacher, measured)[name]
    with contextlib.closing(Checkpoints(folder, read_only=True)) as checkpoints:
        # A student that was stopped among several keeps its state in all later checkpoints.
        found = checkpoints.step_to_read(before=None if name else step)
        state = restore_states(checkpoints, found, {name: run.each[name].state})[name]
    if int(state.step) >= step:
        raise InputError(f"run: no checkpoint of {folder} holds a state before step {step}")
    return state


@contextlib.contextmanager
def _checked_operations(captured: Captured) -> Iterator[None]:
    """Stops at the first operation that gives NaN or, where the run found one, infinity."""
    infinite = " is nan " not in captured.found
    try:
        with jax.debug_nans(True), jax.debug_infs(infinite):
            yield
    except FloatingPointError as error:
        traceback.print_exc()
        reason = str(error).splitlines()[0]
        raise RunError(f"step {captured.step}: {reason} {_where(error)}") from error


def _where(error: BaseException) -> str:
    """Returns the last line of this package in an error's traceback."""
    package = str(Path(__file__).parents[1])
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if f.filename.startswith(package) and f.filename != __file__]
    return f"(in {own[-1].filename}:{own[-1].lineno}, {own[-1].name})" if own else ""


def _outcome(step: int, metrics: dict[str, float]) -> str:
    """Returns the message for a step in which no single operation was non-finite."""
    wrong = [f"{name} is {value}" for name, value in metrics.items() if not math.isfinite(value)]
    kind = jax.devices()[0].device_kind
    if wrong:
        return f"step {step}: {', '.join(wrong)}, but no single operation gives such a number"
    return f"step {step} is finite when it is replayed on {kind}: try the devices of the run"
