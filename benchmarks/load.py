"""Measures the anonymous host memory and the time that loading a model's weights takes.

  python -m benchmarks.make_inputs weights vit_large_patch16_224 /tmp/vit_large.safetensors
  python -m benchmarks.load vit_large_patch16_224 /tmp/vit_large.safetensors

On the CPU, the loaded parameters are part of the host memory. The target for a model of S bytes is
a peak below 1.3 S + 1 GiB, including the process itself.
"""

from __future__ import annotations

import re
import sys
import threading
import time
from pathlib import Path

import jax

from benchmarks.results import report
from singer_jax.models.weights import load_model, spec_of_weights
from singer_jax.models.zoo import lookup
from singer_jax.platform import parallel

_GIB = 2**30


def anonymous_bytes() -> int:
    """Returns the anonymous resident memory of this process (RssAnon), in bytes."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"RssAnon:\s+(\d+) kB", status).group(1))


def main(model: str, path: Path) -> None:
    """Loads the weights once and samples the memory every 5 ms."""
    spec = spec_of_weights(lookup(model), path)
    mesh = parallel.make_mesh()
    peak, done = anonymous_bytes(), threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.005):
            peak = max(peak, anonymous_bytes())

    before = anonymous_bytes()
    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    _, params = load_model(
        spec, path, shardings=lambda abstract: parallel.tree_shardings(mesh, abstract)
    )
    jax.block_until_ready(params)
    seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    row = {
        "model": model,
        "size GiB": f"{size / _GIB:.2f}",
        "peak anonymous GiB": f"{peak / _GIB:.2f}",
        "before loading GiB": f"{before / _GIB:.2f}",
        "limit 1.3 S + 1 GiB": f"{1.3 * size / _GIB + 1:.2f}",
        "seconds": f"{seconds:.2f}",
    }
    report(
        f"Loading {model}",
        f"python -m benchmarks.load {model} {path.name}",
        [row],
        jax.devices()[0].device_kind,
        ("jax", "flax", "safetensors"),
    )


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
