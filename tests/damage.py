"""Damage to files as disks cause it, and the warnings about it."""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

from singer_jax.runs import verify


def flip(file: Path, place: int, bit: int = 0) -> None:
    """One bit; places beyond the end go round."""
    content = bytearray(file.read_bytes())
    if content:
        content[place % len(content)] ^= 1 << bit
        file.write_bytes(content)


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def largest(folder: Path) -> Path:
    return max(files(folder), key=lambda file: file.stat().st_size)


@contextlib.contextmanager
def warned() -> Iterator[list[str]]:
    """Collects the warnings about checkpoints; unlike `caplog`, anew in each example."""
    lines: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: lines.append(record.getMessage())
    verify.LOG.addHandler(handler)
    try:
        yield lines
    finally:
        verify.LOG.removeHandler(handler)
