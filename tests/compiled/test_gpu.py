"""Programs of a training run compile for NVIDIA GPUs without one (launch/common.sh: its compiler).

What XLA refuses on a GPU shows here, and whether the kernels are used that are meant to be.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import cli

COMPILER = Path(sys.prefix) / "gpu_compiler"

pytestmark = pytest.mark.slow


def run(*arguments: str) -> str:
    assert COMPILER.is_dir(), "bash launch/test.sh --all installs the compiler for GPUs"
    path = os.pathsep.join([str(COMPILER), os.getcwd()])
    environment = cli.environment() | {"PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, "-m", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def programs() -> dict:
    return json.loads(run("tests.compiled.gpu"))


def test_a_step_takes_cudnn_s_attention_forward_and_backward(programs):
    """Also with 197 tokens, of which jax has no gradient."""
    step = programs["step"]
    # The teacher's four blocks, the student's three, and the teacher's next one in the info loss.
    assert step.count('custom_call_target="__cudnn$fmhaSoftmax"') >= 8
    assert step.count('custom_call_target="__cudnn$fmhaSoftmaxBackward"') >= 4


def test_devices_share_sums_and_not_images(programs):
    step = programs["step"]
    assert "all-reduce" in step
    assert "all-gather" not in step and "all-to-all" not in step


def test_sums_of_the_devices_run_beside_products(programs):
    lines = programs["step"][programs["step"].index("\nENTRY ") :].splitlines()
    assert not any(" all-reduce(" in line for line in lines)  # one that waits for its end
    started = [index for index, line in enumerate(lines) if " all-reduce-start(" in line]
    assert 1 <= len(started) <= 3  # one for each data type
    for start in started:
        name = lines[start].split(" = ")[0].strip()
        done = next(i for i in range(start, len(lines)) if f"all-reduce-done({name})" in lines[i])
        between = lines[start + 1 : done]
        assert any('custom_call_target="__cublas' in line for line in between), lines[start]


def test_null_spaces_are_decomposed_on_the_device(programs):
    assert "cusolver" in programs["states"]


# Of SiNGER, four blocks of a ViT-L's width to three of a ViT-Ti's, 128 images, on an H200. Counted
# with jax 0.10.2.
LIMITS = {
    "exact": {"kernels": 420, "gigabytes": 25.6},
    "approximate": {"kernels": 416, "gigabytes": 24.4},
    "fp8": {"kernels": 440, "gigabytes": 23.7},
}


@pytest.mark.parametrize("name", LIMITS)
def test_a_step_needs_no_more_kernels_and_traffic_than_before(programs, name):
    found = programs["counts"][name]
    for key, limit in LIMITS[name].items():
        assert found[key] <= limit, f"{key}: {found[key]}"


@pytest.mark.parametrize("name", LIMITS)
def test_a_step_is_one_graph_and_waits_for_nothing(programs, name):
    found = programs["counts"][name]
    assert (found["graphs"], found["outside of graphs"], found["waits"]) == (1, 0, 0)


@pytest.mark.parametrize("name", ["exact", "approximate"])
def test_products_compute_their_bias_and_residual(programs, name):
    assert programs["counts"][name]["epilogues"] >= 46


def test_the_approximate_gelu_is_computed_by_the_product(programs):
    assert programs["counts"]["approximate"]["gelu epilogues"] >= 4
    assert programs["counts"]["exact"]["gelu epilogues"] == 0


def test_an_fp8_teacher_multiplies_in_fp8_with_its_epilogues(programs):
    """Each of four blocks has four such products: query, key, value and the MLP's first map."""
    found = programs["counts"]["fp8"]
    assert found["fp8 products"] >= 16
    assert found["epilogues"] >= 46 and found["gelu epilogues"] >= 4


def test_a_plan_for_a_node():
    printed = run(
        "singer_jax.main",
        "--config=configs/plan.py",
        "--config.plan=fitnet_vitl_vitt",
        "--config.overrides=teacher.overrides.depth=2 student.overrides.depth=2",
        "--config.topology=h100:8",
        "--config.batch_size=64",
    )
    assert "h100:8: 8 x NVIDIA H100 80GB HBM3; batch 64, 8 images per chip" in printed
    assert "all-reduce" in printed and "images/s, MFU" in printed
    assert "0 waits of the host" in printed and "modelled time" in printed
