"""The errors that a command reports in one line, by their exit status."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping

_LONGEST = 200  # characters of a name that is looked for among others


class InputError(ValueError):
    """Something given (a key, value, file or folder) is wrong: exit status 2.

    The message is one line that says what, where and what to do; raised before any long work.
    """

    status = 2


class RunError(RuntimeError):
    """A run failed for a reason that its message names: exit status 1, checkpoints are kept."""

    status = 1


class StudentsStopped(RunError):
    """Some students of a run, or all, met a number that is none; the others are done.

    Args:
      message: of the error.
      students: what each of them met.
    """

    def __init__(self, message: str, students: Mapping[str, str]) -> None:
        super().__init__(message)
        self.students = dict(students)


class Stopped(Exception):
    """A run was asked to stop, has saved, and can be started again: exit status 75."""

    status = 75


def shown(text: str) -> str:
    """A stranger's text for a terminal: what would move its cursor or break the line is escaped."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def excerpt(text: str, most: int = 100) -> str:
    """Returns the beginning of a text from an untrusted file, for one line of a message."""
    text = shown(text[: most + 1])
    return text if len(text) <= most else f"{text[:most]}..."


def listed(names: Iterable[str], most: int = 5) -> str:
    """Returns the first names for a message, and the number of the others."""
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(excerpt(name) for name in names[:most]) + more


def unknown(kind: str, name: str, known: Iterable[str]) -> InputError:
    """An `InputError` for a name that is not in `known`, with the closest names."""
    known, name = sorted(known), name[:_LONGEST]
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    hint = f"closest: {', '.join(close)}; " if close else ""
    listed = ", ".join(known) if len(known) <= 12 else f"{', '.join(known[:12])}, ..."
    return InputError(f"unknown {kind} {name!r}; {hint}known: {listed}")
