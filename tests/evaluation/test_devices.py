"""Tests that probes on eight devices divide the images and give unchanged results."""

import re

import jax
import numpy as np
import pytest

from singer_jax.data.sources import Record
from singer_jax.evaluation.backbone import Backbone, Examples, ModelSelection, load_backbone
from singer_jax.evaluation.depth import Depth
from singer_jax.evaluation.knn import knn_top1
from singer_jax.evaluation.probe import ProbeSettings
from singer_jax.evaluation.progress import Progress
from singer_jax.evaluation.scoring import count, score
from singer_jax.evaluation.segmentation import Segmentation
from singer_jax.evaluation.trainers import CropBatches, CropTrainer, FeatureTrainer
from singer_jax.platform import memory, parallel
from singer_jax.platform.sharded_rows import pick, spread
from tests import tiny

IMAGES, RATES = 40, (0.1, 1.0)
MESHES = [(8, 1), (3, 2)]  # 16 images divide by the first
TASKS = [
    pytest.param(Segmentation(4), id="segmentation"),
    pytest.param(Depth(bins=8), id="depth"),
]
COLLECTIVE = re.compile(
    r"= (.+?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
)


class Pixels:
    """Random images with a label for each pixel, and their transform."""

    num_classes, exif, takes_label = 4, False, True

    def __init__(self, task: object) -> None:
        rng, shape = np.random.default_rng(0), (IMAGES, 16, 16)
        self.images = rng.integers(0, 256, (*shape, 3), dtype=np.uint8)
        depth = isinstance(task, Depth)
        labels = rng.uniform(0, 9, shape) if depth else rng.integers(-1, 4, shape)
        self.labels = labels.astype(np.float32 if depth else np.int32)

    def __len__(self) -> int:
        return IMAGES

    def __getitem__(self, index: int) -> Record:
        return Record(self.images[index], self.labels[index])

    def __call__(self, image: object, label: np.ndarray, rng: object) -> tuple:
        return np.asarray(image), label


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> str:
    return str(tiny.write_described(tmp_path_factory.mktemp("weights")))


@pytest.fixture(scope="module")
def backbone_on(weights):
    return lambda data, fsdp: load_backbone(
        parallel.make_mesh(data, fsdp), ModelSelection(weights=weights)
    )


def crop_trainer(backbone: Backbone, task: object) -> CropTrainer:
    source, settings = Pixels(task), ProbeSettings(epochs=1, batch_size=16)

    def centre_of(split: object) -> Examples:
        return backbone.extract(split, task, source)

    crops = CropBatches(source, source, settings, backbone.mesh)
    return CropTrainer(task, backbone, crops, centre_of, settings)


def collectives(program: str) -> dict[str, int]:
    """Returns the bytes of the results of each kind of collective in a compiled program."""
    found: dict[str, int] = {}
    for shapes, kind in COLLECTIVE.findall(program):
        for dtype, dims in re.findall(r"([a-z]+\d+)\[([\d,]*)\]", shapes):
            size = np.prod([int(n) for n in dims.split(",") if n], initial=1)
            found[kind] = found.get(kind, 0) + int(size) * int(re.sub(r"\D", "", dtype)) // 8
    return found


def iterations(program: str) -> set[int]:
    """Returns the number of iterations of a compiled program's loops."""
    return {int(n) for n in re.findall(r'"known_trip_count":\{"n":"(\d+)"', program)}


@pytest.mark.parametrize("task", TASKS)
def test_a_device_computes_its_own_images_and_exchanges_only_heads(backbone_on, task):
    """No image, feature or full-size logit leaves its device, so that a probe's work is divided."""
    programs = {}
    for devices in (1, 8):
        backbone = backbone_on(devices, 1)
        trainer = crop_trainer(backbone, task)
        heads = trainer.start(RATES, Progress())
        step = trainer.crop_step(IMAGES, RATES)
        batch = {
            "image": np.zeros((16, 16, 16, 3), np.uint8),
            "label": Pixels(task).labels[:16],
            "valid": np.ones(16, bool),
        }
        batch = parallel.put_rows(batch, parallel.batch_sharding(backbone.mesh), 16)
        lowered = step.lower(backbone.params, heads, batch, np.int32(0))
        features = jax.eval_shape(
            lambda p, x, b=backbone: b.features(p, x, task), backbone.params, batch["image"]
        )
        counted = count.lower(task, backbone.mesh, heads, features, batch["label"], batch["valid"])
        programs[devices] = [lowered.compile(), counted.compile()]
    size = sum(value.nbytes for value in heads.values())
    for one, eight in zip(programs[1], programs[8], strict=True):
        assert iterations(one.as_text()) == {16} and iterations(eight.as_text()) == {2}
        found = collectives(eight.as_text())
        assert set(found) == {"all-reduce"}
        summed = max(2 * size, 3 * 4 * 2 * 16)  # gradients and loss; or the counts of the metrics
        assert found["all-reduce"] <= summed
        assert eight.cost_analysis()["flops"] < 1.2 * one.cost_analysis()["flops"]
    step = programs[8][0].cost_analysis()["flops"] / programs[1][0].cost_analysis()["flops"]
    assert step < 0.2  # the loops' bodies count once; the backbone's part is divided by eight


@pytest.mark.parametrize(
    ("task", "mesh"), [(Segmentation(4), (8, 1)), (Depth(bins=8), (3, 2))], ids=["masks", "depth"]
)
def test_crops_train_the_heads_of_one_device(backbone_on, task, mesh):
    """The batch may be no multiple of the number of devices."""
    chosen, found = np.arange(IMAGES), {}
    for shape in ((1, 1), mesh):
        trainer = crop_trainer(backbone_on(*shape), task)
        *_, (_, heads) = trainer.train(chosen, RATES)
        found[shape] = heads, score(task, heads, trainer.centre(chosen), trainer.mesh)
    (one, metrics), (many, same) = found.values()
    for name, value in one.items():
        np.testing.assert_allclose(many[name], value, rtol=1e-4, atol=1e-5, err_msg=name)
    for of_one, of_many in zip(metrics, same, strict=True):
        assert of_many == pytest.approx(of_one, rel=2e-2)  # an argmax may turn by rounding


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("bytes_", [1, 2**30], ids=["streamed", "on the devices"])
def test_stored_features_train_the_heads_of_one_device(mesh, bytes_, monkeypatch):
    monkeypatch.setattr(memory, "device_memory", lambda mesh: bytes_)
    task, rng = Segmentation(3), np.random.default_rng(0)
    features = rng.standard_normal((21, 2, 2, 5)).astype(np.float16)
    train = Examples(features, rng.integers(-1, 3, (21, 4, 4)).astype(np.int32))
    settings = ProbeSettings(epochs=3, batch_size=10)
    one, many = (
        FeatureTrainer(task, train, (5, 3), settings, mesh=parallel.make_mesh(*shape))
        for shape in ((1, 1), mesh)
    )
    epochs = (trainer.train(np.arange(21), RATES) for trainer in (one, many))
    for (step, a), (same, b) in zip(*epochs, strict=True):
        assert step == same
        for name, value in a.items():
            np.testing.assert_allclose(b[name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mesh", MESHES)
def test_spread_rows_are_picked_as_from_one_array(mesh):
    devices = parallel.make_mesh(*mesh)
    rows = np.random.default_rng(0).standard_normal((21, 3)).astype(np.float16)
    spreaded = spread(devices, rows, 19)
    assert {len(shard.data) for shard in spreaded.addressable_shards} == {-(-19 // devices.size)}
    index = np.arange(4 * devices.size) * 7 % 19
    program = jax.jit(lambda *xs: pick(devices, *xs))
    np.testing.assert_array_equal(program(spreaded, index), rows[index])
    found = collectives(program.lower(spreaded, index).compile().as_text())
    assert "all-gather" not in found and sum(found.values()) <= 2 * 3 * 4 * devices.size * 2


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("images", [5, 60])
def test_a_spread_bank_finds_the_neighbours_of_one_device(mesh, images):
    rng = np.random.default_rng(0)
    bank, asked = (
        Examples(
            rng.standard_normal((n, 5)).astype(np.float32), rng.integers(0, 4, n).astype(np.int32)
        )
        for n in (images, 23)
    )
    one, many = (
        knn_top1(bank, asked, classes=4, mesh=parallel.make_mesh(*shape))
        for shape in ((1, 1), mesh)
    )
    assert many == one


def test_less_memory_means_smaller_batches(backbone_on, monkeypatch):
    backbone, task = backbone_on(2, 1), Segmentation(4)
    assert backbone.images_at_once(task) == 64
    whole = backbone.extract(Pixels(task), task, Pixels(task))
    monkeypatch.setattr(memory, "device_memory", lambda mesh: 2**20)
    assert 1 <= backbone.images_at_once(task) < 10
    again = backbone.extract(Pixels(task), task, Pixels(task))
    np.testing.assert_allclose(again.features, whole.features, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(again.labels, whole.labels)
