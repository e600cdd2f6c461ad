"""Names of the files and folders in a work directory; no other module spells them.

A run writes:

    config.json                        its settings
    weights.json                       the origin of its weights
    running.json                       the lock of the job that writes
    metrics.jsonl, tensorboard/        its metrics
    wandb_id                           its id at Weights & Biases
    checkpoints/STEP/                  its checkpoints
    checkpoints.manifests/STEP.json    sizes and digests of their files
    checkpoints.damaged/STEP/          damaged checkpoints, each beside a STEP.txt with the reason
    nan/STUDENT.json                   steps with non-finite numbers, for the job `replay`
    student/ or students/NAME/         its exported students

Other jobs write:

    evaluation/[NAME/]                 an evaluation, by its recommended --workdir:
      results.json                       the numbers
      tasks/                             finished tasks, trained heads, unfinished probes
      features/TASK/                     features of the fast protocol
    report/index.html                  the page of the job `report`
    compare.json, compare/index.html   the table and the page of the job `compare`

A file that a single job both writes and reads, such as `study.json`, is named in that job.
"""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from etils import epath

from singer_jax.models.weight_files import STUDENT_FOLDER, STUDENTS_FOLDER

LOCK_FILE = "running.json"
METRICS_FILE = "metrics.jsonl"

_Folder = TypeVar("_Folder", epath.Path, Path)


def config_file(run: epath.Path) -> epath.Path:
    """Returns the path of a run's settings."""
    return run / "config.json"


def origins_file(run: epath.Path) -> epath.Path:
    """Returns the path of the file that describes the origin of each model's weights."""
    return run / "weights.json"


def metrics_file(run: _Folder) -> _Folder:
    """Returns the path of the rows of metrics."""
    return run / METRICS_FILE


def tensorboard_folder(run: _Folder) -> _Folder:
    """Returns the folder of TensorBoard's event files."""
    return run / "tensorboard"


def wandb_id_file(run: epath.Path) -> epath.Path:
    """Returns the path of the file that holds the run's id at Weights & Biases."""
    return run / "wandb_id"


def checkpoints_folder(run: epath.Path) -> epath.Path:
    """Returns the folder of a run's checkpoints; each lies in a folder named by its step."""
    return run / "checkpoints"


def manifests_folder(checkpoints: epath.Path) -> epath.Path:
    """Returns the folder of the manifests that belong to a folder of checkpoints."""
    return checkpoints.with_name(f"{checkpoints.name}.manifests")


def damaged_folder(checkpoints: epath.Path) -> epath.Path:
    """Returns the folder to which damaged checkpoints of a folder are moved."""
    return checkpoints.with_name(f"{checkpoints.name}.damaged")


def captured_step_file(run: epath.Path, student: str) -> epath.Path:
    """Returns the path of the record of a student's first step with a non-finite number.

    Args:
      run: The work directory.
      student: The name of one of several students; empty for an only student.
    """
    return run / "nan" / f"{student or 'student'}.json"


def export_folder(run: epath.Path, student: str) -> epath.Path:
    """Returns the folder of an exported student.

    Args:
      run: The work directory.
      student: The name of one of several students; empty for an only student.
    """
    return run / STUDENTS_FOLDER / student if student else run / STUDENT_FOLDER


def export_folders(run: epath.Path) -> list[epath.Path]:
    """Returns all folders that may hold an exported student."""
    students = run / STUDENTS_FOLDER
    return [run / STUDENT_FOLDER, *(sorted(students.iterdir()) if students.is_dir() else ())]


def evaluation_folder(run: epath.Path) -> epath.Path:
    """Returns the folder in which the job `evaluate` measures a run."""
    return run / "evaluation"


def model_folder(evaluation: epath.Path, name: str) -> epath.Path:
    """Returns the folder of one model of an evaluation.

    Args:
      evaluation: The folder of the evaluation.
      name: The name of one of several models; empty for an only model.
    """
    return evaluation / name if name else evaluation


def results_file(measured: epath.Path) -> epath.Path:
    """Returns the path of the numbers in the folder of a measured model."""
    return measured / "results.json"


def student_results_file(run: epath.Path, student: str) -> epath.Path:
    """Returns the path of the results of a run's student.

    Args:
      run: The work directory.
      student: The name of one of several students; empty for an only student.
    """
    return results_file(model_folder(evaluation_folder(run), student))


def task_file(measured: epath.Path, task: str) -> epath.Path:
    """Returns the path of a finished task in the folder of a measured model."""
    return measured / "tasks" / f"{task}.json"


def head_file(measured: epath.Path, task: str) -> epath.Path:
    """Returns the path of the head that was trained for a task."""
    return measured / "tasks" / f"{task}.npz"


def probe_progress_file(measured: epath.Path, task: str) -> epath.Path:
    """Returns the path of the state of a task's unfinished probe."""
    return measured / "tasks" / f"{task}.progress.npz"


def features_folder(measured: epath.Path, task: str) -> epath.Path:
    """Returns the folder of the stored features of a task."""
    return measured / "features" / task


def report_page(workdir: epath.Path) -> epath.Path:
    """Returns the path of the page that the job `report` writes, with a folder of its own."""
    return workdir / "report" / "index.html"


def comparison_page(workdir: epath.Path) -> epath.Path:
    """Returns the path of the page that the job `compare` writes, with a folder of its own."""
    return workdir / "compare" / "index.html"


def comparison_file(workdir: epath.Path) -> epath.Path:
    """Returns the path of the table that the job `compare` writes."""
    return workdir / "compare.json"
