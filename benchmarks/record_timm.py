"""Records timm's outputs on small random models, and the input statistics of its weights.

    python -m benchmarks.record_timm

This requires torch, torchvision and timm. It writes the three files that tests/models/test_timm.py
reads: one model of each kind of block, loaded by timm itself from weights that a seed draws, and
the statistics of every weights tag. Nothing else reads them.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from singer_jax.models.families import FAMILIES
from singer_jax.models.zoo import MODELS

FOLDER = Path(__file__).parent.parent / "tests" / "models" / "timm"
FILES = ("vision_transformer", "deit", "eva", "beit")
STATISTICS = ("mean", "std", "interpolation", "crop_pct")

SMALL = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2}
# Fields in which models of one kind may differ; of others only whether they are set.
_SIZES = frozenset(SMALL) | {"num_classes", "mlp_ratio", "rope_temperature", "num_kv_heads"}
_SET_OR_NOT = ("init_values", "reg_tokens", "ref_feat_shape", "swiglu_align_to")


def kinds() -> Iterator[str]:
    """Returns one name of each kind; no two of them have the same fields apart from sizes."""
    known = set()
    for family in FAMILIES:
        for name in family.members():
            spec = MODELS[name]
            fields = dataclasses.asdict(spec.arch).items()
            kind = {key: value for key, value in fields if key not in _SIZES}
            kind |= {key: bool(kind[key]) for key in _SET_OR_NOT}
            text = json.dumps(kind)
            if text not in known and spec.timm_name == name:
                known.add(text)
                yield name


def cases() -> Iterator[dict[str, Any]]:
    """Returns the name, the arguments of timm, and the image size of the weights."""
    for name in kinds():
        arguments: dict[str, Any] = SMALL | {"num_classes": 5}
        if MODELS[name].arch.num_kv_heads:
            arguments["num_kv_heads"] = [2, 1]
        yield {"name": name, "model": name, "arguments": arguments, "weights_img_size": 16}
    for name, model, stored, size in (
        ("flexivit larger", "flexivit_small", 16, 24),
        ("flexivit smaller", "flexivit_small", 24, [16, 8]),
        ("radio larger", "vit_base_patch16_radio_v3", 16, 24),
        ("radio smaller", "vit_so400m_patch16_radio_v4", 24, 16),
        ("beit larger", "beit_base_patch16_224", 16, [24, 28]),
        ("beit smaller", "beit_base_patch16_224", 24, 16),
        ("eva02 larger", "eva02_base_patch14_224", 16, [24, 16]),
        ("deit distilled larger", "deit_tiny_distilled_patch16_224", 16, 24),
        ("pe not square", "vit_pe_core_base_patch16_224", 16, [12, 24]),
        ("mixed not square", "vit_small_patch16_rope_mixed_ape_224", 16, [12, 24]),
    ):
        arguments = SMALL | {"num_classes": 5, "img_size": size}
        yield {"name": name, "model": model, "arguments": arguments, "weights_img_size": stored}


def drawn(shapes: Mapping[str, list[int]]) -> dict[str, np.ndarray]:
    """Returns weights that depend only on keys and shapes (`RandomState` has a fixed stream)."""
    found = {}
    for key, shape in shapes.items():
        random = np.random.RandomState(zlib.crc32(key.encode()))
        scale = 1.0 if len(shape) < 2 or "token" in key else 2.0 / np.sqrt(shape[-1])
        values = scale * random.standard_normal(shape)
        if key.endswith(("norm.weight", "norm1.weight", "norm2.weight", "norm_pre.weight")):
            values = 1 + 0.3 * values
        found[key] = (0.5 * values).astype(np.float32)
    return found


def images(size: Any) -> np.ndarray:
    """Returns one normalised image [1, height, width, 3]."""
    height, width = (size, size) if isinstance(size, int) else size
    return np.random.RandomState(0).standard_normal((1, height, width, 3)).astype(np.float32)


def _record(case: dict[str, Any]) -> dict[str, np.ndarray]:
    """Returns timm's features of a case; adds the keys and shapes of the weights to the case."""
    import torch

    from benchmarks.step import import_timm

    timm = import_timm()
    arguments = case["arguments"]
    if "num_kv_heads" in arguments:
        arguments = arguments | {"num_kv_heads": tuple(arguments["num_kv_heads"])}
    stored = timm.create_model(
        case["model"], **(arguments | {"img_size": case["weights_img_size"]})
    )
    case["shapes"] = {key: list(value.shape) for key, value in stored.state_dict().items()}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.safetensors"
        save_file(drawn(case["shapes"]), file)
        overlay = {"file": str(file), "num_classes": arguments["num_classes"]}
        model = timm.create_model(
            case["model"], pretrained=True, pretrained_cfg_overlay=overlay, **arguments
        ).eval()
    found: dict[str, np.ndarray] = {}
    for index, block in enumerate(model.blocks):
        block.register_forward_hook(functools.partial(_keep, found, f"block.{index}"))
    with torch.no_grad():
        x = torch.from_numpy(images(arguments["img_size"]).transpose(0, 3, 1, 2).copy())
        found["output"] = model(x).numpy()
    return found


def _keep(found: dict[str, np.ndarray], name: str, module: Any, given: Any, output: Any) -> None:
    found[name] = output.numpy()


def _tags() -> dict[str, Any]:
    """Returns the input statistics of every weights tag of timm's plain vision transformers."""
    from benchmarks.step import import_timm

    import_timm()
    from timm.models import get_pretrained_cfg, list_models

    found = {}
    for file in FILES:
        names = {model.split(".")[0] for model in list_models(module=file)}
        for name in sorted(names | set(list_models(module=file, pretrained=True))):
            config = get_pretrained_cfg(name)
            found[name] = [config.input_size[1:], *(getattr(config, key) for key in STATISTICS)]
    return found


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    described, arrays = list(cases()), {}
    for case in described:
        print(case["name"])
        for key, value in _record(case).items():
            arrays[f"{case['name']}/{key}"] = np.ascontiguousarray(value)
    save_file(arrays, FOLDER / "features.safetensors")
    cases_text = ",\n".join(map(json.dumps, described))
    (FOLDER / "cases.json").write_text(f"[\n{cases_text}\n]\n")
    tags = (f"{json.dumps(name)}: {json.dumps(found)}" for name, found in _tags().items())
    (FOLDER / "tags.json").write_text("{\n" + ",\n".join(tags) + "\n}\n")


if __name__ == "__main__":
    main()
