"""Compares the fast probe with the published one, and one learning rate with sixteen.

  python -m benchmarks.probe --model vit_tiny_patch16_224 --images 256 --epochs 10

The model has random weights, and the data are random JPEGs in eight classes. The fast probe with
one and with sixteen rates and the published probe, which runs the backbone in every epoch, are
timed in turn, including the extraction of features. The rate of the extraction is compared with
that of the input pipeline alone.
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from benchmarks.make_inputs import write_images, write_weights
from benchmarks.results import report
from singer_jax.data.images import EvalTransform
from singer_jax.data.loader import LoaderOptions, eval_batches, worker_count
from singer_jax.data.registry import make_source
from singer_jax.data.sources import TEST, TRAIN
from singer_jax.evaluation.backbone import ModelSelection, load_backbone
from singer_jax.evaluation.measure import ProbedModel, Split, probe_models, test_examples
from singer_jax.evaluation.probe import ProbeSettings
from singer_jax.platform import parallel

RATES = tuple(np.geomspace(0.01, 10, 16).round(4).tolist())


def seconds(function: Callable[[], object]) -> float:
    """Returns the seconds that a call takes."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def main(arguments: argparse.Namespace) -> None:
    """Measures everything once to warm up and then `rounds` times in turn."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for split, count in (("train", arguments.images), ("val", arguments.images // 4)):
            for label in range(8):
                write_images(count // 8, root / split / str(label))
        write_weights(arguments.model, root / "weights.safetensors")
        weights = str(root / "weights.safetensors")
        selected = ModelSelection(weights=weights, model=arguments.model)
        backbone = load_backbone(parallel.make_mesh(), selected)
        split = Split(*(make_source("folder", str(root), part) for part in (TRAIN, TEST)))
        workers = worker_count(None)

        def run(protocol: str, rates: tuple[float, ...], epochs: int) -> None:
            settings = ProbeSettings(protocol=protocol, learning_rates=rates, epochs=epochs)
            store = root / "features"
            shutil.rmtree(store, ignore_errors=True)  # extraction is part of the measurement
            kind = "classification"
            test = test_examples({"": backbone}, kind, split.test, settings, workers)[""]
            models = {"": ProbedModel(backbone, test, store)}
            probe_models(models, kind, split, settings, 0, workers)

        def extract() -> None:
            task, transform = backbone.classification(8, None), EvalTransform(backbone.image_size)
            backbone.extract(split.train, task, transform, workers)

        def read() -> None:
            transform, options = EvalTransform(backbone.image_size), LoaderOptions(workers)
            batches = eval_batches(split.train, transform, batch_size=64, options=options)
            with contextlib.closing(batches):
                for _ in batches:
                    pass

        measured: dict[str, Callable[[], None]] = {
            "fast, 1 rate": lambda: run("fast", (0.5,), arguments.epochs),
            "fast, 16 rates": lambda: run("fast", RATES, arguments.epochs),
            "published, 1 rate": lambda: run("paper", (0.5,), arguments.epochs),
            "extraction": extract,
            "input pipeline": read,
        }
        times: dict[str, list[float]] = {name: [] for name in measured}
        for number in range(1 + arguments.rounds):
            for name, function in measured.items():
                taken = seconds(function)
                if number:
                    times[name].append(taken)
        medians = {name: statistics.median(values) for name, values in times.items()}
        rows = []
        for name, median in medians.items():
            extracted = name in ("extraction", "input pipeline")
            base = "input pipeline" if extracted else "fast, 1 rate"
            rate = f"{len(split.train) / median:.0f}" if extracted else ""
            rows.append(
                {
                    "what": name,
                    "median s": f"{median:.2f}",
                    "min..max": f"{min(times[name]):.2f}..{max(times[name]):.2f}",
                    "ratio": f"{median / medians[base]:.2f} x {base}",
                    "images/s": rate,
                }
            )
    report(
        f"Probe of {arguments.model}, {arguments.images} training images, "
        f"{arguments.epochs} epochs",
        f"python -m benchmarks.probe --model {arguments.model} --images {arguments.images} "
        f"--epochs {arguments.epochs}",
        rows,
        jax.devices()[0].device_kind,
        ("jax", "flax", "grain"),
    )


if __name__ == "__main__":
    from absl import app

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="vit_tiny_patch16_224")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    # absl's flags must be parsed before grain starts its workers.
    app.run(lambda argv: main(given), argv=["probe"])
