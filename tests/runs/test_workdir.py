"""The names of the files in a work directory, which one module spells."""

import ast
from pathlib import Path

import pytest
from etils import epath

from singer_jax.runs import workdir

PACKAGE = Path(__file__).parents[2] / "singer_jax"
RUN = epath.Path("/runs/a")
# As in docs and in the work directories that exist: another name would not continue an old run.
PATHS = {
    "config.json": workdir.config_file(RUN),
    "weights.json": workdir.origins_file(RUN),
    "running.json": RUN / workdir.LOCK_FILE,
    "metrics.jsonl": workdir.metrics_file(RUN),
    "tensorboard": workdir.tensorboard_folder(RUN),
    "wandb_id": workdir.wandb_id_file(RUN),
    "checkpoints": workdir.checkpoints_folder(RUN),
    "checkpoints.manifests": workdir.manifests_folder(RUN / "checkpoints"),
    "checkpoints.damaged": workdir.damaged_folder(RUN / "checkpoints"),
    "nan/student.json": workdir.captured_step_file(RUN, ""),
    "nan/small.json": workdir.captured_step_file(RUN, "small"),
    "student": workdir.export_folder(RUN, ""),
    "students/small": workdir.export_folder(RUN, "small"),
    "evaluation": workdir.evaluation_folder(RUN),
    "evaluation/results.json": workdir.student_results_file(RUN, ""),
    "evaluation/small/results.json": workdir.student_results_file(RUN, "small"),
    "tasks/digits.json": workdir.task_file(RUN, "digits"),
    "tasks/digits.npz": workdir.head_file(RUN, "digits"),
    "tasks/digits.progress.npz": workdir.probe_progress_file(RUN, "digits"),
    "features/digits": workdir.features_folder(RUN, "digits"),
    "report/index.html": workdir.report_page(RUN),
    "compare/index.html": workdir.comparison_page(RUN),
    "compare.json": workdir.comparison_file(RUN),
}
NAMES = {part for path in PATHS for part in Path(path).parts} - {"small", "digits"}
OF_MODELS = {"student", "students"}  # `weight_files` finds an export in a work directory


@pytest.mark.parametrize("path", PATHS)
def test_files_have_the_documented_names(path):
    assert PATHS[path] == RUN / path


def spelled(file: Path) -> set[str]:
    """Returns the strings of a file that are parts of a path, or that are assigned to a name."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        parts = []
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):
            parts = [node.left, node.right]
        elif isinstance(node, ast.Assign):
            parts = [node.value]
        found |= {part.value for part in parts if isinstance(part, ast.Constant)}
    return {name for name in found if isinstance(name, str)}


def test_no_other_module_spells_them():
    for file in sorted(PACKAGE.rglob("*.py")):
        allowed = set()
        if file.name == "workdir.py":
            continue
        if file.name == "weight_files.py":
            allowed = OF_MODELS | {"config.json"}  # the latter as timm's and transformers' file
        assert spelled(file) & NAMES <= allowed, file


def test_all_exports_of_a_run_are_listed(tmp_path):
    run = epath.Path(tmp_path)
    assert workdir.export_folders(run) == [run / "student"]
    for name in ("b", "a"):
        workdir.export_folder(run, name).mkdir(parents=True)
    expected = [run / "student", run / "students" / "a", run / "students" / "b"]
    assert workdir.export_folders(run) == expected
