"""The same training step in PyTorch with timm models."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks.step.jax_step import LEARNING_RATE, OUTLIER_WEIGHT, QUANTILE, WEIGHT_DECAY
from benchmarks.step.memory import resident_peak


def torch_step(
    arguments: argparse.Namespace, shared: Path, compiled: bool = False
) -> tuple[Callable[[], float], Callable[[], int], dict]:
    """Returns the step in PyTorch, its peak memory and its device."""
    import torch
    import torch.nn.functional as F
    from safetensors.torch import load_file

    timm = import_timm()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    low = arguments.precision == "bfloat16"
    teacher = timm.create_model(arguments.teacher)
    teacher.load_state_dict(load_file(shared / "teacher.safetensors"))
    teacher = (
        teacher.to(device, torch.bfloat16 if low else torch.float32).eval().requires_grad_(False)
    )
    student = timm.create_model(arguments.student, num_classes=0).to(device)
    student.load_state_dict(load_file(shared / "student.safetensors"))
    layers: dict[tuple[int, int], dict[str, torch.Tensor]] = {}
    for name, value in load_file(shared / "parts.safetensors").items():
        layer, own, part = name.split(".")
        value = value.to(device)
        if part != "projection":
            value.requires_grad_()
        layers.setdefault((int(layer), int(own)), {})[part] = value
    layers = dict(sorted(layers.items()))
    last_block = max(own for _, own in layers) + 1
    parts = [v for entry in layers.values() for v in entry.values() if v.requires_grad]
    optimizer = torch.optim.AdamW(
        [*student.parameters(), *parts], LEARNING_RATE, weight_decay=WEIGHT_DECAY
    )
    images = torch.from_numpy(np.load(shared / "images.npy")).to(device)
    mean = torch.tensor([0.485, 0.456, 0.406], device=device)
    std = torch.tensor([0.229, 0.224, 0.225], device=device)

    def features(model: torch.nn.Module, x: torch.Tensor, blocks: int) -> list[torch.Tensor]:
        x = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(x))))
        found = []
        for block in model.blocks[:blocks]:
            x = block(x)
            found.append(x)
        return found

    def similarities(patches: torch.Tensor) -> torch.Tensor:
        unit = F.normalize(patches, dim=-1)
        return unit @ unit.transpose(-1, -2)

    def loss() -> torch.Tensor:
        x = ((images.float() / 255 - mean) / std).permute(0, 3, 1, 2).contiguous()
        with torch.autocast(device, torch.bfloat16, enabled=low):
            own_features = features(student, x, last_block)
            with torch.no_grad():
                dtype = next(teacher.parameters()).dtype
                taught = features(teacher, x.to(dtype), len(teacher.blocks))
        kd = outlier = info = 0.0
        previous = None
        for (layer, own), part in layers.items():
            patches = taught[layer][:, 1:].float()
            update = (patches @ part["down"]) @ (part["up"] @ part["projection"])
            refined = torch.cat([taught[layer][:, :1].float(), patches + update], 1)
            predicted = own_features[own].float() @ part["kernel"] + part["bias"]
            kd = kd + F.mse_loss(predicted, refined)
            norms = refined[:, 1:].norm(dim=-1)
            threshold = torch.quantile(norms, QUANTILE, dim=1, keepdim=True).detach()
            above = norms > threshold
            outlier = outlier + ((norms - threshold).square() * above).sum() / above.sum()
            if layer + 1 < len(teacher.blocks):
                seen = teacher.blocks[layer + 1](refined.to(dtype))
                info = info + F.mse_loss(seen.float(), taught[layer + 1].float())
            else:
                reference = patches if previous is None else previous
                info = info + F.mse_loss(similarities(refined[:, 1:]), similarities(reference))
            previous = refined[:, 1:]
        return (kd + OUTLIER_WEIGHT * outlier + info) / len(layers)

    total_loss = torch.compile(loss) if compiled else loss

    def step() -> float:
        optimizer.zero_grad()
        total = total_loss()
        total.backward()
        optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()
        return total.item()

    def peak() -> int:
        return torch.cuda.max_memory_allocated() if device == "cuda" else resident_peak()

    return step, peak, {"device": device}


def import_timm() -> object:
    """Returns timm, also where torchvision's compiled part cannot be loaded (on a CPU)."""
    import torch

    try:
        import torchvision  # noqa: F401
    except (RuntimeError, OSError):
        for name in [name for name in sys.modules if name.startswith("torchvision")]:
            del sys.modules[name]
        # The import only asks that these operators are declared; nothing here calls them.
        library = torch.library.Library("torchvision", "DEF")
        import_timm.library = library  # lives as long as the process
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import timm

    return timm
