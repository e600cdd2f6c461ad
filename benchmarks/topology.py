"""Programs compiled for TPUs that are not attached (package libtpu), and their statistics."""

from __future__ import annotations

import dataclasses
import resource
import time
from typing import Any

import jax
from jax.sharding import Mesh

from singer_jax.platform import chips, hlo, parallel


def tpu_mesh(topology: str = "v5e:2x2", fsdp: int = 1) -> Mesh:
    """Returns the mesh of `parallel.make_mesh` with chips that are not attached."""
    return parallel.make_mesh(fsdp=fsdp, described=chips.described(topology))


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program.

    Attributes:
      compiled: as jax gives it.
      cpu_seconds: of the compiler, all threads.
      seconds: by the clock.
    """

    compiled: jax.stages.Compiled
    cpu_seconds: float
    seconds: float

    @property
    def temporary_gib(self) -> float:
        """Bytes of memory of one chip besides arguments and results."""
        return self.compiled.memory_analysis().temp_size_in_bytes / 2**30

    def cost(self, name: str) -> float:
        """Returns `flops` or `bytes accessed` of one chip; the body of a loop counts once."""
        return self.compiled.cost_analysis().get(name, 0.0)

    @property
    def traffic_gb(self) -> float:
        """Bytes moved to and from the memory of one chip; loops of unknown length count once."""
        return hlo.moved(self.compiled.as_text()).traffic / 1e9


def compile_timed(jitted: Any, *args: Any, **kwargs: Any) -> Program:
    """Compiles a jitted function for abstract arguments that carry their shardings."""
    lowered = jitted.lower(*args, **kwargs)
    start, cpu = time.perf_counter(), _cpu_seconds()
    compiled = lowered.compile()
    return Program(compiled, _cpu_seconds() - cpu, time.perf_counter() - start)


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime
