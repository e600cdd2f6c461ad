"""Settings of all tests: eight virtual CPU devices, exact products, no deadlines, one cache."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["HF_HUB_OFFLINE"] = "1"

import hypothesis
import jax
import pytest

from singer_jax.platform import parallel

# Goldens and properties are stated for float32 products, not for TF32 or bfloat16 passes.
jax.config.update("jax_default_matmul_precision", "highest")

# Shared machines are slow now and then; a deadline would measure them and not the code.
hypothesis.settings.register_profile("default", deadline=None, max_examples=25)
hypothesis.settings.load_profile("default")


@pytest.fixture(scope="session")
def mesh() -> jax.sharding.Mesh:
    """One device."""
    return parallel.make_mesh(1, 1)


@pytest.fixture(autouse=True, scope="module")
def quickly_compiled(request: pytest.FixtureRequest) -> Iterator[None]:
    """Most tests take the compiler's time; its optimisations are for programs that run longer.

    Commands in processes of their own compile as users do, and so do modules marked `optimized`
    with `--all`.
    """
    as_users_do = request.node.get_closest_marker("optimized") and request.config.getoption("--all")
    quickly = not as_users_do
    if not quickly:
        jax.clear_caches()
    jax.config.update("jax_disable_most_optimizations", quickly)
    yield


INTEROP = Path(__file__).parent / "interop"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds `--interop`, which needs the extra `interop`, and `--all`."""
    parser.addoption("--interop", action="store_true", help="collect tests/interop")
    parser.addoption("--all", action="store_true", help="also run tests marked slow")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leaves tests/interop out of an ordinary run; None leaves the choice to pytest."""
    left_out = collection_path == INTEROP and not config.getoption("--interop")
    return True if left_out else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselects slow tests without `--all`; they are named neither as passed nor as skipped."""
    if config.getoption("--all"):
        return
    slow = [item for item in items if item.get_closest_marker("slow")]
    if slow:
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in slow]


def pytest_configure(config: pytest.Config) -> None:
    """Compiled programs are kept for this run of the tests alone, in all its processes."""
    if not hasattr(config, "workerinput"):
        folder = tempfile.mkdtemp(prefix="singer_jax_tests_")
        config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
        os.environ["JAX_COMPILATION_CACHE_DIR"] = folder
        jax.config.update("jax_compilation_cache_dir", folder)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """How long the compiler took for each program of tests/compiled."""
    took = [
        f"{value:6.1f}  {report.nodeid.split('::')[-1]}"
        for report in terminalreporter.getreports("passed")
        for name, value in report.user_properties
        if name == "compiler CPU seconds"
    ]
    if took:
        terminalreporter.section("CPU seconds of the TPU's compiler")
        terminalreporter.write_line("\n".join(sorted(took, reverse=True)))
