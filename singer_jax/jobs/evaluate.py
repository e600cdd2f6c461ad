"""Job `evaluate`: evaluates a model on the tasks of Table 1, or on one labelled source."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import jax
from etils import epath

from singer_jax import methods
from singer_jax.data.loader import worker_count
from singer_jax.data.registry import DataSettings
from singer_jax.errors import InputError, Stopped
from singer_jax.evaluation import table1
from singer_jax.evaluation.backbone import (
    Backbone,
    Examples,
    ModelSelection,
    load_backbone,
    load_teacher,
)
from singer_jax.evaluation.evaluated_model import EvaluatedModel
from singer_jax.evaluation.measure import (
    ProbedModel,
    probe_models,
    test_examples,
    without_infinities,
)
from singer_jax.evaluation.probe import ProbeSettings
from singer_jax.evaluation.progress import FileProgressStore
from singer_jax.evaluation.scoring import score
from singer_jax.evaluation.task_data import (
    TaskData,
    data_digest,
    find_data,
    task_key,
    with_statistics,
)
from singer_jax.io.files import as_path, cached, download, make_workdir
from singer_jax.io.limits import read_arrays
from singer_jax.models.architecture import PRECISIONS, ComputePolicy
from singer_jax.platform import hosts, parallel, signals
from singer_jax.runs.checkpoints import step_to_read
from singer_jax.runs.lock import holding
from singer_jax.runs.metrics import LOG
from singer_jax.runs.workdir import (
    config_file,
    features_folder,
    head_file,
    model_folder,
    probe_progress_file,
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
    data = find_data(settings.data, settings.tasks)
    models = _load_models(settings, workdir, data)
    for name, reason in data.skipped.items():
        LOG.info("skipped %s: %s", name, reason)
    rows: dict[str, Any] = {}
    with holding(workdir, jax.process_index() == 0):
        with signals.deferred():
            evaluation = _Evaluation(settings, models, data)
            for task in data.splits:
                evaluation.run(task)
        for model in models:
            rows |= model.write_results()
    if settings.data.source == "table1" and jax.process_index() == 0:
        print(table1.format_rows(rows))
        print(table1.NOTE)


def _load_models(
    settings: EvaluateSettings, workdir: epath.Path, data: TaskData
) -> list[EvaluatedModel]:
    """Loads the models with those of their tasks that are finished."""
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
            try:
                backbones["teacher"] = _load_teacher(mesh, run, policy)
            except InputError as error:
                LOG.warning("the teacher is not evaluated: %s", error)
    else:
        selected = dataclasses.replace(settings, step=step)
        backbones[settings.student] = load_backbone(mesh, selected, policy)
    found = []
    for name, backbone in backbones.items():
        own = None if name == "teacher" else students.get(name, run)
        model = EvaluatedModel(
            name,
            model_folder(workdir, name),
            backbone,
            to_dict(own) if own else None,
            None if name == "teacher" else step,
            _measuring(settings),
            dict(data.skipped),
        )
        if jax.process_index() == 0:
            make_workdir(model.folder)
        model.read_finished((*table1.TASKS, *data.splits))
        found.append(model)
    return found


def _load_teacher(mesh: jax.sharding.Mesh, run: DistillSettings, policy: ComputePolicy) -> Backbone:
    data = run.data
    return load_teacher(mesh, run.teacher, data.image_size, data.normalisation, policy)


def _measuring(settings: EvaluateSettings) -> dict[str, Any]:
    """Returns the settings on which the results depend."""
    return {
        "probe": to_dict(settings.probe),
        "seed": settings.seed,
        "precision": settings.precision,
        "normalisation": settings.data.normalisation,
    }


@dataclasses.dataclass(frozen=True)
class _Unfinished:
    """Model for which a task is to be measured.

    Attributes:
      model: the model.
      backbone: the model with the image statistics of the task.
      key: `task_key` of the task.
    """

    model: EvaluatedModel
    backbone: Backbone
    key: str


class _Evaluation:
    """Evaluation of several models, task by task."""

    def __init__(
        self, settings: EvaluateSettings, models: Sequence[EvaluatedModel], data: TaskData
    ) -> None:
        self.settings, self.models, self.data = settings, models, data
        self.workers = worker_count(settings.data.workers)
        self._questions = itertools.count(1)

    def run(self, task: str) -> None:
        """Adds the missing results of a task to each model, or the reason why there are none."""
        unfinished = self._unfinished(task)
        if not unfinished:
            return
        LOG.info("evaluating task: %s", task)
        benchmark, split = self.data.benchmarks[task], self.data.splits[task]
        tests = test_examples(
            {name: one.backbone for name, one in unfinished.items()},
            benchmark.kind,
            split.test,
            self.settings.probe,
            self.workers,
        )
        if benchmark.kind == "transfer":
            for name, one in unfinished.items():
                metrics = self._transfer(task, one, tests.pop(name))
                one.model.finish(task, one.key, data_digest(split), metrics)
            return
        # The published protocol trains all models on the same decoded images. The fast protocol
        # frees the features of each model after its evaluation.
        shared = self.settings.probe.protocol == "paper"
        for names in [list(unfinished)] if shared else [[name] for name in unfinished]:
            group = {name: (unfinished[name], tests.pop(name)) for name in names}
            self._probe(task, group)

    def _unfinished(self, task: str) -> dict[str, _Unfinished]:
        """Returns the models for which a task is to be measured; reports finished ones."""
        benchmark, split = self.data.benchmarks[task], self.data.splits[task]
        found = {}
        for model in self.models:
            head = model.key_of("imagenet")
            if benchmark.kind == "transfer" and not head:
                reason = "needs the head of the task imagenet, which is not evaluated"
                if self.settings.tasks:
                    raise InputError(f"tasks: {task} {reason}; add imagenet")
                model.skipped[task] = reason
                continue
            key = task_key(benchmark, split, head)
            if model.key_of(task) == key:
                model.report(task)
                continue
            backbone = dataclasses.replace(model.backbone, before_batch=self._stop_if_asked)
            backbone = with_statistics(backbone, benchmark, self.settings.data.normalisation)
            found[model.name] = _Unfinished(model, backbone, key)
        return found

    def _probe(self, task: str, group: dict[str, tuple[_Unfinished, Examples]]) -> None:
        """Trains and tests the probes of a task for some models."""
        benchmark, split = self.data.benchmarks[task], self.data.splits[task]
        probe = self.settings.probe
        if probe.epochs is None:
            probe = dataclasses.replace(probe, epochs=benchmark.epochs)
        models = {}
        for name, (one, test) in group.items():
            folder = one.model.folder
            progress = probe_progress_file(folder, task)
            progress_store = FileProgressStore(
                progress, one.model.progress_key(one.key), self._asked
            )
            store = cached(features_folder(folder, task))
            models[name] = ProbedModel(one.backbone, test, store, progress_store)
        found = probe_models(models, benchmark.kind, split, probe, self.settings.seed, self.workers)
        for name, (result, metrics) in found.items():
            one, _ = group[name]
            one.model.write_head(task, result.head)
            one.model.finish(task, one.key, data_digest(split), metrics)
            models[name].progress_store.remove()

    def _transfer(self, task: str, one: _Unfinished, test: Examples) -> dict[str, Any]:
        """Returns the metrics of the ImageNet head on another test split."""
        file, known = head_file(one.model.folder, "imagenet"), self.data.splits[task].test
        first = jax.process_index() == 0
        head = parallel.of_first_process(read_arrays(download(file)) if first else None)
        classes = head["bias"].shape[0]
        if known.num_classes > classes:
            raise InputError(
                f"tasks: {task} has {known.num_classes} classes, but the head of imagenet has "
                f"{classes}; leave {task} out"
            )
        heads = {part: value[None] for part, value in head.items()}
        classification = one.backbone.classification(classes, self.settings.probe.pooling)
        metrics = score(classification, heads, test, one.backbone.mesh)[0]
        return without_infinities(metrics) | {"test_images": test.images}

    def _asked(self) -> bool:
        """Returns True if a stop was requested; the answer is the same in every process."""
        return hosts.stop_after(next(self._questions))

    def _stop_if_asked(self) -> None:
        if self._asked():
            folder = (
                self.models[0].folder if len(self.models) == 1 else self.models[0].folder.parent
            )
            raise Stopped(f"stopped while extracting features; finished tasks are kept in {folder}")
