"""HTML report of a run: one self-contained page."""

from __future__ import annotations

import base64
import functools
import hashlib
import html
import io
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from etils import epath
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from singer_jax.errors import shown
from singer_jax.io import limits
from singer_jax.io.files import write_text
from singer_jax.report.collect import LayerNorms, ModelMaps, Report, column_order

_FOLDER = Path(__file__).parent
# Colours that are readable on white and on black.
_INK = "#808890"
_MOST_PANELS = 500
_LONGEST_NAME = 200  # largest number of characters of a name in a plot
_NO_METADATA = dict.fromkeys(("Date", "Creator", "Format", "Type"))
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "singer_jax",
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "axes.facecolor": "none",
    "legend.framealpha": 0.0,
    "font.size": 9,
}


def write_page(file: epath.Path, report: Report) -> None:
    """Writes the page, which needs no network and no other file.

    Args:
      file: path of index.html; its folder is created.
      report: contents of the page.
    """
    sections = [
        _summary(report.summary),
        _section("Results", _table(report.results) + _paragraph(report.note)),
        _section("Patches", _maps()) if report.models else "",
        _section("Training", _training(report.rows)) if report.rows else "",
        _section("Patch norms before and after refinement", _histograms(report))
        if report.layers
        else "",
        _section("Null space", _spectra(report)) if report.layers else "",
        _section("Configuration", _config(report.config)),
    ]
    _write(file, report.title, sections, _data(report))


def write_comparison(
    file: epath.Path,
    rows: Mapping[str, Mapping[str, str]],
    curves: Mapping[str, Sequence[Mapping[str, float]]],
) -> None:
    """Writes the page of several runs: one table, and the curves of the first run of each row.

    Args:
      file: path of index.html; its folder is created.
      rows: formatted cells by row and column.
      curves: rows of metrics.jsonl, by row of the table.
    """
    names = column_order([row for of_run in curves.values() for row in of_run])
    shown = ["train/loss", *(name for name in names if name.startswith("eval/"))]

    lines = {
        metric: {
            name: points
            for name, of_run in curves.items()
            if len(points := _points(of_run, metric)) > 1
        }
        for metric in shown
    }

    def panel(axis: Axes, metric: str) -> None:
        for name, points in lines[metric].items():
            axis.plot(*zip(*points, strict=True), label=_plain(name.split(" (")[0]))
        axis.set(title=_plain(metric), xlabel="step")
        axis.legend(fontsize=6)

    plots = _plots([functools.partial(panel, metric=metric) for metric in shown if lines[metric]])
    sections = [_section("Results", _table(rows)), _section("Training", plots)]
    _write(file, "Comparison of runs", sections, {})


def _write(file: epath.Path, title: str, sections: Sequence[str], data: dict[str, Any]) -> None:
    script = (_FOLDER / "page.js").read_text()
    parts = {
        "title": html.escape(title),
        "style": (_FOLDER / "page.css").read_text(),
        "sections": "\n".join(filter(None, sections)),
        "data": json.dumps(data).replace("<", "\\u003c"),
        "script": script,
        # Even if an untrusted name became markup, the browser would run only this script.
        "sha256": base64.b64encode(hashlib.sha256(f"\n{script}\n".encode()).digest()).decode(),
    }
    # One substitution for all parts, since a name in one part may look like another's placeholder.
    page = re.sub(r"\{\{(\w+)\}\}", lambda m: parts[m[1]], (_FOLDER / "page.html").read_text())
    write_text(file, page)


def format_text(rows: Mapping[str, Mapping[str, str]]) -> str:
    """Returns the table as text for a terminal."""
    columns = column_order(list(rows.values()))
    cells = [["", *columns]]
    cells += [[name, *(row.get(column, "-") for column in columns)] for name, row in rows.items()]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns) + 1)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in cells
    )


def _section(title: str, body: str) -> str:
    anchor = title.lower().replace(" ", "-")
    return f'<section id="{anchor}"><h2>{html.escape(title)}</h2>{body}</section>'


def _paragraph(text: str) -> str:
    return f'<p class="note">{html.escape(text)}</p>' if text else ""


def _table(rows: Mapping[str, Mapping[str, float | None]]) -> str:
    if not rows:
        return _paragraph("Not evaluated yet: run the job evaluate into RUN/evaluation.")
    columns = column_order(list(rows.values()))
    head = "".join(f"<th>{html.escape(column)}</th>" for column in columns)
    body = ""
    for name, row in rows.items():
        cells = ""
        for column in columns:
            value = row.get(column)
            text = value if isinstance(value, str) else "-" if value is None else f"{value:.4g}"
            cells += f"<td>{html.escape(text)}</td>"
        body += f"<tr><th>{html.escape(name)}</th>{cells}</tr>"
    return f'<div class="scroll"><table><tr><th></th>{head}</tr>{body}</table></div>'


def _summary(rows: Mapping[str, str]) -> str:
    """Returns the models, methods and data of the run as a list; empty without any."""
    items = "".join(
        f"<dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd>" for name, value in rows.items()
    )
    return f"<dl>{items}</dl>" if items else ""


def _points(rows: Sequence[Mapping[str, float]], metric: str) -> list[tuple[float, float]]:
    """Returns the steps and values of a metric."""
    return [(row["step"], row[metric]) for row in rows if metric in row]


def _maps() -> str:
    """Returns the containers that page.js fills from the data."""
    return (
        '<p class="note">The maps show the patch tokens of the last block. Click a patch to see '
        "which patches are similar to it.</p>"
        '<div id="images" role="group" aria-label="image"></div>'
        '<div id="quantities" role="group" aria-label="quantity"></div>'
        '<div id="scale"><span></span><div></div><span></span></div>'
        '<p id="explanation" class="note"></p><div id="maps"></div>'
    )


def _plots(panels: Sequence[Callable[[Axes], Any]]) -> str:
    """Returns one SVG per panel, so that the panels wrap on a narrow screen."""
    limits.check("metrics.jsonl", len(panels), _MOST_PANELS, "panels")
    drawings = ""
    with matplotlib.rc_context(_STYLE):
        for panel in panels:
            figure = Figure(figsize=(3.6, 2.6), layout="constrained")
            figure.patch.set_alpha(0)
            panel(figure.subplots())
            buffer = io.StringIO()
            figure.savefig(buffer, format="svg", metadata=_NO_METADATA)
            drawing = buffer.getvalue()
            drawings += drawing[drawing.index("<svg") :]
    return f'<div class="plots">{drawings}</div>'


def _plain(text: str) -> str:
    """Returns a name with the characters escaped that matplotlib would typeset."""
    return shown(text[:_LONGEST_NAME]).replace("$", r"\$")


def _label_logarithmic(axis: Axes) -> None:
    """Labels a logarithmic axis with plain numbers, also between two powers of ten if few fit."""
    low, high = np.log10(axis.get_ylim())
    few = np.floor(high) - np.ceil(low) < 2
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
    axis.yaxis.set_minor_formatter("{x:g}" if few else NullFormatter())


def _training(rows: Sequence[Mapping[str, float]]) -> str:
    """Returns plots of loss terms, learning rate and evaluation metrics over the steps."""
    panels: dict[tuple[str, str], dict[str, str]] = {}  # by (title, scale): column names by label
    for name in column_order(list(rows)):
        group, _, rest = name.partition("/")
        student, _, metric = rest.rpartition("/")
        if group == "eval":  # val/loss, or NAME/val/loss for one of several students
            student, _, place = student.rpartition("/")
            metric = f"{place}/{metric}"
            panels.setdefault((metric, "linear"), {})[student or metric] = name
        elif metric == "loss" or metric.startswith("loss_"):
            # All loss terms of a single student share one panel.
            panels.setdefault((metric if student else "", "log"), {})[student or metric] = name
        elif metric == "learning_rate":
            panels.setdefault((metric, "linear"), {})[student or metric] = name

    points = {name: _points(rows, name) for of in panels.values() for name in of.values()}
    single = {
        f"{student} {metric}" if student and student != metric else metric: points[name][0]
        for (metric, _), of in panels.items()
        for student, name in of.items()
        if len(points[name]) == 1
    }
    panels = {
        which: lines
        for which, of in panels.items()
        if (lines := {label: name for label, name in of.items() if len(points[name]) > 1})
    }

    def panel(axis: Axes, which: tuple[str, str], columns: Mapping[str, str]) -> None:
        title, scale = which
        for label, name in columns.items():
            marker = "o" if len(points[name]) < 20 else ""
            line = zip(*points[name], strict=True)
            axis.plot(*line, marker=marker, markersize=3, label=_plain(label))
        axis.set(yscale=scale, xlabel="step", title=_plain(title or "loss terms"))
        if scale == "log":
            _label_logarithmic(axis)
        if set(columns) != {title}:
            axis.legend()

    plots = _plots(
        [functools.partial(panel, which=which, columns=of) for which, of in panels.items()]
    )
    once = {name: {"step": step, "value": value} for name, (step, value) in single.items()}
    return plots + (_paragraph("Recorded once:") + _table(once) if once else "")


def _histograms(report: Report) -> str:
    def panel(axis: Axes, layer: LayerNorms) -> None:
        bins = np.linspace(0, max(layer.before.max(), layer.after.max()), 60)
        for values, label in ((layer.before, "teacher"), (layer.after, "refined")):
            axis.hist(values, bins, histtype="step", label=label)
        axis.set(yscale="log", xlabel="patch norm", ylabel="patches", title=_plain(layer.name))
        axis.legend()

    def ratio(norms: Float[np.ndarray, " patches"]) -> float:
        return float(np.quantile(norms, 0.99) / np.median(norms))

    table = {
        layer.name: {
            "median, teacher": float(np.median(layer.before)),
            "median, refined": float(np.median(layer.after)),
            "p99/median, teacher": ratio(layer.before),
            "p99/median, refined": ratio(layer.after),
        }
        for layer in report.layers
    }
    return _plots([functools.partial(panel, layer=layer) for layer in report.layers]) + _table(
        table
    )


def _spectra(report: Report) -> str:
    def panel(axis: Axes, layer: LayerNorms) -> None:
        axis.semilogy(layer.singular_values)
        axis.axhline(layer.threshold, linestyle="--", color=_INK)
        _label_logarithmic(axis)
        axis.set(xlabel="index", ylabel="singular value", title=_plain(layer.name))

    table = {
        layer.name: {
            "threshold": layer.threshold,
            "singular values below": layer.null_dim,
            "all singular values": len(layer.singular_values),
        }
        for layer in report.layers
    }
    note = "The dashed line is the threshold. The null space is spanned by the directions below it."
    plots = _plots([functools.partial(panel, layer=layer) for layer in report.layers])
    return plots + _paragraph(note) + _table(table)


def _config(config: Mapping[str, Any]) -> str:
    text = html.escape(json.dumps(config, indent=2))
    return f"<details><summary>config.json</summary><pre>{text}</pre></details>"


def _data(report: Report) -> dict[str, Any]:
    """Returns the data that page.js draws: maps as bytes in base64, one after the other."""
    if not report.models:
        return {}
    norms = {m.name: np.linalg.norm(m.tokens, axis=-1) for m in report.models}
    relative = {name: values / np.median(values) for name, values in norms.items()}
    largest = max(float(np.quantile(values, 0.999)) for values in relative.values())
    lookup = {
        name: _bytes(matplotlib.colormaps[name](np.arange(256), bytes=True)[:, :3])
        for name in ("viridis", "magma")
    }
    models = []
    for model in report.models:
        unit = model.tokens / np.maximum(
            np.linalg.norm(model.tokens, axis=-1, keepdims=True), np.finfo(np.float32).tiny
        )
        similarity = np.einsum("ipd,iqd->ipq", unit, unit)
        models.append(
            {
                "name": model.name,
                "grid": list(model.grid),
                "norm": _bytes(_scaled(relative[model.name], 0, largest)),
                "cosine": None if model.cosine is None else _bytes(_scaled(model.cosine, 0, 1)),
                "similarity": _bytes(_scaled(similarity, 0, 1)),
                "pca": _bytes(_principal_colours(model)),
            }
        )
    images = report.images
    return {
        "images": len(images),
        "size": list(images.shape[1:3]),
        "pixels": [_png(image) for image in images],
        "largest": largest,
        "colours": lookup,
        "models": models,
    }


def _principal_colours(model: ModelMaps) -> np.ndarray:
    """Returns the first three principal components of all shown patches as red, green and blue."""
    from sklearn.decomposition import PCA

    images, patches, dim = model.tokens.shape
    flat = model.tokens.reshape(-1, dim)
    components = PCA(min(3, dim, len(flat))).fit_transform(flat)
    components = np.pad(components, ((0, 0), (0, 3 - components.shape[1])))
    low, high = np.quantile(components, [0.01, 0.99], axis=0)
    return _scaled(components, low, np.maximum(high, low + 1e-12)).reshape(images, patches, 3)


def _scaled(values: Float[np.ndarray, "..."], low: Any, high: Any) -> np.ndarray:
    return np.clip((values - low) / (high - low) * 255, 0, 255).round().astype(np.uint8)


def _bytes(values: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(values, np.uint8).tobytes()).decode()


def _png(image: np.ndarray) -> str:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
