"""Measures how many generated pictures one core draws per second.

  python -m benchmarks.scenes

The pictures are drawn in one process, including the composition of the scene. The best and the
median of several rounds are reported in CPU time.
"""

from __future__ import annotations

import argparse
import statistics
import time

from benchmarks.results import report
from singer_jax.data.scenes import SceneSettings, ScenesSource
from singer_jax.data.sources import TRAIN


def seconds(size: int, first: int, pictures: int) -> float:
    """Returns the CPU seconds per picture."""
    source = ScenesSource("scenes", TRAIN, SceneSettings(size=size))
    start = time.process_time()
    for index in range(first, first + pictures):
        source[index]
    return (time.process_time() - start) / pictures


def main() -> None:
    """Measures all sizes and reports the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=10)
    arguments = parser.parse_args()
    rows = []
    for size in (32, 64, 128, 224):
        rounds = [
            seconds(size, first * arguments.pictures, arguments.pictures)
            for first in range(arguments.rounds)
        ]
        rows.append(
            {
                "size": size,
                "CPU ms a picture": f"{1e3 * statistics.median(rounds):.2f}",
                "pictures/s a core": f"{1 / statistics.median(rounds):.0f}",
                "best round": f"{1 / min(rounds):.0f}",
            }
        )
    report("Drawing scenes", "python -m benchmarks.scenes", rows, "", ("numpy",))


if __name__ == "__main__":
    main()
