"""A program that loads batches, for tests of its workers: FOLDER REPORTS WORKERS [wait].

SHARED_MEMORY in the environment begins the names of its segments of shared memory.
Each decoding process writes a report; the main process prints digests of six batches.
"""

import json
import os
import sys
import time
from multiprocessing import shared_memory
from pathlib import Path

import numpy as np
from absl import app

from singer_jax.data.images import TrainTransform
from singer_jax.data.loader import LoaderOptions, train_batches
from singer_jax.data.sources import TRAIN, FolderSource


class Reporting(TrainTransform):
    """A transform that reports the process in which it runs."""

    def __call__(self, image: object, rng: np.random.Generator) -> np.ndarray:
        shared_memory._SHM_NAME_PREFIX = os.environ["SHARED_MEMORY"]
        import jax
        from jax._src import xla_bridge

        report = {
            "modules": [name for name in sys.modules if name.startswith("singer_jax")],
            "backends": list(xla_bridge._backends),
            "platforms": jax.config.jax_platforms,
        }
        (Path(os.environ["REPORTS"]) / f"{os.getpid()}.json").write_text(json.dumps(report))
        return super().__call__(image, rng)


def main(argv: list[str]) -> None:
    folder, reports, workers, *wait = argv[1:]
    os.environ["REPORTS"] = reports
    source = FolderSource(folder, TRAIN)
    options = LoaderOptions(int(workers))
    batches = train_batches(source, Reporting(8), batch_size=4, seed=0, options=options)
    found = [next(batches)["image"].astype(int).sum(axis=(1, 2, 3)).tolist() for _ in range(6)]
    print(json.dumps(found), flush=True)
    if wait:
        time.sleep(1000)
    batches.close()


if __name__ == "__main__":
    app.run(main)
