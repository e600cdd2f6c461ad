"""The job `nullspace`: whether a teacher has a null space and whether its outliers lie in it."""

from __future__ import annotations

import contextlib
import functools
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from singer_jax import parallel
from singer_jax.data.images import EvalTransform
from singer_jax.data.loader import eval_batches, worker_count
from singer_jax.data.sources import TRAIN, evenly, make_source
from singer_jax.errors import InputError
from singer_jax.files import make_workdir, write_text
from singer_jax.methods import nullspace
from singer_jax.methods.base import teacher_layers
from singer_jax.methods.singer import DEPTHS, outlier_threshold, token_norms
from singer_jax.models.vit import Numerics
from singer_jax.models.weights import load_model
from singer_jax.training.setup import PRECISIONS, resolve_model
from singer_jax.training.step import Network


def analyse(config: Any, workdir: epath.Path) -> None:
    """Prints the table and writes nullspace.json and nullspace.png.

    Args:
      config: as `singer_jax.config.null_spaces` describes it.
      workdir: for both files.

    Raises:
      InputError: a layer or threshold out of range, no teacher, no images.
    """
    thresholds = [_parse(text) for text in config.thresholds]
    spec, weights = resolve_model("teacher", config.teacher, config)
    if not weights:
        raise InputError("teacher.weights: empty; give a hub name, a file or a run")
    layers = teacher_layers(config, DEPTHS, spec.arch)
    for rule, threshold in thresholds:
        nullspace.check_threshold(rule, threshold, spec.arch.embed_dim)
    images = make_source(config.data.source, config.data.path, TRAIN)
    few = evenly(images, config.images)
    make_workdir(workdir)

    mesh = parallel.make_mesh(config.mesh.data, config.mesh.fsdp)
    dtype = PRECISIONS[config.precision]
    graph, params = load_model(
        spec,
        weights,
        Numerics(dtype, dtype),
        lambda abstract: parallel.tree_shardings(mesh, abstract),
    )
    network = Network(spec, graph)

    @functools.partial(jax.jit, out_shardings=parallel.replicated(mesh))
    def patches_of(params: Any, images: jax.Array) -> dict[int, jax.Array]:
        features = network.merge(params).features(network.prepare(images), max(layers) + 1)
        prefix = spec.arch.num_prefix_tokens
        return {layer: features[layer][:, prefix:].astype(jnp.float32) for layer in layers}

    patches: dict[int, list[np.ndarray]] = {layer: [] for layer in layers}
    sharding, batch_size = parallel.batch_sharding(mesh), 8 * mesh.size
    batches = eval_batches(
        few,
        EvalTransform(network.image_size),
        batch_size=batch_size,
        workers=min(worker_count(config.data.workers), 2),
        rows=parallel.local_rows(sharding, batch_size),
    )
    with contextlib.closing(batches):
        for batch in batches:
            put = parallel.put_rows(batch["image"], sharding, batch_size)
            for layer, value in patches_of(params, put).items():
                patches[layer].append(np.asarray(value))

    rows: list[dict[str, Any]] = []
    curves: dict[int, dict[str, np.ndarray]] = {}
    for layer in layers:
        # What is left over is the padding of the last batch.
        tokens = jnp.asarray(np.concatenate(patches[layer])[: len(few)])
        norms = token_norms(tokens)
        outliers = norms > outlier_threshold(norms, config.quantile)
        curves[layer] = {}
        for source in config.sources:
            space = jax.jit(
                lambda params, layer=layer, source=source: nullspace.decompose(
                    nullspace.linear_map(network.merge(params), layer, source)
                ),
                out_shardings=parallel.replicated(mesh),
            )(params)
            # From here every process goes on alone.
            space = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), space)
            curves[layer][source] = np.asarray(space.values)
            for rule, threshold in thresholds:
                tau = nullspace.threshold_value(space, rule, threshold)
                rank = min(config.rank, spec.arch.embed_dim)
                filters = {
                    "project": nullspace.projector(space, tau, rank),
                    "soft": nullspace.soft_filter(space, tau),
                }
                rows.append(
                    {
                        "layer": layer,
                        "source": source,
                        "threshold": f"{rule}={threshold:g}",
                        "tau": float(tau),
                        "smallest": float(space.values[-1]),
                        "median": float(jnp.median(space.values)),
                        "largest": float(space.values[0]),
                        "null_dim": int(nullspace.null_dim(space, tau)),
                        "dim": spec.arch.embed_dim,
                    }
                    | {
                        f"share_{use}": float(nullspace.energy_share(q, tokens, outliers))
                        for use, q in filters.items()
                    }
                )
    if jax.process_index() > 0:
        return
    print(_table(rows))
    spectra = {
        layer: {source: values.tolist() for source, values in of_layer.items()}
        for layer, of_layer in curves.items()
    }
    content = {"images": len(few), "rows": rows, "singular_values": spectra}
    write_text(workdir / "nullspace.json", json.dumps(content, indent=1) + "\n")
    from singer_jax.report.pictures import save_spectra

    save_spectra(workdir / "nullspace.png", spec.name, curves, rows)


def _parse(text: str) -> tuple[str, float]:
    rule, _, number = text.partition("=")
    return rule, float(number)


def _table(rows: list[dict[str, Any]]) -> str:
    lines = [
        f"{'layer':>5}  {'source':9} {'threshold':15}{'tau':>9}{'null dim':>12}"
        f"{'smallest':>10}{'median':>10}{'largest':>10}{'project':>9}{'soft':>7}"
    ]
    for row in rows:
        lines.append(
            f"{row['layer']:>5}  {row['source']:9} {row['threshold']:15}{row['tau']:>9.3g}"
            f"{row['null_dim']:>7}/{row['dim']:<4}{row['smallest']:>10.3g}{row['median']:>10.3g}"
            f"{row['largest']:>10.3g}{row['share_project']:>9.2f}{row['share_soft']:>7.2f}"
        )
    lines.append(
        "project, soft: share of the outlier tokens' energy that the refinement could remove"
    )
    return "\n".join(lines)
