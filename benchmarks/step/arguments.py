"""Command line of the benchmark."""

from __future__ import annotations

import argparse

from benchmarks.step.peers import PEERS


def parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    found = argparse.ArgumentParser(
        description="One SiNGER training step against the same step in PyTorch."
    )
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
