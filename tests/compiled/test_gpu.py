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
def programs() -> dict[str, str]:
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


def test_null_spaces_are_decomposed_on_the_device(programs):
    assert "cusolver" in programs["states"]


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
