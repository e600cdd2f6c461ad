"""Compares the features and losses with a quantised teacher with those in float32.

  pip install ".[quantised]"
  python -m benchmarks.quantised --model vit_small_patch14_dinov2 --weights FILE --images FOLDER

The cosine of each token to the one in float32 is computed after four blocks, for the teacher
without changes and for one with synthetic outlier tokens: every 50th patch gets a mark in its
position embedding, and a hidden unit of a middle block reacts to the mark and writes 10 times the
last block's median norm into two channels. The norms then have two modes, as in large models. The
losses are those of one batch, with the same student and refiner, after some steps with the teacher
in float32.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from PIL import Image

from benchmarks.results import report
from singer_jax.config import default, settings_of
from singer_jax.models.architecture import ComputePolicy
from singer_jax.models.network import ModelSettings, resolve_model
from singer_jax.models.params import Params
from singer_jax.models.quantised import FORMATS
from singer_jax.models.weights import abstract_model, load_model, with_scales
from singer_jax.platform import parallel
from singer_jax.training.program import jit_step
from singer_jax.training.setup import setup_students

SIZE = 224
TERMS = ("loss_kd", "loss_outlier", "loss_info")


def read_images(folder: Path, count: int) -> np.ndarray:
    """Returns images evenly spread over a folder, uint8 [count, SIZE, SIZE, 3]."""
    files = sorted(path for path in folder.rglob("*") if path.suffix in (".jpg", ".jpeg", ".png"))
    chosen = [files[index * len(files) // count] for index in range(count)]
    images = [Image.open(file).convert("RGB").resize((SIZE, SIZE)) for file in chosen]
    return np.stack([np.asarray(image) for image in images])


def with_outliers(graph: nnx.GraphDef, params: Params, x: jax.Array) -> Params:
    """Returns parameters with a mark on some positions and a hidden unit that reacts to it.

    Raises:
      ValueError: the unit does not tell the marked tokens of `x` from the others.
    """
    model = nnx.merge(graph, params)
    middle, typical = len(model.blocks) // 2 - 1, model.features(x)
    prefix, tokens, dim = model.arch.num_prefix_tokens, typical[0].shape[1], typical[0].shape[2]
    marked = np.zeros(tokens, bool)
    marked[prefix + (tokens - prefix) // 100 :: 50] = True
    stream = np.float64(typical[middle - 1]).reshape(-1, dim)
    mark = np.linalg.eigh(np.cov(stream.T))[1][:, 0]  # where the others vary the least
    mark *= 3 * np.median(np.linalg.norm(stream, axis=-1))
    model.pos_embed[...] = model.pos_embed[...].at[:, marked].add(mark)

    block, before = model.blocks[middle], model.features(x, middle)[-1]
    first, second = block.scales()
    mixed = block.attn(block.norm1(before))
    read = np.float64(block.norm2(before + (mixed if first is None else mixed * first)))
    others = read[:, ~marked].reshape(-1, dim)
    along = read[:, marked].mean((0, 1)) - others.mean(0)
    low, high = (others @ along).max(), (read[:, marked] @ along).min()
    if low >= high:
        raise ValueError("the marked tokens cannot be distinguished from the others")
    answer = 100.0  # of the hidden unit
    gain = 2 * answer / (high - low)
    mlp = block.mlp
    unit = int(np.argmin(np.linalg.norm(mlp.fc2.kernel[...], axis=1)))
    mlp.fc1.kernel[...] = mlp.fc1.kernel[...].at[:, unit].set(gain * along)
    mlp.fc1.bias[...] = mlp.fc1.bias[...].at[unit].set(-gain * (low + high) / 2)
    row = np.zeros(dim)
    norm = 10 * np.median(np.linalg.norm(typical[-1], axis=-1))
    row[[dim // 3, dim // 2]] = norm / answer / np.sqrt(2)
    row = row if second is None else row / np.asarray(second)
    mlp.fc2.kernel[...] = mlp.fc2.kernel[...].at[unit].set(row)
    return nnx.to_pure_dict(nnx.state(model))


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Returns the cosine of each pair of tokens."""
    a, b = np.float64(a), np.float64(b)
    return (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)


def features_rows(arguments: argparse.Namespace, pixels: np.ndarray, layers: list[int]) -> list:
    """Returns a row for each teacher, number format and layer."""
    settings = ModelSettings(model=arguments.model, weights=arguments.weights)
    spec, file = resolve_model("teacher", settings, SIZE)
    x = spec.prepare(jnp.asarray(pixels))
    graph, params = load_model(spec, file)
    rows = []
    for what, own in (
        ("unchanged", params),
        ("synthetic outliers", with_outliers(graph, params, x)),
    ):

        def features(policy: ComputePolicy, own: Params = own) -> dict[int, np.ndarray]:
            graph, abstract = abstract_model(spec.arch, policy)
            own = jax.tree.map(lambda leaf: leaf.astype(policy.param_dtype), own)
            own = with_scales(own, abstract)
            found = jax.jit(lambda p, x: nnx.merge(graph, p).features_at(x, layers))(own, x)
            return jax.device_get(found)

        exact = features(ComputePolicy())
        for dtype in ("float32", "bfloat16"):
            for quantised in (None, *FORMATS):
                if dtype == "float32" and quantised is None:
                    continue
                found = features(
                    ComputePolicy(jnp.dtype(dtype), jnp.dtype(dtype), quantised=quantised)
                )
                for layer in layers:
                    near = cosines(exact[layer], found[layer])
                    norms = np.linalg.norm(exact[layer], axis=-1)
                    rows.append(
                        {
                            "teacher": what,
                            "norms: median, largest": f"{np.median(norms):.1f}, {norms.max():.0f}",
                            "block": layer,
                            "other products": dtype,
                            "quantised": quantised or "-",
                            "median cosine": f"{np.median(near):.5f}",
                            "1st percentile": f"{np.percentile(near, 1):.5f}",
                        }
                    )
    return rows


def losses_rows(arguments: argparse.Namespace, pixels: np.ndarray) -> list[dict[str, str]]:
    """Returns the three losses by number format, and their differences from those in float32."""
    config = default()
    config.teacher.model, config.teacher.weights = arguments.model, arguments.weights
    config.student.model, config.precision = arguments.student, "float32"
    config.batch_size, config.data.image_size = 8, SIZE
    config.method.interpolate_patch_grid = True
    config.steps, config.mesh.data = 1000, 1

    def prepared(quantised: str | None) -> tuple:
        config.teacher.precision = quantised
        run = setup_students(settings_of(config), 8000, 0)
        return run, run.load_teacher()

    run, teacher = prepared(None)
    state, sharding = run.init_states(teacher)[""], parallel.batch_sharding(run.any.mesh)
    step = jit_step(run.any.distillation, run.any.mesh, state, teacher)

    def batch(number: int) -> dict[str, jax.Array]:
        chosen = np.arange(8 * number, 8 * number + 8) % len(pixels)
        return parallel.put_batch(
            {"image": pixels[chosen], "label": np.zeros(8, np.int32)}, sharding
        )

    for number in range(arguments.steps):
        state, _ = step(state, teacher, batch(number), np.bool_(False))
    rows, exact = [], None
    for quantised in (None, *FORMATS):
        run, teacher = prepared(quantised)
        metrics = jax.jit(run.any.distillation.gradients)(state, teacher, batch(0))[0]
        found = {term: float(metrics[term]) for term in TERMS}
        exact = exact or found
        rows.append(
            {"teacher": quantised or "float32"}
            | {t: f"{v:.4g} ({100 * (v / exact[t] - 1):+.2f} %)" for t, v in found.items()}
        )
    return rows


def main() -> None:
    """Measures features and losses and reports both tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="timm name of the teacher")
    parser.add_argument("--weights", required=True)
    parser.add_argument("--images", required=True, type=Path, help="folder of images")
    parser.add_argument("--count", type=int, default=48)
    parser.add_argument("--student", default="vit_tiny_patch16_224")
    parser.add_argument(
        "--steps", type=int, default=20, help="training steps before the losses are compared"
    )
    arguments = parser.parse_args()
    pixels = read_images(arguments.images, arguments.count)
    depth = resolve_model("teacher", ModelSettings(model=arguments.model))[0].arch.depth
    layers = [depth // 4 - 1, depth // 2 - 1, 3 * depth // 4 - 1, depth - 1]
    named = [Path(a).name if "/" in a else a for a in sys.argv[1:]]
    command = f"python -m benchmarks.quantised {' '.join(named)}"
    libraries = ("jax", "qwix")
    title = f"{arguments.model}, {arguments.count} images of {SIZE} x {SIZE}"
    rows = features_rows(arguments, pixels, layers)
    report(f"Quantised teacher's features, {title}", command, rows, "", libraries)
    rows = losses_rows(arguments, pixels)
    report(f"Losses with a quantised teacher, {title}", command, rows, "", libraries)


if __name__ == "__main__":
    main()
