"""Measures of the outlier energy that the null spaces of a teacher's layers hold."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from singer_jax.data.images import EvalTransform
from singer_jax.data.loader import eval_batches
from singer_jax.data.sources import Source
from singer_jax.evaluation.singular_defects import median_angle, singular_defect
from singer_jax.methods import calibration, nullspace, removal
from singer_jax.methods.norms import image_medians, token_norms
from singer_jax.models.network import Network
from singer_jax.models.params import Params
from singer_jax.models.vit import VisionTransformer
from singer_jax.platform import parallel


def collect_patches(
    network: Network,
    params: Params,
    mesh: Mesh,
    images: Source,
    layers: Sequence[int],
    workers: int = 0,
) -> tuple[dict[int, np.ndarray], np.ndarray]:
    """Returns patch tokens after some blocks, and patch norms after each, in every process.

    Args:
      network: the model.
      params: its parameters on `mesh`.
      mesh: devices to run on.
      images: images to run the model on; all are readable (`checking.readable`), because the
        replacement of an unreadable one would count twice.
      layers: indices of blocks.
      workers: number of the loader's processes.

    Returns:
      the tokens [images, patches, dim] in float32 by block, and norms [blocks, images, patches].
    """
    prefix = network.spec.arch.num_prefix_tokens

    @functools.partial(jax.jit, out_shardings=parallel.replicated(mesh))
    def patches_of(params: Params, images: jax.Array) -> tuple[dict[int, jax.Array], jax.Array]:
        found = network.merge(params).features(network.spec.prepare(images))
        found = [tokens[:, prefix:].astype(jnp.float32) for tokens in found]
        norms = jnp.stack([token_norms(tokens) for tokens in found])
        return {layer: found[layer] for layer in layers}, norms

    norms: list[np.ndarray] = []
    patches: dict[int, list[np.ndarray]] = {layer: [] for layer in layers}
    sharding, batch_size = parallel.batch_sharding(mesh), 8 * mesh.size
    batches = eval_batches(
        images,
        EvalTransform(network.image_size),
        batch_size=batch_size,
        workers=workers,
        rows=parallel.local_rows(sharding, batch_size),
    )
    with contextlib.closing(batches):
        for batch in batches:
            put = parallel.put_rows(batch["image"], sharding, batch_size)
            tokens, of_blocks = patches_of(params, put)
            norms.append(np.asarray(of_blocks))
            for layer, value in tokens.items():
                patches[layer].append(np.asarray(value))
    # The remaining rows are the padding of the last batch.
    count = len(images)
    by_layer = {layer: np.concatenate(found)[:count] for layer, found in patches.items()}
    return by_layer, np.concatenate(norms, axis=1)[:, :count]


@dataclasses.dataclass(frozen=True)
class MeasuredSpaces:
    """The null spaces that are measured in each layer.

    Attributes:
      sources: Linear maps (`nullspace.linear_map`), or `calibrated`, which finds its directions in
        every second image and is measured on the others.
      thresholds: Threshold types and thresholds (`nullspace.threshold_value`).
      ridge: Ridge of `calibrated` (`calibration.calibrated`).
      rank: Smallest number of directions of a projector, and number of calibrated directions.
    """

    sources: Sequence[str]
    thresholds: Sequence[tuple[str, float]]
    ridge: float
    rank: int


@dataclasses.dataclass(frozen=True)
class LayerPatches:
    """Patch tokens after a block, from `collect_patches`.

    Attributes:
      layer: Index of the block.
      tokens: Tokens [images, patches, dim].
      outliers: Mask of the outlier patches, bool [images, patches].
    """

    layer: int
    tokens: np.ndarray
    outliers: np.ndarray


def describe_layer(
    network: Network, params: Params, mesh: Mesh, seen: LayerPatches, spaces: MeasuredSpaces
) -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]:
    """Measures a layer's null spaces: their size and their share of the outlier energy.

    Args:
      network: The teacher.
      params: Its parameters on `mesh`.
      mesh: Devices to run on.
      seen: The layer's patches.
      spaces: The null spaces to measure.

    Returns:
      A row for each source and threshold, and the singular values of each source. A row holds the
      lengths `outlier_medians` and `left_medians` (`methods.removal`) of an outlier beside its
      image's mean patch: whole, and outside the subspace of mode `project`; and the layer's
      `defect_angle` in degrees (`singular_defects.median_angle`).
    """
    tokens, outliers, layer = jnp.asarray(seen.tokens), jnp.asarray(seen.outliers), seen.layer

    def statistics(which: slice) -> calibration.OutlierStatistics:
        found = calibration.outlier_statistics(tokens[which], outliers[which])
        return jax.tree.map(np.asarray, found)

    def on_every_device(compute: Callable[[VisionTransformer], Any]) -> Any:
        found = jax.jit(
            lambda params: compute(network.merge(params)), out_shardings=parallel.replicated(mesh)
        )(params)
        # The rest needs no communication between processes.
        return jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), found)

    def space_of(chosen_on: calibration.OutlierStatistics, **keys: Any) -> nullspace.NullSpace:
        own = nullspace.NullSpaceSettings(ridge=spaces.ridge, **keys)
        return on_every_device(
            lambda model: calibration.of_layer(model, layer, own, spaces.rank, chosen_on)
        )

    defect = on_every_device(lambda model: singular_defect(model, layer))
    angle = median_angle(tokens, outliers, defect)
    rows, spectra = [], {}
    for source in spaces.sources:
        halves = source == "calibrated"
        chosen_on = statistics(slice(None, None, 2) if halves else slice(None))
        measured_on = [x[1::2] if halves else x for x in (tokens, outliers)]
        whole = removal.length(
            nullspace.deviations(*measured_on), measured_on[1], image_medians(measured_on[0])
        )

        plain = space_of(chosen_on, weight_matrix=source)
        spectra[source] = np.asarray(plain.values)
        for rule, threshold in spaces.thresholds:
            space = plain
            if rule == "energy":
                chosen = {"threshold_type": rule, "threshold": threshold}
                space = space_of(chosen_on, weight_matrix=source, **chosen)
            tau = nullspace.threshold_value(space, rule, threshold)
            projection = nullspace.projector(space, tau, spaces.rank)
            share = float(nullspace.energy_share(projection, *measured_on))
            soft = nullspace.soft_filter(space, tau)
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
                    "dim": len(space.values),
                    "defect_angle": angle,
                    "share_project": share,
                    "share_soft": float(nullspace.energy_share(soft, *measured_on)),
                    "outlier_medians": float(whole),
                    "left_medians": float(whole) * max(1 - share, 0) ** 0.5,
                }
            )
    return rows, spectra
