"""The job `evaluate`: every task of Table 1 whose data is there, or one labelled source."""

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
from singer_jax.data.registry import DataSettings, open_source
from singer_jax.data.sources import TEST, TRAIN
from singer_jax.errors import InputError, Stopped
from singer_jax.evaluation import table1
from singer_jax.evaluation.backbone import Backbone, Examples, load_backbone, load_teacher
from singer_jax.evaluation.measure import Split, probe_task, test_examples
from singer_jax.evaluation.probe import ProbeSettings, score
from singer_jax.evaluation.progress import FileKeeper
from singer_jax.io.files import as_path, cached, download, make_workdir, replacing, write_text
from singer_jax.io.limits import read_arrays, read_object
from singer_jax.jobs.report import read_settings
from singer_jax.models.architecture import PRECISIONS, ComputePolicy
from singer_jax.platform import hosts, parallel, signals
from singer_jax.runs.lock import holding
from singer_jax.runs.telemetry import LOG
from singer_jax.settings.ranges import SEED, TEXT, Each, OneOf
from singer_jax.settings.settings import Settings, section, setting, to_dict
from singer_jax.training.settings import DistillSettings


@dataclasses.dataclass(frozen=True)
class EvaluateSettings(Settings):
    """What is measured, on which data, how."""

    job: str = setting("evaluate", OneOf(("evaluate",)), "the command")
    seed: int = setting(0, SEED, "of heads, order and crops")
    run: str = setting("", TEXT, "a work directory: its student; or else")
    student: str = setting(
        "", TEXT, "one of several students of `run`; empty: all of them and the teacher"
    )
    weights: str = setting("", TEXT, "a hub name or file, and")
    model: str = setting(
        "", TEXT, "its timm name, where neither the hub name nor a config.json says it"
    )
    precision: str = setting("float32", OneOf(tuple(PRECISIONS)), "of activations")
    data: DataSettings = section(DataSettings(source="table1"))
    tasks: tuple[str, ...] = setting(
        (), Each(OneOf(tuple(table1.TASKS))), "of table1; none: all whose data are there"
    )
    mesh: parallel.MeshSettings = section(parallel.MeshSettings())
    probe: ProbeSettings = section(ProbeSettings())


@dataclasses.dataclass(frozen=True)
class _Subject:
    """A model to measure.

    Attributes:
      name: of a student of several, or `teacher`; else empty.
      folder: of its results.
      backbone: the model.
      run: settings of the run that made it.
      identity: of the model and the settings, for what was measured before.
      finished: what is measured, by task.
      skipped: why the other tasks are not.
    """

    name: str
    folder: epath.Path
    backbone: Backbone
    run: DistillSettings | None
    identity: dict[str, str]
    finished: dict[str, dict[str, Any]]
    skipped: dict[str, str]


def evaluate(settings: EvaluateSettings, workdir: epath.Path) -> None:
    """Measures one model, or all students of a run and their teacher on the same images.

    A task that is finished is not done again.

    Args:
      settings: what, on which data, how.
      workdir: for results.json, tasks/ (what is finished) and features/ (of the fast protocol); of
        several models in a folder of each one's name.

    Raises:
      InputError: nothing to evaluate, no data at all, or data that is there in part.
      Stopped: on request; the same command goes on with the probe that was under way.
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
    described = as_path(settings.run) / "config.json" if settings.run else None
    run = read_settings(as_path(settings.run)) if described and described.is_file() else None
    students = run.each() if run and run.students.named else {}
    backbones: dict[str, Backbone] = {}
    if students and not settings.student:
        for name in students:
            backbones[name] = load_backbone(mesh, run=settings.run, student=name, policy=policy)
        if any(methods.needs(own.method).teacher for own in students.values()):
            data = run.data
            try:
                backbones["teacher"] = load_teacher(
                    mesh, run.teacher, data.image_size, data.normalisation, policy
                )
            except InputError as error:
                LOG.warning("the teacher is not measured: %s", error)
    else:
        backbones[settings.student] = load_backbone(
            mesh,
            run=settings.run,
            weights=settings.weights,
            model=settings.model,
            student=settings.student,
            policy=policy,
        )
    found = []
    for name, backbone in backbones.items():
        folder = workdir / name if name else workdir
        if jax.process_index() == 0:
            make_workdir(folder)
        identity = {"model": backbone.digest(), "settings": _settings_digest(settings)}
        finished = parallel.of_first_process(
            {
                task: known
                for task in tasks
                if (known := _finished(folder / "tasks" / f"{task}.json", identity))
            }
        )
        own = None if name == "teacher" else students.get(name, run)
        parts = (name, folder, backbone, own, identity, finished, dict(skipped))
        found.append(_Subject(*parts))
    return found


def _measure_all(
    settings: EvaluateSettings,
    subjects: list[_Subject],
    benchmarks: dict[str, table1.Benchmark],
    splits: dict[str, Split],
) -> None:
    """Adds to `finished` what is not in it, and to `skipped` what cannot be measured."""
    questions = itertools.count(1)

    def asked() -> bool:
        return hosts.stop_after(next(questions))

    def stop_if_asked() -> None:
        if asked():
            folder = subjects[0].folder if len(subjects) == 1 else subjects[0].folder.parent
            raise Stopped(f"stopped while extracting features; what is done is kept in {folder}")

    for task, split in splits.items():
        benchmark = benchmarks[task]
        due: dict[str, tuple[_Subject, Backbone, str]] = {}
        for subject in subjects:
            head = subject.finished.get("imagenet", {}).get("key")
            if benchmark.kind == "transfer" and not head:
                reason = "needs the head of the task imagenet, which is not measured"
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
        LOG.info("== %s", task)
        tests = test_examples(
            {name: backbone for name, (_, backbone, _) in due.items()},
            benchmark.kind,
            split.test,
            settings.probe,
            worker_count(settings.data.workers),
        )
        for name, (subject, backbone, key) in due.items():
            of_all = hashlib.sha256(json.dumps([subject.identity, key]).encode()).hexdigest()
            kept = subject.folder / "tasks"
            keeper = FileKeeper(kept / f"{task}.progress.npz", of_all, asked)
            metrics = _measure(
                task, benchmark, backbone, split, settings, subject.folder, keeper, tests.pop(name)
            )
            subject.finished[task] = {**subject.identity, "key": key, "metrics": metrics}
            _write(kept / f"{task}.json", subject.finished[task])
            keeper.remove()
            _say(subject, task)
            _summarise(settings, subject)


def _say(subject: _Subject, task: str) -> None:
    name = f"{subject.name}: {task}" if subject.name else task
    LOG.info("%s: %s", name, _brief(subject.finished[task]["metrics"]))


def _summarise(settings: EvaluateSettings, subject: _Subject) -> dict[str, Any]:
    """Writes results.json of what is finished; returns the rows of the table."""
    results = {name: found["metrics"] for name, found in subject.finished.items()}
    run = to_dict(subject.run) if subject.run else None
    measured = f"{subject.name}, measured here" if subject.name else "measured here"
    rows: dict[str, Any] = {measured: table1.row(results)}
    model = subject.backbone.network.spec.name
    content = {
        "model": model,
        "run": {k: run[k] for k in ("seed", "method", "teacher", "student")} if run else None,
        "protocol": settings.probe.protocol,
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
    _write(subject.folder / "results.json", content)
    return rows


def _find_data(
    settings: EvaluateSettings,
) -> tuple[dict[str, table1.Benchmark], dict[str, Split], dict[str, str]]:
    """The tasks, the data of those that have some, and why the others are skipped."""
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
    for name, benchmark in table1.TASKS.items():  # imagenet before what needs its head
        if name not in chosen:
            continue
        try:
            test = open_benchmark(benchmark.data, data.path, TEST)
            transfer = benchmark.kind == "transfer"
            train = None if transfer else open_benchmark(benchmark.data, data.path, TRAIN)
            splits[name] = Split(train, test)
        except NotInstalled as error:
            if name in settings.tasks or data.source != "table1":
                raise
            skipped[name] = str(error)
    if not splits:
        raise InputError(
            "data.path: none of the data sets is there; set it to the folder that holds them "
            "(docs/data.md), or give one as data.source"
        )
    return table1.TASKS, splits, skipped


def _split(data: DataSettings, kind: str) -> Split:
    train, test = (open_source(data, split) for split in (TRAIN, TEST))
    if not train.num_classes and kind == "classification":
        raise InputError(f"data.source: {data.source} has no labels to probe")
    if train.num_classes != test.num_classes:
        raise InputError(
            f"data.source: {data.source} has {train.num_classes} classes to train and "
            f"{test.num_classes} to test"
        )
    return Split(train, test)


def _with_statistics(
    backbone: Backbone, benchmark: table1.Benchmark, normalisation: str
) -> Backbone:
    """The backbone with the image statistics of the official code, where they are asked for."""
    if normalisation == "model":
        return backbone
    spec = dataclasses.replace(backbone.network.spec, mean=benchmark.mean, std=benchmark.std)
    return dataclasses.replace(backbone, network=dataclasses.replace(backbone.network, spec=spec))


def _measure(
    name: str,
    benchmark: table1.Benchmark,
    backbone: Backbone,
    split: Split,
    settings: EvaluateSettings,
    workdir: epath.Path,
    keeper: FileKeeper,
    test: Examples,
) -> dict[str, Any]:
    workers, first = worker_count(settings.data.workers), jax.process_index() == 0
    if benchmark.kind == "transfer":
        file = workdir / "tasks" / "imagenet.npz"
        head = parallel.of_first_process(read_arrays(download(file)) if first else None)
        classes = head["bias"].shape[0]
        if split.test.num_classes > classes:
            raise InputError(
                f"{name} has {split.test.num_classes} classes, the head of imagenet {classes}"
            )
        task = backbone.classification(classes, settings.probe.pooling)
        heads = {part: value[None] for part, value in head.items()}
        return score(task, heads, test, backbone.mesh)[0] | {"test_images": test.images}
    probe = settings.probe
    if probe.epochs is None:
        probe = dataclasses.replace(probe, epochs=benchmark.epochs)
    result, metrics = probe_task(
        backbone,
        benchmark.kind,
        split,
        probe,
        settings.seed,
        workers,
        cached(workdir / "features" / name),
        keeper,
        test,
    )
    if first:
        with replacing(workdir / "tasks" / f"{name}.npz") as file:
            np.savez(file, **result.head)
    return metrics


def _settings_digest(settings: EvaluateSettings) -> str:
    measured = {
        "probe": to_dict(settings.probe),
        "seed": settings.seed,
        "precision": settings.precision,
        "normalisation": settings.data.normalisation,
    }
    return hashlib.sha256(json.dumps(measured, sort_keys=True).encode()).hexdigest()


def _key(benchmark: table1.Benchmark, split: Split, imagenet: str | None) -> str:
    """Of the task and its data; of a transfer also of the head that it takes."""
    parts = [repr(benchmark), *(source.fingerprint() for source in split if source is not None)]
    if benchmark.kind == "transfer":
        parts.append(imagenet)
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _finished(file: epath.Path, identity: dict[str, str]) -> dict[str, Any] | None:
    """A task that was measured with this model and these settings; its head is there too."""
    try:
        content = read_object(file)
    except (FileNotFoundError, InputError):
        return None
    known = table1.TASKS.get(file.stem)
    headless = known is not None and known.kind == "transfer"
    if not headless and not file.with_suffix(".npz").is_file():
        return None
    return content if all(content.get(k) == v for k, v in identity.items()) else None


def _write(file: epath.Path, content: Any) -> None:
    if jax.process_index() == 0:
        write_text(file, json.dumps(content, indent=2) + "\n")


def _brief(metrics: dict[str, Any]) -> str:
    numbers = {k: v for k, v in metrics.items() if isinstance(v, float)}
    return ", ".join(f"{name} {value:.4g}" for name, value in numbers.items())
