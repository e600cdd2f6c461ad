"""Tests that the numbers of docs/reproduce_table1.md follow from the code and from the results."""

import json
import math
import re
from pathlib import Path

import pytest

from singer_jax.evaluation.table1 import PUBLISHED, TASKS
from singer_jax.jobs.check_data import EXPECTED
from singer_jax.platform.chips import CHIPS
from singer_jax.training.roofline import DECODED

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "reproduce_table1.md").read_text()
STEPS = 100 * math.ceil(1_281_167 / 512)
FLOAT32 = 67e12  # operations per second of an H100, by its data sheet
MODELS = {
    "vitl_vits": ("vit_large_patch16_224", "vit_small_patch16_224"),
    "vitl_vitt": ("vit_large_patch16_224", "vit_tiny_patch16_224"),
    "deit3l_deit3b": ("deit3_large_patch16_224", "deit3_base_patch16_224"),
    "deit3s_deit3t": ("deit3_small_patch16_224", "deit3_tiny_patch16_224"),
}


def rows(first: str) -> dict[str, list[str]]:
    """Returns the other cells of the rows whose first cell matches, by that cell."""
    found = [re.split(r"\s*\|\s*", line.strip("| ")) for line in PAGE.splitlines()]
    return {cells[0].strip("`"): cells[1:] for cells in found if re.fullmatch(first, cells[0])}


HOURS = rows(r"`\w+_(vitl|deit3)\w+`")


def test_there_is_a_row_for_every_distilled_student_of_the_table():
    assert len(HOURS) == sum(isinstance(key, tuple) for key in PUBLISHED) == 11


@pytest.mark.parametrize("config", HOURS)
def test_the_hours_of_a_student_follow_from_its_plan(config):
    tflop, ms, hours, chip_hours, paper, paper_chip_hours = map(float, HOURS[config])
    plans = (ROOT / "benchmarks" / "results" / "plans.jsonl").read_text().splitlines()
    planned = [json.loads(line)["row"] for line in plans]
    of_config = [
        row
        for row in planned
        if (row["configuration"], row["chips"], row["images"]) == (config, "v5e:2x2", "128 a chip")
    ]
    assert ms in [row["ms a step"] for row in of_config]
    assert tflop == pytest.approx(4 * of_config[-1]["TFLOP"], abs=0.06)
    assert hours == pytest.approx(STEPS * ms / 3.6e6, abs=0.051)
    assert chip_hours == pytest.approx(4 * STEPS * ms / 3.6e6, abs=0.51)
    expected = STEPS * tflop * 1e12 / FLOAT32 / 3600
    assert paper_chip_hours == pytest.approx(expected, abs=0.7)
    assert paper == pytest.approx(expected / 8, abs=0.1)
    assert f"{FLOAT32 / 1e12:.0f} TFLOP/s" in PAGE and f"{STEPS:,} steps" in PAGE


def test_all_runs_together_take_the_sum():
    total = rows("all, as eleven runs")["all, as eleven runs"]
    for column in (3, 5):
        parts = sum(float(cells[column]) for cells in HOURS.values())
        assert float(total[column]) == pytest.approx(parts, abs=3)


@pytest.mark.parametrize("task", [name for name, one in TASKS.items() if one.kind != "transfer"])
def test_the_steps_of_a_probe_follow_from_the_number_of_images(task):
    steps, images, decoding, _, fast = rows(f"`{task}`")[task]
    train, test = (EXPECTED[TASKS[task].data][split] for split in ("train", "test"))
    assert int(steps.replace(",", "")) == TASKS[task].epochs * math.ceil(train / 64)
    seen = TASKS[task].epochs * train + test
    assert float(images.removesuffix(" M")) == pytest.approx(seen / 1e6, abs=0.051)
    assert float(decoding) == pytest.approx(seen / DECODED / 3600, abs=0.51)
    assert float(fast.removesuffix(" M")) == pytest.approx((train + test) / 1e6, abs=0.0051)


def test_published_numbers_are_those_of_the_code():
    methods = {"FitNet": "fitnet", "ViTKD": "vitkd", "SiNGER": "singer"}
    students = {
        "ViT-L to ViT-S": MODELS["vitl_vits"],
        "ViT-L to ViT-Ti": MODELS["vitl_vitt"],
        "DeiT-III-L to B": MODELS["deit3l_deit3b"],
        "DeiT-III-S to Ti": MODELS["deit3s_deit3t"],
    }
    shown = {}
    for line in PAGE.splitlines():
        cells = re.split(r"\s*\|\s*", line.strip("| "))
        if cells[0] in students:
            key = (methods[cells[1]], *students[cells[0]])
            shown[key] = tuple(map(float, cells[2:8]))
    assert shown == {key: row for key, row in PUBLISHED.items() if isinstance(key, tuple)}


def test_float32_is_as_much_slower_as_the_pages_say():
    precision = (ROOT / "docs" / "precision.md").read_text()
    bf16 = CHIPS["NVIDIA H100"].bf16
    assert f"{FLOAT32 / 1e12:.0f} TFLOP/s in float32 and {bf16 / 1e12:.0f} in bfloat16" in precision
