"""The job `distill`: from settings to a trained student, or to several."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import itertools
import json
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import PurePath
from typing import Any

import jax
import numpy as np
from clu import parameter_overview
from etils import epath
from flax import nnx
from tqdm.contrib.logging import logging_redirect_tqdm

from singer_jax.data.images import EvalTransform, TrainTransform
from singer_jax.data.loader import UnreadableCount, train_batches, worker_count
from singer_jax.data.registry import open_source
from singer_jax.data.sources import TEST, TRAIN, Source, evenly
from singer_jax.errors import InputError, StudentsStopped
from singer_jax.evaluation.backbone import Backbone, extract_each
from singer_jax.evaluation.cleaning import describe_cleaning, find_register_neurons
from singer_jax.evaluation.cleaning import told as cleaning_told
from singer_jax.evaluation.knn import knn_top1
from singer_jax.io.files import check_takes_checkpoints, make_workdir, write_text, writing
from singer_jax.models import registers
from singer_jax.models.export_timm import export_timm, to_hub_config, trained_here
from singer_jax.models.model_card import write_card
from singer_jax.models.params import Params, join
from singer_jax.models.provenance import Provenance, origin, provenance, told
from singer_jax.models.weights import to_timm
from singer_jax.platform import parallel
from singer_jax.runs.checkpoints import Checkpoints, fingerprint
from singer_jax.runs.lock import RunLock, holding
from singer_jax.runs.metrics import LOG, MetricsWriter, StepMetrics, metric_name
from singer_jax.runs.recorder import Recorder, in_words, stall_watchdog
from singer_jax.runs.workdir import config_file, export_folder, origins_file
from singer_jax.settings.settings import to_dict
from singer_jax.training import calibration
from singer_jax.training.capture import capture
from singer_jax.training.flops import step_flops
from singer_jax.training.held_out import HeldOut
from singer_jax.training.identity import check_same_run, check_same_teacher
from singer_jax.training.loop import LoopHooks, train
from singer_jax.training.program import compile_step
from singer_jax.training.settings import DistillSettings
from singer_jax.training.setup import Setups, restore_states, saved_tree, setup_students
from singer_jax.training.step import TrainState


def distill(settings: DistillSettings, workdir: epath.Path) -> None:
    """Trains one student or several; continues by itself where `workdir` holds a checkpoint.

    Args:
      settings: of the run.
      workdir: for config.json, metrics.jsonl, tensorboard/, checkpoints/ and student/, or of
        several students/NAME/.

    Raises:
      InputError: the settings cannot work, or are not those of the run in `workdir`, or another
        process runs it.
      Stopped: after SIGTERM or SIGINT, saved.
      RunError: a loss that is no number, too many unreadable images, no whole checkpoint. Of
        several students the others are trained and exported before it is raised.
    """
    with parallel.computing(settings.precision):
        _distill(settings, workdir)


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
        held = stack.enter_context(holding(workdir, jax.process_index() == 0))
        checkpoints = Checkpoints(workdir, settings.checkpoint.keep)
        stack.enter_context(contextlib.closing(checkpoints))
        start = checkpoints.newest_whole() or 0
        meta, saved = _described(settings, run, source), {}
        if start:
            saved = checkpoints.meta(start)
            check_same_run(settings, workdir, meta, saved)
            LOG.info("%s: continuing after step %d of %d", workdir, start, steps)
        stopped = dict(saved.get("stopped", {}))
        # A run that continues says which weights it was trained from.
        weights = meta["weights"] = saved.get("weights") or _provenance(settings, run)
        for name, one in weights.items() if jax.process_index() == 0 else ():
            LOG.info("%s: %s", name, told(one))
        if start < steps:
            states = _train(settings, workdir, run, source, held, checkpoints, start, meta, stopped)
        else:
            states = restore_states(checkpoints, start, run)
            _write_config(settings, workdir, weights)
        held.check()
        _export_students(workdir, run, states, settings, weights)
    names = ", ".join(filter(None, states)) or "student"
    LOG.info("%s: %d steps done, %s exported", workdir, steps, names)
    if stopped:
        message = f"{workdir}: {in_words(stopped)}; the other students are done"
        raise StudentsStopped(message, stopped)


def _warn_of_long_warmup(settings: DistillSettings, run: Setups) -> None:
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


def _described(settings: DistillSettings, run: Setups, source: Source) -> dict[str, Any]:
    """What a checkpoint says of its run."""
    specs = {name: own.distillation.student.spec for name, own in run.each.items()}
    configs = {name: to_hub_config(spec) for name, spec in specs.items()}
    students = {"student": configs[""]} if "" in configs else {"students": configs}
    return {"data": source.fingerprint(), "config": to_dict(settings)} | students


def _train(
    settings: DistillSettings,
    workdir: epath.Path,
    run: Setups,
    source: Source,
    held: RunLock,
    checkpoints: Checkpoints,
    start: int,
    meta: dict[str, Any],
    stopped: dict[str, str],
) -> Mapping[str, TrainState]:
    """The states after the last step; adds to `stopped` the students that went wrong."""
    teacher, mesh = load_teacher(settings, run, source, meta["weights"]), run.any.mesh
    if teacher is not None:
        stacked = run.teacher_model.policy.stacked
        meta = meta | {"teacher": fingerprint(teacher, stacked)}
    if start:
        check_same_teacher(settings, workdir, meta, checkpoints.meta(start))
        checkpoints.set_aside()  # only now is it known that they are this run's
        states = restore_states(checkpoints, start, run)
    else:
        states = run.init_states(teacher, measured(settings, run, source, teacher))
    every = settings.evals.every_steps
    evaluate = _evaluation(settings, run, source, stopped) if every else None
    LOG.info("%s: %s", workdir, _sizes(states, teacher))
    with contextlib.ExitStack() as stack:
        batches = stack.enter_context(
            contextlib.closing(device_batches(settings, run, source, start))
        )
        with stall_watchdog():
            first = next(batches)
        LOG.info("%s: compiling the step (may take a minute)", workdir)
        began = time.perf_counter()
        program = compile_step(
            run.students, mesh, states, teacher, first[0], settings.students.execution
        )
        LOG.info("%s: compiled in %.0f s", workdir, time.perf_counter() - began)
        if program.told:
            LOG.info("%s: %s", workdir, program.told)

        _write_config(settings, workdir, meta["weights"])
        writer = MetricsWriter(workdir, start, to_dict(settings) if settings.log.wandb else None)
        stack.callback(writer.close)
        recorder = Recorder(
            writer,
            start=start,
            steps=run.any.steps,
            every=settings.log.every_steps,
            batch_size=settings.batch_size,
            flops=step_flops(run.students, run.states, run.teacher, settings.batch_size),
            devices=mesh.devices.ravel(),
            stopped=stopped,
            capture=functools.partial(capture, workdir, settings, source),
        )
        stack.callback(recorder.close)
        stack.enter_context(logging_redirect_tqdm([LOG]))

        def save(states: Mapping[str, TrainState], step: int) -> None:
            held.check()
            checkpoints.save(saved_tree(states), step, meta | {"stopped": dict(stopped)})

        between = LoopHooks(
            save=save,
            save_every=settings.checkpoint.every_steps,
            kept_in=str(workdir),
            saved=checkpoints.wait,
            evaluate=evaluate,
            evaluate_every=settings.evals.every_steps,
            first=functools.partial(_report_start, run),
        )
        rest, first = itertools.chain(iter([first]), batches), None  # kept no longer than its step
        return train(program.step, states, teacher, rest, between, recorder)


def measured(
    settings: DistillSettings, run: Setups, source: Source, teacher: Params | None
) -> dict[str, Any]:
    """What the students' methods must know of the first batches, read apart from the training."""
    if not any(own.measured for own in run.each.values()):
        return {}
    LOG.info("looking at the teacher's outliers in the first %d batches", calibration.BATCHES)
    with contextlib.closing(device_batches(settings, run, source, 0)) as batches:
        few = itertools.islice(batches, calibration.BATCHES)
        return calibration.measure(run, teacher, (batch for batch, _ in few))


def _provenance(settings: DistillSettings, run: Setups) -> dict[str, Provenance]:
    """Of the teacher and of each student; in process 0 alone."""
    found: dict[str, Provenance] = {}
    if jax.process_index() > 0:
        return found
    if run.teacher_model:
        spec, file = run.teacher_model.network.spec, run.teacher_model.weights
        found["teacher"] = provenance(spec, settings.teacher.weights, file)
    for name, own in settings.each().items():
        prepared = run.each[name]
        spec = prepared.distillation.student.spec
        found[name or "student"] = provenance(spec, own.student.weights, prepared.weights)
    return found


# Images on which a run says what cleaning its teacher changes.
_DESCRIBED = 64


def load_teacher(
    settings: DistillSettings, run: Setups, source: Source, weights: dict[str, Provenance]
) -> Params | None:
    """The teacher's parameters; where it is cleaned, adds to `weights` what cleans it.

    A run that continues takes what `weights` says already.
    """
    teacher_model, of_teacher = run.teacher_model, weights.get("teacher", {})
    if teacher_model is None or settings.teacher.artifact_removal is None:
        return run.load_teacher()
    if "clean" in of_teacher:
        return run.load_teacher(of_teacher["clean"]["neurons"])
    params, mesh, wanted = teacher_model.load(), run.any.mesh, settings.teacher.registers
    before, neurons = (teacher_model.uncleaned, params), ()
    workers = min(worker_count(settings.data.workers), 2)
    if settings.teacher.artifact_removal == "registers":
        few = evenly(source, wanted.images)
        neurons = find_register_neurons(*before, mesh, few, wanted, workers)
    teacher = teacher_model.with_neurons(params, neurons)
    after, few = (teacher_model.network, teacher), evenly(source, _DESCRIBED)
    layers = describe_cleaning(before, after, mesh, few, run.students.teacher_reads, workers)
    found = {"by": settings.teacher.artifact_removal, "neurons": neurons, "layers": layers}
    for line in cleaning_told(found) if jax.process_index() == 0 else ():
        LOG.info(line)
    weights["teacher"] = {**of_teacher, "clean": found}
    return teacher


def _sizes(states: Mapping[str, TrainState], teacher: Params | None) -> str:
    count = parameter_overview.count_parameters
    of_file = {name: part for name, part in (teacher or {}).items() if name != registers.NAME}
    counts = {"teacher": count(of_file)}
    for name, state in states.items():
        before = f"{name}: " if name else ""
        counts |= {
            f"{before}student": count(state.params["student"]),
            f"{before}student, untouched": count(state.constants["student"]),
            f"{before}method": count(state.params["method"]),
        }
    return "parameters: " + ", ".join(f"{name} {n:,}" for name, n in counts.items() if n)


def device_batches(
    settings: DistillSettings, run: Setups, source: Source, start: int
) -> Iterator[tuple[Any, Any]]:
    """Batches on the devices, each with the number of unreadable images up to it."""
    data, mesh, size = settings.data, run.any.mesh, settings.batch_size
    sharding = parallel.batch_sharding(mesh)
    gather = parallel.gather_of_processes(mesh)
    unreadable = UnreadableCount(source, LOG.warning, data.max_unreadable, gather)
    batches = train_batches(
        source,
        TrainTransform(
            run.image_size, data.crop_area, data.crop_ratio, data.flip, data.decode == "fast"
        ),
        batch_size=size,
        seed=settings.seed,
        start=start,
        workers=worker_count(data.workers),
        strict=data.fail_on_unreadable,
        # Row i of the batch is image i of the step, on any number of processes.
        rows=parallel.local_rows(sharding, size),
    )
    with contextlib.closing(batches):
        for batch in batches:
            unreadable.add(batch)
            examples = {key: batch[key] for key in ("image", "label")}
            yield parallel.put_rows(examples, sharding, size), unreadable.unreadable


_PER_CLASS = 10  # images of the training split that kNN compares with
_LARGEST_BANK = 20_000  # which is extracted at each evaluation, unless more are asked for


def bank_size(images: int, classes: int) -> int:
    """Returns how many training images kNN compares with: several a class, at least `images`."""
    return max(images, min(_PER_CLASS * classes, _LARGEST_BANK))


def _evaluation(
    settings: DistillSettings, run: Setups, train_split: Source, stopped: Mapping[str, str]
) -> Callable[[Mapping[str, TrainState], Params | None], dict[str, float]]:
    """Evaluation while training: the losses on held-out images and, with labels, kNN.

    An image that cannot be read is named once; kNN leaves it out. Students in `stopped` are left
    out.

    Returns:
      a function that gives `eval/val/loss`, `eval/val/loss_<term>` and `eval/knn/top1`,
      of several students behind `eval/NAME/`, and `eval/images/unreadable`, how many images of both
      splits could not be read so far.

    Raises:
      InputError: no test split.
    """
    try:
        test_split = open_source(settings.data, TEST)
    except InputError as error:
        raise InputError(
            f"evals.every_steps: {settings.evals.every_steps}, but there is nothing to evaluate "
            f"on: {error}; set evals.every_steps=0 or add a test split"
        ) from error
    test = evenly(test_split, settings.evals.images)
    bank = evenly(train_split, bank_size(settings.evals.images, train_split.num_classes))
    if test.num_classes and len(bank) < min(2 * bank.num_classes, len(train_split)):
        LOG.warning(
            "evals.images: kNN compares with %d images of %d classes; give at least two a class",
            len(bank),
            bank.num_classes,
        )
    workers, mesh = worker_count(settings.data.workers), run.any.mesh
    unreadable: set[str] = set()

    def say_unreadable(source: Source, indices: np.ndarray) -> None:
        for described in map(source.describe, indices.tolist()):
            if described not in unreadable:
                unreadable.add(described)
                LOG.warning(
                    "unreadable image, left out of kNN, replaced in the losses: %s", described
                )

    held_out = HeldOut(
        run,
        test,
        settings.batch_size // settings.grad_accum_steps,
        workers,
        functools.partial(say_unreadable, test),
    )

    def nearest(states: Mapping[str, TrainState]) -> dict[str, float]:
        backbones, tasks = {}, {}
        for name, state in states.items():
            params = join(state.params["student"], state.constants["student"])
            own = run.each[name].distillation.student
            backbones[name] = Backbone(own, params, mesh)
            tasks[name] = backbones[name].classification(test.num_classes, None)
        banks, tests = (
            extract_each(
                backbones,
                source,
                tasks,
                EvalTransform,
                workers,
                functools.partial(say_unreadable, source),
            )
            for source in (bank, test)
        )
        return {
            name: 100 * knn_top1(banks[name], tests[name], classes=test.num_classes, mesh=mesh)
            for name in states
        }

    def evaluate(states: Mapping[str, TrainState], teacher: Params | None) -> dict[str, float]:
        losses = held_out(states, teacher)
        going_on = {name: state for name, state in states.items() if name not in stopped}
        metrics = {
            metric_name("eval", name, f"val/{term}"): value
            for name in going_on
            for term, value in losses[name].items()
        }
        if test.num_classes and bank.num_classes:
            for name, top1 in nearest(going_on).items():
                metrics[metric_name("eval", name, "knn/top1")] = top1
        metrics["eval/images/unreadable"] = len(unreadable)
        return metrics

    return evaluate


def _report_start(run: Setups, states: Mapping[str, TrainState], metrics: StepMetrics) -> None:
    for name, own in run.each.items():
        params, constants = states[name].params["method"], states[name].constants["method"]
        method = nnx.merge(own.distillation.method, params, constants)
        for level, line in method.report(metrics[name]):
            LOG.log(level, f"{name}: {line}" if name else line)


def _write_config(
    settings: DistillSettings, workdir: epath.Path, weights: Mapping[str, Provenance]
) -> None:
    """Writes config.json and weights.json, once all that may refuse this start has been seen."""
    if jax.process_index() > 0:
        return
    with writing(workdir):
        write_text(config_file(workdir), json.dumps(to_dict(settings), indent=2) + "\n")
        write_text(origins_file(workdir), json.dumps(weights, indent=2) + "\n")


def made_by(
    settings: DistillSettings, weights: Mapping[str, Provenance], name: str, step: int
) -> dict[str, Any]:
    """Returns what an export says of its origin.

    Args:
      settings: of the run, as they are for this student.
      weights: of the run.
      name: of the student; empty where it is the only one.
      step: of the checkpoint.
    """
    data = settings.data
    # Of a folder the name alone: its place is nobody else's business.
    source = PurePath(data.path if data.source == "folder" else data.source).name
    images = {"source": source, "batch_size": settings.batch_size}
    return origin(weights, name, settings.method_name, step, images)


def _export_students(
    workdir: epath.Path,
    run: Setups,
    states: Mapping[str, TrainState],
    settings: DistillSettings,
    weights: Mapping[str, Provenance],
) -> None:
    gather = jax.jit(lambda tree: tree, out_shardings=parallel.replicated(run.any.mesh))
    for name, own in settings.each().items():
        parts = gather((states[name].params["student"], states[name].constants["student"]))
        if jax.process_index() > 0:
            continue
        made_from = made_by(own, weights, name, int(states[name].step))
        folder = export_folder(workdir, name)
        trained, untouched = map(to_timm, parts)
        spec = trained_here(run.each[name].distillation.student.spec)
        export_timm(folder, spec, trained | untouched, made_from)
        write_card(folder, spec, made_from)
    parallel.of_first_process(None)  # no process ends before everything is written
