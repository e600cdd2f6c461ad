"""Records tiny random models of other libraries, as each library saves them, and their features.

  python -m benchmarks.record_foreign tests/models/foreign --sources SOURCES

This requires torch, timm, transformers and open_clip, and in the folder SOURCES clones of
facebookresearch/dinov2, facebookresearch/dinov3, facebookresearch/mae, bytedance/ibot and
google-research/vision_transformer. `tests/models/test_foreign.py` reads the recordings without
any of them. The recording of a model whose library is missing is not changed.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import shutil
import sys
import traceback
import types
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

SIDE, PATCH, DIM, DEPTH, HEADS, HIDDEN = 16, 4, 16, 2, 2, 32
# The same sizes as overrides of a timm model.
SIZES = {
    "img_size": SIDE,
    "patch_size": PATCH,
    "embed_dim": DIM,
    "depth": DEPTH,
    "num_heads": HEADS,
    "mlp_ratio": HIDDEN / DIM,
}
# And in the configurations of transformers.
_HF = {
    "hidden_size": DIM,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": HEADS,
    "image_size": SIDE,
    "patch_size": PATCH,
}
_HF_HIDDEN = _HF | {"intermediate_size": HIDDEN}
_TEXT = {
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 8,
    "vocab_size": 8,
    "max_position_embeddings": 4,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}


def randomised(model: nn.Module, seed: int) -> nn.Module:
    """Returns the model with random parameters that all matter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def features(
    blocks: Iterable[nn.Module], run: Callable[[torch.Tensor], Any], images: np.ndarray
) -> list[np.ndarray]:
    """Returns the residual stream after each block, by hooks."""
    found: list[np.ndarray] = []

    def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
        while isinstance(output, (tuple, list)):
            output = output[0]
        found.append(output.detach().numpy().copy())

    handles = [block.register_forward_hook(keep) for block in blocks]
    with torch.no_grad():
        run(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()))
    for handle in handles:
        handle.remove()
    return found


class Recorder:
    """Writes recordings below a folder.

    Args:
      folder: gets one folder for each model.
      images: [batch, side, side, 3], which all models see.
    """

    def __init__(self, folder: Path, images: np.ndarray) -> None:
        self.folder, self.images = folder, images

    def start(self, name: str) -> Path:
        """Returns an empty folder for a model."""
        shutil.rmtree(self.folder / name, ignore_errors=True)
        (self.folder / name).mkdir(parents=True)
        return self.folder / name

    def finish(self, name: str, found: list[np.ndarray], **model: Any) -> None:
        """Writes features, and the model that has them."""
        assert len(found) == DEPTH, (name, len(found))
        np.savez(self.folder / name / "features.npz", *found)
        (self.folder / name / "model.json").write_text(json.dumps(model, indent=1) + "\n")

    def state_dict(self, name: str, network: nn.Module, **model: Any) -> None:
        """Records a model whose state dict is saved by `torch.save`."""
        torch.save(network.state_dict(), self.start(name) / "weights.pth")
        blocks = [each for each in network.modules() if type(each).__name__.endswith("Block")]
        found = features(blocks, network, self.images)
        self.finish(name, found, file="weights.pth", **model)


def transformers_models(recorder: Recorder) -> None:
    """Records the vision models of transformers, saved by `save_pretrained`."""
    import transformers as hf

    siglip2 = {key: value for key, value in _HF_HIDDEN.items() if key != "image_size"}
    clip = {"vision_config": _HF_HIDDEN, "text_config": _TEXT, "projection_dim": 8}
    made = {
        "hf_vit": lambda: hf.ViTModel(hf.ViTConfig(**_HF_HIDDEN)),
        "hf_vit_classes": lambda: hf.ViTForImageClassification(
            hf.ViTConfig(num_labels=3, **_HF_HIDDEN)
        ),
        "hf_deit": lambda: hf.DeiTModel(hf.DeiTConfig(**_HF_HIDDEN)),
        "hf_dinov2": lambda: hf.Dinov2Model(hf.Dinov2Config(mlp_ratio=2, **_HF)),
        "hf_dinov2_swiglu": lambda: hf.Dinov2Model(
            hf.Dinov2Config(mlp_ratio=3, use_swiglu_ffn=True, **_HF)
        ),
        "hf_dinov2_registers": lambda: hf.Dinov2WithRegistersModel(
            hf.Dinov2WithRegistersConfig(mlp_ratio=2, **_HF)
        ),
        "hf_dinov3": lambda: hf.DINOv3ViTModel(
            hf.DINOv3ViTConfig(num_register_tokens=4, **_HF_HIDDEN)
        ),
        "hf_dinov3_gated": lambda: hf.DINOv3ViTModel(
            hf.DINOv3ViTConfig(
                num_register_tokens=4, use_gated_mlp=True, hidden_act="silu", **_HF_HIDDEN
            )
        ),
        "hf_clip_vision": lambda: hf.CLIPVisionModel(hf.CLIPVisionConfig(**_HF_HIDDEN)),
        "hf_clip": lambda: hf.CLIPModel(hf.CLIPConfig(**clip)),
        "hf_siglip": lambda: hf.SiglipVisionModel(hf.SiglipVisionConfig(**_HF_HIDDEN)),
        "hf_siglip2": lambda: hf.Siglip2VisionModel(
            hf.Siglip2VisionConfig(num_patches=(SIDE // PATCH) ** 2, **siglip2)
        ),
    }
    for seed, (name, make) in enumerate(made.items()):
        model = randomised(make(), seed)
        folder = recorder.start(name)
        model.save_pretrained(folder)
        (folder / "generation_config.json").unlink(missing_ok=True)
        vision = getattr(model, "vision_model", model)
        lists = [each for each in vision.modules() if isinstance(each, nn.ModuleList)]
        blocks = next(each for each in lists if len(each) == DEPTH)
        run = _run_siglip2 if name == "hf_siglip2" else lambda vision, x: vision(x)
        found = features(blocks, lambda x, v=vision, run=run: run(v, x), recorder.images)
        recorder.finish(name, found, file="", model="", overrides={})


def _run_siglip2(model: nn.Module, images: torch.Tensor) -> None:
    """Gives the model patches, each flat with the channels last, as its processor does."""
    rows = SIDE // PATCH
    patches = images.reshape(len(images), 3, rows, PATCH, rows, PATCH)
    patches = patches.permute(0, 2, 4, 3, 5, 1).reshape(len(images), rows * rows, -1)
    mask = torch.ones(patches.shape[:2], dtype=torch.int32)
    shapes = torch.tensor([[rows, rows]] * len(images))
    model(pixel_values=patches, pixel_attention_mask=mask, spatial_shapes=shapes)


def open_clip_models(recorder: Recorder) -> None:
    """Records a whole CLIP of open_clip in a checkpoint of its training."""
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

    vision = CLIPVisionCfg(
        layers=DEPTH, width=DIM, head_width=DIM // HEADS, mlp_ratio=HIDDEN / DIM,
        patch_size=PATCH, image_size=SIDE,
    )  # fmt: skip
    text = CLIPTextCfg(context_length=4, vocab_size=8, width=8, heads=2, layers=1)
    for seed, quick in enumerate((False, True)):
        model = randomised(CLIP(8, vision, text, quick_gelu=quick), 100 + seed)
        state = {f"module.{key}": value for key, value in model.state_dict().items()}
        content = {"epoch": 1, "name": "tiny", "state_dict": state}
        timm_name = f"vit_base_patch16_clip{'_quickgelu' * quick}_224"
        name = f"open_clip{'_quickgelu' * quick}"
        folder = recorder.start(name)
        torch.save(content, folder / "epoch_1.pt")
        found = features(model.visual.transformer.resblocks, model.visual, recorder.images)
        recorder.finish(name, found, file="epoch_1.pt", model=timm_name, overrides=SIZES)


@contextlib.contextmanager
def imported(source: Path, **stubs: Any) -> Iterator[None]:
    """Lets modules of a clone be imported, with stubs for modules that they need by name."""
    before = set(sys.modules)
    sys.path.insert(0, str(source))
    sys.modules.update(stubs)
    try:
        yield
    finally:
        sys.path.remove(str(source))
        for name in set(sys.modules) - before:
            if str(source) in str(getattr(sys.modules[name], "__file__", "")) or name in stubs:
                del sys.modules[name]


def meta_models(recorder: Recorder, sources: Path) -> None:
    """Records Meta's DINOv2 and DINOv3."""
    common = {"img_size": SIDE, "patch_size": PATCH, "embed_dim": DIM, "depth": DEPTH}
    common |= {"num_heads": HEADS}
    with imported(sources / "dinov2"):
        from dinov2.layers import MemEffAttention
        from dinov2.layers import NestedTensorBlock as Block
        from dinov2.models.vision_transformer import DinoVisionTransformer

        def block(**settings: Any) -> nn.Module:
            return Block(attn_class=MemEffAttention, **settings)

        variants = {
            "meta_dinov2": ({"mlp_ratio": 2}, "vit_base_patch14_dinov2", SIZES),
            "meta_dinov2_chunked": (
                {"mlp_ratio": 2, "block_chunks": 2}, "vit_base_patch14_dinov2", SIZES,
            ),
            "meta_dinov2_registers": (
                {"mlp_ratio": 2, "num_register_tokens": 4}, "vit_base_patch14_reg4_dinov2", SIZES,
            ),
            "meta_dinov2_swiglu": (
                {"mlp_ratio": 3, "ffn_layer": "swiglufused"},
                "vit_base_patch14_dinov2",
                SIZES | {"mlp_layer": "swiglu_packed", "mlp_ratio": 4.0},
            ),
        }  # fmt: skip
        for seed, (name, (settings, timm_name, overrides)) in enumerate(variants.items()):
            model = DinoVisionTransformer(
                init_values=1.0, **({"block_chunks": 0} | common | settings), block_fn=block
            )
            randomised(model, 200 + seed)
            recorder.state_dict(name, model, model=timm_name, overrides=overrides)
    with imported(sources / "dinov3"):
        from dinov3.models.vision_transformer import DinoVisionTransformer

        common |= {"layerscale_init": 1.0, "norm_layer": "layernormbf16", "n_storage_tokens": 4}
        common |= {"mask_k_bias": True, "pos_embed_rope_dtype": "fp32", "ffn_ratio": 2}
        for seed, (name, settings, changes) in enumerate(
            (
                ("meta_dinov3", {}, {}),
                (
                    "meta_dinov3_swiglu",
                    {"ffn_layer": "swiglu", "ffn_ratio": 3},
                    {"mlp_layer": "swiglu"},
                ),
            )
        ):
            model = DinoVisionTransformer(**(common | settings))
            model.init_weights()
            randomised(model, 300 + seed)
            overrides = SIZES | changes
            recorder.state_dict(
                name, model, model="vit_base_patch16_dinov3_qkvb", overrides=overrides
            )


def mae_models(recorder: Recorder, sources: Path) -> None:
    """Records MAE with its decoder, in a checkpoint of its training."""
    import timm.models.vision_transformer as timm_vit

    plain = timm_vit.Block
    # The arguments of timm 0.3.2, for which MAE was written, and NumPy's old name of a type.
    timm_vit.Block = lambda *args, qk_scale=None, **kwargs: plain(*args, **kwargs)
    np.float = float
    try:
        with imported(sources / "mae"):
            from models_mae import MaskedAutoencoderViT

            model = MaskedAutoencoderViT(
                SIDE, PATCH, embed_dim=DIM, depth=DEPTH, num_heads=HEADS, mlp_ratio=2,
                decoder_embed_dim=8, decoder_depth=1, decoder_num_heads=2,
                norm_layer=functools.partial(nn.LayerNorm, eps=1e-6),
            )  # fmt: skip
    finally:
        timm_vit.Block = plain
        del np.float
    randomised(model, 400)
    folder = recorder.start("mae")
    arguments = argparse.Namespace(lr=1e-3, output_dir="out")
    torch.save(
        {"model": model.state_dict(), "optimizer": {"state": {}}, "epoch": 1, "args": arguments},
        folder / "checkpoint-1.pth",
    )

    def encode(images: torch.Tensor) -> None:
        # All patches in their order: `forward_encoder` would draw some of them.
        x = model.patch_embed(images) + model.pos_embed[:, 1:]
        token = (model.cls_token + model.pos_embed[:, :1]).expand(len(x), -1, -1)
        x = torch.cat([token, x], dim=1)
        for block in model.blocks:
            x = block(x)

    found = features(model.blocks, encode, recorder.images)
    recorder.finish(
        "mae", found, file="checkpoint-1.pth", model="vit_base_patch16_224", overrides=SIZES
    )


def ibot_models(recorder: Recorder, sources: Path) -> None:
    """Records iBOT's student and teacher, in a checkpoint of its training."""
    utils = types.ModuleType("utils")
    utils.trunc_normal_ = nn.init.trunc_normal_
    with imported(sources / "ibot", utils=utils):
        from models.vision_transformer import VisionTransformer

        student, teacher = (
            randomised(
                VisionTransformer(
                    [SIDE], PATCH, embed_dim=DIM, depth=DEPTH, num_heads=HEADS, mlp_ratio=2,
                    qkv_bias=True, masked_im_modeling=masked,
                ),
                500 + masked,
            )
            for masked in (True, False)
        )  # fmt: skip
    folder = recorder.start("ibot")

    def state(model: nn.Module, prefix: str) -> dict[str, torch.Tensor]:
        head = {"head.mlp.0.weight": torch.ones(4, DIM), "head.last_layer.weight_g": torch.ones(4)}
        wrapped = {f"backbone.{key}": value for key, value in model.state_dict().items()}
        return {prefix + key: value for key, value in (wrapped | head).items()}

    content = {"student": state(student, "module."), "teacher": state(teacher, ""), "epoch": 1}
    torch.save(content, folder / "checkpoint.pth")
    found = features(teacher.blocks, teacher, recorder.images)
    recorder.finish(
        "ibot", found, file="checkpoint.pth", model="vit_base_patch16_224", overrides=SIZES
    )


def flax_models(recorder: Recorder, sources: Path) -> None:
    """Records the Flax ViT of the augreg release as `.npz`."""
    import jax
    from flax.traverse_util import flatten_dict

    with imported(sources / "vision_transformer"):
        from vit_jax.models_vit import VisionTransformer

        sizes = types.SimpleNamespace(size=(PATCH, PATCH))
        encoder = {"num_layers": DEPTH, "mlp_dim": HIDDEN, "num_heads": HEADS}
        model = VisionTransformer(
            num_classes=3, patches=sizes, hidden_size=DIM,
            transformer=encoder | {"dropout_rate": 0.0},
        )  # fmt: skip
        variables = model.init(jax.random.key(0), recorder.images, train=False)
        rng = np.random.default_rng(600)
        flat = {
            key: np.asarray(value) + 0.2 * rng.standard_normal(value.shape).astype(np.float32)
            for key, value in flatten_dict(variables["params"], sep="/").items()
        }
        nested: dict[str, Any] = {}
        for key, value in flat.items():
            *parents, last = key.split("/")
            place = nested
            for parent in parents:
                place = place.setdefault(parent, {})
            place[last] = value
        with jax.default_matmul_precision("highest"):
            _, kept = model.apply(
                {"params": nested}, recorder.images, train=False, capture_intermediates=True
            )
    folder = recorder.start("flax_augreg")
    np.savez(folder / "augreg.npz", **flat)
    inside = kept["intermediates"]["Transformer"]
    found = [np.asarray(inside[f"encoderblock_{n}"]["__call__"][0]) for n in range(DEPTH)]
    # The release approximates GELU; timm's models of its weights do not.
    overrides = SIZES | {"act_layer": "gelu_tanh"}
    recorder.finish(
        "flax_augreg", found, file="augreg.npz", model="vit_base_patch16_224", overrides=overrides
    )


def main() -> None:
    """Records every model whose library is installed."""
    line = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    line.add_argument("folder", type=Path)
    line.add_argument("--sources", type=Path, default=Path("sources"), help="folder of the clones")
    given = line.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    images = np.random.default_rng(0).standard_normal((2, SIDE, SIDE, 3)).astype(np.float32)
    np.savez(given.folder / "images.npz", images)
    recorder = Recorder(given.folder, images)
    failed = False
    for record, from_clone in (
        (transformers_models, False),
        (open_clip_models, False),
        (meta_models, True),
        (mae_models, True),
        (ibot_models, True),
        (flax_models, True),
    ):
        try:
            record(recorder, *([given.sources] if from_clone else []))
        except Exception:  # the others are recorded all the same
            failed = True
            traceback.print_exc()
    sys.exit(failed)


if __name__ == "__main__":
    main()
