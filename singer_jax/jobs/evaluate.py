"""Job `evaluate`: evaluates a model on the tasks of Table 1, or on one labelled source."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath

from singer_jax import methods
from singer_jax.data.benchmarks import NotInstalled, open_benchmark
from singer_jax.data.loader import worker_count
from singer_jax.data.registry import DataSettings, announced, open_source
from singer_jax.data.sources import TEST, TRAIN
from singer_jax.errors import InputError, Stopped
from singer_jax.evaluation import table1
from singer_jax.evaluation.backbone import (
    Backbone,
    Examples,
    ModelSelection,
    load_backbone,
    load_teacher,
)
from singer_jax.evaluation.measure import (
    ProbedModel,
    Split,
    probe_models,
    test_examples,
    without_infinities,
)
from singer_jax.evaluation.probe import ProbeResult, ProbeSettings
from singer_jax.evaluation.progress import FileKeeper
from singer_jax.evaluation.results import VERSION, provenance
from singer_jax.evaluation.scoring import score
from singer_jax.io.files import as_path, cached, download, make_workdir, replacing, write_text
from singer_jax.io.limits import read_arrays, read_object
from singer_jax.models.architecture import PRECISIONS, ComputePolicy
from singer_jax.platform import hosts, parallel, signals
from singer_jax.runs.checkpoints import fingerprint, step_to_read
from singer_jax.runs.lock import holding
from singer_jax.runs.metrics import LOG
from singer_jax.runs.workdir import (
    config_file,
    features_folder,
    head_file,
    model_folder,
    probe_progress_file,
    results_file,
    task_file,
)
from singer_jax.settings.ranges import SEED, TEXT, Each, OneOf
from singer_jax.settings.settings import section, setting, to_dict
from singer_jax.training.restore import read_settings
from singer_jax.training.settings import DistillSettings


@dataclasses.dataclass(frozen=True)
class EvaluateSettings(ModelSelection):
    """Settings of the job `evaluate`."""

    job: str = setting("evaluate", OneOf(("evaluate",)), "Name of the command.")
    seed: int = setting(0, SEED, "Seed of heads, order and crops.")
    run: str = setting(
        "",
        TEXT,
        "Work directory of a finished run; its student is evaluated. Set either this or `weights`.",
    )
    student: str = setting(
        "",
        TEXT,
        "Name of one of several students of `run`. Empty: all students and the teacher.",
    )
    weights: str = setting(
        "", TEXT, "Weights to evaluate: Hub repository or file. Set either this or `run`."
    )
    precision: str = setting("float32", OneOf(tuple(PRECISIONS)), "Dtype of the activations.")
    data: DataSettings = section(DataSettings(source="table1"))
    tasks: tuple[str, ...] = setting(
        (),
        Each(OneOf(tuple(table1.TASKS))),
        "Tasks of Table 1 to evaluate. Empty: all tasks whose data are installed.",
    )
    mesh: parallel.MeshSettings = section(parallel.MeshSettings())
    probe: ProbeSettings = section(ProbeSettings())


@dataclasses.dataclass(frozen=True)
class _Subject:
    """Model to evaluate.

    Attributes:
      name: name of one of several students, or `teacher`; else empty.
      folder: folder of its results.
      backbone: the model.
      run: settings of the run that made it.
      step: step of the run's checkpoint; None if it is not a student of a run.
      digest: `checkpoints.fingerprint` of its parameters.
      identity: digests of the model and of the settings, by which finished results are reused.
      finished: results of the finished tasks, by name.
      skipped: reasons why other tasks are not evaluated, by name.
    """

    name: str
    folder: epath.Path
    backbone: Backbone
    run: DistillSettings | None
    step: int | None
    digest: str
    identity: dict[str, str]
    finished: dict[str, dict[str, Any]]
    skipped: dict[str, str]


def evaluate(settings: EvaluateSettings, workdir: epath.Path) -> None:
    """Evaluates one model, or all students of a run and their teacher on the same images.

    Finished tasks are not repeated.

    Args:
      settings: settings of the job.
      workdir: folder for results.json, tasks/ (finished tasks) and features/ (of the fast
        protocol); with several models, each has a subfolder of its name.

    Raises:
      InputError: no model is given, no data set was found, or a data set is incomplete.
      Stopped: a stop was requested; the same command resumes the current probe.
    """
    benchmarks, splits, skipped = _find_data(settings)
    subjects = _subjects(settings, workdir, (*table1.TASKS, *splits), skipped)
    for name, reason in skipped.items():
        LOG.info("skipped %s: %s", name, reason)
    rows: dict[str, Any] = {}
    with holding(workdir, jax.process_index() == 0):
        with signals.deferred():
            _measure_all(settings, subjects, benchmarks, splits)
        for subject in subjects:
            rows |= _summarise(settings, subject)
    if settings.data.source == "table1" and jax.process_index() == 0:
        print(table1.format_rows(rows))
        print(table1.NOTE)


def _subjects(
    settings: EvaluateSettings,
    workdir: epath.Path,
    tasks: tuple[str, ...],
    skipped: dict[str, str],
) -> list[_Subject]:
    mesh = parallel.make_mesh(settings.mesh.data, settings.mesh.fsdp)
    policy = ComputePolicy(PRECISIONS[settings.precision])
    folder, step = as_path(settings.run or "."), settings.step
    if settings.run:
        step = step_to_read(folder, step)
    described = settings.run and config_file(folder).is_file()
    run = read_settings(folder, step) if described else None
    students = run.each() if run and run.students.named else {}
    backbones: dict[str, Backbone] = {}
    if students and not settings.student:
        for name in students:
            selected = ModelSelection(run=settings.run, student=name, step=step)
            backbones[name] = load_backbone(mesh, selected, policy)
        if any(methods.needs(own.method).teacher for own in students.values()):
            data = run.data
            try:
                backbones["teacher"] = load_teacher(
                    mesh, run.teacher, data.image_size, data.normalisation, policy
                )
            except InputError as error:
                LOG.warning("the teacher is not evaluated: %s", error)
    else:
        selected = dataclasses.replace(settings, step=step)
        backbones[settings.student] = load_backbone(mesh, selected, policy)
    found = []
    for name, backbone in backbones.items():
        folder = model_folder(workdir, name)
        if jax.process_index() == 0:
            make_workdir(folder)
        identity = {"model": backbone.digest(), "settings": _settings_digest(settings)}
        finished = parallel.of_first_process(
            {task: known for task in tasks if (known := _finished(folder, task, identity))}
        )
        own, of_run = students.get(name, run), step
        if name == "teacher":
            own = of_run = None
        digest = fingerprint(backbone.params)
        parts = (name, folder, backbone, own, of_run, digest, identity, finished, dict(skipped))
        found.append(_Subject(*parts))
    return found


def _measure_all(
    settings: EvaluateSettings,
    subjects: list[_Subject],
    benchmarks: dict[str, table1.Benchmark],
    splits: dict[str, Split],
) -> None:
    """Adds the missing results to `finished`, and the reasons for missing ones to `skipped`."""
    questions = itertools.count(1)

    def asked() -> bool:
        return hosts.stop_after(next(questions))

    def stop_if_asked() -> None:
        if asked():
            folder = subjects[0].folder if len(subjects) == 1 else subjects[0].folder.parent
            raise Stopped(f"stopped while extracting features; finished tasks are kept in {folder}")

    for task, split in splits.items():
        benchmark = benchmarks[task]
        due: dict[str, tuple[_Subject, Backbone, str]] = {}
        for subject in subjects:
            head = subject.finished.get("imagenet", {}).get("key")
            if benchmark.kind == "transfer" and not head:
                reason = "needs the head of the task imagenet, which is not evaluated"
                if settings.tasks:
                    raise InputError(f"tasks: {task} {reason}; add imagenet")
                subject.skipped[task] = reason
                continue
            key = _key(benchmark, split, head)
            if subject.finished.get(task, {}).get("key") == key:
                _say(subject, task)
                _summarise(settings, subject)
                continue
            backbone = dataclasses.replace(subject.backbone, before_batch=stop_if_asked)
            backbone = _with_statistics(backbone, benchmark, settings.data.normalisation)
            due[subject.name] = subject, backbone, key
        if not due:
            continue
        LOG.info("evaluating task: %s", task)
        tests = test_examples(
            {name: backbone for name, (_, backbone, _) in due.items()},
            benchmark.kind,
            split.test,
            settings.probe,
            worker_count(settings.data.workers),
        )
        if benchmark.kind == "transfer":
            for name, (subject, backbone, key) in due.items():
                metrics = _transfer(
                    task, backbone, split, settings, subject.folder, tests.pop(name)
                )
                _finish(settings, subject, task, split, key, metrics)
            continue
        # The published protocol trains all models on the same decoded images. The fast protocol
        # frees the features of each model after its evaluation.
        shared = settings.probe.protocol == "paper"
        for names in [list(due)] if shared else [[name] for name in due]:
            models = {}
            for name in names:
                subject, backbone, key = due[name]
                of_all = hashlib.sha256(json.dumps([subject.identity, key]).encode()).hexdigest()
                progress = probe_progress_file(subject.folder, task)
                keeper = FileKeeper(progress, of_all, asked)
                store = cached(features_folder(subject.folder, task))
                models[name] = ProbedModel(backbone, tests.pop(name), store, keeper)
            for name, (result, metrics) in _probe(benchmark, models, split, settings).items():
                subject, _, key = due[name]
                if jax.process_index() == 0:
                    with replacing(head_file(subject.folder, task)) as file:
                        np.savez(file, **result.head)
                _finish(settings, subject, task, split, key, metrics)
                models[name].keeper.remove()


def _finish(
    settings: EvaluateSettings,
    subject: _Subject,
    task: str,
    split: Split,
    key: str,
    metrics: dict[str, Any],
) -> None:
    """Writes the metrics of a task, and the updated results."""
    subject.finished[task] = {
        **subject.identity,
        "key": key,
        "data": _data_digest(split),
        "metrics": metrics,
    }
    _write(task_file(subject.folder, task), subject.finished[task])
    _say(subject, task)
    _summarise(settings, subject)


def _say(subject: _Subject, task: str) -> None:
    name = f"{subject.name}: {task}" if subject.name else task
    LOG.info("%s: %s", name, _brief(subject.finished[task]["metrics"]))


def _summarise(settings: EvaluateSettings, subject: _Subject) -> dict[str, Any]:
    """Writes the results.json of the finished tasks; returns the rows of the table."""
    results = {name: found["metrics"] for name, found in subject.finished.items()}
    run = to_dict(subject.run) if subject.run else None
    measured = f"{subject.name}, measured here" if subject.name else "measured here"
    rows: dict[str, Any] = {measured: table1.row(results)}
    model = subject.backbone.network.spec.name
    content = {
        "model": model,
        "run": {k: run[k] for k in ("seed", "method", "teacher", "student")} if run else None,
        "protocol": settings.probe.protocol,
        **provenance(
            _measuring(settings),
            {name: found["data"] for name, found in subject.finished.items()},
            subject.step,
            subject.digest,
        ),
        "tasks": results,
        "skipped": {
            name: reason for name, reason in subject.skipped.items() if name not in results
        },
        "table1": rows[measured],
    }
    paper = table1.published(run, model)
    if paper:
        rows[f"published: {paper[0]}"] = paper[1]
        content["published"] = {"of": paper[0], "row": paper[1]}
    _write(results_file(subject.folder), content)
    return rows


def _find_data(
    settings: EvaluateSettings,
) -> tuple[dict[str, table1.Benchmark], dict[str, Split], dict[str, str]]:
    """Returns the tasks, the available data, and the reasons for skipping the other tasks."""
    data = settings.data
    named = {benchmark.data: name for name, benchmark in table1.TASKS.items()}
    chosen = tuple(settings.tasks) or tuple(table1.TASKS)
    if data.source in named and table1.TASKS[named[data.source]].kind != "classification":
        chosen = (named[data.source],)
    elif data.source != "table1":
        sources = tuple(table1.SCENES) if data.source == "scenes" else (data.source,)
        found, splits = {}, {}
        for source in sources:
            name, benchmark = Path(source).name, table1.SCENES.get(source, table1.Benchmark(source))
            found[name] = benchmark
            splits[name] = _split(dataclasses.replace(data, source=source), benchmark.kind)
        return found, splits, {}
    splits, skipped = {}, {}
    for (
        name,
        benchmark,
    ) in table1.TASKS.items():  # imagenet precedes tasks that reuse its head
        if name not in chosen:
            continue
        try:
            test = announced(open_benchmark(benchmark.data, data.path, TEST), f"{name} test")
            train = None
            if benchmark.kind != "transfer":
                found = open_benchmark(benchmark.data, data.path, TRAIN)
                train = announced(found, f"{name} train")
            splits[name] = Split(train, test)
        except NotInstalled as error:
            if name in settings.tasks or data.source != "table1":
                raise
            skipped[name] = str(error)
    if not splits:
        raise InputError(
            "data.path: no data set of Table 1 found, expected e.g. DATA/imagenet/val "
            "(docs/data.md); for your own labelled images set --config.data.source=FOLDER"
        )
    return table1.TASKS, splits, skipped


def _split(data: DataSettings, kind: str) -> Split:
    train, test = (open_source(data, split) for split in (TRAIN, TEST))
    if not train.num_classes and kind == "classification":
        raise InputError(
            f"data.source: {data.source} has no labels for a probe; give one subfolder per class"
        )
    if train.num_classes != test.num_classes:
        raise InputError(
            f"data.source: {data.source} has {train.num_classes} classes to train and "
            f"{test.num_classes} to test"
        )
    return Split(train, test)


def _with_statistics(
    backbone: Backbone, benchmark: table1.Benchmark, normalisation: str
) -> Backbone:
    """Returns the backbone, with the official code's image statistics if configured."""
    if normalisation == "model":
        return backbone
    spec = dataclasses.replace(backbone.network.spec, mean=benchmark.mean, std=benchmark.std)
    return dataclasses.replace(backbone, network=dataclasses.replace(backbone.network, spec=spec))


def _transfer(
    name: str,
    backbone: Backbone,
    split: Split,
    settings: EvaluateSettings,
    workdir: epath.Path,
    test: Examples,
) -> dict[str, Any]:
    """Returns the metrics of the ImageNet head on another test split."""
    file = head_file(workdir, "imagenet")
    first = jax.process_index() == 0
    head = parallel.of_first_process(read_arrays(download(file)) if first else None)
    classes = head["bias"].shape[0]
    if split.test.num_classes > classes:
        raise InputError(
            f"tasks: {name} has {split.test.num_classes} classes, but the head of imagenet has "
            f"{classes}; leave {name} out"
        )
    task = backbone.classification(classes, settings.probe.pooling)
    heads = {part: value[None] for part, value in head.items()}
    metrics = score(task, heads, test, backbone.mesh)[0]
    return without_infinities(metrics) | {"test_images": test.images}


def _probe(
    benchmark: table1.Benchmark,
    models: dict[str, ProbedModel],
    split: Split,
    settings: EvaluateSettings,
) -> dict[str, tuple[ProbeResult, dict[str, Any]]]:
    probe = settings.probe
    if probe.epochs is None:
        probe = dataclasses.replace(probe, epochs=benchmark.epochs)
    workers = worker_count(settings.data.workers)
    return probe_models(models, benchmark.kind, split, probe, settings.seed, workers)


def _measuring(settings: EvaluateSettings) -> dict[str, Any]:
    """Returns the settings on which the results depend."""
    return {
        "probe": to_dict(settings.probe),
        "seed": settings.seed,
        "precision": settings.precision,
        "normalisation": settings.data.normalisation,
    }


def _settings_digest(settings: EvaluateSettings) -> str:
    measured = _measuring(settings) | {"version": VERSION}
    return hashlib.sha256(json.dumps(measured, sort_keys=True).encode()).hexdigest()


def _data_digest(split: Split) -> str:
    parts = [source.fingerprint() for source in split if source is not None]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _key(benchmark: table1.Benchmark, split: Split, imagenet: str | None) -> str:
    """Returns a digest of the task and its data, and for a transfer also of the head."""
    parts = [repr(benchmark), *(source.fingerprint() for source in split if source is not None)]
    if benchmark.kind == "transfer":
        parts.append(imagenet)
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _finished(folder: epath.Path, task: str, identity: dict[str, str]) -> dict[str, Any] | None:
    """Returns the stored results of a task, if model and settings are the same.

    It returns None if they differ, or if the task's head is missing.
    """
    try:
        content = read_object(task_file(folder, task))
    except (FileNotFoundError, InputError):
        return None
    known = table1.TASKS.get(task)
    headless = known is not None and known.kind == "transfer"
    if not headless and not head_file(folder, task).is_file():
        return None
    return content if all(content.get(k) == v for k, v in identity.items()) else None


def _write(file: epath.Path, content: Any) -> None:
    if jax.process_index() == 0:
        write_text(file, json.dumps(content, indent=2) + "\n")


def _brief(metrics: dict[str, Any]) -> str:
    numbers = {k: v for k, v in metrics.items() if isinstance(v, float)}
    return ", ".join(f"{name} {value:.4g}" for name, value in numbers.items())
