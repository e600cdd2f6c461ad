"""Several methods at once: the weighted sum of their losses."""

from __future__ import annotations

from collections.abc import Mapping

from flax import nnx

from singer_jax.methods.base import Batch, Forward, Method, Scalars


class WeightedSum(Method):
    """Methods by name with their weights; terms and metrics are named `<method>_<term>`.

    Methods may read the same student block: each has adapters of its own.
    """

    def __init__(self, methods: Mapping[str, Method], weights: Mapping[str, float]) -> None:
        self.methods = nnx.Dict(methods)
        self.weights = tuple(weights.items())
        for which in ("teacher_layers", "student_layers"):
            layers = {layer for method in methods.values() for layer in getattr(method, which)}
            setattr(self, which, tuple(sorted(layers)))

    def loss(
        self, teacher: Forward | None, student: Forward, batch: Batch
    ) -> tuple[Scalars, Scalars]:
        """All terms, times the weight of their method."""
        terms: Scalars = {}
        metrics: Scalars = {}
        for name, weight in self.weights:
            its_terms, its_metrics = self.methods[name].loss(teacher, student, batch)
            terms |= {f"{name}_{term}": weight * value for term, value in its_terms.items()}
            metrics |= {f"{name}_{metric}": value for metric, value in its_metrics.items()}
        return terms, metrics

    def report(self, metrics: Mapping[str, float]) -> list[tuple[int, str]]:
        """What each method says."""
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
