"""Distillation methods by name."""

from singer_jax.errors import unknown
from singer_jax.methods.base import Batch, Constant, Forward, Method
from singer_jax.methods.fitnet import FitNet
from singer_jax.methods.singer import Singer
from singer_jax.methods.supervised import Supervised

METHODS: dict[str, type[Method]] = {
    "singer": Singer,
    "fitnet": FitNet,
    "supervised": Supervised,
}

__all__ = ["METHODS", "Batch", "Constant", "Forward", "Method", "lookup"]


def lookup(name: str) -> type[Method]:
    """The method of that name; `InputError` with the closest names if there is none."""
    if name not in METHODS:
        raise unknown("method", name, METHODS)
    return METHODS[name]
