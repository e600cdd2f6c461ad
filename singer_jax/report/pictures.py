"""Maps of patch norms and of the similarity to the teacher, as in the paper's Figure 2."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Float, UInt8
from matplotlib.figure import Figure

from singer_jax.io.files import replacing


def save_patch_maps(
    path: epath.Path,
    title: str,
    images: UInt8[np.ndarray, "images height width 3"],
    norms: Float[np.ndarray, "images rows columns"],
    cosine: Float[np.ndarray, "images rows columns"] | None,
) -> None:
    """Draws input, patch norms and cosine similarity to the teacher, one column per image.

    Args:
      path: path of the PNG file; its folder is created.
      title: name of the model.
      images: pixels as the model saw them.
      norms: norms of the last block's patch tokens.
      cosine: cosine similarity of the same tokens to the teacher's, -1 to 1; None for the teacher.
    """
    rows = [
        ("input", images, {}),
        ("patch norm", norms, {"vmin": float(norms.min()), "vmax": float(norms.max())}),
    ]
    if cosine is not None:
        rows.append(("cosine to teacher", cosine, {"vmin": 0.0, "vmax": 1.0, "cmap": "magma"}))
    size = (1.5 * len(images) + 1.2, 1.5 * len(rows) + 0.4)
    figure = Figure(figsize=size, layout="constrained")
    figure.suptitle(title)
    axes = figure.subplots(len(rows), len(images), squeeze=False)
    for row, (label, values, options) in zip(axes, rows, strict=True):
        for axis, value in zip(row, values, strict=True):
            shown = axis.imshow(value, **options)
            axis.set(xticks=[], yticks=[])
        row[0].set_ylabel(label)
        if options:
            figure.colorbar(shown, ax=row.tolist(), fraction=0.02, pad=0.01)
    with replacing(path) as file:
        figure.savefig(file, dpi=110)


def save_norm_maps(
    path: epath.Path,
    images: UInt8[np.ndarray, "images height width 3"],
    maps: Mapping[str, Float[np.ndarray, "images rows columns"]],
    largest: float | None = None,
) -> None:
    """Draws patch norms relative to each model's median: a row per image, a column per model.

    Args:
      path: path of the PNG file; its folder is created.
      images: pixels as the models saw them.
      maps: patch norms of each model or layer.
      largest: upper end of the shared colour bar, as a ratio to the median; None: the largest ratio
        of the first model.
    """
    figure = Figure(figsize=(1.75 * (len(maps) + 1), 1.8 * len(images) + 0.3), layout="constrained")
    axes = figure.subplots(len(images), len(maps) + 1, squeeze=False)
    ratios = {name: norms / np.median(norms) for name, norms in maps.items()}
    largest = float(next(iter(ratios.values())).max()) if largest is None else largest
    for row, image in enumerate(axes):
        image[0].imshow(images[row])
        for axis, values in zip(image[1:], ratios.values(), strict=True):
            shown = axis.imshow(values[row], vmin=0, vmax=largest)
        for axis in image:
            axis.set(xticks=[], yticks=[])
    for axis, name in zip(axes[0], ("input", *ratios), strict=True):
        axis.set_title(name.replace(", ", "\n", 1), fontsize=8)
    bar = figure.colorbar(shown, ax=axes.ravel().tolist(), fraction=0.02, pad=0.02)
    bar.set_label("patch norm / median", fontsize=8)
    with replacing(path) as file:
        figure.savefig(file, dpi=110)


def save_spectra(
    path: epath.Path,
    title: str,
    curves: Mapping[int, Mapping[str, Float[np.ndarray, " dim"]]],
    rows: Sequence[Mapping[str, Any]],
) -> None:
    """Draws the singular values of each layer, one line per source, and marks the thresholds.

    Args:
      path: path of the PNG file; its folder is created.
      title: name of the model.
      curves: singular values by layer and source, descending.
      rows: rows with `layer`, `source`, `tau`, `null_dim` and `dim`.
    """
    figure = Figure(figsize=(5 * len(curves), 4), layout="constrained")
    figure.suptitle(title)
    for axis, (layer, of_layer) in zip(
        figure.subplots(1, len(curves), squeeze=False)[0], curves.items(), strict=True
    ):
        for source, values in of_layer.items():
            (line,) = axis.semilogy(values, label=source)
            for row in rows:
                if (row["layer"], row["source"]) == (layer, source):
                    crossed = row["dim"] - row["null_dim"]
                    axis.plot(crossed, row["tau"], "o", color=line.get_color(), markersize=4)
        axis.set(title=f"layer {layer}", xlabel="index", ylabel="singular value")
        axis.legend()
    with replacing(path) as file:
        figure.savefig(file, dpi=110)
