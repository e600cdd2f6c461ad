"""One SiNGER training step against the same step in PyTorch with timm models.

  pip install ".[bench]" && pip install --no-deps timm torchvision==0.28.0
  python -m benchmarks.step --teacher vit_large_patch16_224 --student vit_tiny_patch16_224 --batch 4
  python -m benchmarks.step --breakdown --peers jax

All start from the same weights and see the same images; their first losses must agree. All reuse
the teacher's own next feature in the info loss, which the official code computes again, and
PyTorch's attention is its fused one (timm's default). Each runs in a process of its own and they
take turns, one step each, so that a noisy machine is noisy for all and nobody's waiting threads
slow the others. Printed: median seconds a step, peak memory of each process (of the device, where
there is one), the step's operations over the time that one product of large matrices takes for as
many, and ratios to the fastest PyTorch form.

Peers: `jax`, this project; `int8` and `fp8`, with a quantised teacher; `eager` and `compiled`,
PyTorch in the same precision (autocast); `official`, PyTorch in float32, as the official code runs.
Only models, methods, training and parallel are imported: no grain, clu, ml_collections, orbax or
TFDS.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

RANK, QUANTILE, OUTLIER_WEIGHT = 64, 0.97, 0.01
LEARNING_RATE, WEIGHT_DECAY = 1e-3, 1e-4


def changes(arguments: argparse.Namespace, weights: str, quantised: str | None) -> dict[str, Any]:
    """Settings of our step."""
    return {
        "teacher.model": arguments.teacher,
        "teacher.weights": weights,
        "teacher.precision": quantised,
        "student.model": arguments.student,
        "precision": arguments.precision,
        "batch_size": arguments.batch,
        "steps": 1000,
        "data.normalisation": "imagenet",
        "method.rank": RANK,
        "method.outlier_quantile": QUANTILE,
        "method.nullspace.init": "official",
        "optimizer.learning_rate": LEARNING_RATE,
        "optimizer.weight_decay": WEIGHT_DECAY,
        "schedule.name": "multistep",
        "schedule.milestones": (),
        "schedule.warmup_epochs": 0,
    }


def prepared(arguments: argparse.Namespace, weights: str, quantised: str | None) -> Any:
    """The run (`training.setup.Setups`) of our step."""
    from singer_jax.settings.settings import from_flat
    from singer_jax.training.settings import DistillSettings
    from singer_jax.training.setup import setup_students

    settings = from_flat(DistillSettings(), changes(arguments, weights, quantised))
    return setup_students(settings, 1000 * arguments.batch, 0)


def random_images(batch: int, size: int) -> np.ndarray:
    """[batch, size, size, 3] uint8."""
    return np.random.default_rng(0).integers(0, 256, (batch, size, size, 3), np.uint8)


def matmul_rate(precision: str) -> float:
    """Operations a second of a product of random square matrices."""
    import jax
    import jax.numpy as jnp

    size = 2048 if jax.default_backend() == "cpu" else 8192
    a, b = jax.random.normal(jax.random.key(0), (2, size, size), jnp.dtype(precision))
    product = jax.jit(jnp.matmul)
    product(a, b).block_until_ready()
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        last = [product(a, b) for _ in range(10)][-1]
        last.block_until_ready()
        seconds.append((time.perf_counter() - start) / 10)
    return 2 * size**3 / statistics.median(seconds)


def jax_step(
    arguments: argparse.Namespace, shared: Path, quantised: str | None = None
) -> tuple[Callable[[], float], Callable[[], int], dict]:
    """Our step; writes the student and the method's parts that the peers start from."""
    import jax
    from flax import nnx
    from safetensors.numpy import save_file

    from singer_jax.models.params import join
    from singer_jax.models.weights import to_timm
    from singer_jax.platform import parallel
    from singer_jax.training.flops import step_flops
    from singer_jax.training.program import compile_step

    parallel.start()
    if arguments.precision == "float32":
        jax.config.update("jax_default_matmul_precision", "highest")
    runs = prepared(arguments, str(shared / "teacher.safetensors"), quantised)
    run = runs.any
    teacher = runs.load_teacher()
    states = runs.init_states(teacher)
    state = states[""]

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

    images = random_images(arguments.batch, runs.image_size)
    np.save(shared / "images.npy", images)
    batch = parallel.put_batch(
        {"image": images, "label": np.zeros(arguments.batch, np.int32)},
        parallel.batch_sharding(run.mesh),
    )
    unlogged = np.bool_(False)  # as 49 of 50 steps
    program = compile_step(runs.students, run.mesh, states, teacher, batch)

    def step() -> float:
        nonlocal states
        states, metrics = program.step(states, teacher, batch, unlogged)
        jax.block_until_ready(states)
        return float(metrics[""]["loss"])

    def peak() -> int:
        on_device = jax.default_backend() != "cpu"
        return program.peak if on_device else resident_peak()

    flops = step_flops(runs.students, runs.states, runs.teacher, arguments.batch)
    facts = {"flops": flops, "device": jax.devices()[0].device_kind}
    return step, peak, facts | {"rate": matmul_rate(arguments.precision)}


def torch_step(
    arguments: argparse.Namespace, shared: Path, compiled: bool = False
) -> tuple[Callable[[], float], Callable[[], int], dict]:
    """The same step in PyTorch."""
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


def resident_peak() -> int:
    """Bytes that this process has held at most."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) * 1024


PEERS = {
    "jax": ("this project", jax_step, {}),
    "int8": ("this project, teacher in int8", jax_step, {"quantised": "int8"}),
    "fp8": ("this project, teacher in fp8", jax_step, {"quantised": "fp8"}),
    "eager": ("PyTorch, eager", torch_step, {}),
    "compiled": ("PyTorch, compiled", torch_step, {"compiled": True}),
    "official": ("PyTorch, eager, float32", torch_step, {}),
}
TORCH = ("eager", "compiled", "official")


@dataclasses.dataclass(frozen=True)
class Measured:
    """Of one peer: seconds of its timed steps, bytes at most, first loss, what else it said."""

    seconds: Sequence[float]
    peak: int
    loss: float
    facts: dict[str, Any]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def worker(arguments: argparse.Namespace) -> None:
    """One peer: a step for each line on standard input, a line of JSON after each."""
    _, make, kind = PEERS[arguments.peer]
    if arguments.peer == "official":
        arguments.precision = "float32"
    step, peak, facts = make(arguments, Path(arguments.shared), **kind)
    print(json.dumps(facts), flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        loss = step()
        seconds = time.perf_counter() - start
        print(json.dumps({"seconds": seconds, "loss": loss, "peak": peak()}), flush=True)


def measure(arguments: argparse.Namespace) -> dict[str, Measured]:
    """Starts the peers and lets them take turns; one that fails says why and is left out.

    Raises:
      SystemExit: ours failed, or the first losses do not agree.
    """
    settings = [
        f"--{name}={getattr(arguments, name)}"
        for name in ("teacher", "student", "batch", "precision")
    ]
    names = sorted(arguments.peers, key=list(PEERS).index)
    peers, facts = {}, {}
    found: dict[str, list[dict]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as shared:
        make_inputs = [sys.executable, "-m", "benchmarks.make_inputs", "weights"]
        subprocess.run(
            [*make_inputs, arguments.teacher, f"{shared}/teacher.safetensors"], check=True
        )

        def answer(name: str) -> dict | None:
            if line := peers[name].stdout.readline():
                return json.loads(line)
            print(f"{PEERS[name][0]}: failed, see above", file=sys.stderr)
            peers.pop(name)
            return None

        for name in names:  # one after the other: the first writes what the others read
            command = [sys.executable, "-m", "benchmarks.step", *settings]
            peers[name] = subprocess.Popen(
                [*command, "--peer", name, "--shared", shared],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"},
            )
            facts[name] = answer(name)
        for _ in range(arguments.warmup + arguments.rounds):
            for name in list(peers):
                peers[name].stdin.write("step\n")
                peers[name].stdin.flush()
                if said := answer(name):
                    found[name].append(said)
        for process in peers.values():
            process.stdin.close()
            process.wait()

    if "jax" not in peers:
        sys.exit("no step of this project was measured")
    expected = found["jax"][0]["loss"]
    for name in peers:
        # The others round otherwise: the official one not at all, a quantised teacher more.
        exact = arguments.precision == "float32" and name not in ("int8", "fp8")
        loss = found[name][0]["loss"]
        if not np.isclose(loss, expected, rtol=1e-3 if exact else 5e-2):
            sys.exit(f"{PEERS[name][0]} does not compute the same step: loss {loss}, {expected}")
    return {
        name: Measured(
            [said["seconds"] for said in found[name][arguments.warmup :]],
            max(said["peak"] for said in found[name]),
            found[name][0]["loss"],
            facts[name],
        )
        for name in peers
    }


def rows(arguments: argparse.Namespace, measured: dict[str, Measured]) -> list[dict[str, str]]:
    """Of the table."""
    from singer_jax.platform import chips

    best = min((m.median for name, m in measured.items() if name in TORCH), default=None)
    least = min((m.peak for name, m in measured.items() if name in TORCH), default=None)
    facts = measured["jax"].facts
    chip = chips.chip(facts["device"])
    found = []
    for name, one in measured.items():
        row = {
            "peer": PEERS[name][0],
            "median s/step": f"{one.median:.4g}",
            "min..max": f"{min(one.seconds):.4g}..{max(one.seconds):.4g}",
            "of PyTorch's fastest": f"{one.median / best:.2f}" if best else "",
            "images/s": f"{arguments.batch / one.median:.1f}",
            "of a product's rate": f"{facts['flops'] / one.median / facts['rate']:.0%}",
            "peak GiB": f"{one.peak / 2**30:.2f}",
            "of PyTorch's least": f"{one.peak / least:.2f}" if least else "",
            "first loss": f"{one.loss:.6f}",
        }
        if chip:
            row["MFU"] = f"{facts['flops'] / one.median / chip.bf16:.3f}"
        found.append(row)
    return found


def breakdown(arguments: argparse.Namespace) -> tuple[list[dict[str, str]], str]:
    """Operations, memory traffic and, of the teacher's pass and of the rest, time; and the device.

    The compiler may move a part's work into another's loop or fusion. Input is measured by
    `benchmarks.input`.
    """
    import jax

    from singer_jax.platform import hlo, parallel
    from singer_jax.training.flops import parts_flops
    from singer_jax.training.program import compile_step
    from singer_jax.training.step import PARTS

    parallel.start()
    if arguments.precision == "float32":
        jax.config.update("jax_default_matmul_precision", "highest")
    with tempfile.TemporaryDirectory() as folder:
        from benchmarks.make_inputs import write_weights

        weights = Path(folder) / "teacher.safetensors"
        write_weights(arguments.teacher, weights)
        runs = prepared(arguments, str(weights), None)
        teacher = runs.load_teacher()
    states, mesh = runs.init_states(teacher), runs.any.mesh
    images = random_images(arguments.batch, runs.image_size)
    examples = {"image": images, "label": np.zeros(arguments.batch, np.int32)}
    batch = parallel.put_batch(examples, parallel.batch_sharding(mesh))
    program = compile_step(runs.students, mesh, states, teacher, batch)
    step = program.step
    reads = runs.students.teacher_reads
    moved = hlo.moved(program.compiled.as_text(), (max(reads) + 1) / len(reads), PARTS)
    flops = parts_flops(runs.students, runs.states, runs.teacher, arguments.batch)
    teach = jax.jit(runs.students.teach).lower(teacher, batch).compile()

    times: dict[str, list[float]] = {"teacher": [], "all": []}
    for _ in range(arguments.warmup + arguments.rounds):
        start = time.perf_counter()
        jax.block_until_ready(teach(teacher, batch))
        between = time.perf_counter()
        states, _ = jax.block_until_ready(step(states, teacher, batch, np.bool_(False)))
        times["teacher"].append(between - start)
        times["all"].append(time.perf_counter() - between)
    seconds = {name: statistics.median(t[arguments.warmup :]) for name, t in times.items()}
    total = sum(flops.values())
    found = [
        {
            "part": part or "in none of them",
            "TFLOP": f"{flops.get(part, 0) / 1e12:.3f}",
            "of the operations": f"{flops.get(part, 0) / total:.1%}",
            "traffic GB": f"{moved.by_part.get(part, 0) / 1e9:.2f}",
            "s": f"{seconds[part]:.4g}, alone" if part in seconds else "",
        }
        for part in (*PARTS, "")
    ]
    found.append(
        {
            "part": "whole step",
            "TFLOP": f"{total / 1e12:.3f}",
            "of the operations": "",
            "traffic GB": f"{moved.traffic / 1e9:.2f}",
            "s": f"{seconds['all']:.4g}",
        }
    )
    return found, mesh.devices.flat[0].device_kind


def parser() -> argparse.ArgumentParser:
    """Of the command."""
    found = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    found.add_argument("--teacher", default="vit_small_patch16_224")
    found.add_argument("--student", default="vit_tiny_patch16_224")
    found.add_argument("--batch", type=int, default=16)
    found.add_argument("--rounds", type=int, default=7, help="timed steps of each, at least 5")
    found.add_argument("--warmup", type=int, default=2)
    found.add_argument("--precision", default="float32", choices=("float32", "bfloat16"))
    found.add_argument("--peers", nargs="+", default=["jax", "eager"], choices=list(PEERS))
    found.add_argument("--breakdown", action="store_true", help="our step by its parts")
    found.add_argument("--peer", choices=list(PEERS), help=argparse.SUPPRESS)
    found.add_argument("--shared", help=argparse.SUPPRESS)
    return found


def main() -> None:
    """Measures the peers, or our step's parts."""
    arguments = parser().parse_args()
    if arguments.peer:
        worker(arguments)
        return

    from benchmarks.results import report

    command = f"python -m benchmarks.step {' '.join(sys.argv[1:])}"
    what = f"{arguments.teacher} -> {arguments.student}, batch {arguments.batch}"
    if arguments.breakdown:
        table, device = breakdown(arguments)
        title = f"SiNGER step by its parts, {what}, {arguments.precision}"
        report(title, command, table, device, ("jax", "flax"))
        return
    measured = measure(arguments)
    table, device = rows(arguments, measured), measured["jax"].facts["device"]
    libraries = ("jax", "flax", *(("torch", "timm") if set(measured) & set(TORCH) else ()))
    report(f"SiNGER step, {what}, {arguments.precision}", command, table, device, libraries)


if __name__ == "__main__":
    main()
