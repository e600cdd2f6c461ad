"""How near a teacher's features with `teacher.approximate_gelu` are to those of the exact GELU.

  python -m benchmarks.approximate_gelu --model NAME --weights FILE --images FOLDER

Cosines of tokens and relative errors against float32 with the exact GELU, after four blocks. The
tanh approximation is computed in float32, as cuBLASLt does before it rounds. `--append` writes the
rows to approximate_gelu.jsonl beside this file.
"""

from __future__ import annotations

import argparse
import json
from importlib.metadata import version
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.quantised import SIZE, cosines, read_images
from singer_jax.models.architecture import ComputePolicy
from singer_jax.models.network import ModelSettings, resolve_model
from singer_jax.models.weights import load_model

FILE = Path(__file__).with_suffix(".jsonl")
FORMS = (("float32", True), ("bfloat16", False), ("bfloat16", True))


def main() -> None:
    """Prints or writes a row for each form and block."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="timm name of the teacher")
    parser.add_argument("--weights", required=True)
    parser.add_argument("--images", required=True, type=Path, help="folder, searched through")
    parser.add_argument("--count", type=int, default=16)
    parser.add_argument("--append", action="store_true", help=f"to {FILE.name}")
    arguments = parser.parse_args()
    settings = ModelSettings(model=arguments.model, weights=arguments.weights)
    spec, file = resolve_model("teacher", settings, SIZE)
    depth = spec.arch.depth
    layers = [depth // 4 - 1, depth // 2 - 1, 3 * depth // 4 - 1, depth - 1]
    x = spec.prepare(jnp.asarray(read_images(arguments.images, arguments.count)))

    def features(dtype: str, approximate: bool) -> dict[int, np.ndarray]:
        policy = ComputePolicy(
            jnp.dtype(dtype), jnp.dtype(dtype), approximate_gelu=approximate, backend="cpu"
        )
        graph, params = load_model(spec, file, policy)
        found = jax.jit(lambda p, x: nnx.merge(graph, p).features_at(x, layers))(params, x)
        return {layer: np.asarray(one, np.float64) for layer, one in found.items()}

    exact = features("float32", False)
    for dtype, approximate in FORMS:
        found = features(dtype, approximate)
        for layer in layers:
            near, off = cosines(exact[layer], found[layer]), found[layer] - exact[layer]
            row = {
                "model": arguments.model,
                "images": arguments.count,
                "block": layer,
                "dtype": dtype,
                "approximate_gelu": approximate,
                "median_cosine": round(float(np.median(near)), 7),
                "first_percentile_cosine": round(float(np.percentile(near, 1)), 7),
                "relative_error": float(
                    f"{np.linalg.norm(off) / np.linalg.norm(exact[layer]):.3g}"
                ),
                "jax": version("jax"),
            }
            print(row, flush=True)
            if arguments.append:
                with FILE.open("a") as rows:
                    rows.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
