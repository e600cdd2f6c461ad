"""Measures of the outlier energy that the null spaces of a teacher's layers hold."""

from __future__ import annotations

import contextlib
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
from singer_jax.methods import calibration, nullspace
from singer_jax.methods.norms import token_norms
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


def describe_layer(
    network: Network,
    params: Params,
    mesh: Mesh,
    layer: int,
    patches: np.ndarray,
    *,
    sources: Sequence[str],
    epsilon: float,
    thresholds: Sequence[tuple[str, float]],
    rank: int,
    outliers: np.ndarray,
) -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]:
    """Measures a layer's null spaces: their size and their share of the outlier energy.

    Args:
      network: the teacher.
      params: its parameters on `mesh`.
      mesh: devices to run on.
      layer: index of a block.
      patches: patch tokens after the block, from `collect_patches`.
      sources: linear maps (`nullspace.linear_map`), or `calibrated`, which finds its directions in
        every second image and is measured on the others.
      epsilon: ridge of `calibrated` (`calibration.calibrated`).
      thresholds: rules and numbers (`nullspace.threshold_value`).
      rank: smallest number of directions of a projector, and number of calibrated directions.
      outliers: mask of the outlier patches, bool [images, patches].

    Returns:
      a row for each source and threshold, with the layer's `defect_angle` in degrees
      (`singular_defects.median_angle`), and the singular values of each source.
    """
    tokens = jnp.asarray(patches)
    half = calibration.outlier_statistics(tokens[::2], outliers[::2])
    half = jax.tree.map(np.asarray, half)

    def on_every_device(compute: Callable[[VisionTransformer], Any]) -> Any:
        found = jax.jit(
            lambda params: compute(network.merge(params)), out_shardings=parallel.replicated(mesh)
        )(params)
        # The rest needs no communication between processes.
        return jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), found)

    defect = on_every_device(lambda model: singular_defect(model, layer))
    angle = median_angle(tokens, outliers, defect)
    rows, spectra = [], {}
    for source in sources:
        own = nullspace.NullSpaceSettings(weight_matrix=source, ridge=epsilon)
        space = on_every_device(
            lambda model, own=own: calibration.of_layer(model, layer, own, rank, half)
        )
        seen = [x[1::2] if source == "calibrated" else x for x in (tokens, outliers)]
        spectra[source] = np.asarray(space.values)
        for rule, threshold in thresholds:
            tau = nullspace.threshold_value(space, rule, threshold)
            filters = {
                "project": nullspace.projector(space, tau, rank),
                "soft": nullspace.soft_filter(space, tau),
            }
            shares = {
                f"share_{use}": float(nullspace.energy_share(q, *seen))
                for use, q in filters.items()
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
                    "dim": len(space.values),
                    "defect_angle": angle,
                }
                | shares
            )
    return rows, spectra
