"""The job `nullspace`: whether a teacher has a null space and whether its outliers lie in it."""

from __future__ import annotations

import json
from typing import Any

import jax
from etils import epath

from singer_jax import parallel
from singer_jax.data.loader import worker_count
from singer_jax.data.registry import make_source
from singer_jax.data.sources import TRAIN, evenly
from singer_jax.errors import InputError
from singer_jax.evaluation.null_spaces import collect_patches, describe_layer
from singer_jax.files import make_workdir, write_text
from singer_jax.methods import nullspace as spaces
from singer_jax.methods.base import teacher_layers
from singer_jax.methods.singer import DEPTHS
from singer_jax.models.architecture import PRECISIONS, Numerics
from singer_jax.models.network import Network, resolve_model
from singer_jax.models.weights import load_model
from singer_jax.report.pictures import save_spectra


def nullspace(config: Any, workdir: epath.Path) -> None:
    """Prints the table and writes nullspace.json and nullspace.png.

    Args:
      config: as `singer_jax.config.null_spaces` describes it.
      workdir: for both files.

    Raises:
      InputError: a layer or threshold out of range, no teacher, no images.
    """
    thresholds = [_parse(text) for text in config.thresholds]
    spec, weights = resolve_model(
        "teacher",
        config.teacher.model,
        config.teacher.weights,
        dict(config.teacher.overrides),
        config.data.image_size,
        config.data.normalisation,
    )
    if not weights:
        raise InputError("teacher.weights: empty; give a hub name, a file or a run")
    layers = teacher_layers(config, DEPTHS, spec.arch)
    for rule, threshold in thresholds:
        spaces.check_threshold(rule, threshold, spec.arch.embed_dim)
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
    workers = min(worker_count(config.data.workers), 2)
    patches = collect_patches(network, params, mesh, few, layers, workers)

    rows: list[dict[str, Any]] = []
    curves: dict[int, dict[str, Any]] = {}
    for layer in layers:
        found, curves[layer] = describe_layer(
            network,
            params,
            mesh,
            layer,
            patches[layer],
            sources=config.sources,
            thresholds=thresholds,
            rank=config.rank,
            quantile=config.quantile,
        )
        rows += found
    if jax.process_index() > 0:
        return
    print(_table(rows))
    spectra = {
        layer: {source: values.tolist() for source, values in of_layer.items()}
        for layer, of_layer in curves.items()
    }
    content = {"images": len(few), "rows": rows, "singular_values": spectra}
    write_text(workdir / "nullspace.json", json.dumps(content, indent=1) + "\n")
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
