"""Metrics of heads on a split, computed batch by batch on the devices."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool

from singer_jax.evaluation.backbone import Examples
from singer_jax.evaluation.heads import Head, Task, over_devices
from singer_jax.platform import parallel
from singer_jax.platform.memory import fitting

_MOST_SCORED = 256  # largest number of images per batch


@functools.partial(jax.jit, static_argnums=(0, 1))
def count(task: Task, mesh: Mesh, heads: Head, features: Array, labels: Array, valid: Array) -> Any:
    """Applies `Task.count` to stacked heads and a batch that is split over the devices."""
    counted = over_devices(mesh, task.count)
    return jax.vmap(counted, in_axes=(0, None, None, None))(heads, features, labels, valid)


def score(
    task: Task,
    heads: Head,
    examples: Examples,
    mesh: Mesh | None = None,
) -> list[dict[str, float]]:
    """Returns the metrics of each of several stacked heads; every image counts once.

    Args:
      task: task of the heads.
      heads: heads with a leading axis.
      examples: features and labels of the split.
      mesh: devices over which the images are split; default: one device.
    """
    mesh = mesh or parallel.make_mesh(1)
    features = examples.features.shape[1:]
    of_image = math.prod(features) + math.prod(features[:-1]) * heads["bias"].size
    batch_size = mesh.size * min(
        math.ceil(min(_MOST_SCORED, examples.images) / mesh.size), fitting(mesh, 4 * of_image)
    )
    total: dict[str, np.ndarray] = {}
    for start in range(0, examples.images, batch_size):
        index = np.arange(start, min(start + batch_size, examples.images))
        batch = padded(mesh, examples, index, batch_size)
        counts = jax.device_get(count(task, mesh, heads, *batch))
        for name, value in counts.items():
            wide = np.int64 if np.issubdtype(value.dtype, np.integer) else np.float64
            total[name] = total.get(name, 0) + value.astype(wide)
    heads_trained = len(heads["bias"])
    return [
        task.metrics({name: value[number] for name, value in total.items()})
        for number in range(heads_trained)
    ]


def padded(
    mesh: Mesh, examples: Examples, index: np.ndarray, rows: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns features, labels and `valid` of some images and padding, split over the devices."""
    valid = np.arange(rows) < len(index)
    arrays = (*examples.take(np.resize(index, rows)), valid)
    sharding = parallel.batch_sharding(mesh)
    return tuple(parallel.put(array, sharding) for array in arrays)


def are_finite(heads: Mapping[str, Any]) -> Bool[np.ndarray, " heads"]:
    """Returns a mask of the stacked heads that hold neither NaN nor infinity."""
    finite = [np.isfinite(np.asarray(value)) for value in heads.values()]
    return np.all([each.reshape(len(each), -1).all(axis=1) for each in finite], axis=0)
