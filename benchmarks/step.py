"""One SiNGER training step against the same step in eager PyTorch with timm models.

  pip install ".[bench]" && pip install --no-deps timm torchvision==0.28.0
  python -m benchmarks.step --teacher vit_large_patch16_224 --student vit_tiny_patch16_224 --batch 4

Both start from the same weights and see the same images; their first losses must agree. Both reuse
the teacher's own next feature in the info loss, which the official code computes again. Each runs
in a process of its own and they take turns, one step each, so that a noisy machine is noisy for
both and neither's waiting threads slow the other. Printed: median seconds a step, peak memory of
each process, and the ratios.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

RANK, QUANTILE, OUTLIER_WEIGHT = 64, 0.97, 0.01
LEARNING_RATE, WEIGHT_DECAY = 1e-3, 1e-4


def jax_step(arguments: argparse.Namespace, shared: Path) -> tuple[Callable[[], float], dict]:
    """Our step; writes the student and the method's parts that the peer starts from."""
    import jax
    from flax import nnx
    from safetensors.numpy import save_file

    from singer_jax import parallel
    from singer_jax.config import default, settings_of
    from singer_jax.models.params import join
    from singer_jax.models.weights import to_timm
    from singer_jax.telemetry import peak_flops
    from singer_jax.training.flops import step_flops
    from singer_jax.training.program import jit_step
    from singer_jax.training.setup import setup_students

    config = default()
    config.teacher.model = arguments.teacher
    config.teacher.weights = str(shared / "teacher.safetensors")
    config.student.model = arguments.student
    config.precision, config.batch_size = arguments.precision, arguments.batch
    config.data.normalisation = "imagenet"
    config.method.rank, config.method.quantile = RANK, QUANTILE
    config.method.nullspace.start = "official"
    config.steps, config.schedule.name, config.schedule.milestones = 1000, "multistep", ()
    runs = setup_students(settings_of(config), 1000 * arguments.batch, 0)
    run = runs.any
    teacher = run.load_teacher()
    state = run.init_state(teacher)

    save_file(
        to_timm(join(state.params["student"], state.constants["student"])),
        shared / "student.safetensors",
    )
    method = nnx.merge(run.distillation.method, state.params["method"], state.constants["method"])
    parts = {}
    for layer, own in zip(method.teacher_layers, method.student_layers, strict=True):
        refiner, adapter = method.refiner[str(layer)], method.adapter[str(own)]
        parts |= {
            f"{layer}.{own}.down": refiner.down[...],
            f"{layer}.{own}.up": refiner.up[...],
            f"{layer}.{own}.projection": refiner.projection[...],
            f"{layer}.{own}.kernel": adapter.kernel[...],
            f"{layer}.{own}.bias": adapter.bias[...],
        }
    save_file(
        {name: np.asarray(value) for name, value in parts.items()}, shared / "parts.safetensors"
    )

    size = run.image_size
    images = np.random.default_rng(0).integers(0, 256, (arguments.batch, size, size, 3), np.uint8)
    np.save(shared / "images.npy", images)
    batch = parallel.put_batch(
        {"image": images, "label": np.zeros(arguments.batch, np.int32)},
        parallel.batch_sharding(run.mesh),
    )
    unlogged = np.bool_(False)  # as 49 of 50 steps
    step_fn = jit_step(run.distillation, run.mesh, state, teacher)
    compiled = step_fn.lower(state, teacher, batch, unlogged).compile()

    def step() -> float:
        nonlocal state
        state, metrics = compiled(state, teacher, batch, unlogged)
        jax.block_until_ready(state)
        return float(metrics["loss"])

    facts = {
        "flops": step_flops(runs.students, runs.states, runs.teacher, arguments.batch),
        "peak": peak_flops(run.mesh.devices.ravel()),
    }
    return step, facts | {"device": jax.devices()[0].device_kind}


def torch_step(arguments: argparse.Namespace, shared: Path) -> tuple[Callable[[], float], dict]:
    """The same step in eager PyTorch."""
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
            outlier = outlier + F.mse_loss(norms[above], threshold.expand_as(norms)[above])
            if layer + 1 < len(teacher.blocks):
                seen = teacher.blocks[layer + 1](refined.to(dtype))
                info = info + F.mse_loss(seen.float(), taught[layer + 1].float())
            else:
                reference = patches if previous is None else previous
                info = info + F.mse_loss(similarities(refined[:, 1:]), similarities(reference))
            previous = refined[:, 1:]
        return (kd + OUTLIER_WEIGHT * outlier + info) / len(layers)

    def step() -> float:
        optimizer.zero_grad()
        total = loss()
        total.backward()
        optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()
        return total.item()

    return step, {"device": device}


def import_timm() -> object:
    """timm, also where torchvision's compiled part cannot be loaded (a CPU-only machine)."""
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


def worker(arguments: argparse.Namespace) -> None:
    """One peer: a step for each line on standard input, a line of JSON after each."""
    make = {"jax": jax_step, "torch": torch_step}[arguments.peer]
    step, facts = make(arguments, Path(arguments.shared))
    print(json.dumps(facts), flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        loss = step()
        seconds = time.perf_counter() - start
        status = Path("/proc/self/status").read_text().splitlines()
        peak = next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
        print(json.dumps({"seconds": seconds, "loss": loss, "peak_kib": peak}), flush=True)


def main() -> None:
    """Starts both peers and lets them take turns."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--teacher", default="vit_small_patch16_224")
    parser.add_argument("--student", default="vit_tiny_patch16_224")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=7, help="timed steps of each, at least 5")
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--precision", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--peer", choices=("jax", "torch"), help=argparse.SUPPRESS)
    parser.add_argument("--shared", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peer:
        worker(arguments)
        return

    from benchmarks.results import report

    with tempfile.TemporaryDirectory() as shared:
        make_inputs = [sys.executable, "-m", "benchmarks.make_inputs", "weights"]
        subprocess.run(
            [*make_inputs, arguments.teacher, f"{shared}/teacher.safetensors"], check=True
        )
        peers, facts, measured = {}, {}, {"jax": [], "torch": []}
        for peer in measured:  # one after the other: the second reads what the first writes
            command = [sys.executable, "-m", "benchmarks.step", *sys.argv[1:]]
            peers[peer] = subprocess.Popen(
                [*command, "--peer", peer, "--shared", shared],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            facts[peer] = json.loads(peers[peer].stdout.readline())
        for _ in range(arguments.warmup + arguments.rounds):
            for peer, process in peers.items():
                process.stdin.write("step\n")
                process.stdin.flush()
                measured[peer].append(json.loads(process.stdout.readline()))
        for process in peers.values():
            process.stdin.close()
            process.wait()

    losses = [runs[0]["loss"] for runs in measured.values()]
    tolerance = 1e-3 if arguments.precision == "float32" else 2e-2
    if not np.allclose(*losses, rtol=tolerance):
        sys.exit(f"the peers do not compute the same step: first losses {losses}")
    medians = {
        peer: statistics.median(run["seconds"] for run in runs[arguments.warmup :])
        for peer, runs in measured.items()
    }
    peaks = {peer: max(run["peak_kib"] for run in runs) / 2**20 for peer, runs in measured.items()}
    rows = []
    for peer, runs in measured.items():
        seconds = [run["seconds"] for run in runs[arguments.warmup :]]
        row = {
            "peer": "this project" if peer == "jax" else "eager PyTorch",
            "median s/step": f"{medians[peer]:.3f}",
            "min..max": f"{min(seconds):.3f}..{max(seconds):.3f}",
            "ratio to PyTorch": f"{medians[peer] / medians['torch']:.2f}",
            "images/s": f"{arguments.batch / medians[peer]:.1f}",
            "peak GiB (host)": f"{peaks[peer]:.2f}",
            "memory ratio": f"{peaks[peer] / peaks['torch']:.2f}",
            "first loss": f"{runs[0]['loss']:.6f}",
        }
        if facts["jax"]["peak"]:
            row["MFU"] = f"{facts['jax']['flops'] / medians[peer] / facts['jax']['peak']:.3f}"
        rows.append(row)
    teacher, student = arguments.teacher, arguments.student
    report(
        f"SiNGER step, {teacher} -> {student}, batch {arguments.batch}, {arguments.precision}",
        f"python -m benchmarks.step {' '.join(sys.argv[1:])}",
        rows,
        facts["jax"]["device"],
        ("jax", "flax", "torch", "timm"),
    )


if __name__ == "__main__":
    main()
