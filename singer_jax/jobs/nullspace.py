"""Job `nullspace`: measures a teacher's artifacts and the share that its null space holds."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from singer_jax.data.checking import readable
from singer_jax.data.images import EvalTransform, open_image
from singer_jax.data.loader import worker_count
from singer_jax.data.registry import SizedDataSettings, open_source
from singer_jax.data.sources import TRAIN, Source, evenly
from singer_jax.errors import InputError
from singer_jax.evaluation import norm_summary
from singer_jax.evaluation.null_spaces import (
    LayerPatches,
    MeasuredSpaces,
    collect_patches,
    describe_layer,
)
from singer_jax.io.files import make_workdir, write_text
from singer_jax.methods import nullspace as spaces
from singer_jax.methods.base import teacher_layers
from singer_jax.methods.norms import is_outlier
from singer_jax.methods.singer import DEPTHS
from singer_jax.models.architecture import PRECISIONS, ComputePolicy
from singer_jax.models.network import FrozenSettings, Network, resolve_model
from singer_jax.models.quantised import check_installed
from singer_jax.models.weights import load_model
from singer_jax.platform import parallel
from singer_jax.report.pictures import save_norm_maps, save_spectra
from singer_jax.runs.lock import holding
from singer_jax.settings.ranges import (
    BETWEEN,
    COUNT,
    FROM_ZERO,
    POSITIVE,
    Each,
    Flag,
    OneOf,
    Text,
    optional,
)
from singer_jax.settings.settings import Settings, section, setting

_PICTURED = 4  # number of images in norms.png
_NUMBER = r"(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?"
_THRESHOLD = Text(
    f"({'|'.join(spaces.RULES)})={_NUMBER}",
    "rule=number with the rule quantile, absolute, relative, rank or energy",
)


@dataclasses.dataclass(frozen=True)
class NullspaceSettings(Settings):
    """Settings of the job `nullspace`."""

    job: str = setting("nullspace", OneOf(("nullspace",)), "Name of the command.")
    teacher: FrozenSettings = section(FrozenSettings())
    precision: str = setting(
        "bfloat16",
        OneOf(tuple(PRECISIONS)),
        "Dtype of the activations and the teacher's parameters.",
    )
    layers: tuple[int, ...] | None = setting(
        None,
        optional(Each(FROM_ZERO)),
        "Indices of teacher blocks, from 0, ascending. None: the paper's relative depths.",
    )
    include_last_layer: bool = setting(True, Flag(), "Adds the teacher's last block.")
    rank: int = setting(64, COUNT, "Rank of the refiner.")
    outlier_quantile: float = setting(
        0.97,
        BETWEEN,
        "Quantile of an image's patch norms above which patches count as outliers, in a layer "
        "without artifacts.",
    )
    images: int = setting(
        64,
        COUNT,
        "Number of training images to measure the outliers on. `calibrated` needs at least 2, and "
        "more for a larger `rank`.",
    )
    details: bool = setting(
        False, Flag(), "Prints also the table of singular values by layer, source and threshold."
    )
    weight_matrices: tuple[str, ...] = setting(
        spaces.SOURCES,
        Each(OneOf(spaces.SOURCES), least=1),
        "Linear maps to decompose, or `calibrated`, which uses every second image.",
    )
    ridge: float = setting(
        1.0, POSITIVE, "Ridge of `calibrated`, as `method.nullspace.ridge` of a distillation."
    )
    thresholds: tuple[str, ...] = setting(
        ("absolute=0.05", "quantile=0.25", "quantile=0.5", "relative=0.1"),
        Each(_THRESHOLD, least=1),
        "Thresholds below which a singular value counts as null; for `energy` the length of an "
        "outlier that is left, in median patch norms.",
    )
    data: SizedDataSettings = section(SizedDataSettings())
    mesh: parallel.MeshSettings = section(parallel.MeshSettings())


def nullspace(settings: NullspaceSettings, workdir: epath.Path) -> None:
    """Prints patch norms and a verdict; writes nullspace.json, nullspace.png and norms.png.

    Args:
      settings: settings of the job.
      workdir: folder for the files.

    Raises:
      InputError: no teacher or no images are given, or a layer, rank or threshold is out of range.
    """
    thresholds = [_parse(text) for text in settings.thresholds]
    data = settings.data
    spec, weights = resolve_model("teacher", settings.teacher, data.image_size, data.normalisation)
    if not weights:
        raise InputError("teacher.weights: empty; give a Hub repository, file or work directory")
    layers = teacher_layers(settings.layers, settings.include_last_layer, DEPTHS, spec.arch)
    if settings.rank > spec.arch.embed_dim:
        raise InputError(f"rank: {settings.rank}, but the teacher's width is {spec.arch.embed_dim}")
    for rule, threshold in thresholds:
        spaces.check_threshold(rule, threshold, spec.arch.embed_dim)
    quantised = settings.teacher.precision
    if quantised:
        check_installed(quantised)
    images = open_source(data, TRAIN)
    few = readable(evenly(images, settings.images))
    if "calibrated" in settings.weight_matrices and len(few) < 2:
        raise InputError("images: 1, but calibrated needs 2; give more or change weight_matrices")
    make_workdir(workdir)

    mesh = parallel.make_mesh(settings.mesh.data, settings.mesh.fsdp)
    dtype = PRECISIONS[settings.precision]
    graph, params = load_model(
        spec,
        weights,
        ComputePolicy(dtype, dtype, quantised=quantised, backend=parallel.platform(mesh)),
        lambda abstract: parallel.tree_shardings(mesh, abstract),
    )
    network = Network(spec, graph)
    workers = min(worker_count(data.workers), 2)
    patches, norms = collect_patches(network, params, mesh, few, layers, workers)
    summaries = norm_summary.summarise(norms)

    measured = MeasuredSpaces(settings.weight_matrices, thresholds, settings.ridge, settings.rank)
    rows: list[dict[str, Any]] = []
    curves: dict[int, dict[str, Any]] = {}
    for layer in layers:
        outliers = norm_summary.artifacts(norms[layer])
        seen = outliers[::2].any() and outliers[1::2].any()  # both halves have outliers
        if not (summaries[layer].has_artifacts and seen):
            outliers = np.asarray(is_outlier(jnp.asarray(norms[layer]), settings.outlier_quantile))
        seen_patches = LayerPatches(layer, patches[layer], outliers)
        found, curves[layer] = describe_layer(network, params, mesh, seen_patches, measured)
        rows += found
    if jax.process_index() > 0:
        return
    answer = f"{_verdict(summaries, layers, rows)}; measured on {len(few):,} images"
    print(f"{norm_summary.table(summaries)}\nverdict: {answer}")
    if settings.details:
        print(_table(rows))
    spectra = {
        layer: {source: values.tolist() for source, values in of_layer.items()}
        for layer, of_layer in curves.items()
    }
    content = {
        "images": len(few),
        "verdict": answer,
        "norms": [dataclasses.asdict(one) for one in summaries],
        "rows": rows,
        "singular_values": spectra,
    }
    with holding(workdir):  # no other job can replace some of the files
        write_text(workdir / "nullspace.json", json.dumps(content, indent=1) + "\n")
        save_spectra(workdir / "nullspace.png", spec.name, curves, rows)
        _save_maps(workdir / "norms.png", few, network, {layer: norms[layer] for layer in layers})


def _verdict(
    summaries: list[norm_summary.NormSummary], layers: Sequence[int], rows: list[dict[str, Any]]
) -> str:
    """Returns the verdict for the first source, preferably at `distill`'s default threshold."""
    source = rows[0]["source"]
    thresholds = [row["threshold"] for row in rows if row["source"] == source]
    usual = "quantile=0.5"
    threshold = usual if usual in thresholds else thresholds[0]
    held = [
        norm_summary.Removal(row["share_project"], row["left_medians"], row["outlier_medians"])
        for row in rows
        if (row["source"], row["threshold"]) == (source, threshold)
        and summaries[row["layer"]].has_artifacts
    ]
    return norm_summary.verdict(summaries, layers, held, f"{source}, {threshold}")


def _save_maps(
    path: epath.Path, images: Source, network: Network, norms: Mapping[int, np.ndarray]
) -> None:
    """Draws the norms of a few images in each distilled layer."""
    few = evenly(images, _PICTURED)
    transform = EvalTransform(network.image_size)
    shown = [transform(open_image(few[n].image, few.exif)) for n in range(len(few))]
    maps = {
        f"layer {layer}": norm_summary.over_median(of_layer)[few.chosen].reshape(
            -1, *network.spec.arch.grid
        )
        for layer, of_layer in norms.items()
    }
    largest = max(float(ratios.max()) for ratios in maps.values())
    save_norm_maps(path, np.stack(shown), maps, largest)


def _parse(text: str) -> tuple[str, float]:
    rule, _, number = text.partition("=")
    return rule, float(number)


def _table(rows: list[dict[str, Any]]) -> str:
    lines = [
        f"{'layer':>5}  {'source':11}{'threshold':15}{'tau':>9}{'null dim':>12}"
        f"{'smallest':>10}{'median':>10}{'largest':>10}{'project':>9}{'left':>7}{'soft':>7}"
        f"{'angle':>7}"
    ]
    for row in rows:
        lines.append(
            f"{row['layer']:>5}  {row['source']:11}{row['threshold']:15}{row['tau']:>9.3g}"
            f"{row['null_dim']:>7}/{row['dim']:<4}{row['smallest']:>10.3g}{row['median']:>10.3g}"
            f"{row['largest']:>10.3g}{row['share_project']:>9.2f}{row['left_medians']:>7.2f}"
            f"{row['share_soft']:>7.2f}{row['defect_angle']:>7.1f}"
        )
    lines.append(
        "project, soft: share of the outlier tokens' energy that the refinement could remove "
        "(calibrated: measured on held-out images)\n"
        "left: length of an outlier outside the subspace of project, in median patch norms\n"
        "angle: degrees between outlier tokens and the singular defect of the preceding blocks"
    )
    return "\n".join(lines)
