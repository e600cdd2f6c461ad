"""Ranges of setting values: small objects that check a value and describe the allowed values.

A range does not know the name of its setting, which is a field of `singer_jax.settings.settings`.
"""

from __future__ import annotations

import dataclasses
import re
import reprlib
import sys
from typing import Any, Protocol

from singer_jax.errors import InputError, unknown


class Allowed(Protocol):
    """A set of values; its `str` describes them and completes "give ..." in an error."""

    def admits(self, value: Any) -> bool:
        """Returns whether a value belongs to the set."""


@dataclasses.dataclass(frozen=True)
class Range:
    """A finite number, which is not a bool.

    Attributes:
      low, high: smallest and largest number; None: no bound.
      low_open, high_open: True if the bound itself is excluded.
      whole: True if only an int is allowed.
    """

    low: float | None = None
    high: float | None = None
    low_open: bool = False
    high_open: bool = False
    whole: bool = False

    def admits(self, value: Any) -> bool:
        kinds = int if self.whole else (int, float)
        if not isinstance(value, kinds) or isinstance(value, bool):
            return False
        above = self.low is None or (value > self.low if self.low_open else value >= self.low)
        below = self.high is None or (value < self.high if self.high_open else value <= self.high)
        return above and below and abs(value) <= sys.float_info.max  # false for NaN

    def __str__(self) -> str:
        bounds = []
        if self.low is not None:
            bounds.append(f"{'>' if self.low_open else '>='} {_number(self.low)}")
        if self.high is not None:
            bounds.append(f"{'<' if self.high_open else '<='} {_number(self.high)}")
        kind = "an integer" if self.whole else "a number"
        return f"{kind} {' and '.join(bounds)}".rstrip()


def _number(value: float) -> str:
    power = isinstance(value, int) and value >= 2**16 and value & (value - 1) == 0
    return f"2**{value.bit_length() - 1}" if power else f"{value}"


@dataclasses.dataclass(frozen=True)
class OneOf:
    """One of several names."""

    names: tuple[str, ...]

    def admits(self, value: Any) -> bool:
        return isinstance(value, str) and value in self.names

    def __str__(self) -> str:
        return " or ".join(map(repr, self.names))


@dataclasses.dataclass(frozen=True)
class Flag:
    """True or False."""

    def admits(self, value: Any) -> bool:
        return isinstance(value, bool)

    def __str__(self) -> str:
        return "True or False"


@dataclasses.dataclass(frozen=True)
class Text:
    """One line of text.

    Attributes:
      pattern: regular expression that matches the whole text.
      form: description of the pattern.
    """

    pattern: str = ".*"
    form: str = "one line of text"

    def admits(self, value: Any) -> bool:
        return (
            isinstance(value, str)
            and value.isprintable()
            and re.fullmatch(self.pattern, value) is not None
        )

    def __str__(self) -> str:
        return self.form


@dataclasses.dataclass(frozen=True)
class Nothing:
    """None."""

    def admits(self, value: Any) -> bool:
        return value is None

    def __str__(self) -> str:
        return "None"


@dataclasses.dataclass(frozen=True)
class Elsewhere:
    """No value: the key is set in another place.

    Attributes:
      where: description of that place.
    """

    where: str

    def admits(self, value: Any) -> bool:
        return False

    def __str__(self) -> str:
        return f"it {self.where}"


@dataclasses.dataclass(frozen=True)
class Each:
    """A tuple (or list) of values of one kind.

    Attributes:
      item: range of each value.
      length: number of values; None: any number of at least `least`.
      least: smallest number of values.
      ascending: True if no value may be smaller than the one before.
    """

    item: Allowed
    length: int | None = None
    least: int = 0
    ascending: bool = False

    def admits(self, value: Any) -> bool:
        return (
            isinstance(value, tuple | list)
            and len(value) >= self.least
            and (self.length is None or len(value) == self.length)
            and all(self.item.admits(item) for item in value)
            and not (self.ascending and sorted(value) != list(value))
        )

    def __str__(self) -> str:
        least = f"{self.least} or more values" if self.least else "any number of values"
        count = least if self.length is None else f"{self.length} values"
        order = "ascending, " if self.ascending else ""
        return f"a tuple of {count}, {order}each {self.item}"


@dataclasses.dataclass(frozen=True)
class Either:
    """A value that belongs to any of several ranges."""

    kinds: tuple[Allowed, ...]

    def admits(self, value: Any) -> bool:
        return any(kind.admits(value) for kind in self.kinds)

    def __str__(self) -> str:
        return ", or ".join(map(str, self.kinds))


SEED = Range(0, 2**32, high_open=True, whole=True)
COUNT = Range(1, 2**31, high_open=True, whole=True)
FROM_ZERO = Range(0, 2**31, high_open=True, whole=True)
POSITIVE = Range(0, low_open=True)
NOT_NEGATIVE = Range(0)
SHARE = Range(0, 1)
BETWEEN = Range(0, 1, low_open=True, high_open=True)
DECAY = Range(0, 1, high_open=True)
SIDE = Range(1, 2**14, whole=True)
TEXT = Text()
NAME = Text(".*\\S.*", "a name or folder")


def optional(allowed: Allowed) -> Either:
    """Returns the range that also admits None."""
    return Either((allowed, Nothing()))


def check(name: str, value: Any, allowed: Allowed) -> None:
    """Raises `InputError` with the setting, its value and the allowed values if it is invalid."""
    if allowed.admits(value):
        return
    kinds = allowed.kinds if isinstance(allowed, Either) else (allowed,)
    values = (value,)
    if isinstance(allowed, Each) and isinstance(value, tuple | list):
        kinds, values = (allowed.item,), tuple(value)
    for kind in kinds:
        for text in values:
            if isinstance(kind, OneOf) and isinstance(text, str) and not kind.admits(text):
                raise unknown(name, text, kind.names)
    shown = " ".join(reprlib.repr(value).split())
    raise InputError(f"{name}: {shown}; give {allowed}")
