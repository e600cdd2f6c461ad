"""STUDY.md and its plot from the results of the job `study`; the same file gives the same bytes.

  python -m benchmarks.study runs/study/results.jsonl runs/study_real/results.jsonl
  python -m benchmarks.study          # again from the results that are kept here

The first keeps the results, of one study or of several, as benchmarks/study.jsonl.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import scipy.stats
from matplotlib.figure import Figure

HERE = Path(__file__).parent
KEPT, PAGE, PLOT = HERE / "study.jsonl", HERE / "STUDY.md", HERE / "study.svg"
AGAINST = ("fitnet", "fitnet_final_norm", "fitnet_clip")
SEEDS = 5  # of a student that is compared

# Scores that read tokens of the student's last block which the method does not train.
UNTRAINED = {
    "relational": ("linear_top1", "knn_top1"),
    "vitkd_official": ("linear_top1", "knn_top1"),
    "pooled": ("miou", "depth_rmse"),
}


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
    Measure("next_block_changed", "what the next block adds, changed", 2),
)
OF_TEACHER = (
    *SCORES,
    Measure("norm_ratio_first", "norm ratio, first distilled block", 2),
    Measure("norm_ratio", "last block", 2),
    Measure("planted_length", "planted length", 1),
    Measure("planted_in_null_space", "of its energy in the null space", 2),
)

INTRODUCTION = """\
# Does it work, and when

Made by `python -m benchmarks.study` from `benchmarks/study.jsonl`, the results of
`python -m singer_jax.main --config=configs/study.py`, which says every size. Nothing here is the
paper's, and nothing is of a real large model.

## Question and design

Does refining a teacher's features in a null space beat what else people do about tokens of huge
norm, where there are such tokens, and what does it cost where there are none?

A small transformer is trained to classify generated scenes (`data.source=scenes`). Each teacher
below is that one trained on while a vector is added to a few patches of every image, as one more
neuron of the first distilled block's MLP would write it: planted artifacts, of which direction,
place and size are known. The name says them: direction (random, or the most null or most visible
one for the next block by the paper's linear map), place (random patches, or background: those whose
pixels vary least), and about how many medians long the patch becomes. `none` was trained on
without. Students see images without labels. All of a cell learn in one run from the same teacher
pass.

Names: `fitnet_SPACE` is `method.match.target_space`, `fitnet_clip`
`method.match.norm_clip_quantile`; of `singer_WORD` the configuration says in what it differs.
FitNet learns from the same blocks as SiNGER, but for `fitnet_own_blocks`. What stands in brackets
cleaned the teacher. `planted`: the vector is subtracted; what later blocks made of it stays.
`registers`: four neurons were looked for and moved; the one that writes the vector fires by its
length, at the marked patches alone, and is easy to find."""

# Of the teacher of `configs/study.py:real` whose results are kept.
OF_GIVEN = """
`given` is a trained model as it is. Here: a ViT-S/14 in DINOv2's architecture and timm's layout,
which others trained on to find what is salient in photos. It sees scenes of 84 x 84 pixels and has
no outliers. Its students saw 9,600 images in batches of 16, and two seeds are all."""

MEASURED = """
Linear top-1, mIoU and depth are linear probes in closed form (ridge regression) on test scenes, of
the class token and of the patches. Dense scores leave out the marked patches, so that an artifact
which follows the background tells nothing. Intervals are 95 % by Student's t over seeds;
differences are between runs of the same seed, bold where five seeds' interval leaves out 0. Some
scores read tokens of the student's last block that its method does not train: the class token of
`relational` and `vitkd_official`, the patches of `pooled`. They are shown and not compared.

The clean teacher is the same weights with a vector of zeros; the cosine to it is one after a linear
map that is fitted on other images. Of a target, that is the teacher's features at the first
distilled block as refined or cleaned: how many medians its 99th percentile is, what share of the
planted energy is gone, and the change of what the next block adds to the residual stream. Half of
all directions are null for the linear map of the next block, so that 0.50 in the null space is what
chance gives.

## Teachers
"""

OPEN = """\
## What is not

- Anything at the scale of the paper: teachers of hundreds of millions of parameters, whose
  artifacts emerged by themselves, and students that are trained for long. No teacher here was
  trained that long.
- Rows with fewer than five seeds (the variants) show no more than large differences.
- SiNGER without its distillation term: nothing would teach the student."""

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


def pairs(rows: Group, other: Group, key: str) -> list[float]:
    """Differences between runs of the same seed."""
    seeds = sorted(rows.keys() & other.keys())
    return [rows[seed][key] - other[seed][key] for seed in seeds]


def paired(rows: Group, other: Group, key: str) -> tuple[float, float]:
    """`interval` of `pairs`."""
    return interval(pairs(rows, other, key))


def is_compared(name: str, measure: Measure) -> bool:
    """Whether a student's method trains the tokens that a score reads."""
    return measure.key not in UNTRAINED.get(name, ())


def name_of(row: Row) -> str:
    """Of a student; one of a cleaned teacher is named with what cleaned it."""
    return f"{row['student']} ({row['clean']})" if row["clean"] else row["student"]


def groups_of(rows: Iterable[Row], teacher: str) -> dict[str, Group]:
    """Students of a teacher by name, in the order of the file; without runs that were stopped."""
    found: dict[str, Group] = {}
    for row in rows:
        if row["teacher"] == teacher and row["student"] and "stopped" not in row:
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
    """Paired differences to one student; bold where the interval of enough seeds leaves out 0."""
    body = []
    for name, group in groups.items():
        if name == against:
            continue
        cells = []
        for measure in SCORES:
            if not is_compared(name, measure):
                cells.append("")
                continue
            mean, half = paired(group, groups[against], measure.key)
            text = number(mean, half, measure.digits, sign=True)
            cells.append(f"**{text}**" if abs(mean) > half and len(group) >= SEEDS else text)
        body.append([name, *cells])
    return table([f"minus {against}", *(m.heading for m in SCORES)], body)


class Difference(NamedTuple):
    """Of a student of a teacher to another in one measure."""

    teacher: str
    against: str
    student: str
    measure: Measure
    mean: float
    p_value: float


def settled(groups: Mapping[str, Group]) -> dict[str, Group]:
    """Students with enough seeds to be compared."""
    return {name: group for name, group in groups.items() if len(group) >= SEEDS}


def compared(rows: Sequence[Row]) -> list[str]:
    """Teachers with enough seeds of the students that others are compared with."""
    teachers = dict.fromkeys(row["teacher"] for row in rows)
    return [name for name in teachers if set(AGAINST) <= set(settled(groups_of(rows, name)))]


def all_differences(rows: Sequence[Row]) -> list[Difference]:
    """Every pair that is compared, of all teachers, with the p-value of a paired t-test."""
    found = []
    for teacher in compared(rows):
        groups = settled(groups_of(rows, teacher))
        for against, (name, group), measure in itertools.product(AGAINST, groups.items(), SCORES):
            already = name in AGAINST[: AGAINST.index(against) + 1]  # or itself
            if already or not is_compared(name, measure):
                continue
            values = pairs(group, groups[against], measure.key)
            p_value = np.nan_to_num(scipy.stats.ttest_1samp(values, 0).pvalue, nan=1.0)
            mean = float(np.mean(values))
            found.append(Difference(teacher, against, name, measure, mean, float(p_value)))
    return found


def established(found: Sequence[Difference]) -> list[Difference]:
    """Those of which one in twenty is expected to be none (Benjamini and Hochberg)."""
    if not found:
        return []
    adjusted = scipy.stats.false_discovery_control([one.p_value for one in found])
    return [one for one, value in zip(found, adjusted, strict=True) if value <= 0.05]


def findings(found: Sequence[Difference]) -> list[str]:
    """Who is better and worse than one student, in a sentence a measure."""
    lines = []
    for measure in SCORES:
        own = [one for one in found if one.measure is measure]
        told = []
        for word, sign in (("better", 1), ("worse", -1)):
            named = [
                f"{one.student} ({one.mean:+.{measure.digits}f})"
                for one in own
                if one.mean * measure.better * sign > 0
            ]
            told += [f"{word} {', '.join(named)}"] if named else []
        lines.append(f"- {measure.heading}: {'; '.join(told) or 'no student differs'}.")
    return [*lines, ""]


def plot(rows: Sequence[Row], path: Path) -> None:
    """Paired differences to FitNet, a column a measure and a row a teacher."""
    teachers = compared(rows)
    with matplotlib.rc_context({"svg.hashsalt": "study", "font.size": 8}):
        shown = (SCORES[0], SCORES[2], SCORES[3])
        figure = Figure(figsize=(10, 2.6 * len(teachers)), layout="constrained")
        axes = figure.subplots(len(teachers), len(shown), squeeze=False)
        for teacher, line in zip(teachers, axes, strict=True):
            groups = settled(groups_of(rows, teacher))
            names = [name for name in groups if name != AGAINST[0]]
            for measure, axis in zip(shown, line, strict=True):
                found = [
                    paired(groups[name], groups[AGAINST[0]], measure.key)
                    if is_compared(name, measure)
                    else (math.nan, math.nan)
                    for name in names
                ]
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


def told_stopped(rows: Sequence[Row]) -> list[str]:
    """Runs that met a number that is none."""
    lost = [row for row in rows if "stopped" in row]
    told = [
        f"- {row['teacher']}, seed {row['seed']}, {name_of(row)}: {row['stopped']}" for row in lost
    ]
    return ["Not measured:", "", *told, ""] if lost else []


def page(rows: Sequence[Row]) -> str:
    """STUDY.md."""
    teachers = list(dict.fromkeys(row["teacher"] for row in rows))
    lines = [INTRODUCTION, *([OF_GIVEN] if "given" in teachers else ()), MEASURED]
    own = {row["teacher"]: {0: row} for row in rows if not row["student"]}
    lines += means(own, OF_TEACHER)
    found = all_differences(rows)
    known = established(found)
    lines += [
        "## What is established",
        "",
        f"Of {len(found)} differences, each tested by a paired t-test over {SEEDS} seeds, those of",
        "which one in twenty is expected to be chance (Benjamini and Hochberg). All are of these",
        "teachers, one of each name, and of these test scenes.",
        "",
    ]
    for teacher, against in itertools.product(compared(rows), AGAINST):
        lines += [f"Teacher {teacher}, against {against}:", ""]
        lines += findings([one for one in known if one[:2] == (teacher, against)])
    lines += [
        OPEN,
        *unconverged(rows),
        "",
        *told_stopped(rows),
        *([f"![Paired differences to FitNet]({PLOT.name})", ""] if compared(rows) else ()),
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
    texts = [path.read_text() for path in arguments.results or [KEPT]]
    rows = [json.loads(line) for text in texts for line in text.splitlines()]
    twice = Counter((row["teacher"], row["clean"], row["seed"], row["student"]) for row in rows)
    if (most := twice.most_common(1)) and most[0][1] > 1:
        sys.exit(f"twice in these results: {most[0][0]}; of two studies give one teacher to one")
    KEPT.write_text("".join(texts))
    PAGE.write_text(page(rows))
    if compared(rows):
        plot(rows, PLOT)
    print(PAGE)


if __name__ == "__main__":
    main()
