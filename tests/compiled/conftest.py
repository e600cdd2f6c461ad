"""Compiling with a bound."""

from collections.abc import Iterator

import jax
import pytest

from benchmarks.topology import Program, compile_timed
from tests.compiled.compiling import Compile


@pytest.fixture(autouse=True, scope="module")
def no_cache() -> Iterator[None]:
    """What was compiled before would take no time."""
    jax.config.update("jax_enable_compilation_cache", False)
    yield
    jax.config.update("jax_enable_compilation_cache", True)


@pytest.fixture
def compiles(record_property) -> Compile:
    """Compiles a jitted function, records the compiler's CPU seconds and bounds them."""

    def check(at_most: float, jitted, *args, **kwargs) -> Program:
        program = compile_timed(jitted, *args, **kwargs)
        record_property("compiler CPU seconds", round(program.cpu_seconds, 1))
        assert program.cpu_seconds < at_most
        return program

    return check
