"""The weighted sum of the losses of several methods."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from flax import nnx

from singer_jax.methods.base import Batch, Method, ModelFeatures, Scalars
from singer_jax.settings.settings import Settings


@dataclasses.dataclass(frozen=True)
class WeightedSumSettings(Settings):
    """Settings of a weighted sum: the weight and the settings of each method."""

    methods: tuple[tuple[float, Settings], ...]


class WeightedSum(Method):
    """A weighted sum of methods; its terms and metrics are named `<method>_<term>`.

    Summed methods may distil the same student block, because each has its own adapters. Two terms
    of one method may not, because they would share an adapter; that method raises an error.
    """

    def __init__(self, methods: Mapping[str, Method], weights: Mapping[str, float]) -> None:
        self.methods = nnx.Dict(methods)
        self.weights = tuple(weights.items())
        for which in ("teacher_layers", "student_layers"):
            layers = {layer for method in methods.values() for layer in getattr(method, which)}
            setattr(self, which, tuple(sorted(layers)))

    @property
    def teacher_reads(self) -> tuple[int, ...]:
        """Teacher blocks that any of the methods reads."""
        return tuple(sorted({layer for m in self.methods.values() for layer in m.teacher_reads}))

    def loss(self, teacher: ModelFeatures | None, student: ModelFeatures, batch: Batch) -> Scalars:
        """Returns all terms, each times the weight of its method."""
        return {
            f"{name}_{term}": weight * value
            for name, weight in self.weights
            for term, value in self.methods[name].loss(teacher, student, batch).items()
        }

    def observe(self, teacher: ModelFeatures | None) -> dict[str, Any]:
        """Returns what each method observes, by name of the method."""
        found = {name: method.observe(teacher) for name, method in self.methods.items()}
        return {name: means for name, means in found.items() if means}

    def absorb(self, means: dict[str, Any]) -> None:
        """Passes the means of each method to it."""
        for name, own in means.items():
            self.methods[name].absorb(own)

    def diagnose(self, teacher: ModelFeatures | None) -> Scalars:
        """Returns the metrics of all methods."""
        return {
            f"{name}_{metric}": value
            for name, _ in self.weights
            for metric, value in self.methods[name].diagnose(teacher).items()
        }

    def report(self, metrics: Mapping[str, float]) -> list[tuple[int, str]]:
        """Returns the lines of each method, each starting with the method's name."""
        lines = []
        for name, _ in self.weights:
            its_metrics = {
                key.removeprefix(f"{name}_"): value
                for key, value in metrics.items()
                if key.startswith(f"{name}_")
            }
            lines += [
                (level, f"{name}: {line}") for level, line in self.methods[name].report(its_metrics)
            ]
        return lines
