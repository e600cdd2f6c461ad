"""Exports for transformers: the files equal those that its models were verified to load."""

import json

import numpy as np
import pytest
from etils import epath
from safetensors.numpy import load_file

from singer_jax.errors import InputError
from singer_jax.evaluation.backbone import resolve_weights
from singer_jax.models.export_huggingface import check_huggingface, export_huggingface
from singer_jax.models.export_timm import trained_here
from singer_jax.models.weights import model_tensors
from singer_jax.models.zoo import lookup
from tests.interop.cases import CASES, RECORDED, SIZES, exported, spec_of, tensors_of


def test_exports_are_those_that_transformers_opened(tmp_path):
    recorded = json.loads(RECORDED.read_text())
    assert set(recorded) == set(CASES)
    for case in CASES:
        assert exported(case, tmp_path / case) == recorded[case], f"{case}: see tests/interop"


def test_every_bit_of_the_weights_is_in_the_export(tmp_path):
    for case in CASES:
        spec = spec_of(case)
        given = tensors_of(spec)
        export_huggingface(epath.Path(tmp_path / case), spec, given)
        written = load_file(tmp_path / case / "model.safetensors").values()
        found = np.sort(np.concatenate([tensor.ravel() for tensor in written]))
        for key, tensor in given.items():
            values = tensor.ravel()
            at = np.searchsorted(found, values).clip(max=found.size - 1)
            assert np.array_equal(found[at], values), (case, key)


@pytest.mark.parametrize(
    ("model", "changes", "field"),
    [
        ("vit_small_patch16_dinov3", {"num_classes": 3}, "num_classes"),
        ("vit_tiny_patch16_224", {"pre_norm": True, "init_values": 1e-5}, "pre_norm"),
        ("beit_base_patch16_224", {"num_classes": 0}, "pos_embed"),
        ("vit_tiny_patch16_224", {"synthetic_outlier": "random"}, "synthetic_outlier"),
        ("vit_tiny_patch16_224", {"reg_tokens": 2}, "reg_tokens"),
        ("vit_tiny_patch16_224", {"num_classes": 3, "global_pool": "avg"}, "global_pool"),
        ("vit_small_patch14_dinov2", {"mlp_ratio": 2.5}, "mlp_ratio"),
    ],
)
def test_a_model_that_transformers_lacks_is_one_line(model, changes, field):
    with pytest.raises(InputError) as caught:
        check_huggingface(lookup(model, SIZES | changes))
    message = str(caught.value)
    assert field in message and len(message) <= 200 and len(message.splitlines()) == 1


def test_the_image_processor_does_what_the_model_states(tmp_path):
    spec = trained_here(spec_of("deit3"))
    export_huggingface(epath.Path(tmp_path), spec, tensors_of(spec))
    stated = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert stated["size"] == {"shortest_edge": 36}  # 32 pixels over 0.875
    assert stated["crop_size"] == {"height": 32, "width": 32}
    assert (tuple(stated["image_mean"]), tuple(stated["image_std"])) == (spec.mean, spec.std)
    assert stated["resample"] == 2  # bilinear


@pytest.mark.parametrize("model", ["vit_base_patch16_clip_224", "vit_base_patch16_siglip_224"])
def test_models_of_square_images_alone_are_refused_for_others(model):
    sizes = {"img_size": (16, 32), "patch_size": 8, "num_classes": 0}
    with pytest.raises(InputError, match="need square images, not 16 x 32"):
        check_huggingface(lookup(model, sizes))


@pytest.mark.parametrize("case", [case for case in CASES if not case.startswith("deit3")])
def test_an_export_opens_as_the_same_model(tmp_path, case):
    model = spec_of(case)
    export_huggingface(epath.Path(tmp_path), model, tensors_of(model))
    spec, file = resolve_weights(str(tmp_path))
    found = model_tensors(spec, file)
    for key, tensor in tensors_of(model).items():
        np.testing.assert_array_equal(found[key].read(), tensor, err_msg=key)
    assert (spec.mean, spec.std, spec.interpolation) == (model.mean, model.std, model.interpolation)
    for name in ("act_layer", "norm_eps", "num_heads", "rope_type", "rope_temperature"):
        assert getattr(spec.arch, name) == getattr(model.arch, name)
