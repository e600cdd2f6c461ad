"""Measures on one GPU, in parts, the numbers that are otherwise predicted: see accelerator.sh.

Each part runs in a process of its own for at most 100 s and writes each table at once, so that what
a part measured stays where it fails or takes too long. The parts run in the order of `PARTS`.
"""

from __future__ import annotations

import argparse
import dataclasses
import gzip
import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks import levers, step
from benchmarks.results import report
from benchmarks.step import jax_step

LONGEST = 100  # seconds of a part
TINY = "vit_tiny_patch16_224"
TOKENS = 197

Table = tuple[str, list[dict[str, Any]]]


def sizes(small: bool) -> argparse.Namespace:
    """Arguments of `benchmarks.step` for the step that all parts measure."""
    teacher, batch = (TINY, 2) if small else ("vit_large_patch16_224", 128)
    given = [f"--teacher={teacher}", f"--student={TINY}", f"--batch={batch}"]
    found = step.parser().parse_args([*given, "--precision=bfloat16", "--rounds=10", "--warmup=3"])
    found.depth = 2 if small else 0
    return found


def seconds_of(function: Callable, *given: Any, calls: int = 10) -> float:
    """Median time of a call in seconds, of calls that are dispatched one after the other."""
    import jax

    jax.block_until_ready(function(*given))
    found = []
    for _ in range(5):
        start = time.perf_counter()
        jax.block_until_ready([function(*given) for _ in range(calls)])
        found.append((time.perf_counter() - start) / calls)
    return statistics.median(found)


@dataclasses.dataclass
class Made:
    """A compiled step with random parameters."""

    program: Any
    states: Any
    teacher: Any
    batch: Any

    def seconds(self, rounds: int, synchronised: bool) -> float:
        """Time of a step in seconds, each waited for or all dispatched in a chain."""
        import jax
        import numpy as np

        for _ in range(3):
            self.run(np.bool_(False))
        jax.block_until_ready(self.states)
        each, start = [], time.perf_counter()
        for _ in range(rounds):
            began = time.perf_counter()
            self.run(np.bool_(False))
            if synchronised:
                jax.block_until_ready(self.states)
                each.append(time.perf_counter() - began)
        jax.block_until_ready(self.states)
        chained = (time.perf_counter() - start) / rounds
        return statistics.median(each) if synchronised else chained

    def run(self, logged: Any) -> Any:
        """Runs a step and returns its metrics."""
        self.states, metrics = self.program.step(self.states, self.teacher, self.batch, logged)
        return metrics


def made(arguments: argparse.Namespace, given: Mapping[str, Any]) -> Made:
    """Compiles the step, with the choices that the backend has now."""
    import jax
    import numpy as np
    from flax import nnx

    from singer_jax.models.vit import VisionTransformer
    from singer_jax.platform import parallel
    from singer_jax.settings.settings import from_flat
    from singer_jax.training.program import compile_step
    from singer_jax.training.settings import DistillSettings
    from singer_jax.training.setup import setup_students

    settings = from_flat(DistillSettings(), levers.changes(arguments) | given)
    with parallel.computing(settings.precision):
        runs = setup_students(settings, 1000 * arguments.batch, 0, weights_needed=False)
        model = runs.teacher_model

        @jax.jit
        def drawn() -> Any:
            own = VisionTransformer(model.network.spec.arch, model.policy, rngs=nnx.Rngs(0))
            return nnx.to_pure_dict(nnx.state(own))

        teacher = drawn()
        states = runs.init_states(teacher)
        images = jax_step.random_images(arguments.batch, runs.image_size)
        batch = {"image": images, "label": np.zeros(arguments.batch, np.int32)}
        batch = parallel.put_batch(batch, parallel.batch_sharding(runs.any.mesh))
        program = compile_step(runs.students, runs.any.mesh, states, teacher, batch)
    return Made(program, states, teacher, batch)


def rates(small: bool) -> Iterator[Table]:
    """Rates of the products of a ViT-L at 128 images, and times of both forms of GELU."""
    import jax
    import jax.numpy as jnp

    from singer_jax.models.layers import ACTIVATIONS
    from singer_jax.platform import parallel

    options = parallel.compiler_options(parallel.make_mesh(1))
    rows, dim = (2 * TOKENS, 64) if small else (128 * TOKENS, 1024)
    x = jax.random.normal(jax.random.key(0), (rows, dim), jnp.bfloat16)
    found = []
    for width in (dim, 3 * dim, 4 * dim):
        kernel = jax.random.normal(jax.random.key(1), (dim, width), jnp.bfloat16)
        bias = jnp.zeros(width, jnp.bfloat16)
        product = jax.jit(lambda x, kernel, bias: x @ kernel + bias, compiler_options=options)
        seconds = seconds_of(product, x, kernel, bias)
        rate = 2 * rows * dim * width / seconds / 1e12
        name = f"[{rows},{dim}] x {width}, bias"
        found.append({"what": name, "ms": f"{1e3 * seconds:.4f}", "TFLOP/s": f"{rate:.4g}"})
    tanh = lambda x: jax.nn.gelu(x, approximate=True)  # noqa: E731
    for name, gelu in (("exact", ACTIVATIONS["gelu"]), ("tanh", tanh)):
        both = jax.jit(
            lambda x, kernel, bias, gelu=gelu: gelu(x @ kernel + bias), compiler_options=options
        )
        seconds = seconds_of(both, x, kernel, bias)
        rate = 2 * rows * dim * width / seconds / 1e12
        name = f"[{rows},{dim}] x {width}, bias, {name} GELU"
        found.append({"what": name, "ms": f"{1e3 * seconds:.4f}", "TFLOP/s": f"{rate:.4g}"})
    yield "Rates of products in bfloat16", found


def host(small: bool) -> Iterator[Table]:
    """The default step, synchronised and chained: the difference is time of the host."""
    own = made(sizes(small), {})
    rounds = 3 if small else 20
    found = {
        name: own.seconds(rounds, wait) for name, wait in (("synchronised", True), ("chained", 0))
    }
    found["host"] = found["synchronised"] - found["chained"]
    yield "SiNGER step", [{"what": key, "ms": f"{1e3 * s:.2f}"} for key, s in found.items()]
    yield "Trace of three steps", traced(own)


def traced(own: Made) -> list[dict[str, str]]:
    """Time of the device by part of the step, from a trace of three steps."""
    import jax
    import numpy as np

    from singer_jax.platform import hlo
    from singer_jax.training.step import PARTS

    program = hlo.Program(own.program.compiled.as_text(), 1, PARTS)
    parts = {
        one.name: program.part(one) or "other"
        for instructions in program.computations.values()
        for one in instructions
    }
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, create_perfetto_trace=True):
            for _ in range(3):
                own.run(np.bool_(False))
            jax.block_until_ready(own.states)
        (file,) = Path(folder).rglob("perfetto_trace.json.gz")
        events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
    totals, count = Counter(), Counter()
    for event in events:
        name = str(event.get("args", {}).get("hlo_op", ""))
        if event.get("ph") == "X" and name:
            part = parts.get(name, "unknown")
            totals[part] += event["dur"] / 3e3
            count[part] += 1
    if not totals:
        return [{"part": "no kernels in the trace", "kernels": "", "ms a step": ""}]
    return [
        {"part": part, "kernels": f"{count[part] / 3:.0f}", "ms a step": f"{ms:.2f}"}
        for part, ms in totals.most_common()
    ]


def chosen(default: Any, number: int, small: bool) -> dict[str, Any]:
    """Makes the backend choose what a row of `benchmarks.levers` does; returns its settings."""
    from singer_jax.platform import backends

    choices, given = default, {}
    for _, own, settings in levers.LEVERS[: number + 1]:
        choices, given = dataclasses.replace(choices, **own), given | settings
    if small:  # the CPU stands in, without the options of another compiler
        choices = dataclasses.replace(choices, compiler_options=())
    backends._CHOICES |= {"gpu": choices, "cpu": choices} if small else {"gpu": choices}
    return given


def lever(number: int, small: bool) -> Iterator[Table]:
    """The step after one more change of `benchmarks.levers`."""
    from singer_jax.platform import backends

    given = chosen(backends.choices("gpu"), number, small)
    own, rounds = made(sizes(small), given), 3 if small else 20
    found = {
        name: own.seconds(rounds, wait) for name, wait in (("synchronised", 1), ("chained", 0))
    }
    row = {f"ms, {name}": f"{1e3 * seconds:.2f}" for name, seconds in found.items()}
    yield "Levers, cumulative", [{"lever": levers.LEVERS[number][0]} | row]


def checks(small: bool) -> Iterator[Table]:
    """Loss and gradient norm of each lever against float32 on the same device.

    The compiler options and forms of the GPU can change numbers, and cuBLASLt's bias epilogue has
    known bugs. The depth is 4, so that all programs compile in time.
    """
    import numpy as np

    from singer_jax.platform import backends

    arguments = sizes(small)
    arguments.batch = 2 if small else 16
    arguments.depth = 2 if small else 4
    forms = [("float32", "float32", 0)]
    forms += [(f"bfloat16, {own[0]}", "bfloat16", n) for n, own in enumerate(levers.LEVERS)]
    exact: dict[str, float] = {}
    default = backends.choices("gpu")
    for title, precision, number in forms:
        given = chosen(default, number, small)
        arguments.precision = precision
        metrics = made(arguments, given).run(np.bool_(False))[""]
        found = {key: float(value) for key, value in metrics.items() if "loss" in key}
        found["grad_norm"] = float(metrics["grad_norm"])
        exact = exact or found
        off = {key: f"{value / exact[key] - 1:+.3%}" for key, value in found.items() if exact[key]}
        yield "Losses and gradient norm against float32", [{"form": title} | off]


def peers(small: bool, names: tuple[str, ...] = ("jax", *step.TORCH)) -> Iterator[Table]:
    """The default step against PyTorch in the same run."""
    arguments = sizes(small)
    torch = importlib.util.find_spec("torch") and importlib.util.find_spec("timm")
    arguments.peers = [name for name in names if torch or name not in step.TORCH]
    measured = step.measure(arguments)
    yield "SiNGER step against its peers", step.rows(arguments, measured)


def quantised(small: bool) -> Iterator[Table]:
    """The step with a quantised teacher."""
    yield from peers(small, ("jax", "int8", "fp8"))


def job(small: bool) -> Iterator[Table]:
    """The job `distill` from JPEG-free data, with its loader, and its rows of metrics."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = sizes(small)
        weights = f"{folder}/teacher.safetensors"
        made_inputs = [sys.executable, "-m", "benchmarks.make_inputs", "weights"]
        subprocess.run([*made_inputs, arguments.teacher, weights], check=True)
        given = {
            "teacher.model": arguments.teacher,
            "teacher.weights": weights,
            "data.source": "digits",
            "batch_size": arguments.batch,
            "steps": 4 if small else 40,
            "log.every_steps": 2 if small else 10,
        }
        command = [sys.executable, "-m", "singer_jax.main", "--config=configs/singer_vitl_vitt.py"]
        command += [f"--config.{key}={value}" for key, value in given.items()]
        subprocess.run([*command, f"--workdir={folder}/run"], check=True, stdout=sys.stderr)
        rows = [
            json.loads(x) for x in Path(folder, "run", "metrics.jsonl").read_text().splitlines()
        ]
    shown = ("step", "train/images_per_second", "train/mfu", "train/loss")
    yield "Job distill", [{name: row.get(name, "") for name in shown} for row in rows]


def probe(small: bool) -> Iterator[Table]:
    """Rate of the probe's feature extraction, chained."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from singer_jax.models.architecture import ComputePolicy
    from singer_jax.models.vit import VisionTransformer
    from singer_jax.models.zoo import lookup

    arch = lookup(TINY).arch
    policy = ComputePolicy(jnp.bfloat16, jnp.bfloat16)
    graph, params = nnx.split(VisionTransformer(arch, policy, rngs=nnx.Rngs(0)))
    count = 2 if small else 256
    images = jnp.zeros((count, *arch.img_size, 3), jnp.bfloat16)
    features = jax.jit(lambda p, x: nnx.merge(graph, p).features_at(x, (arch.depth - 1,)))
    seconds = seconds_of(features, params, images, calls=2 if small else 10)
    row = {"images": count, "ms": f"{1e3 * seconds:.3f}", "images/s": f"{count / seconds:.0f}"}
    yield "Feature extraction of a probe, ViT-Ti", [row]


PARTS: dict[str, Callable[[bool], Iterator[Table]]] = {
    "rates": rates,
    "host": host,
    **{f"lever{n}": (lambda small, n=n: lever(n, small)) for n in range(len(levers.LEVERS))},
    "checks": checks,
    "peers": peers,
    "quantised": quantised,
    "job": job,
    "probe": probe,
}


def in_process(part: str, small: bool) -> list[Table]:
    """Runs a part in a process of its own; returns the tables that it wrote before its end."""
    command = [sys.executable, "-m", "benchmarks.accelerator", "--part", part]
    command += ["--small"] if small else []
    with tempfile.TemporaryFile("w+") as output:
        began, failed = time.perf_counter(), ""
        process = subprocess.Popen(command, stdout=output, start_new_session=True)
        try:
            failed = f"status {status}" if (status := process.wait(LONGEST)) else ""
        except subprocess.TimeoutExpired:
            failed = f"more than {LONGEST} s"
            stop(process)
        took = time.perf_counter() - began
        output.seek(0)
        lines = [line for line in output.read().splitlines() if line.startswith('["')]
    print(f"\n{part}: {took:.0f} s{', ' if failed else ''}{failed}", flush=True)
    return [tuple(json.loads(line)) for line in lines]


def stop(process: subprocess.Popen) -> None:
    """Ends a part with the processes that it started."""
    import os
    import signal

    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def main() -> None:
    """Measures the parts and prints each table, or writes the tables of one part as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", help=f"{', '.join(PARTS)}; none: all of them")
    parser.add_argument("--append", action="store_true", help="append to benchmarks/results")
    parser.add_argument("--small", action="store_true", help="sizes for a CPU")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if unknown := set(arguments.parts) - set(PARTS):
        parser.error(f"unknown part {min(unknown)!r}; give some of {', '.join(PARTS)}")
    if arguments.part:
        for table in PARTS[arguments.part](arguments.small):
            print(json.dumps(table), flush=True)
        return
    command = f"bash benchmarks/accelerator.sh {' '.join(sys.argv[1:])}".strip()
    names = ("jax", "flax", "torch", "timm", "qwix")
    libraries = [name for name in names if importlib.util.find_spec(name)]
    device = device_kind()
    for part in arguments.parts or PARTS:
        for title, rows in in_process(part, arguments.small):
            print(f"\n{title}")
            report(title, command, rows, device, libraries, arguments.append)
            sys.stdout.flush()


def device_kind() -> str:
    """Kind of the first device, from a process that leaves its memory free."""
    program = "import jax; print(jax.devices()[0].device_kind)"
    done = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    return done.stdout.strip()


if __name__ == "__main__":
    main()
