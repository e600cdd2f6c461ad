"""Opens exports with the libraries they are for; what they compute is what our models compute."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import onnxruntime
import pytest
import timm
import torch
import transformers
from etils import epath
from flax import nnx
from PIL import Image

from singer_jax.data.images import EvalTransform
from singer_jax.models.export_huggingface import export_huggingface
from singer_jax.models.export_onnx import export_onnx
from singer_jax.models.export_timm import export_timm, trained_here
from singer_jax.models.network import Network
from singer_jax.models.weights import from_hub_config, load_model
from tests.interop.cases import CASES, RECORDED, exported, spec_of, tensors_of

# Of values of size 1: float32 sums in another order.
TOLERANCE = 1e-5

HEADS = {
    f"{name}.{parameter}"
    for name in ("classifier", "cls_classifier", "distillation_classifier")
    for parameter in ("weight", "bias")
}


@functools.cache
def images() -> np.ndarray:
    """Normalised, as our models take them."""
    return np.random.default_rng(1).standard_normal((2, 32, 32, 3)).astype(np.float32)


def pixels() -> torch.Tensor:
    """The same, as PyTorch's models take them."""
    return torch.from_numpy(images().transpose(0, 3, 1, 2).copy())


def close(found: torch.Tensor | np.ndarray, expected: jax.Array) -> None:
    """Compares relative to the largest value."""
    expected = np.asarray(expected)
    scale = max(1, np.abs(expected).max())
    np.testing.assert_allclose(np.asarray(found) / scale, expected / scale, rtol=0, atol=TOLERANCE)


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    """A case, a folder with its timm export, our model read from it, and its features."""
    folder = tmp_path_factory.mktemp("export")
    spec = spec_of(request.param)
    export_timm(epath.Path(folder), spec, tensors_of(spec))
    stated = from_hub_config(json.loads((folder / "config.json").read_text()))
    graph, params = load_model(stated, folder / "model.safetensors")
    model = nnx.merge(graph, params)
    return request.param, folder, Network(stated, graph), params, model, model.features(images())


@torch.no_grad()
def test_timm_opens_an_export_in_one_line(case):
    _, folder, network, _, model, features = case
    opened = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    close(opened(pixels()), model.head_output(features[-1]))
    prefix = network.spec.arch.num_prefix_tokens
    _, blocks = opened.forward_intermediates(
        pixels(), output_fmt="NLC", return_prefix_tokens=bool(prefix)
    )
    for block, feature in zip(blocks, features, strict=True):
        close(torch.cat([block[1], block[0]], dim=1) if prefix else block, feature)
    found = timm.data.resolve_model_data_config(opened)
    spec = network.spec
    assert tuple(found["input_size"]) == (3, *spec.arch.img_size)
    assert (tuple(found["mean"]), tuple(found["std"])) == (spec.mean, spec.std)
    assert (found["interpolation"], found["crop_pct"]) == (spec.interpolation, spec.crop_pct)
    assert opened.num_features == spec.arch.embed_dim


@torch.no_grad()
def test_transformers_opens_an_export(case, tmp_path):
    name, _, network, _, model, features = case
    recorded = json.loads(RECORDED.read_text())
    assert exported(name, tmp_path) == recorded[name], "record it: tests/interop/cases.py"
    opened, report = transformers.AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["mismatched_keys"]
    assert set(report["unexpected_keys"]) <= HEADS
    found = opened.eval()(pixels())
    last = features[-1]
    close(found.last_hidden_state, last if name.startswith("clip") else model.norm(last))
    arch = network.spec.arch
    if arch.global_pool != "avg" and not arch.distilled:  # else the class token alone
        close(found.pooler_output, model.pooled(last))
    if arch.num_classes:
        classifier = transformers.AutoModelForImageClassification.from_pretrained(tmp_path).eval()
        close(classifier(pixels()).logits, model.head_output(last))


def test_onnxruntime_runs_an_export_at_any_batch_size(case, tmp_path):
    _, _, network, params, model, features = case
    assert export_onnx(epath.Path(tmp_path), network, params) <= TOLERANCE
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    for few in (1, 2):
        tokens, pooled, *logits = session.run(None, {"pixel_values": pixels()[:few].numpy()})
        last = features[-1][:few]
        close(tokens, model.norm(last))
        close(pooled, model.pooled(last))
        assert len(logits) == bool(network.spec.arch.num_classes)
        for found in logits:
            close(found, model.head_output(last))


@pytest.mark.parametrize("size", [(60, 45), (200, 131)])
def test_their_transforms_prepare_images_as_our_evaluation_does(tmp_path, size):
    spec = trained_here(spec_of("vit"))
    export_timm(epath.Path(tmp_path / "timm"), spec, tensors_of(spec))
    export_huggingface(epath.Path(tmp_path / "huggingface"), spec, tensors_of(spec))
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 4, 3), dtype=np.uint8))
    image = coarse.resize(size, Image.Resampling.BICUBIC)
    expected = spec.prepare(jnp.asarray(EvalTransform(32)(image))[None])
    opened = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True)
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(opened))
    processor = transformers.AutoImageProcessor.from_pretrained(Path(tmp_path / "huggingface"))
    of_timm = transform(image)[None]
    of_transformers = processor(image, return_tensors="pt").pixel_values
    for found in (of_timm, of_transformers):
        difference = np.abs(found.numpy().transpose(0, 2, 3, 1) - np.asarray(expected))
        assert difference.max() <= 2.01 / 127.5, "more than two grey levels"
