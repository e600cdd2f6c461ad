"""The job `distill`: trains one student or several, from settings to exported weights."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import itertools
import json
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
from clu import parameter_overview
from etils import epath
from tqdm.contrib.logging import logging_redirect_tqdm

from singer_jax.data.registry import open_source
from singer_jax.data.sources import TRAIN, Source
from singer_jax.errors import InputError, StudentsStopped
from singer_jax.io.files import check_takes_checkpoints, make_workdir, write_text, writing
from singer_jax.jobs.validation import Validation
from singer_jax.models import registers
from singer_jax.models.export_timm import export_timm, to_hub_config, trained_here
from singer_jax.models.model_card import write_card
from singer_jax.models.params import Params
from singer_jax.models.provenance import describe
from singer_jax.models.weights import to_timm, without_scales
from singer_jax.platform import parallel
from singer_jax.runs.checkpoints import Checkpoints, fingerprint
from singer_jax.runs.lock import RunLock, holding
from singer_jax.runs.metrics import LOG, MetricsWriter, StepMetrics
from singer_jax.runs.recorder import RecordedSteps, Recorder, in_words, stall_watchdog
from singer_jax.runs.workdir import config_file, export_folder, origins_file
from singer_jax.settings.settings import to_dict
from singer_jax.training.artifact_removal import load_teacher
from singer_jax.training.batches import device_batches
from singer_jax.training.calibration import measure_first_batches
from singer_jax.training.failed_step import capture
from singer_jax.training.flops import step_flops
from singer_jax.training.loop import LoopHooks, train
from singer_jax.training.program import compile_step
from singer_jax.training.provenance import export_origin, run_provenance
from singer_jax.training.restore import restore_states, saved_tree
from singer_jax.training.resume_checks import check_same_run, check_same_teacher
from singer_jax.training.settings import DistillSettings
from singer_jax.training.setup import RunSetup, setup_students
from singer_jax.training.step import TrainState


def distill(settings: DistillSettings, workdir: epath.Path) -> None:
    """Trains one student or several; continues the run where `workdir` holds a checkpoint.

    Args:
      settings: The settings of the run.
      workdir: Folder for config.json, metrics.jsonl, tensorboard/, checkpoints/ and student/ (of
        several students students/NAME/).

    Raises:
      InputError: The settings cannot work or differ from those of the run in `workdir`, or another
        process trains in it.
      Stopped: SIGTERM or SIGINT arrived; the run is saved.
      RunError: A non-finite loss, too many unreadable images, or no checkpoint without corruption.
        If one student of several stops, the others are trained and exported first.
    """
    with parallel.computing(settings.precision):
        _distill(settings, workdir)


@dataclasses.dataclass(frozen=True)
class _Job:
    """A start of a run.

    Attributes:
      settings: The settings of the run.
      workdir: The work directory.
      run: The students before their first step.
      source: The training images.
      lock: The lock of the work directory.
      checkpoints: The checkpoints in it.
      meta: The description of the run in each checkpoint, with `weights`, the models' provenance.
      stopped: The reason by the name of each student that ended with an error; it grows while
        the others are trained.
    """

    settings: DistillSettings
    workdir: epath.Path
    run: RunSetup
    source: Source
    lock: RunLock
    checkpoints: Checkpoints
    meta: dict[str, Any]
    stopped: dict[str, str]


def _distill(settings: DistillSettings, workdir: epath.Path) -> None:
    if settings.log.wandb and importlib.util.find_spec("wandb") is None:
        raise InputError("log.wandb: wandb is not installed; pip install wandb, or leave it off")
    check_takes_checkpoints(workdir)
    source = open_source(settings.data, TRAIN)
    run = setup_students(settings, len(source), source.num_classes)
    steps = run.any.steps
    _warn_of_long_warmup(settings, run)
    make_workdir(workdir)
    with contextlib.ExitStack() as stack:
        lock = stack.enter_context(holding(workdir, jax.process_index() == 0))
        checkpoints = Checkpoints(workdir, settings.checkpoint.keep)
        stack.enter_context(contextlib.closing(checkpoints))
        start = checkpoints.newest_whole() or 0
        meta, saved = _description(settings, run, source), {}
        if start:
            saved = checkpoints.meta(start)
            former = getattr(source, "former_fingerprint", source.fingerprint)()
            check_same_run(settings, workdir, meta, saved, former)
            LOG.info("%s: continuing after step %d of %d", workdir, start, steps)
        stopped = dict(saved.get("stopped", {}))
        # A run that continues keeps the provenance of the weights from which it was started.
        meta["weights"] = saved.get("weights") or run_provenance(settings, run)
        for name, one in meta["weights"].items() if jax.process_index() == 0 else ():
            LOG.info("%s: %s", name, describe(one))
        job = _Job(settings, workdir, run, source, lock, checkpoints, meta, stopped)
        if start < steps:
            states = _train(job, start)
        else:
            states = restore_states(checkpoints, start, run.states)
            _write_config(job)
        lock.check()
        _export_students(job, states)
    names = ", ".join(filter(None, states)) or "student"
    LOG.info("%s: %d steps done, %s exported", workdir, steps, names)
    if stopped:
        message = f"{workdir}: {in_words(stopped)}; the other students are done"
        raise StudentsStopped(message, stopped)


def _warn_of_long_warmup(settings: DistillSettings, run: RunSetup) -> None:
    epochs, steps = settings.schedule.warmup_epochs, run.any.steps
    warmup = epochs * run.any.steps_per_epoch
    if settings.schedule.name == "cosine" and steps < warmup:
        LOG.warning(
            "schedule.warmup_epochs: %d epochs are %d steps, the run has %d: the learning rate "
            "ends at %.0f %% of optimizer.learning_rate",
            epochs,
            warmup,
            steps,
            100 * steps / warmup,
        )


def _description(settings: DistillSettings, run: RunSetup, source: Source) -> dict[str, Any]:
    """Returns the description of the run that is saved in each checkpoint."""
    specs = {name: own.distillation.student.spec for name, own in run.each.items()}
    configs = {name: to_hub_config(spec) for name, spec in specs.items()}
    students = {"student": configs[""]} if "" in configs else {"students": configs}
    return {"data": source.fingerprint(), "config": to_dict(settings)} | students


def _train(job: _Job, start: int) -> Mapping[str, TrainState]:
    """Trains the steps after `start`, and returns the states after the last one."""
    settings, run, source = job.settings, job.run, job.source
    layers = run.students.teacher_reads
    teacher = load_teacher(run.teacher_model, settings, source, layers, job.meta["weights"])
    if teacher is not None:
        stacked = run.teacher_model.policy.stacked
        digest = fingerprint(without_scales(teacher), stacked)
        job = dataclasses.replace(job, meta=job.meta | {"teacher": digest})
    states = _first_states(job, teacher, start)
    validation = None
    if settings.evals.every_steps:
        validation = Validation(settings, run, source, job.stopped)
    LOG.info("%s: %s", job.workdir, _sizes(states, teacher))
    with contextlib.ExitStack() as stack:
        batches = device_batches(settings, run, source, start)
        stack.enter_context(contextlib.closing(batches))
        with stall_watchdog():
            first = next(batches)
        step_fn = _compile(job, states, teacher, first[0])
        _write_config(job)
        recorder = _open_recorder(job, start, stack)
        rest, first = itertools.chain(iter([first]), batches), None  # kept no longer than its step
        return train(step_fn, states, teacher, rest, _hooks(job, validation), recorder)


def _first_states(job: _Job, teacher: Params | None, start: int) -> Mapping[str, TrainState]:
    """Returns the states after step `start`: new ones, or those of the checkpoint."""
    if not start:
        measured = measure_first_batches(job.settings, job.run, job.source, teacher)
        return job.run.init_states(teacher, measured)
    check_same_teacher(job.settings, job.workdir, job.meta, job.checkpoints.meta(start))
    job.checkpoints.set_aside()  # only now is it known that they belong to this run
    return restore_states(job.checkpoints, start, job.run.states)


def _sizes(states: Mapping[str, TrainState], teacher: Params | None) -> str:
    """Returns a line with the numbers of parameters."""
    count = parameter_overview.count_parameters
    of_file = without_scales(teacher or {})
    of_file.pop(registers.NAME, None)
    counts = {"teacher": count(of_file)}
    for name, state in states.items():
        before = f"{name}: " if name else ""
        counts |= {
            f"{before}student": count(state.params["student"]),
            f"{before}student (frozen)": count(state.constants["student"]),
            f"{before}method": count(state.params["method"]),
        }
    return "parameters: " + ", ".join(f"{name} {n:,}" for name, n in counts.items() if n)


def _compile(
    job: _Job, states: Mapping[str, TrainState], teacher: Params | None, batch: Any
) -> Callable:
    LOG.info("%s: compiling the step (may take a minute)", job.workdir)
    began = time.perf_counter()
    execution = job.settings.students.execution
    program = compile_step(job.run.students, job.run.any.mesh, states, teacher, batch, execution)
    LOG.info("%s: compiled in %.0f s", job.workdir, time.perf_counter() - began)
    if program.description:
        LOG.info("%s: %s", job.workdir, program.description)
    return program.step


def _open_recorder(job: _Job, start: int, stack: contextlib.ExitStack) -> Recorder:
    """Returns the recorder of the steps' metrics; `stack` closes it and its writer."""
    settings, run = job.settings, job.run
    config = to_dict(settings) if settings.log.wandb else None
    writer = MetricsWriter(job.workdir, start, config)
    stack.callback(writer.close)
    recorder = Recorder(
        writer,
        RecordedSteps(
            start=start,
            steps=run.any.steps,
            every=settings.log.every_steps,
            batch_size=settings.batch_size,
            flops=step_flops(run.students, run.states, run.teacher, settings.batch_size),
            devices=run.any.mesh.devices.ravel(),
        ),
        stopped=job.stopped,
        capture=functools.partial(capture, job.workdir, settings, job.source),
    )
    stack.callback(recorder.close)
    stack.enter_context(logging_redirect_tqdm([LOG]))
    return recorder


def _hooks(job: _Job, validation: Validation | None) -> LoopHooks:
    """Returns what the training loop calls between steps."""
    settings, checkpoints = job.settings, job.checkpoints

    def save(states: Mapping[str, TrainState], step: int) -> None:
        job.lock.check()
        checkpoints.save(saved_tree(states), step, job.meta | {"stopped": dict(job.stopped)})

    return LoopHooks(
        save=save,
        save_every=settings.checkpoint.every_steps,
        kept_in=str(job.workdir),
        saved=checkpoints.wait,
        evaluate=validation,
        evaluate_every=settings.evals.every_steps,
        first=functools.partial(_report_start, job.run),
    )


def _report_start(run: RunSetup, states: Mapping[str, TrainState], metrics: StepMetrics) -> None:
    """Logs the reports of the methods after the first step."""
    for name, own in run.each.items():
        for level, line in own.method_of(states[name]).report(metrics[name]):
            LOG.log(level, f"{name}: {line}" if name else line)


def _write_config(job: _Job) -> None:
    """Writes config.json and weights.json, after all checks that may refuse this start."""
    if jax.process_index() > 0:
        return
    with writing(job.workdir):
        for file, content in (
            (config_file(job.workdir), to_dict(job.settings)),
            (origins_file(job.workdir), job.meta["weights"]),
        ):
            write_text(file, json.dumps(content, indent=2) + "\n")


def _export_students(job: _Job, states: Mapping[str, TrainState]) -> None:
    """Exports each student with its model card."""
    run, weights = job.run, job.meta["weights"]
    gather = jax.jit(lambda tree: tree, out_shardings=parallel.replicated(run.any.mesh))
    for name, own in job.settings.each().items():
        parts = gather((states[name].params["student"], states[name].constants["student"]))
        if jax.process_index() > 0:
            continue
        made_from = export_origin(own, weights, name, int(states[name].step))
        folder = export_folder(job.workdir, name)
        trained, frozen = map(to_timm, parts)
        spec = trained_here(run.each[name].distillation.student.spec)
        make_workdir(folder)
        with holding(folder):  # the job `export` also writes there
            export_timm(folder, spec, trained | frozen, made_from)
            write_card(folder, spec, made_from)
    parallel.of_first_process(None)  # no process ends before everything is written
