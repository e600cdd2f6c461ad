"""A roofline lower bound for the time of a compiled training step, and its memory.

The time is the longer of matrix products at the chip's peak rate and memory traffic at its
bandwidth, plus the collectives without overlap. Nothing is measured; a real step is slower. For
GPUs `platform.kernels` adds a model of the time.
"""

from __future__ import annotations

import dataclasses
import math
import resource
import time
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from singer_jax.errors import InputError
from singer_jax.platform import chips, hlo, kernels, parallel
from singer_jax.platform.kernels import Kernels, Launches
from singer_jax.training.flops import parts_flops
from singer_jax.training.program import compile_step
from singer_jax.training.setup import RunSetup
from singer_jax.training.step import PARTS

# Images per second that one core decodes, crops and flips, loader included. It is a conservative
# estimate, below the rate that `benchmarks.input` prints.
DECODED = 400
_HOP = 1e-6  # latency from chip to chip in seconds


class DoesNotFit(InputError):
    """A step needs more memory than a chip has."""


@dataclasses.dataclass(frozen=True)
class Cost:
    """The cost of one step on each chip.

    Attributes:
      kind: Kind of the chips.
      count: Number of chips.
      images: Global batch size.
      arguments, temporaries, peak: Memory in bytes.
      flops: Operations of matrix products.
      fast_flops: Those operations that run on the chip's 8-bit units.
      traffic: Bytes read from and written to memory.
      collectives: Number of runs and bytes of each kind, without the diagnostics of logged steps.
      parts: Operations and traffic of each part of the step.
      compile_seconds, compile_cpu_seconds: Compile time: wall clock, and CPU time of all threads.
      description: Description of the execution of several students for logs.
      kernels: Kernels of a GPU's program; None for other chips.
      launches: Launches of a GPU's program; None for other chips.
      float32: True if matrix products are computed in float32 (`parallel.computing`).
    """

    kind: str
    count: int
    images: int
    arguments: int
    temporaries: int
    peak: int
    flops: float
    fast_flops: float
    traffic: float
    collectives: Mapping[str, tuple[float, float]]
    parts: Mapping[str, tuple[float, float]]
    compile_seconds: float
    compile_cpu_seconds: float
    description: str = ""
    kernels: Kernels | None = None
    launches: Launches | None = None
    float32: bool = False

    @property
    def chip(self) -> chips.Chip:
        """Data sheet of the chip."""
        return chips.chip(self.kind)

    @property
    def rate(self) -> float:
        """The chip's operations per second in the precision of the step."""
        return self.chip.float32 if self.float32 else self.chip.bf16

    @property
    def seconds(self) -> dict[str, float]:
        """Lower bounds of a step's time in seconds, by resource."""
        sent = sum(
            size * (2 if kind == "all-reduce" else 1)
            for kind, (_, size) in self.collectives.items()
        )
        started = sum(count for count, _ in self.collectives.values())
        # The network is a torus of at least two dimensions; data travels there and back.
        hops = 4 * math.isqrt(self.count)
        network = sent / self.chip.network + started * hops * _HOP if self.count > 1 else 0.0
        return {
            "operations": (self.flops - self.fast_flops) / self.rate
            + self.fast_flops / self.chip.int8,
            "memory traffic": self.traffic / self.chip.bandwidth,
            "collectives": network,
        }

    @property
    def binds(self) -> str:
        """Name of the resource that takes the longest."""
        return max(self.seconds, key=self.seconds.get)

    @property
    def step_seconds(self) -> float:
        """Lower bound of a step's time in seconds."""
        found = self.seconds
        return max(found["operations"], found["memory traffic"]) + found["collectives"]

    @property
    def images_per_second(self) -> float:
        """Upper bound of the throughput of all chips together."""
        return self.images / self.step_seconds

    @property
    def mfu(self) -> float:
        """Model FLOPs utilisation, relative to the chip's bfloat16 rate."""
        return self.flops / self.chip.bf16 / self.step_seconds


def abstract_batch(run: RunSetup, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns an abstract batch with the shapes and shardings of a training batch."""
    split, side = parallel.batch_sharding(run.any.mesh), run.image_size
    shape = (batch_size, side, side, 3)
    return {
        "image": jax.ShapeDtypeStruct(shape, jnp.uint8, sharding=split),
        "label": jax.ShapeDtypeStruct(shape[:1], jnp.int32, sharding=split),
    }


def cost(run: RunSetup, batch_size: int, schedule: str | None = None) -> Cost:
    """Compiles the step of a run for its devices, and computes its cost from the program.

    Args:
      run: Setup of the run, as `setup_students` returns them.
      batch_size: Global batch size.
      schedule: Execution of several students, as for `compile_step`.

    Raises:
      DoesNotFit: The step does not fit into the memory of a chip.
      InputError: The chip is not listed in `platform.chips`.
    """
    mesh = run.any.mesh
    kind = mesh.devices.flat[0].device_kind
    if chips.chip(kind) is None:
        raise InputError(
            f"topology: the speed of {kind!r} is unknown; choose a chip of platform.chips.CHIPS"
        )
    start, cpu = time.perf_counter(), _cpu_seconds()
    batch = abstract_batch(run, batch_size)
    try:
        with kernels.launches() as launches:
            program = compile_step(run.students, mesh, run.states, run.teacher, batch, schedule)
            launched = launches()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise _does_not_fit(batch_size, mesh) from error
    if program.peak > chips.chip(kind).memory:  # a GPU's compiler does not check it
        raise _does_not_fit(batch_size, mesh)
    seconds, cpu = time.perf_counter() - start, _cpu_seconds() - cpu
    compiled = program.compiled
    memory = compiled.memory_analysis()
    reads = run.students.teacher_reads
    # A frozen teacher's blocks are two nested loops, the outer one over the blocks that are read.
    trips = (max(reads) + 1) / len(reads) if reads else 1
    text = compiled.as_text()
    moved = hlo.moved(text, trips, PARTS)
    gpu = parallel.platform(mesh) == "gpu"
    flops = parts_flops(run.students, run.states, run.teacher, batch_size)
    shares = {part: number / mesh.size for part, number in flops.items()}
    fast = 0
    precision = run.teacher_model.policy.quantised if run.teacher_model else None
    if precision == "int8" or (precision == "fp8" and chips.chip(kind).fp8):
        counted = parts_flops(run.students, run.states, run.teacher, batch_size, quantised=True)
        fast = sum(counted.values())
    return Cost(
        kind=kind,
        count=mesh.size,
        images=batch_size,
        arguments=memory.argument_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        peak=program.peak,
        flops=sum(shares.values()),
        fast_flops=fast / mesh.size,
        traffic=moved.traffic,
        collectives=moved.collectives,
        parts={
            part: (shares.get(part, 0.0), moved.by_part.get(part, 0.0)) for part in (*PARTS, "")
        },
        compile_seconds=seconds,
        compile_cpu_seconds=cpu,
        description=program.description,
        kernels=kernels.read(text, chips.chip(kind), PARTS) if gpu else None,
        launches=launched if gpu else None,
        float32=jax.config.jax_default_matmul_precision == "highest",
    )


def _does_not_fit(batch_size: int, mesh: Mesh) -> DoesNotFit:
    memory = chips.chip(mesh.devices.flat[0].device_kind).memory
    return DoesNotFit(
        f"batch_size: {batch_size} is {batch_size // mesh.size} images a chip, which does not fit "
        f"into its memory of {memory / 2**30:.0f} GiB; use a smaller one (batch_size=max finds "
        "it), grad_accum_steps, student.remat or mesh.fsdp"
    )


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime
