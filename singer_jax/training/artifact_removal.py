"""The removal of a teacher's artifacts: the search for register neurons, and its effect.

The search is algorithm 1 of "Vision Transformers Don't Need Trained Registers" (arXiv 2506.08010)
with two differences. The authors set the norm of an outlier and the last searched block for each
model. Here the norm is a multiple of the image's median, and the block follows from the outliers.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float

from singer_jax.data.images import EvalTransform
from singer_jax.data.loader import worker_count
from singer_jax.data.sources import Source, evenly
from singer_jax.errors import InputError
from singer_jax.methods.norms import outlier_threshold, token_norms
from singer_jax.models.inference import ImagePass, leave_out
from singer_jax.models.network import Network
from singer_jax.models.params import Params
from singer_jax.models.provenance import Provenance
from singer_jax.models.registers import Neurons, RegisterSettings
from singer_jax.models.vit import VisionTransformer
from singer_jax.platform import parallel
from singer_jax.runs.metrics import LOG
from singer_jax.training.settings import DistillSettings
from singer_jax.training.teacher import Teacher

# Number of images on which a run describes the effect of the removal of artifacts.
_DESCRIBED = 64


def load_teacher(
    teacher: Teacher | None,
    settings: DistillSettings,
    source: Source,
    layers: Sequence[int],
    weights: dict[str, Provenance],
) -> Params | None:
    """Loads the teacher's parameters and, where its artifacts are removed, prepares the removal.

    The register neurons are searched once: a run that continues takes those in `weights`.

    Args:
      teacher: The teacher; None where no method reads one.
      settings: The settings of the run.
      source: The training images.
      layers: Indices of the blocks whose features the students read.
      weights: The provenance of the run's models; the removal is added to the teacher's.

    Returns:
      The parameters of `Teacher.network` on its devices; None without a teacher.

    Raises:
      InputError: Weights that cannot be read, or no register neurons.
    """
    if teacher is None:
        return None
    params, removal = teacher.load(), settings.teacher.artifact_removal
    if removal is None:
        return params
    of_teacher = weights.get("teacher", {})
    if "clean" in of_teacher:
        return teacher.with_neurons(params, of_teacher["clean"]["neurons"])
    mesh, wanted = teacher.mesh, settings.teacher.registers
    before, neurons = (teacher.unmodified, params), ()
    workers = min(worker_count(settings.data.workers), 2)
    if removal == "registers":
        few = evenly(source, wanted.images)
        neurons = find_register_neurons(*before, mesh, few, wanted, workers)
    complete = teacher.with_neurons(params, neurons)
    after, few = (teacher.network, complete), evenly(source, _DESCRIBED)
    changes = describe_artifact_removal(before, after, mesh, few, layers, workers)
    found = {"by": removal, "neurons": neurons, "layers": changes}
    for line in artifact_removal_lines(found) if jax.process_index() == 0 else ():
        LOG.info(line)
    weights["teacher"] = {**of_teacher, "clean": found}
    return complete


def find_register_neurons(
    network: Network,
    params: Params,
    mesh: Mesh,
    images: Source,
    settings: RegisterSettings,
    workers: int = 0,
) -> Neurons:
    """Finds the neurons with the largest mean activation at outlier patches, largest first.

    The outliers are those after the last block but one. The search covers the MLPs up to the first
    block after which half of these patches are outliers already. The absolute activation is
    averaged over an image's outliers, then over the images with outliers.

    Args:
      network, params: The teacher without removal of artifacts, its parameters on `mesh`.
      mesh: The devices.
      images: The images to search on; unreadable ones are left out.
      settings: The definition of an outlier, and the number of neurons.
      workers: Number of decoding processes of the loader.

    Returns:
      Block and position of each neuron, the same in every process.

    Raises:
      InputError: No outliers, or too few neurons in the searched blocks.
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

    parts = [
        jax.device_get(of_batch(params, batch["image"], batch["valid"]))
        for batch in _image_pass(network, images, workers).batches(mesh)
    ]
    scores, with_outliers, already = (np.sum(part, axis=0) for part in zip(*parts, strict=True))
    if not with_outliers:
        raise InputError(
            f"teacher.artifact_removal: registers, but no patch of {len(images)} images has more "
            f"than {settings.outlier:g} times the median norm after block {watched} of "
            f"{network.spec.name}; set it to None or lower teacher.registers.outlier"
        )
    searched = scores[: np.argmax(2 * already >= already[watched]) + 1]
    if settings.neurons > searched.size:
        raise InputError(
            f"teacher.registers.neurons: {settings.neurons}, but the blocks that make the outliers "
            f"have {searched.size}"
        )
    best = np.argsort(-searched, axis=None, kind="stable")[: settings.neurons]
    return [tuple(divmod(int(index), searched.shape[1])) for index in best]


def describe_artifact_removal(
    before: tuple[Network, Params],
    after: tuple[Network, Params],
    mesh: Mesh,
    images: Source,
    layers: Sequence[int],
    workers: int = 0,
) -> dict[str, Any]:
    """Compares a teacher's features before and after the removal of artifacts.

    Args:
      before, after: The teacher without and with the removal, each with its parameters on `mesh`.
      mesh: The devices.
      images: The images to compare on; unreadable ones are left out.
      layers: Indices of the blocks after which features are compared.
      workers: Number of decoding processes of the loader.

    Returns:
      By layer (a string, as in JSON) the patch norms `before` and `after`, each with `median`,
      `p99` and `max`. With a class token also `class_token`: the mean over the images of the
      `cosine` between its two values, and of `moved`, their distance over the norm before.
    """
    networks, params = zip(before, after, strict=True)

    @functools.partial(jax.jit, out_shardings=parallel.gathered(mesh))
    def changes_of(params: Sequence[Params], pixels: Array) -> dict[int, dict[str, Array]]:
        models = [network.merge(own) for network, own in zip(networks, params, strict=True)]
        seen = [model.features_at(networks[0].spec.prepare(pixels), layers) for model in models]
        return {
            layer: _changes(models[0], *(features[layer].astype(jnp.float32) for features in seen))
            for layer in layers
        }

    whole = _image_pass(networks[0], images, workers).compute(
        lambda batch: changes_of(params, batch["image"]), mesh
    )
    return {str(layer): _summary(whole[layer]) for layer in layers}


def artifact_removal_lines(found: Mapping[str, Any]) -> list[str]:
    """Returns the lines that a log says of a removal and its effect.

    Args:
      found: `by` (the value of `teacher.artifact_removal`), `neurons`, and `layers` as
        `describe_artifact_removal` returns them.
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
    """Returns norms and class-token changes by image, for `_summary`."""
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
    """Returns True for patches whose norm exceeds a multiple of their image's median norm."""
    norms = token_norms(_patches(model, x))
    return norms > multiple * outlier_threshold(norms, 0.5)


def _image_pass(network: Network, images: Source, workers: int) -> ImagePass:
    return ImagePass(images, EvalTransform(network.image_size), workers, unreadable=leave_out)
