"""Markdown tables of settings, from which docs/configuration.md is made."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from singer_jax.settings.ranges import Allowed, Each, Either, Flag, Nothing, OneOf, Range, Text
from singer_jax.settings.settings import ABSENT, Setting

# Values below this bound need no mention: counts are stored as 32-bit integers.
_COUNTS = 2**31


def type_of(allowed: Allowed) -> str:
    """Returns the type of a range in Python's words, such as `int >= 1` or `bool`."""
    match allowed:
        case Either(kinds):
            return " or ".join(map(type_of, kinds))
        case Each(item, length, least, ascending):
            count = f", {length} values" if length else f", at least {least}" if least else ""
            return f"tuple of {type_of(item)}{count}{', ascending' if ascending else ''}"
        case Range():
            return _number(allowed)
        case OneOf(names) if len(names) == 1:
            return f"`{names[0]!r}`"
        case OneOf(names):
            return f"{', '.join(f'`{name!r}`' for name in names[:-1])} or `{names[-1]!r}`"
        case Flag():
            return "bool"
        case Nothing():
            return "None"
        case Text(form=form):
            return "str" if form == Text().form else f"str: {form}"
    return str(allowed)


def _number(allowed: Range) -> str:
    kind = "int" if allowed.whole else "float"
    low, high = allowed.low, allowed.high
    if allowed.whole and high == _COUNTS:
        high = None
    if low is None and high is None:
        return kind
    if high is None:
        return f"{kind} {'>' if allowed.low_open else '>='} {low:g}"
    left, right = "(["[not allowed.low_open], ")]"[not allowed.high_open]
    return f"{kind} in {left}{low:g}, {_short(high)}{right}"


def _short(bound: float) -> str:
    power = isinstance(bound, int) and bound >= 2**16 and bound & (bound - 1) == 0
    return f"2**{bound.bit_length() - 1}" if power else f"{bound:g}"


def has_tuple(allowed: Allowed) -> bool:
    """Returns True if a tuple is among the allowed values."""
    kinds = allowed.kinds if isinstance(allowed, Either) else (allowed,)
    return any(isinstance(kind, Each) for kind in kinds)


def table(
    known: Mapping[str, Setting], paper: Mapping[str, Any], examples: Mapping[str, str]
) -> list[str]:
    """Returns the lines of a table with a row for each key.

    Args:
      known: Settings by key.
      paper: Defaults of the protocol `paper` that differ from the settings' own.
      examples: Arguments of the command line that set a key, by the last part of the key.
    """
    with_default = any(setting.default is not ABSENT for setting in known.values())
    head = ["key", "type", *(["default"] if with_default else []), "description"]
    rows = [head, ["---"] * len(head)]
    for key, setting in known.items():
        row = [f"`{key}`", type_of(setting.allowed)]
        if with_default:
            default = "" if setting.default is ABSENT else f"`{setting.default!r}`"
            row.append(default + (f"; `:paper`: `{paper[key]!r}`" if key in paper else ""))
        meaning = setting.meaning.removesuffix(".") + "."
        if setting.unit:
            meaning += f" Unit: {setting.unit}."
        name = key.rpartition(".")[2]
        if has_tuple(setting.allowed) and name in examples:
            meaning += f" Example: `{examples[name]}`."
        rows.append([*row, meaning])
    return [f"| {' | '.join(row)} |" for row in rows]
