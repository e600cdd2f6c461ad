"""The peers of the benchmark, each in a process of its own, and their measurements."""

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
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.step.jax_step import jax_step
from benchmarks.step.torch_step import torch_step

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
    """Measurements of one peer.

    Attributes:
      seconds: seconds of each timed step.
      peak: peak memory in bytes.
      loss: first loss.
      facts: other facts that the peer printed.
    """

    seconds: Sequence[float]
    peak: int
    loss: float
    facts: dict[str, Any]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def worker(arguments: argparse.Namespace) -> None:
    """Runs one peer: a step for each line of standard input, and a line of JSON after each."""
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
    """Starts the peers and lets them take turns; a peer that fails is left out.

    Raises:
      SystemExit: this project's step failed, or the first losses do not agree.
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
        # The peers round differently.
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
    """Returns the rows of the table of all peers."""
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
            "time / fastest PyTorch": f"{one.median / best:.2f}" if best else "",
            "images/s": f"{arguments.batch / one.median:.1f}",
            "share of matmul rate": f"{facts['flops'] / one.median / facts['rate']:.0%}",
            "peak GiB": f"{one.peak / 2**30:.2f}",
            "memory / smallest PyTorch": f"{one.peak / least:.2f}" if least else "",
            "first loss": f"{one.loss:.6f}",
        }
        if chip:
            row["MFU"] = f"{facts['flops'] / one.median / chip.bf16:.3f}"
        found.append(row)
    return found
