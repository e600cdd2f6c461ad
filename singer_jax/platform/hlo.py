"""Memory traffic and collectives of a compiled program, computed from its HLO text.

`Compiled.cost_analysis` counts the body of a loop once, and on a TPU every prefetched slice as the
whole array. Here a loop counts as often as it runs, and a slice with its own size. Arrays count
with the padding of their tiles, and arrays in the chip's fast memory do not count.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Mapping, Sequence

COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)

# Operations without memory traffic of their own.
FREE = (
    "parameter",
    "get-tuple-element",
    "tuple",
    "bitcast",
    "constant",
    "after-all",
    "partition-id",
    "replica-id",
    "opt-barrier",
    "domain",
    "add-dependency",
)
_BITS = re.compile(r"(?:pred|token|[a-z]+?(\d+))")
_ARRAY = re.compile(r"([a-z]+\d*[a-z\d]*)\[([\d,]*)\](?:\{([^}]*)\})?")
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) (?:\(.*\) -> .* )?\{")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (.*)")
_CALLED = re.compile(r"(calls|body|condition|to_apply|branch_computations)=(\{[^}]*\}|%?[\w.\-]+)")


@dataclasses.dataclass(frozen=True)
class Array:
    """An array of a program.

    Attributes:
      size: Size in bytes, including the padding of tiles.
      main: True if it lies in main memory.
      dtype: Data type, such as `bf16`.
      dims: Number of elements along each axis.
    """

    size: int
    main: bool
    dtype: str = ""
    dims: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction of a program."""

    name: str
    opcode: str
    results: tuple[Array, ...]
    operands: tuple[str, ...]
    called: Mapping[str, tuple[str, ...]]
    attributes: str
    root: bool


@dataclasses.dataclass(frozen=True)
class Moved:
    """The traffic of a program on one device; a condition counts with its cheaper branch.

    Attributes:
      traffic: Bytes read from and written to main memory.
      collectives: Number of runs of each kind, and the bytes of its results.
      by_part: Traffic by `jax.named_scope`; traffic outside the named scopes is under "".
    """

    traffic: float
    collectives: Mapping[str, tuple[float, float]]
    by_part: Mapping[str, float]


def moved(text: str, unknown_trips: float = 1, parts: Sequence[str] = ()) -> Moved:
    """Computes the traffic of a compiled program.

    Args:
      text: Text of the program, from `Compiled.as_text()`.
      unknown_trips: Assumed trip count of a loop whose trip count is unknown.
      parts: Names of scopes.
    """
    return Program(text, unknown_trips, parts).moved()


def part_of(names: str, parts: Sequence[str]) -> str:
    """Returns the first scope in a stack of names such as `jit(step)/transpose(jvp(student))`."""
    found = [name for name in re.findall(r"\w+", names) if name in parts]
    return found[0] if found else ""


class Program:
    """A compiled program that is read from its text; the arguments are those of `moved`."""

    def __init__(self, text: str, unknown_trips: float, parts: Sequence[str] = ()) -> None:
        self.unknown_trips, self.parts = unknown_trips, parts
        self.computations: dict[str, list[Instruction]] = {}
        current: list[Instruction] = []
        for line in text.splitlines():
            if line.startswith(" "):
                found = _instruction(line)
                if found:
                    current.append(found)
            elif match := _COMPUTATION.match(line):
                current = self.computations[match[2]] = []
                if match[1]:
                    self.entry = match[2]
        self.named = {
            name: {one.name: one for one in instructions}
            for name, instructions in self.computations.items()
        }

    def moved(self) -> Moved:
        """Returns the traffic of the whole program."""
        return self._of(self.entry)

    @functools.cache  # noqa: B019 (lives as long as the program)
    def _of(self, computation: str) -> Moved:
        traffic: dict[str, float] = collections.defaultdict(float)
        counts = collections.defaultdict(lambda: (0.0, 0.0))

        for one in self.computations[computation]:
            part = self.part(one)

            def add(other: Moved, times: float = 1, part: str = part) -> None:
                for name, size in other.by_part.items():
                    traffic[name or part] += times * size
                for kind, (count, size) in other.collectives.items():
                    before = counts[kind]
                    counts[kind] = before[0] + times * count, before[1] + times * size

            kind = one.opcode.removesuffix("-start")
            if kind in COLLECTIVES:
                sent = one.results[-1:] if one.opcode.endswith("-start") else one.results
                add(Moved(0, {kind: (1, sum(array.size for array in sent))}, {}))
            if one.opcode == "while":
                trips = self.trips(one)
                for role in ("body", "condition"):
                    add(self._of(one.called[role][0]), trips)
            elif one.opcode == "conditional":
                branches = [self._of(name) for name in one.called["branch_computations"]]
                add(min(branches, key=lambda branch: branch.traffic))
            elif one.opcode in ("call", "async-start"):
                for name in one.called.get("to_apply", ()) + one.called.get("calls", ()):
                    add(self._of(name))
            else:
                if one.opcode == "fusion":  # collectives may be wrapped in one
                    inner = self._of(one.called["calls"][0])
                    add(Moved(0, inner.collectives, {}))
                traffic[part] += self.traffic(computation, one)
        return Moved(sum(traffic.values()), dict(counts), dict(traffic))

    def part(self, one: Instruction) -> str:
        """Returns the scope of an instruction."""
        named = re.search(r'op_name="([^"]*)"', one.attributes)
        return part_of(named[1], self.parts) if named else ""

    def trips(self, loop: Instruction) -> float:
        """Returns the number of runs of a loop's body."""
        known = re.search(r'known_trip_count"?:\{"?n"?:"?(\d+)', loop.attributes)
        if known:
            return int(known[1])
        # If the compiler does not report the trip count: jax counts from 0 to a constant.
        condition = self.named[loop.called["condition"][0]]
        (root,) = [one for one in condition.values() if one.root]
        bounds = [condition[name].attributes for name in root.operands if name in condition]
        found = [re.match(r"constant\((\d+)\)", bound) for bound in bounds]
        if root.opcode == "compare" and "direction=LT" in root.attributes and found[-1]:
            return int(found[-1][1])
        return self.unknown_trips

    def traffic(self, computation: str, one: Instruction) -> float:
        """Returns the traffic of an instruction that is no loop, branch or call."""
        if one.opcode in FREE or one.opcode.endswith(("-done", "-update")):
            return 0
        arrays = [self._arrays(computation, name) for name in one.operands]
        reads = [sum(array.size for array in given if array.main) for given in arrays]
        writes = sum(array.size for array in one.results if array.main)
        match one.opcode.removesuffix("-start"):
            case "slice" | "dynamic-slice" | "gather":
                source = bool(arrays) and any(array.main for array in arrays[0])
                if one.opcode.endswith("-start"):
                    moves = one.results[1]
                    return moves.size * (source + moves.main)
                return sum(a.size for a in one.results) * source + writes
            case "copy" if one.opcode.endswith("-start"):
                return reads[0] + (one.results[0].size if one.results[0].main else 0)
            case "dynamic-update-slice" | "scatter":
                update = arrays[-1 if one.opcode == "scatter" else 1]
                size = sum(array.size for array in update)
                return sum(reads[1:]) + size * any(array.main for array in one.results)
            case "fusion":
                return self._of_fusion(one, reads, writes)
            case "custom-call" if "__cu" in one.attributes and len(one.results) > 1:
                return sum(reads) + writes - one.results[-1].size  # the library's scratch memory
            case "iota" | "rng-bit-generator" | "broadcast":
                return sum(reads) + writes
        if one.opcode.endswith("-start"):  # a collective: its results hold operands, too
            return sum(reads) + (one.results[-1].size if one.results[-1].main else 0)
        return sum(reads) + writes

    def _of_fusion(self, one: Instruction, reads: Sequence[float], writes: float) -> float:
        """Returns the traffic of a fusion.

        A fused slice counts with the elements that it reads, and a fused in-place update with those
        that it writes.
        """
        name = one.called["calls"][0]
        inside = self.computations[name]
        given = {
            instruction.name: int(re.search(r"parameter\((\d+)\)", instruction.attributes)[1])
            for instruction in inside
            if instruction.opcode == "parameter"
        }
        users = collections.defaultdict(list)
        for instruction in inside:
            for position, operand in enumerate(instruction.operands):
                users[operand].append((instruction, position))
        total = 0.0
        for parameter, number in given.items():
            if not number < len(reads) or not reads[number]:
                continue
            used = self._through_bitcasts(parameter, users)
            if used and all(self._is_slice(*user) for user in used):
                slices = sum(
                    user.results[0].size for user, _ in used if "update" not in user.opcode
                )
                total += min(reads[number], slices)
            else:
                total += reads[number]
        roots = [instruction for instruction in inside if instruction.root]
        while roots and roots[0].opcode in ("bitcast", "tuple"):
            roots = [self.named[name][operand] for operand in roots[0].operands]
        for root in roots:
            if root.opcode == "dynamic-update-slice" and writes:
                update = self.named[name][root.operands[1]].results[0]
                writes -= max(0, min(writes, root.results[0].size) - update.size)
        return total + writes

    def _through_bitcasts(self, name: str, users: Mapping) -> list[tuple[Instruction, int]]:
        found = []
        for user, position in users[name]:
            if user.opcode == "bitcast":
                found += self._through_bitcasts(user.name, users)
            else:
                found.append((user, position))
        return found

    @staticmethod
    def _is_slice(user: Instruction, position: int) -> bool:
        """Returns True if it reads only a part of this operand; an in-place update reads none."""
        sliced = ("slice", "dynamic-slice", "gather", "dynamic-update-slice")
        return position == 0 and user.opcode in sliced

    def _arrays(self, computation: str, name: str) -> tuple[Array, ...]:
        found = self.named[computation].get(name)
        return found.results if found else ()


def _instruction(line: str) -> Instruction | None:
    match = _INSTRUCTION.match(line)
    if not match:
        return None
    rest = match[3]
    end = _closing(rest) if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    opcode, _, rest = rest.partition("(")
    end = _closing("(" + rest) - 2
    operands, attributes = rest[:end], rest[end + 1 :]
    called = collections.defaultdict(tuple)
    for role, names in _CALLED.findall(attributes):
        called[role] += tuple(re.findall(r"[\w.\-]+", names))
    for role in re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", attributes):
        called["branch_computations"] += (role,)
    return Instruction(
        name=match[2],
        opcode=opcode,
        results=tuple(_array(*found) for found in _ARRAY.findall(shape)),
        operands=tuple(re.findall(r"%([\w.\-]+)", operands)),
        called=dict(called),
        attributes=f"{opcode}({operands}){attributes}",
        root=bool(match[1]),
    )


def _closing(text: str) -> int:
    """Returns the position after the parenthesis that closes the first one."""
    depth = 0
    for position, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if not depth:
            return position + 1
    return len(text)


def _array(dtype: str, dims: str, layout: str) -> Array:
    bits = _BITS.match(dtype)
    sides = [int(side) for side in dims.split(",") if side]
    given = tuple(sides)
    order, _, rest = layout.partition(":")
    tile = re.search(r"T\(([\d,]+)\)", rest)
    if tile and order:
        tile_sides = [int(side) for side in tile[1].split(",")]
        for minor, side in zip(order.split(","), reversed(tile_sides), strict=False):
            sides[int(minor)] = -(-sides[int(minor)] // side) * side
    size = math.prod(sides) * max(1, int(bits[1] or 8 if bits else 8) // 8)
    return Array(0 if dtype == "token" else size, "S(" not in rest, dtype, given)
