"""Memory of a benchmark's process."""

from __future__ import annotations

from pathlib import Path


def resident_peak() -> int:
    """Returns the peak resident memory of this process in bytes."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) * 1024
