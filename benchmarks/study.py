"""STUDY.md and its plot from the results of the job `study`; the same file gives the same bytes.

  python -m benchmarks.study runs/study/results.jsonl runs/study_real/results.jsonl
  python -m benchmarks.study          # again from the results that are kept here

The first keeps the results, of one study or of several, as benchmarks/study.jsonl.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import scipy.stats
from matplotlib.figure import Figure

HERE = Path(__file__).parent
KEPT, PAGE, PLOT = HERE / "study.jsonl", HERE / "STUDY.md", HERE / "study.svg"
AGAINST = ("fitnet", "fitnet_final_norm")


class Measure(NamedTuple):
    """A column: its key, its heading, digits behind the point, and which way is better."""

    key: str
    heading: str
    digits: int
    better: int = 0


SCORES = (
    Measure("linear_top1", "linear top-1, %", 1, +1),
    Measure("knn_top1", "kNN top-1, %", 1, +1),
    Measure("miou", "mIoU, %", 1, +1),
    Measure("depth_rmse", "depth RMSE, m", 3, -1),
)
LIKENESS = (
    Measure("norm_ratio", "norm ratio", 2),
    Measure("cosine_to_clean", "cosine to clean teacher", 3),
    Measure("cosine_to_clean_marked", "the same, marked patches", 3),
)
TARGET = (
    Measure("target_norm_ratio", "norm ratio of the target", 2),
    Measure("removed_share", "planted energy removed", 2),
    Measure("next_block_changed", "next block's output changed", 2),
)
OF_TEACHER = (
    *SCORES,
    Measure("norm_ratio_first", "norm ratio, first distilled block", 2),
    Measure("norm_ratio", "last block", 2),
    Measure("planted_length", "planted length", 1),
    Measure("planted_in_null_space", "of its energy in the null space", 2),
)

# Of the teacher of `configs/study.py:real` whose results are kept.
OF_GIVEN = (
    "`given` is a real one as it is: a ViT-S/14 in DINOv2's architecture and timm's layout, which",
    "others trained on to find what is salient in photos. It sees scenes of 84 x 84 pixels, and it",
    "has no outliers.",
    "",
)

Row = dict[str, Any]
Group = dict[int, Row]
"""Rows of one student of one teacher by seed."""


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95 % interval by Student's t; NaN of a single value."""
    count = len(values)
    if count < 2:
        return float(np.mean(values)), math.nan
    error = np.std(values, ddof=1) / math.sqrt(count)
    return float(np.mean(values)), float(scipy.stats.t.ppf(0.975, count - 1) * error)


def paired(rows: Group, other: Group, key: str) -> tuple[float, float]:
    """`interval` of the differences between runs of the same seed."""
    seeds = sorted(rows.keys() & other.keys())
    return interval([rows[seed][key] - other[seed][key] for seed in seeds])


def name_of(row: Row) -> str:
    """Of a student; one of a cleaned teacher is named with what cleaned it."""
    return f"{row['student']} ({row['clean']})" if row["clean"] else row["student"]


def groups_of(rows: Iterable[Row], teacher: str) -> dict[str, Group]:
    """Students of a teacher by name, in the order of the file."""
    found: dict[str, Group] = {}
    for row in rows:
        if row["teacher"] == teacher and row["student"]:
            found.setdefault(name_of(row), {})[row["seed"]] = row
    return found


def number(mean: float, half: float, digits: int, sign: bool = False) -> str:
    """`12.3 ± 0.4`."""
    text = f"{mean:{'+' if sign else ''}.{digits}f}"
    return text if math.isnan(half) else f"{text} ± {half:.{digits}f}"


def table(header: Sequence[str], body: Iterable[Sequence[str]]) -> list[str]:
    """Lines of Markdown."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return [*lines, *("| " + " | ".join(cells) + " |" for cells in body), ""]


def means(groups: Mapping[str, Group], measures: Sequence[Measure]) -> list[str]:
    """A row a student; students without any of the measures are left out."""
    body = []
    for name, group in groups.items():
        cells = []
        for measure in measures:
            values = [
                row[measure.key] for row in group.values() if row.get(measure.key) is not None
            ]
            cells.append(number(*interval(values), measure.digits) if values else "")
        if any(cells):
            body.append([name, str(len(group)), *cells])
    return table(["student", "seeds", *(m.heading for m in measures)], body)


def differences(groups: Mapping[str, Group], against: str) -> list[str]:
    """Paired differences to one student; bold where the interval leaves out 0."""
    body = []
    for name, group in groups.items():
        if name == against:
            continue
        cells = []
        for measure in SCORES:
            mean, half = paired(group, groups[against], measure.key)
            text = number(mean, half, measure.digits, sign=True)
            cells.append(f"**{text}**" if abs(mean) > half else text)
        body.append([name, *cells])
    return table([f"minus {against}", *(m.heading for m in SCORES)], body)


def findings(groups: Mapping[str, Group], against: str) -> list[str]:
    """Who is better and worse than one student, in a sentence a measure."""
    lines = []
    for measure in SCORES:
        better, worse = [], []
        for name, group in groups.items():
            mean, half = paired(group, groups[against], measure.key) if name != against else (0, 0)
            if abs(mean) > half:
                (better if mean * measure.better > 0 else worse).append((name, mean))
        told = [
            f"{word} {', '.join(f'{n} ({m:+.{measure.digits}f})' for n, m in found)}"
            for word, found in (("better", better), ("worse", worse))
            if found
        ]
        lines.append(f"- {measure.heading}: {'; '.join(told) or 'no student differs'}.")
    return [*lines, ""]


def settled(groups: Mapping[str, Group], least: int = 5) -> dict[str, Group]:
    """Students with enough seeds to be compared."""
    return {name: group for name, group in groups.items() if len(group) >= least}


def plot(rows: Sequence[Row], teachers: Sequence[str], path: Path) -> None:
    """Paired differences to FitNet, a column a measure and a row a teacher."""
    with matplotlib.rc_context({"svg.hashsalt": "study", "font.size": 8}):
        shown = (SCORES[0], SCORES[2], SCORES[3])
        figure = Figure(figsize=(10, 2.6 * len(teachers)), layout="constrained")
        axes = figure.subplots(len(teachers), len(shown), squeeze=False)
        for teacher, line in zip(teachers, axes, strict=True):
            groups = settled(groups_of(rows, teacher))
            names = [name for name in groups if name != AGAINST[0]]
            for measure, axis in zip(shown, line, strict=True):
                found = [paired(groups[n], groups[AGAINST[0]], measure.key) for n in names]
                centre, half = np.array(found).T
                axis.errorbar(centre, range(len(names)), xerr=half, fmt="o", markersize=3)
                axis.axvline(0, color="grey", linewidth=0.8)
                axis.set_yticks(range(len(names)), names if axis is line[0] else [])
                axis.invert_yaxis()
                if teacher == teachers[0]:
                    axis.set_title(f"{measure.heading}, minus {AGAINST[0]}")
            line[0].set_ylabel(teacher)
        figure.savefig(path, metadata={"Date": None, "Creator": None})


def unconverged(rows: Sequence[Row]) -> list[str]:
    """How far the best student of each teacher is from it, in a sentence."""
    key, told = "linear_top1", []
    for own in (row for row in rows if not row["student"]):
        groups = settled(groups_of(rows, own["teacher"])).values()
        reached = [np.mean([row[key] for row in group.values()]) for group in groups]
        if reached:
            told.append(f"{max(reached):.0f} of {own[key]:.0f} % ({own['teacher']})")
    return [
        "- Students that have converged. Linear top-1 of the best, and of its teacher:",
        f"  {', '.join(told)}. A ranking of students that have seen few",
        "  images is one of how fast they learn, too.",
    ]


def page(rows: Sequence[Row]) -> str:
    """STUDY.md."""
    teachers = list(dict.fromkeys(row["teacher"] for row in rows))
    compared = [
        teacher for teacher in teachers if set(AGAINST) <= set(settled(groups_of(rows, teacher)))
    ]
    lines = [
        "# Does it work, and when",
        "",
        "Made by `python -m benchmarks.study` from `benchmarks/study.jsonl`, the results of",
        "`python -m singer_jax.main --config=configs/study.py`, which says every size. Nothing",
        "here is the paper's, and nothing is of a real large model.",
        "",
        "## Question and design",
        "",
        "Does refining a teacher's features in a null space beat what else people do about tokens",
        "of huge norm, where there are such tokens, and what does it cost where there are none?",
        "",
        "A small transformer is trained to classify generated scenes (`data.source=scenes`). Each",
        "teacher below is that one trained on while a vector is added to a few patches of every",
        "image, as one more neuron of the first distilled block's MLP would write it: planted",
        "artifacts, of which direction, place and size are known. The name says them: direction",
        "(random, or the most null or most visible one for the next block by the paper's linear",
        "map), place (random patches, or background: those whose pixels vary least), and about how",
        "many medians long the patch becomes. `none` was trained on without. Students see images",
        "without labels. All of a cell learn in one run from the same teacher pass. Names:",
        "`fitnet_SPACE` is `method.match.space`, `fitnet_clip` `method.match.clip`; what stands in",
        "brackets cleaned the teacher",
        "(`planted`: the vector was subtracted, the ceiling; `registers` looked for its neurons).",
        "",
        *(OF_GIVEN if "given" in teachers else ()),
        "Linear top-1, mIoU and depth are linear probes in closed form (ridge regression) on test",
        "scenes, of the class token and of the patches. Dense scores leave out the marked",
        "patches, so that an artifact which follows the background tells nothing. Intervals are",
        "95 % by Student's t over seeds; differences are between runs of the same seed. With some",
        "ten students and four scores a teacher, two of the bold ones would be so by chance alone.",
        "",
        "## Teachers",
        "",
    ]
    own = {row["teacher"]: {0: row} for row in rows if not row["student"]}
    lines += means(own, OF_TEACHER)
    lines += ["## What is established", ""]
    for teacher in compared:
        groups = settled(groups_of(rows, teacher))
        for against in AGAINST:
            lines += [f"Teacher {teacher}, at least five seeds, against {against}:", ""]
            lines += findings(groups, against)
    lines += [
        "## What is not",
        "",
        "- Anything at the scale of the paper: teachers of hundreds of millions of parameters,",
        "  whose artifacts emerged by themselves, and students that are trained for long.",
        *unconverged(rows),
        "- Artifacts that emerged by themselves: no teacher was trained that long.",
        "- Rows with fewer than five seeds (the variants) show no more than large differences.",
        "",
        f"![Paired differences to FitNet]({PLOT.name})",
        "",
    ]
    for teacher in teachers:
        groups = groups_of(rows, teacher)
        lines += [f"## Teacher {teacher}", ""]
        lines += means(groups, SCORES)
        lines += means(groups, LIKENESS)
        lines += means(groups, TARGET)
        for against in AGAINST:
            if against in groups:
                lines += differences(groups, against)
    return "\n".join(lines).rstrip() + "\n"


def main() -> None:
    """Writes the page and the plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", nargs="*", type=Path, help="of the job; none: those kept")
    arguments = parser.parse_args()
    if arguments.results:
        KEPT.write_text("".join(path.read_text() for path in arguments.results))
    rows = [json.loads(line) for line in KEPT.read_text().splitlines()]
    PAGE.write_text(page(rows))
    teachers = list(dict.fromkeys(row["teacher"] for row in rows))
    plot(rows, [t for t in teachers if AGAINST[0] in settled(groups_of(rows, t))], PLOT)
    print(f"{PAGE}, {PLOT}")


if __name__ == "__main__":
    main()
