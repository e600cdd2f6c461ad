"""Summaries of patch norms relative to the image's median, which show a teacher's artifacts."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from singer_jax.methods.norms import ARTIFACT

LEAST_SHARE = 0.001
"""Smallest share of artifacts among the patches of a layer that has artifacts."""


@dataclasses.dataclass(frozen=True)
class NormSummary:
    """Summary of the patch norms of one layer.

    Attributes:
      layer: index of the block, from 0.
      median: median of all norms.
      percentile_99: 99th percentile of the ratios of each norm to the median of its image.
      largest: largest of these ratios.
      above_3: share of patches whose ratio is above 3.
      above_5: share of patches whose ratio is above 5.
    """

    layer: int
    median: float
    percentile_99: float
    largest: float
    above_3: float
    above_5: float

    @property
    def has_artifacts(self) -> bool:
        """True if at least one patch in a thousand is an artifact."""
        return self.above_3 >= LEAST_SHARE


class Removal(NamedTuple):
    """The artifacts of one layer and what a refinement can remove of them.

    Attributes:
      share: Share of their energy that lies in the null space.
      left: Length that is left of an artifact at best, in median patch norms.
      length: Its whole length beside the image's mean patch.
    """

    share: float
    left: float
    length: float


def over_median(norms: Float[np.ndarray, "*axes patches"]) -> Float[np.ndarray, "*axes patches"]:
    """Returns norms divided by the median of their image; an image of zeros stays zero."""
    median = np.median(norms, axis=-1, keepdims=True)
    return norms / np.where(median > 0, median, 1)


def artifacts(norms: Float[np.ndarray, "*axes patches"]) -> Bool[np.ndarray, "*axes patches"]:
    """Returns a mask of the patches that are artifacts."""
    return over_median(norms) > ARTIFACT


def summarise(norms: Float[np.ndarray, "layers images patches"]) -> list[NormSummary]:
    """Returns a summary for each layer."""
    found = []
    for layer, of_layer in enumerate(norms):
        ratios = over_median(of_layer)
        found.append(
            NormSummary(
                layer,
                float(np.median(of_layer)),
                float(np.percentile(ratios, 99)),
                float(ratios.max()),
                float(np.mean(ratios > 3)),
                float(np.mean(ratios > 5)),
            )
        )
    return found


def table(summaries: Sequence[NormSummary]) -> str:
    """Returns a line for each layer."""
    lines = [
        f"{'layer':>5}{'median norm':>13}{'99th pct/median':>17}{'largest/median':>16}"
        f"{'above 3':>9}{'above 5':>9}"
    ]
    lines += [
        f"{one.layer:>5}{one.median:>13.4g}{one.percentile_99:>17.2f}{one.largest:>16.2f}"
        f"{one.above_3:>9.2%}{one.above_5:>9.2%}"
        for one in summaries
    ]
    return "\n".join(lines)


def verdict(
    summaries: Sequence[NormSummary],
    distilled: Sequence[int],
    held: Sequence[Removal],
    null_space: str,
) -> str:
    """Returns a recommendation of a method, given the norms, in one line.

    Args:
      summaries: summary of every layer.
      distilled: indices of the layers to distil.
      held: for each distilled layer with artifacts, what the null space holds of them. The verdict
        gives the means of the shares and of the lengths.
      null_space: name of the null space.
    """
    layers = [one.layer for one in summaries if one.has_artifacts]
    most = max(one.above_3 for one in summaries)
    if not layers:
        return (
            f"no artifacts: at most {most:.2%} of a layer's patches are above 3 medians; "
            "use FitNet (method.name=fitnet)"
        )
    found = f"artifacts in {_layers(layers)} (up to {most:.2%} of the patches)"
    if not held:
        return (
            f"{found}, none of which is distilled ({_layers(distilled)} will be): use FitNet "
            "(method.name=fitnet), or set method.layers"
        )
    share, left, length = np.mean(held, axis=0)
    if left <= ARTIFACT:
        advice = (
            "SiNGER can remove them (method.name=singer); compare it with FitNet, which only clips"
        )
    elif share >= 0.5:
        advice = (
            "SiNGER can shorten them and clips the rest (method.name=singer); "
            "method.nullspace.threshold_type=energy chooses what is left"
        )
    else:
        advice = "SiNGER removes little of them: use FitNet, which clips them (method.name=fitnet)"
    return (
        f"{found}, of which the null space ({null_space}) holds {share:.0%} (left of an outlier at "
        f"best: {left:.1f} medians of {length:.1f}): {advice}"
    )


def _layers(layers: Sequence[int]) -> str:
    """Returns ascending numbers in words, such as `layers 3, 17 to 23`."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    parts = [f"{run[0]} to {run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs]
    return f"layer{'s' if len(layers) > 1 else ''} {', '.join(parts)}"
