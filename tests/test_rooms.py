"""Who may know whom: imports point one way through the package."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "singer_jax"

# From the ground up. A room may import those of the lines before its own and, in a line, its own
# alone: what stands in one line does not know each other.
ORDER = """
errors
limits
ranges
settings
backends chips hlo stopping files schedules
holding
models data hosts parallel manifests
stored
checkpoints telemetry methods
training evaluation
report
jobs
config library
main
"""

LEVEL = {
    room: number for number, line in enumerate(ORDER.strip().splitlines()) for room in line.split()
}
FRONT_DOOR = PACKAGE / "__init__.py"
FILES = sorted(set(PACKAGE.rglob("*.py")) - {FRONT_DOOR})


def module(file: Path) -> str:
    path = file.relative_to(PACKAGE.parent).with_suffix("")
    return ".".join(path.parts).removesuffix(".__init__")


def imported(file: Path) -> set[str]:
    """Modules of the package that a file imports anywhere in it."""
    modules = {module(other) for other in FILES}
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "relative import"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                found.add(full if full in modules else node.module)
    return {name for name in found if name.startswith("singer_jax.")}


def room(name: str) -> str:
    return name.split(".")[1]


@pytest.mark.parametrize("file", FILES, ids=module)
def test_imports_point_down(file):
    own = room(module(file))
    for name in imported(file):
        other = room(name)
        assert other == own or LEVEL[other] < LEVEL[own], f"{module(file)} imports {name}"


def test_no_two_files_import_each_other():
    imports = {module(file): imported(file) for file in FILES}

    def reaches(start: str) -> set[str]:
        seen, left = set(), [start]
        while left:
            for name in imports.get(left.pop(), ()):
                if name not in seen:
                    seen.add(name)
                    left.append(name)
        return seen

    assert [name for name in imports if name in reaches(name)] == []


def test_the_front_door_imports_nothing():
    code = "import singer_jax, sys; assert not {'jax', 'flax', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=PACKAGE.parent)
