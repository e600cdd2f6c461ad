"""Every program of the evaluation compiles for a TPU, in bounded time, without one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from benchmarks.topology import tpu_mesh
from singer_jax.evaluation import backbone, knn, scoring, trainers
from singer_jax.evaluation.backbone import Backbone, Examples
from singer_jax.evaluation.classification import Classification
from singer_jax.evaluation.depth import Depth
from singer_jax.evaluation.heads import Task
from singer_jax.evaluation.probe import ProbeSettings
from singer_jax.evaluation.segmentation import Segmentation
from singer_jax.models import program
from singer_jax.models.architecture import ComputePolicy
from singer_jax.models.network import Network
from singer_jax.models.weights import abstract_model
from singer_jax.models.zoo import lookup
from singer_jax.platform import parallel
from tests.compiled.compiling import Compile, abstract

pytestmark = [pytest.mark.optimized, pytest.mark.slow]

TASKS = {
    "classification": Classification(1000),
    "segmentation": Segmentation(150),
    "depth": Depth(),
}
IMAGES = 16  # on four chips


@pytest.fixture(scope="module")
def chips() -> Mesh:
    return tpu_mesh()


@pytest.fixture(scope="module")
def model(chips) -> Backbone:
    """ViT-L, two blocks deep."""
    spec = lookup("vit_large_patch16_224", {"depth": 2, "num_classes": 0})
    graph, params = abstract_model(spec.arch, ComputePolicy(jnp.bfloat16, backend="tpu"))
    return Backbone(Network(spec, graph), parallel.with_shardings(chips, params), chips)


def labels_of(kind: str) -> jax.ShapeDtypeStruct:
    shape = () if kind == "classification" else (224, 224)
    return jax.ShapeDtypeStruct((IMAGES, *shape), jnp.float32 if kind == "depth" else jnp.int32)


def batch_of(chips: Mesh, kind: str) -> dict[str, jax.ShapeDtypeStruct]:
    batch = {
        "image": jax.ShapeDtypeStruct((IMAGES, 224, 224, 3), jnp.uint8),
        "label": labels_of(kind),
        "valid": jax.ShapeDtypeStruct((IMAGES,), jnp.bool_),
    }
    return abstract(batch, parallel.batch_sharding(chips))


def heads_of(chips: Mesh, task: Task, arch: object, rates: int) -> dict[str, jax.ShapeDtypeStruct]:
    inputs, outputs = task.head_shape(arch)
    heads = {
        "kernel": jax.ShapeDtypeStruct((rates, inputs, outputs), jnp.float32),
        "bias": jax.ShapeDtypeStruct((rates, outputs), jnp.float32),
    }
    return abstract(heads, parallel.replicated(chips))


@pytest.mark.parametrize("kind", TASKS)
def test_feature_extraction_and_scores(chips, model, compiles: Compile, kind):
    task = TASKS[kind]
    images = batch_of(chips, kind)["image"]
    compiles(120, backbone._features, model.network, task, chips, model.params, images)
    features = jax.eval_shape(lambda p, i: model.features(p, i, task), model.params, images)
    batch = batch_of(chips, kind)
    features = abstract(features, parallel.batch_sharding(chips))
    heads = heads_of(chips, task, model.arch, 3)
    compiles(120, scoring.count, task, chips, heads, features, batch["label"], batch["valid"])


@pytest.mark.parametrize("kind", TASKS)
def test_the_published_probe_s_step(chips, model, compiles: Compile, kind):
    settings = ProbeSettings(epochs=2, batch_size=IMAGES)
    crops = trainers.CropBatches(np.zeros(64), None, settings, chips)
    trainer = trainers.CropTrainer(TASKS[kind], model, crops, None, settings)
    step = trainer.crop_step(64, (0.1, 0.5))
    number = jax.ShapeDtypeStruct((), jnp.int32, sharding=parallel.replicated(chips))
    heads = heads_of(chips, TASKS[kind], model.arch, 2)
    compiles(180, step, model.params, heads, batch_of(chips, kind), number)


def test_an_epoch_of_the_fast_probe(chips, model, compiles: Compile):
    settings = ProbeSettings(epochs=2, batch_size=IMAGES)
    train = Examples(np.zeros((64, 1024), np.float32), np.zeros(64, np.int32))
    task = TASKS["classification"]
    trainer = trainers.FeatureTrainer(
        task, train, task.head_shape(model.arch), settings, mesh=chips
    )
    split, whole = parallel.batch_sharding(chips), parallel.replicated(chips)
    compiles(
        120,
        trainer.epoch(64, (0.1, 0.5)),
        heads_of(chips, task, model.arch, 2),
        jax.ShapeDtypeStruct((64, 1024), jnp.float32, sharding=split),
        jax.ShapeDtypeStruct((64,), jnp.int32, sharding=split),
        jax.ShapeDtypeStruct((), jnp.int32, sharding=whole),
        jax.ShapeDtypeStruct((4, IMAGES), jnp.int32, sharding=whole),
    )


def test_nearest_neighbours(chips, compiles: Compile):
    split, whole = parallel.batch_sharding(chips), parallel.replicated(chips)
    bank = jax.ShapeDtypeStruct((4096, 1024), jnp.float32, sharding=split)
    labels = jax.ShapeDtypeStruct((4096,), jnp.int32, sharding=split)
    queries = jax.ShapeDtypeStruct((256, 1024), jnp.float32, sharding=whole)
    vote = knn._Vote(images=4000, classes=1000, k=20, temperature=0.07)
    compiles(120, knn._unit, bank)
    compiles(120, knn._predict, chips, vote, bank, labels, queries)


def test_the_exported_program(chips, model, compiles: Compile):
    """What `features.stablehlo` holds, lowered for all platforms, compiled for one."""
    computes = functools.partial(program.tokens_and_pooled, model.network)
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), model.params)
    called = jax.jit(program.exported(model.network, computes, params).call)
    images = jax.ShapeDtypeStruct((IMAGES, 224, 224, 3), jnp.uint8)
    compiles(120, called, model.params, abstract(images, parallel.batch_sharding(chips)))
