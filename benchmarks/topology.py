"""Programs compiled for a TPU without one (package libtpu), and what the compiler said of them."""

from __future__ import annotations

import dataclasses
import os
import resource
import time
from typing import Any
from unittest import mock

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

# Nothing waits for a metadata server, and several processes may load the library.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def tpu_mesh(topology: str = "v5e:2x2", fsdp: int = 1) -> Mesh:
    """A mesh of described chips, with the axes of `parallel.make_mesh`."""
    with mock.patch.dict(os.environ, _ENVIRONMENT):
        devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    return Mesh(
        np.array(devices).reshape(-1, fsdp), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2
    )


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
        """Memory of one chip beside arguments and results."""
        return self.compiled.memory_analysis().temp_size_in_bytes / 2**30

    def cost(self, name: str) -> float:
        """`flops` or `bytes accessed` of one chip; the body of a loop counts once."""
        return self.compiled.cost_analysis().get(name, 0.0)


def compile_timed(jitted: Any, *args: Any, **kwargs: Any) -> Program:
    """Compiles a jitted function for abstract arguments that carry their shardings."""
    lowered = jitted.lower(*args, **kwargs)
    start, cpu = time.perf_counter(), _cpu_seconds()
    compiled = lowered.compile()
    return Program(compiled, _cpu_seconds() - cpu, time.perf_counter() - start)


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime
