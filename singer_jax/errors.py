"""Errors that a command reports in one line, each with its exit status."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping

_MOST_LISTED = 3  # known names that an error lists if there are more than twelve
_LONGEST = 200  # largest number of characters of a name that is compared with the known names


class InputError(ValueError):
    """Invalid configuration or input (a key, value, file or folder): exit status 2.

    The message is one line that says what is wrong, where, and what to do. The error is raised
    before any long work starts.
    """

    status = 2


class RunError(RuntimeError):
    """Failure of a run for a reason that the message names: exit status 1; checkpoints are kept."""

    status = 1


class StudentsStopped(RunError):
    """Non-finite loss or gradient in some or all students of a run; the other students are done.

    Args:
      message: message of the error.
      students: reason why each of these students stopped, by name.
    """

    def __init__(self, message: str, students: Mapping[str, str]) -> None:
        super().__init__(message)
        self.students = dict(students)


class Stopped(Exception):
    """Stop on request: the run has saved and the same command resumes it; exit status 75."""

    status = 75


def shown(text: str) -> str:
    """Returns untrusted text with control characters escaped, so that it is safe in a terminal."""
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
    """Returns an `InputError` for a name that is not in `known`, with the closest known names."""
    known, name = sorted(known), name[:_LONGEST]
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    hint = f"closest: {', '.join(close)}; " if close else ""
    some, more = known[:_MOST_LISTED], len(known) - _MOST_LISTED
    listed = ", ".join(known) if len(known) <= 12 else f"{', '.join(some)} and {more} more"
    return InputError(f"unknown {kind} {name!r}; {hint}known: {listed}")
