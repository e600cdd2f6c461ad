"""Everything that was only predicted, measured on one accelerator: see accelerator.sh.

Each part runs in a process of its own; one that fails or takes too long is said to be not measured,
and the others go on. The most important come first, since accelerator.sh ends after 8 minutes.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
import time

from benchmarks import step
from benchmarks.results import report

NOT_MEASURED = "not measured"


def blocks(images: int) -> dict[str, float]:
    """Seconds of a ViT-L block, forward and backward, with and without fused attention."""
    import dataclasses
    from unittest import mock

    import jax
    import jax.numpy as jnp
    from flax import nnx

    from singer_jax.models import attention, layers
    from singer_jax.models.architecture import ComputePolicy
    from singer_jax.models.vit import VisionTransformer
    from singer_jax.models.zoo import lookup

    arch = dataclasses.replace(lookup("vit_large_patch16_224").arch, depth=1)
    x = jax.random.normal(jax.random.key(0), (images, 197, arch.embed_dim), jnp.bfloat16)
    found = {}
    for name, fused in (("fused", True), ("plain", False)):
        if fused and not attention.has_fused_attention():
            continue
        with mock.patch.object(layers, "has_fused_attention", lambda fused=fused: fused):
            model = VisionTransformer(
                arch, ComputePolicy(jnp.bfloat16, jnp.bfloat16), rngs=nnx.Rngs(0)
            )
        graph, params = nnx.split(model)

        def loss(params, x, graph=graph):  # noqa: ANN001, ANN202
            y = nnx.merge(graph, params).apply_block(0, x)
            return jnp.mean(jnp.square(y.astype(jnp.float32)))

        gradient = jax.jit(jax.grad(loss, argnums=(0, 1)))
        jax.block_until_ready(gradient(params, x))
        seconds = []
        for _ in range(7):
            start = time.perf_counter()
            jax.block_until_ready([gradient(params, x) for _ in range(5)])
            seconds.append((time.perf_counter() - start) / 5)
        found[name] = statistics.median(seconds)
    return found


def in_process(call: str, seconds: float) -> object | None:
    """What a call of this module returns, in a process of its own; None where it fails."""
    program = f"import json; from benchmarks import accelerator as a; print(json.dumps(a.{call}))"
    try:
        done = subprocess.run(
            [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, timeout=seconds
        )
    except subprocess.TimeoutExpired:
        print(f"{call}: more than {seconds:.0f} s", file=sys.stderr)
        return None
    return json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else None


def main() -> None:
    """Measures, and prints targets beside measurements."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--append", action="store_true", help="append to benchmarks/results")
    parser.add_argument("--small", action="store_true", help="sizes for a CPU")
    arguments = parser.parse_args()
    tiny = "vit_tiny_patch16_224"
    teacher, batch = (tiny, 2) if arguments.small else ("vit_large_patch16_224", 128)
    peers = ["jax"]
    if importlib.util.find_spec("torch") and importlib.util.find_spec("timm"):
        peers += step.TORCH
    sizes = [f"--teacher={teacher}", f"--student={tiny}", f"--batch={batch}"]
    sizes += ["--precision=bfloat16", "--rounds=10", "--warmup=3"]
    settings = step.parser().parse_args([*sizes, "--peers", *peers])
    measured = step.measure(settings)
    table, device = step.rows(settings, measured), measured["jax"].facts["device"]
    command = f"bash benchmarks/accelerator.sh {' '.join(sys.argv[1:])}".strip()
    libraries = [
        name for name in ("jax", "flax", "torch", "timm", "qwix") if importlib.util.find_spec(name)
    ]
    keep = arguments.append

    def tell(title: str, rows: list[dict[str, str]]) -> None:
        print(f"\n{title}", flush=True)
        report(title, command, rows, device, libraries, keep)

    what = f"{teacher} -> {tiny}, batch {batch}, bfloat16"
    tell(f"SiNGER step, {what}", table)
    ours, rate = measured["jax"].median, measured["jax"].facts["rate"]

    def faster(than: str) -> str:
        return f"{measured[than].median / ours:.2f} x" if than in measured else NOT_MEASURED

    share = measured["jax"].facts["flops"] / ours / rate
    seconds = in_process(f"blocks({2 if arguments.small else 128})", 90) or {}
    both = "fused" in seconds
    tell(
        "Targets",
        [
            {"what": what, "target": target, "measured": found}
            for what, target, found in (
                (
                    f"share of the rate of a bfloat16 product, {rate / 1e12:.4g} TFLOP/s",
                    "55 % (aim 70)",
                    f"{share:.1%}",
                ),
                ("than compiled PyTorch", "1.1 x (aim 1.5)", faster("compiled")),
                ("than eager PyTorch in bfloat16", "", faster("eager")),
                ("than the official eager float32 step", "1.5 x (aim 5)", faster("official")),
                (
                    "ViT-L block with gradient, fused attention",
                    "below 1 of the plain form",
                    f"{seconds['fused'] / seconds['plain']:.2f}" if both else NOT_MEASURED,
                ),
            )
        ],
    )
    parts = subprocess.run(
        [sys.executable, "-c", "from benchmarks import accelerator as a; a.parts()", *sizes],
        stdout=subprocess.PIPE,
        text=True,
    )
    if parts.returncode == 0:
        tell(f"SiNGER step by its parts, {what}", json.loads(parts.stdout.splitlines()[-1]))
    if importlib.util.find_spec("qwix"):
        settings.peers = ["jax", "int8", "fp8"]
        tell(f"SiNGER step, quantised teacher, {what}", step.rows(settings, step.measure(settings)))
    else:
        print(f"quantised teacher: {NOT_MEASURED}, qwix is missing")


def parts() -> None:
    """`step.breakdown` as one line of JSON."""
    print(json.dumps(step.breakdown(step.parser().parse_args())[0]))


if __name__ == "__main__":
    main()
