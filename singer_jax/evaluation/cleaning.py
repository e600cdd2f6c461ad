"""Which neurons make a teacher's outliers, and what cleaning its features changes.

The neurons are found as in "Vision Transformers Don't Need Trained Registers" (arXiv 2506.08010),
algorithm 1, but for two numbers that the authors set for each model: what norm makes an outlier is
a multiple of the image's median, and the last block that is searched follows from the outliers.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float

from singer_jax.data.images import EvalTransform
from singer_jax.data.loader import eval_batches
from singer_jax.data.sources import Source
from singer_jax.errors import InputError
from singer_jax.methods.norms import outlier_threshold, token_norms
from singer_jax.models.network import Network
from singer_jax.models.params import Params
from singer_jax.models.registers import Neurons, RegisterSettings
from singer_jax.models.vit import VisionTransformer
from singer_jax.platform import parallel


def find_register_neurons(
    network: Network,
    params: Params,
    mesh: Mesh,
    images: Source,
    settings: RegisterSettings,
    workers: int = 0,
) -> Neurons:
    """The neurons with the largest mean activation at outlier patches, best first.

    Outliers are those after the last block but one. Searched are the MLPs up to the first block
    after which half of them are outliers already. The absolute activation is averaged over an
    image's outliers, then over the images that have some.

    Args:
      network, params: the teacher as it is, its parameters on `mesh`.
      mesh: of the devices.
      images: what it looks at; those that cannot be read are left out.
      settings: what an outlier is, and how many neurons.
      workers: of the loader.

    Returns:
      the same in every process.

    Raises:
      InputError: no outliers, or fewer neurons than wanted.
    """
    depth = network.spec.arch.depth
    watched = max(depth - 2, 0)

    @functools.partial(jax.jit, out_shardings=parallel.replicated(mesh))
    def of_batch(params: Params, pixels: Array, valid: Bool[Array, " batch"]) -> Any:
        model, seen = network.merge(params), network.spec.prepare(pixels)
        found = model.features_at(seen, range(depth))
        outputs = [found[layer] for layer in range(depth)]
        high = jnp.stack([_above_median(model, x, settings.outlier) for x in outputs])
        outliers = high[watched] & valid[:, None]
        shares = outliers / jnp.maximum(outliers.sum(axis=1, keepdims=True), 1)

        def score(index: Any, x: Float[Array, "batch tokens dim"]) -> Float[Array, " hidden"]:
            hidden = _patches(model, model.hidden(index, x, seen)).astype(jnp.float32)
            return jnp.sum(shares[..., None] * jnp.abs(hidden), axis=(0, 1))

        inputs = [model.embed(seen), *outputs[:-1]]
        if model.policy.stacked:
            each = jnp.arange(depth), jnp.stack(inputs)
            scores = jax.lax.map(lambda index_and_x: score(*index_and_x), each)
        else:
            scores = jnp.stack([score(index, x) for index, x in enumerate(inputs)])
        return scores, jnp.sum(outliers.any(axis=1)), jnp.sum(high & outliers, axis=(1, 2))

    batches = _batches(network, mesh, images, workers)
    parts = [jax.device_get(of_batch(params, *batch)) for batch in batches]
    scores, with_outliers, already = (np.sum(part, axis=0) for part in zip(*parts, strict=True))
    if not with_outliers:
        raise InputError(
            f"teacher.artifact_removal: registers, but no patch of {len(images)} images has more "
            f"than {settings.outlier:g} times the median norm after block {watched} of "
            f"{network.spec.name}: there is nothing to move; leave it None or lower "
            "teacher.registers.outlier"
        )
    searched = scores[: np.argmax(2 * already >= already[watched]) + 1]
    if settings.neurons > searched.size:
        raise InputError(
            f"teacher.registers.neurons: {settings.neurons}, but the blocks that make the outliers "
            f"have {searched.size}"
        )
    best = np.argsort(-searched, axis=None, kind="stable")[: settings.neurons]
    return [tuple(divmod(int(index), searched.shape[1])) for index in best]


def describe_cleaning(
    before: tuple[Network, Params],
    after: tuple[Network, Params],
    mesh: Mesh,
    images: Source,
    layers: Sequence[int],
    workers: int = 0,
) -> dict[str, Any]:
    """What cleaning changes in the features after some blocks.

    Args:
      before, after: the teacher as it is and cleaned, each with its parameters on `mesh`.
      mesh: of the devices.
      images: what they look at; those that cannot be read are left out.
      layers: indices of blocks.
      workers: of the loader.

    Returns:
      by layer (as JSON has it) the patch norms `before` and `after`, each with `median`, `p99` and
      `max`, and of a class token, averaged over the images, `cosine` between the two and how far
      it `moved`, over its norm.
    """
    networks, params = zip(before, after, strict=True)

    @functools.partial(jax.jit, out_shardings=parallel.replicated(mesh))
    def of_batch(
        params: Sequence[Params], pixels: Array, valid: Bool[Array, " batch"]
    ) -> tuple[dict[int, dict[str, Array]], Array]:
        models = [network.merge(own) for network, own in zip(networks, params, strict=True)]
        seen = [model.features_at(networks[0].spec.prepare(pixels), layers) for model in models]
        return {
            layer: _changes(models[0], *(features[layer].astype(jnp.float32) for features in seen))
            for layer in layers
        }, valid

    parts = []
    for batch in _batches(networks[0], mesh, images, workers):
        found, valid = jax.device_get(of_batch(params, *batch))
        parts.append(jax.tree.map(lambda x, valid=valid: x[valid], found))
    whole = jax.tree.map(lambda *xs: np.concatenate(xs), *parts)
    return {str(layer): _summary(whole[layer]) for layer in layers}


def told(found: Mapping[str, Any]) -> list[str]:
    """What cleans a teacher and what it changes, in lines.

    Args:
      found: `by` (the cleaner), `neurons` and, as `describe_cleaning` gives them, `layers`.
    """
    line = f"teacher cleaned by {found['by']}"
    if found["neurons"]:
        line += ": block/neuron " + " ".join(f"{block}/{n}" for block, n in found["neurons"])
    lines = [line]
    for layer, changed in found["layers"].items():
        before, after = changed["before"], changed["after"]
        line = f"teacher layer {layer}, cleaned: patch norms " + ", ".join(
            f"{name} {before[key]:.4g} -> {after[key]:.4g}"
            for key, name in (("median", "median"), ("p99", "99th percentile"), ("max", "maximum"))
        )
        if "class_token" in changed:
            token = changed["class_token"]
            line += f"; class token cosine {token['cosine']:.4f}, moved {token['moved']:.1%}"
        lines.append(line)
    return lines


def _changes(
    model: VisionTransformer,
    before: Float[Array, "batch tokens dim"],
    after: Float[Array, "batch tokens dim"],
) -> dict[str, Array]:
    """Of each image, for `_summary`."""
    found = {
        "before": token_norms(_patches(model, before)),
        "after": token_norms(_patches(model, after)),
    }
    if model.arch.class_token:
        was, now = before[:, 0], after[:, 0]
        length = jnp.linalg.norm(was, axis=-1)
        product = jnp.sum(was * now, axis=-1)
        found["cosine"] = product / (length * jnp.linalg.norm(now, axis=-1))
        found["moved"] = jnp.linalg.norm(now - was, axis=-1) / length
    return found


def _summary(found: Mapping[str, np.ndarray]) -> dict[str, dict[str, float]]:
    summary = {
        when: {
            "median": float(np.median(found[when])),
            "p99": float(np.quantile(found[when], 0.99)),
            "max": float(found[when].max()),
        }
        for when in ("before", "after")
    }
    if "cosine" in found:
        summary["class_token"] = {key: float(found[key].mean()) for key in ("cosine", "moved")}
    return summary


def _patches(model: VisionTransformer, x: Float[Array, "batch tokens width"]) -> Array:
    return x[:, model.arch.num_prefix_tokens :]


def _above_median(
    model: VisionTransformer, x: Float[Array, "batch tokens dim"], multiple: float
) -> Bool[Array, "batch patches"]:
    """Which patches have more than a multiple of their image's median norm."""
    norms = token_norms(_patches(model, x))
    return norms > multiple * outlier_threshold(norms, 0.5)


def _batches(
    network: Network, mesh: Mesh, images: Source, workers: int
) -> Iterator[tuple[Array, Bool[Array, " batch"]]]:
    """The images on the devices, and which of a batch count."""
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
            given = batch["image"], batch["valid"] & (batch["unreadable"] < 0)
            yield parallel.put_rows(given, sharding, batch_size)
