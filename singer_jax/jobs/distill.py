"""The job `distill`: from settings to a trained student."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import itertools
import json
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from clu import parameter_overview
from etils import epath
from flax import nnx
from tqdm.contrib.logging import logging_redirect_tqdm

from singer_jax import parallel
from singer_jax.checkpoints import Checkpoints, fingerprint
from singer_jax.data.images import EvalTransform, TrainTransform
from singer_jax.data.loader import UnreadableCount, train_batches, worker_count
from singer_jax.data.registry import make_source
from singer_jax.data.sources import TEST, TRAIN, Source, evenly
from singer_jax.errors import InputError
from singer_jax.evaluation.backbone import Backbone
from singer_jax.evaluation.knn import knn_top1
from singer_jax.files import check_takes_checkpoints, make_workdir, write_text, writing
from singer_jax.models.params import Params, join
from singer_jax.models.weights import export_timm, to_hub_config, to_timm
from singer_jax.settings import flatten, from_flat, to_dict
from singer_jax.telemetry import LOG, MetricsWriter, Recorder
from singer_jax.training.flops import step_flops
from singer_jax.training.held_out import HeldOut
from singer_jax.training.loop import Between, train
from singer_jax.training.setup import DistillSettings, Setup, setup
from singer_jax.training.step import TrainState, jit_step


def distill(settings: DistillSettings, workdir: epath.Path) -> None:
    """Trains a student; continues by itself where the work directory holds a checkpoint.

    Args:
      settings: of the run.
      workdir: for config.json, metrics.jsonl, tensorboard/, checkpoints/ and student/.

    Raises:
      InputError: the settings cannot work, or are not those of the run in `workdir`.
      Stopped: after SIGTERM or SIGINT, saved.
      RunError: a loss that is no number, too many unreadable images, a damaged checkpoint.
    """
    if settings.log.wandb and importlib.util.find_spec("wandb") is None:
        raise InputError("log.wandb: wandb is not installed; pip install wandb, or leave it off")
    check_takes_checkpoints(workdir)
    source = make_source(settings.data.source, settings.data.path, TRAIN)
    run = setup(settings, len(source), source.num_classes)
    make_workdir(workdir)
    with contextlib.closing(Checkpoints(workdir, settings.checkpoint.keep)) as checkpoints:
        start = checkpoints.latest_step() or 0
        meta = {
            "data": source.fingerprint(),
            "config": to_dict(settings),
            "student": to_hub_config(run.distillation.student.spec),
        }
        if start:
            _check_same_run(settings, workdir, meta, checkpoints.meta(start))
            LOG.info("%s: continuing after step %d of %d", workdir, start, run.steps)
        if start < run.steps:
            state = _train(settings, workdir, run, source, checkpoints, start, meta)
        else:
            state = checkpoints.restore(start, run.state)
            _write_config(settings, workdir)
    _export_student(workdir / "student", run, state)
    LOG.info("%s: %d steps done, student exported", workdir, int(state.step))


def _train(
    settings: DistillSettings,
    workdir: epath.Path,
    run: Setup,
    source: Source,
    checkpoints: Checkpoints,
    start: int,
    meta: dict[str, Any],
) -> TrainState:
    teacher = run.load_teacher()
    if teacher is not None:
        stacked = run.distillation.teacher.merge(teacher).numerics.stacked
        meta = meta | {"teacher": fingerprint(teacher, stacked)}
    if start:
        _check_same_teacher(settings, workdir, meta, checkpoints.meta(start))
    state = checkpoints.restore(start, run.state) if start else run.init_state(teacher)
    evaluate = _evaluation(settings, run, source) if settings.evals.every else None
    LOG.info("%s: %s", workdir, _sizes(state, teacher))
    with contextlib.ExitStack() as stack:
        batches = stack.enter_context(contextlib.closing(_batches(settings, run, source, start)))
        first = next(batches)
        step_fn = jit_step(run.distillation, run.mesh, state, teacher)
        step_fn = step_fn.lower(state, teacher, first[0], np.bool_(True)).compile()

        _write_config(settings, workdir)
        writer = MetricsWriter(workdir, start, to_dict(settings) if settings.log.wandb else None)
        stack.callback(writer.close)
        recorder = Recorder(
            writer,
            start=start,
            steps=run.steps,
            every=settings.log.every,
            batch_size=settings.batch_size,
            flops=step_flops(run.distillation, run.state, run.teacher, settings.batch_size),
            devices=run.mesh.devices.ravel(),
        )
        stack.callback(recorder.close)
        stack.enter_context(logging_redirect_tqdm([LOG]))
        between = Between(
            save=lambda state, step: checkpoints.save(state, step, meta),
            save_every=settings.checkpoint.every,
            kept_in=str(workdir),
            saved=checkpoints.wait,
            evaluate=evaluate,
            evaluate_every=settings.evals.every,
            first=functools.partial(_report_start, run),
        )
        rest, first = itertools.chain([first], batches), None  # kept no longer than its step
        return train(step_fn, state, teacher, rest, between, recorder)


def _sizes(state: TrainState, teacher: Params | None) -> str:
    count = parameter_overview.count_parameters
    counts = {
        "teacher": count(teacher or {}),
        "student": count(state.params["student"]),
        "student, untouched": count(state.constants["student"]),
        "method": count(state.params["method"]),
    }
    return "parameters: " + ", ".join(f"{name} {n:,}" for name, n in counts.items() if n)


def _batches(
    settings: DistillSettings, run: Setup, source: Source, start: int
) -> Iterator[tuple[Any, Any]]:
    """Batches on the devices, each with the number of unreadable images up to it."""
    data = settings.data
    total = parallel.total_of_processes(run.mesh)
    unreadable = UnreadableCount(source, LOG.warning, total, jax.process_count())
    batches = train_batches(
        source,
        TrainTransform(run.image_size, data.crop_area, data.crop_ratio, data.flip),
        batch_size=settings.batch_size,
        seed=settings.seed,
        start=start,
        workers=worker_count(data.workers),
        strict=data.strict,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    with contextlib.closing(batches):
        for batch in batches:
            unreadable.add(batch)
            examples = {key: batch[key] for key in ("image", "label")}
            put = parallel.put_batch(examples, parallel.batch_sharding(run.mesh))
            yield put, unreadable.unreadable


def _evaluation(
    settings: DistillSettings, run: Setup, train_split: Source
) -> Callable[[TrainState, Params | None], dict[str, float]]:
    """Evaluation while training: the losses on held-out images and, with labels, kNN.

    An image that cannot be read is named once; kNN leaves it out.

    Returns:
      a function that gives `eval/held_out/loss`, `eval/held_out/loss_<term>`, `eval/knn/top1` and
      `eval/images/unreadable`, how many images of both splits could not be read so far.

    Raises:
      InputError: no test split, or one with fewer images than devices.
    """
    try:
        test_split = make_source(settings.data.source, settings.data.path, TEST)
    except InputError as error:
        raise InputError(
            f"evals.every: {settings.evals.every}, but there is nothing to evaluate on: {error}; "
            "set evals.every=0 or add a test split"
        ) from error
    test, bank = (evenly(source, settings.evals.images) for source in (test_split, train_split))
    workers = worker_count(settings.data.workers)
    unreadable: set[str] = set()

    def name(source: Source, indices: np.ndarray) -> None:
        for described in map(source.describe, indices.tolist()):
            if described not in unreadable:
                unreadable.add(described)
                LOG.warning(
                    "unreadable image, left out of kNN, replaced in the losses: %s", described
                )

    held_out = HeldOut(
        run,
        test,
        settings.batch_size // settings.accumulation,
        workers,
        functools.partial(name, test),
    )

    def evaluate(state: TrainState, teacher: Params | None) -> dict[str, float]:
        losses = held_out(state, teacher)
        metrics = {f"eval/held_out/{term}": value for term, value in losses.items()}
        if test.num_classes and bank.num_classes:
            params = join(state.params["student"], state.constants["student"])
            backbone = Backbone(run.distillation.student, params, run.mesh)
            task = backbone.classification(test.num_classes, None)
            transform = EvalTransform(backbone.image_size)
            features = (
                backbone.extract(
                    source, task, transform, workers, left_out=functools.partial(name, source)
                )
                for source in (bank, test)
            )
            top1 = knn_top1(*features, classes=test.num_classes, mesh=run.mesh)
            metrics["eval/knn/top1"] = 100 * top1
        metrics["eval/images/unreadable"] = len(unreadable)
        return metrics

    return evaluate


def _report_start(run: Setup, state: TrainState, metrics: dict[str, jax.Array]) -> None:
    method = nnx.merge(run.distillation.method, state.params["method"], state.constants["method"])
    for level, line in method.report(jax.device_get(metrics)):
        LOG.log(level, line)


def _check_same_run(
    settings: DistillSettings, workdir: epath.Path, meta: dict[str, Any], saved: dict[str, Any]
) -> None:
    """Compares a start with the checkpoint that it continues: only that binds a work directory."""
    changed = _differences(settings, saved["config"])
    if changed:
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        raise InputError(
            f"{workdir} holds the run of another configuration: {'; '.join(changed[:3])}{more}"
            "; use a new --workdir"
        )
    if saved["data"] != meta["data"]:
        raise InputError(
            f"{workdir} was trained on other images than {settings.data.source} "
            f"{settings.data.path} now holds; use a new --workdir or the same images"
        )


# A run may be continued with other values of these; any other difference is another run.
_RESUMABLE = (
    "steps",
    "epochs",
    "data.path",
    "data.workers",
    "data.strict",
    "mesh.",
    "checkpoint.",
    "log.",
    "evals.",
)


def _differences(settings: DistillSettings, saved: dict[str, Any]) -> list[str]:
    """Keys whose values make these settings another run than the saved one, and both values.

    Settings that the run does not read make no difference; those that are newer than the saved run
    had their default then.
    """
    theirs = flatten(saved)
    theirs |= flatten(to_dict(from_flat(DistillSettings(), theirs)))
    ours = flatten(to_dict(settings))
    return [
        f"{key}: {theirs.get(key)!r} -> {ours.get(key)!r}"
        for key in sorted(ours | theirs)
        if ours.get(key) != theirs.get(key) and not key.startswith(_RESUMABLE)
    ]


def _check_same_teacher(
    settings: DistillSettings, workdir: epath.Path, meta: dict[str, Any], saved: dict[str, Any]
) -> None:
    # Checkpoints of older versions say nothing of the teacher's weights.
    if "teacher" in saved and saved["teacher"] != meta.get("teacher"):
        raise InputError(
            f"{workdir} was trained with other teacher weights than {settings.teacher.weights} now "
            "holds; use a new --workdir or the same weights"
        )


def _write_config(settings: DistillSettings, workdir: epath.Path) -> None:
    """Writes config.json, once everything that may refuse this start has been seen."""
    if jax.process_index() > 0:
        return
    with writing(workdir):
        write_text(workdir / "config.json", json.dumps(to_dict(settings), indent=2) + "\n")


def _export_student(folder: epath.Path, run: Setup, state: TrainState) -> None:
    gather = jax.jit(lambda tree: tree, out_shardings=parallel.replicated(run.mesh))
    trained, untouched = gather((state.params["student"], state.constants["student"]))
    if jax.process_index() == 0:
        spec = run.distillation.student.spec
        export_timm(folder, spec, to_timm(trained) | to_timm(untouched))
