"""Kernels of a program compiled for a GPU, its CUDA graphs, and a model of its time.

Kernels, bytes, operations and graphs are read from the program. Times are a model: no constant
below was measured kernel by kernel. `HOST_PER_ARRAY` is fitted to the only measurement, 60.8 ms for
a step on an H200 (benchmarks/README.md).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple
from unittest import mock

from singer_jax.platform import chips, hlo

# Shares of the data sheet's bandwidth that kinds of fusions reach, by a word in the fusion's name.
_BANDWIDTH = {"transpose": 0.35, "reduce": 0.5, "concatenate": 0.54, "loop": 0.71, "copy": 0.71}
_BANDWIDTH_OF_TRITON = 0.56
_BANDWIDTH_OF_OTHERS = 0.75
_BANDWIDTH_OF_FLOAT32 = 0.67  # of products of float32 matrices, and of attention

# Shares of the data sheet's bfloat16 rate that products reach, by their operands.
_LARGE, _SMALL = 0.65, 0.30  # bfloat16, more and fewer than _MANY operations
_MANY = 30e9
_QUANTISED = 0.53  # share of the 8-bit rate
_TF32, _FLOAT32 = 0.17, 0.04
_ATTENTION, _ATTENTION_BACKWARD = 0.20, 0.14

_GAP, _SHORTEST = 1.3e-6, 2.5e-6  # seconds between two kernels, and of the shortest kernel
_ERF, _ERF_GRADIENT = 1.45e-12, 2.25e-12  # seconds per element: arithmetic of the exact GELU

HOST_PER_ARRAY = 3.35e-6
"""Seconds of the host per array that a program takes or returns.

It is (60.8 ms - the modelled 56.6 ms of the kernels) / 1,258 arrays, of the program that was
measured: ViT-L to ViT-Ti, 128 images, bfloat16, with Triton's products and a branch for the
diagnostics.
"""


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A kernel of a program.

    Attributes:
      name: Name of the instruction.
      kind: Kind of kernel: the library's function with its epilogue, or the kind of fusion.
      part: Scope of the instruction (`jax.named_scope`); empty outside the scopes.
      backward: True if it belongs to a gradient.
      runs: Number of runs.
      flops: Operations of the matrix products of one run.
      traffic: Bytes that one run reads and writes.
      seconds: Modelled time of one run, with the gap to the next kernel.
      shape: Data type and dimensions of the first result.
    """

    name: str
    kind: str
    part: str
    backward: bool
    runs: float
    flops: float
    traffic: float
    seconds: float
    shape: str


@dataclasses.dataclass(frozen=True)
class Kernels:
    """All kernels of a program on one GPU; a condition counts without its branches.

    Attributes:
      each: The kernels, in the order of the program.
      arrays: Number of arrays that the program takes and returns.
      waits: Number of conditions and loops for which the host waits.
    """

    each: Sequence[Kernel]
    arrays: int
    waits: int

    @property
    def count(self) -> int:
        """Number of runs of all kernels."""
        return round(sum(one.runs for one in self.each))

    @property
    def traffic(self) -> float:
        """Bytes read and written."""
        return sum(one.runs * one.traffic for one in self.each)

    @property
    def device_seconds(self) -> float:
        """Modelled time of the device."""
        return sum(one.runs * one.seconds for one in self.each)

    @property
    def seconds(self) -> float:
        """Modelled time of a run."""
        return self.device_seconds + self.host_seconds

    @property
    def host_seconds(self) -> float:
        """Modelled time of the host, during which the device waits."""
        return self.arrays * HOST_PER_ARRAY


class Launches(NamedTuple):
    """The launches of the host in each run of a program.

    Attributes:
      graphs: Number of CUDA graphs.
      others: Number of kernels, copies, loops and branches outside of graphs.
    """

    graphs: int
    others: int


def read(text: str, chip: chips.Chip, parts: Sequence[str] = ()) -> Kernels:
    """Reads the kernels of a compiled program.

    Args:
      text: Text of the program, from `Compiled.as_text()`.
      chip: Data sheet of the GPU.
      parts: Names of scopes.
    """
    program = hlo.Program(text, 1, parts)
    entry = program.computations[program.entry]
    opcodes = [one.opcode for one in entry]
    returned = next(one for one in entry if one.root)
    arrays = opcodes.count("parameter") + len(returned.results)
    waits = sum(opcode in ("conditional", "while") for opcode in opcodes)
    return Kernels(list(_Reader(program, chip).kernels(program.entry, 1)), arrays, waits)


class _Reader:
    def __init__(self, program: hlo.Program, chip: chips.Chip) -> None:
        self.program, self.chip = program, chip

    def kernels(self, computation: str, runs: float) -> Iterator[Kernel]:
        for one in self.program.computations[computation]:
            if one.opcode in hlo.FREE or one.opcode.endswith(("-done", "-update")):
                continue
            if one.opcode == "while":
                yield from self.kernels(one.called["body"][0], runs * self.program.trips(one))
            elif one.opcode in ("call", "async-start"):
                for name in one.called.get("to_apply", ()) + one.called.get("calls", ()):
                    yield from self.kernels(name, runs)
            elif one.opcode != "conditional":
                yield self._kernel(computation, one, runs)

    def _kernel(self, computation: str, one: hlo.Instruction, runs: float) -> Kernel:
        traffic = self.program.traffic(computation, one)
        flops, operand = self._products(computation, one)
        kind = _kind(one)
        first = one.results[0] if one.results else hlo.Array(0, True)
        return Kernel(
            name=one.name,
            kind=kind,
            part=self.program.part(one),
            backward="transpose(" in one.attributes,
            runs=runs,
            flops=flops,
            traffic=traffic,
            seconds=self._seconds(computation, one, kind, flops, operand, traffic) + _GAP,
            shape=f"{first.dtype}{list(first.dims)}",
        )

    def _products(self, computation: str, one: hlo.Instruction) -> tuple[float, str]:
        """Returns the operations of an instruction's products, and their operands' data type."""
        if one.opcode == "fusion":
            return self._dots(one.called["calls"][0])
        if one.opcode == "dot":
            return self._dot(computation, one, "lhs_contracting_dims={([\\d,]*)}")
        if "__cudnn$fmha" in one.attributes:
            (query, *_) = self._operand(computation, one)
            batch, tokens, heads, width = query.dims
            flops = 4.0 * batch * heads * tokens * tokens * width
            return (2.5 * flops if "Backward" in one.attributes else flops), "attention"
        if "__cublas" in one.attributes:
            return self._dot(computation, one, r'"lhs_contracting_dimensions": ?\[([^\]]*)\]')
        return 0.0, ""

    def _operand(self, computation: str, one: hlo.Instruction) -> tuple[hlo.Array, ...]:
        return self.program.named[computation][one.operands[0]].results

    def _dot(self, computation: str, one: hlo.Instruction, contracting: str) -> tuple[float, str]:
        (left, *_) = self._operand(computation, one)
        axes = [int(axis) for axis in re.findall(r"\d+", re.search(contracting, one.attributes)[1])]
        summed = math.prod(left.dims[axis] for axis in axes)
        full = left.dtype == "f32" and "HIGHEST" in one.attributes.upper()
        dtype = "f32, full" if full else left.dtype
        return 2.0 * summed * math.prod(one.results[0].dims), dtype

    @functools.cache  # noqa: B019 (lives as long as the program)
    def _dots(self, computation: str) -> tuple[float, str]:
        total, dtype = 0.0, ""
        for one in self.program.computations[computation]:
            if one.opcode not in ("dot", "fusion"):
                continue
            flops, operand = self._products(computation, one)
            total, dtype = total + flops, max(dtype, operand)  # float32 decides
        return total, dtype

    @functools.cache  # noqa: B019 (lives as long as the program)
    def _opcodes(self, computation: str) -> frozenset[str]:
        found = set()
        for one in self.program.computations[computation]:
            found.add(one.opcode)
            for inner in one.called.get("calls", ()):
                found |= self._opcodes(inner)
        return frozenset(found)

    def _seconds(
        self,
        computation: str,
        one: hlo.Instruction,
        kind: str,
        flops: float,
        operand: str,
        traffic: float,
    ) -> float:
        bandwidth = self.chip.bandwidth
        if flops:
            rate, share, extra = self._rate(kind, flops, operand)
            return max(traffic / (share * bandwidth), flops / rate) + extra
        share = _BANDWIDTH_OF_OTHERS
        if "__triton" in kind:
            share = _BANDWIDTH_OF_TRITON
        for word in reversed(_BANDWIDTH):
            if word in one.name and not (word == "transpose" and "loop" in one.name):
                share = _BANDWIDTH[word]
        seconds = max(traffic / (share * bandwidth), _SHORTEST)
        if one.opcode == "fusion" and "erf" in (inside := self._opcodes(one.called["calls"][0])):
            given = [
                array
                for name in one.operands
                if name in self.program.named[computation]
                for array in self.program.named[computation][name].results
            ]
            elements = max(math.prod(array.dims) for array in (*one.results, *given))
            each = _ERF_GRADIENT if "exponential" in inside else _ERF
            seconds = max(seconds, elements * each * 989e12 / self.chip.bf16)
        return seconds

    def _rate(self, kind: str, flops: float, operand: str) -> tuple[float, float, float]:
        """Returns operations per second, share of the bandwidth, and seconds to start."""
        peak = self.chip.bf16
        if operand == "attention":
            backward = "Backward" in kind
            share = _ATTENTION_BACKWARD if backward else _ATTENTION
            return share * peak, _BANDWIDTH_OF_FLOAT32, 8e-6 if backward else 2e-6
        if operand.startswith("f32"):
            share = _FLOAT32 if operand.endswith("full") else _TF32
            return share * peak, _BANDWIDTH_OF_FLOAT32, 3e-6
        if operand.startswith(("f8", "s8")):
            return _QUANTISED * self.chip.int8, _BANDWIDTH_OF_OTHERS, 2e-6
        large = flops > _MANY
        share = _LARGE if large else _SMALL
        return share * peak, _BANDWIDTH_OF_OTHERS, 2e-6 if large else 4e-6


def _kind(one: hlo.Instruction) -> str:
    text = one.attributes
    if one.opcode == "fusion":
        named = re.search(r'"kind": ?"(__[^"]*)"', text)
        shape = re.search(r"kind=(\w+)", text)
        return f"fusion {named[1] if named else shape[1] if shape else ''}".strip()
    target = re.search(r'custom_call_target="([^"]*)"', text)
    if not target:
        return one.opcode
    epilogue = re.search(r'"epilogue": ?"(\w+)"', text)
    added = re.search(r'"beta": ?([\d.]+)', text)
    words = [target[1], epilogue[1] if epilogue else "", "+" if added and float(added[1]) else ""]
    return " ".join(filter(None, words))


def epilogues(found: Kernels) -> Mapping[str, int]:
    """Returns the number of runs of each kind of kernel that a library computes."""
    counts: dict[str, int] = {}
    for one in found.each:
        if one.kind.startswith("__"):
            counts[one.kind] = counts.get(one.kind, 0) + round(one.runs)
    return counts


@contextlib.contextmanager
def launches() -> Iterator[Callable[[], Launches]]:
    """Makes the compiler for described GPUs write the order of its launches.

    Yields:
      A function that returns the launches of the program that was compiled last in the context.
    """
    with tempfile.TemporaryDirectory(prefix="singer_jax_") as folder:
        options = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}

        def found() -> Launches:
            files = sorted(Path(folder).glob("*.thunk_sequence_after_thunk_passes.txt"))
            kinds = top_level(files[-1].read_text()) if files else []
            graphs = kinds.count("kCommandBuffer")
            return Launches(graphs, len(kinds) - graphs)

        with mock.patch.dict(chips.WITHOUT_A_GPU, options):
            yield found


def top_level(text: str) -> list[str]:
    """Returns the kinds of the launches of a program that lie in no graph, loop or branch.

    Args:
      text: The sequence of launches, as the compiler writes it.
    """
    return re.findall(r"^\d+: (k\w+)", text, re.MULTILINE)
