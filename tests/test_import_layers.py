"""The structure of the package: imports point to lower layers, functions take few parameters."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "singer_jax"

# From the bottom up. A package may import the packages of the lines above its own line, and itself;
# packages on one line do not import each other.
LAYERS = """
errors
settings io
platform
data
models
methods runs
training evaluation
report
jobs
config library
main
"""

LEVEL = {
    package: number
    for number, line in enumerate(LAYERS.strip().splitlines())
    for package in line.split()
}
MOST_PARAMETERS = 6
# Functions with more parameters, and the reason.
LONG_SIGNATURES = {
    "_rebuild_tensor": "the signature of torch._utils._rebuild_tensor_v2",
    "_rebuild_typed_tensor": "the signature of torch._utils._rebuild_tensor_v3",
    "load_model": "options of `singer_jax.load_model`, each a keyword",
}
INIT = PACKAGE / "__init__.py"
FILES = sorted(set(PACKAGE.rglob("*.py")) - {INIT})


def module(file: Path) -> str:
    path = file.relative_to(PACKAGE.parent).with_suffix("")
    return ".".join(path.parts).removesuffix(".__init__")


def imported(file: Path) -> set[str]:
    """Returns the modules of the package that a file imports anywhere in it."""
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


def package(name: str) -> str:
    return name.split(".")[1]


@pytest.mark.parametrize("file", FILES, ids=module)
def test_imports_point_to_lower_layers(file):
    own = package(module(file))
    for name in imported(file):
        other = package(name)
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


def test_importing_the_package_loads_nothing_heavy():
    code = "import singer_jax, sys; assert not {'jax', 'flax', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=PACKAGE.parent)


@pytest.mark.parametrize("folder", ["singer_jax", "benchmarks"])
def test_functions_take_few_parameters(folder):
    long = []
    for file in sorted((PACKAGE.parent / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                given = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
                count = len([one for one in given if one.arg not in ("self", "cls")])
                if count > MOST_PARAMETERS and node.name not in LONG_SIGNATURES:
                    long.append(f"{file}:{node.lineno} {node.name}: {count}")
    assert long == [], "group parameters that belong together in a dataclass"
