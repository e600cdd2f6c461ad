"""Tests of the job `plan`: the trainer's own step, compiled for chips that are not attached."""

import dataclasses
import subprocess
import sys

import jax
import pytest

from singer_jax import main
from singer_jax.config import plan as plan_config
from singer_jax.config import settings_of
from singer_jax.data.registry import make_source
from singer_jax.data.sources import TRAIN
from singer_jax.errors import InputError
from singer_jax.jobs import distill, plan
from singer_jax.jobs.plan import PlanSettings, as_text, planned
from singer_jax.platform import chips, parallel
from singer_jax.training import program, roofline
from singer_jax.training.roofline import Cost, DoesNotFit
from singer_jax.training.setup import setup_students
from tests import cli

# Small enough for the compiler of TPUs to take seconds.
SIZES = {
    "student": {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 3, "num_heads": 2},
    "teacher": {"img_size": 16, "patch_size": 4, "embed_dim": 64, "depth": 4, "num_heads": 2},
}
TINY = " ".join(
    [f"{role}.overrides.{key}={n}" for role, sizes in SIZES.items() for key, n in sizes.items()]
    + ["data.image_size=16", "method.layers=(1,3)", "method.rank=4", "batch_size=64"]
)


def jaxpr(function, *args) -> str:
    return str(jax.make_jaxpr(function)(*args))


@pytest.mark.slow
@pytest.mark.parametrize("students", [False, True], ids=["one", "several"])
def test_it_is_the_trainer_s_step(tmp_path, monkeypatch, students):
    """The programs of the jobs `distill` and `plan` have equal jaxprs."""
    file = cli.write_config(tmp_path)
    if students:
        with file.open("a") as out:
            out.write(
                "\n_one = get_config\n\ndef get_config(protocol='recommended'):\n"
                "    config = _one(protocol)\n"
                "    config.students.a = {'method': {'name': 'fitnet'}}\n"
                "    config.students.b = {}\n"
                "    return config\n"
            )
    settings = PlanSettings(plan=str(file), overrides="steps=1 mesh.data=4")
    trained = []

    def record(students, mesh, states, teacher, batch, schedule=None):
        trained.append(jaxpr(students.step, states, teacher, batch, jax.numpy.bool_(True)))
        return program.compile_step(students, mesh, states, teacher, batch, schedule)

    monkeypatch.setattr(distill, "compile_step", record)
    distill.distill(settings.distillation, tmp_path / "run")

    compiled = []

    def compile_step(students, mesh, states, teacher, batch, schedule):
        logged = jax.ShapeDtypeStruct((), bool)
        compiled.append(jaxpr(students.step, states, teacher, batch, logged))
        raise InputError("far enough")

    monkeypatch.setattr(roofline, "compile_step", compile_step)
    monkeypatch.setitem(chips.CHIPS, "cpu", chips.CHIPS["TPU v5e"])
    digits = dataclasses.replace(settings, images=len(make_source("digits", "", TRAIN)), classes=10)
    with pytest.raises(InputError, match="far enough"):
        planned(digits, jax.devices()[:4])
    assert compiled == trained


@pytest.mark.slow
class TestCommand:
    @pytest.fixture
    def printed(self):
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "singer_jax.main",
                "--config=configs/plan.py",
                "--config.plan=singer_vitl_vitt",
                f"--config.overrides={TINY}",
                "--config.topology=v5e:2x2",
                "--config.price=2",
                "--config.images=6400",
            ],
            env=cli.environment(),
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        assert "compiling for v5e:2x2, batch 64 (takes minutes)" in done.stderr
        return done.stdout

    def test_it_says_all(self, printed):
        assert "v5e:2x2: 4 x TPU v5 lite; batch 64, 16 images per chip" in printed
        for words in (
            "of 16 GiB",
            "arguments",
            "temporaries",
            "TFLOP",
            "memory traffic",
            "all-reduce",
            "ms per step, bound by",
            "images/s, MFU",
            "10,000 steps",  # 100 epochs of 6,400 images
            "chip hours",
            "at 2",
            "cores per chip",
        ):
            assert words in printed, words


@pytest.mark.slow
def test_trained_parameters_are_reduced_once(tmp_path):
    """With pure data parallelism, only gradients cross the network in large amounts."""
    settings = PlanSettings(plan="singer_vitl_vitt", overrides=TINY)
    found = planned(settings, chips.described("v5e:2x2"))
    assert set(found.collectives) == {"all-reduce"}
    count, size = found.collectives["all-reduce"]
    mesh = parallel.make_mesh(described=chips.described("v5e:2x2"))
    run = setup_students(settings.distillation, 64, 10, mesh, weights_needed=False)
    trained = sum(leaf.size for leaf in jax.tree.leaves(run.states[""].params))
    # Some of it is bfloat16; tiles of small arrays are filled up.
    assert 2 * trained <= size <= 6 * trained
    assert count <= 4


@pytest.mark.slow
def test_fsdp_gathers_the_teacher():
    settings = PlanSettings(plan="singer_vitl_vitt", overrides=f"{TINY} mesh.fsdp=4")
    found = planned(settings, chips.described("v5e:2x2"))
    assert found.collectives["all-gather"][0] >= 4  # kernels of each of the teacher's blocks
    pure = planned(
        PlanSettings(plan="singer_vitl_vitt", overrides=TINY), chips.described("v5e:2x2")
    )
    assert found.arguments < pure.arguments


def stand_in(peak, memory=16 * 2**30):
    return Cost(
        kind="TPU v5e", count=4, images=1, arguments=0, temporaries=0, peak=peak,
        flops=1, fast_flops=0, traffic=1, collectives={}, parts={},
        compile_seconds=0, compile_cpu_seconds=0,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("fixed", "image", "largest"), [(1, 0.05, 296), (4, 0.3, 32), (10, 1, 4), (15, 0.9, 1)]
)
def test_the_largest_batch(monkeypatch, fixed, image, largest):
    """A step needs `fixed` + `image` per image, in GiB; the chip has 16."""
    tried = []

    def cost(run, batch_size, schedule):
        count = batch_size // 4
        tried.append(count)
        peak = fixed + image * count
        if peak > 15.9:
            raise DoesNotFit("batch_size: ...")
        return dataclasses.replace(stand_in(int(peak * 2**30)), images=batch_size)

    monkeypatch.setattr(plan, "cost", cost)
    settings = PlanSettings(plan="singer_vitl_vitt", batch_size="max")
    found = planned(settings, chips.described("v5e:2x2"))
    assert found.images // 4 == largest
    assert len(tried) <= 6


def test_the_roofline():
    """By hand: 197 TFLOP take 1 s, 820 GB take 1 s, and 2 x 100 GB of reductions take 2 s."""
    found = Cost(
        kind="TPU v5e", count=4, images=1000, arguments=0, temporaries=0, peak=2**30,
        flops=394e12, fast_flops=0, traffic=820e9, collectives={"all-reduce": (0, 100e9)}, parts={},
        compile_seconds=0, compile_cpu_seconds=0,
    )  # fmt: skip
    seconds = found.seconds
    assert seconds["operations"] == pytest.approx(2)
    assert seconds["memory traffic"] == pytest.approx(1)
    assert seconds["collectives"] == pytest.approx(2)
    assert found.step_seconds == pytest.approx(4)
    assert found.images_per_second == pytest.approx(250)
    assert found.mfu == pytest.approx(0.5)
    quantised = dataclasses.replace(found, fast_flops=197e12)  # at 394 TFLOP a second
    assert quantised.seconds["operations"] == pytest.approx(1.5)
    assert quantised.mfu == pytest.approx(2 / quantised.step_seconds)
    # A TPU computes a float32 product from six bfloat16 products; an H100 has its own rate.
    assert dataclasses.replace(found, float32=True).seconds["operations"] == pytest.approx(12)
    exact = dataclasses.replace(found, kind="NVIDIA H100 80GB HBM3", flops=67e12, float32=True)
    assert exact.seconds["operations"] == pytest.approx(1)
    alone = dataclasses.replace(found, count=1)
    assert alone.seconds["collectives"] == 0
    text = as_text(found, PlanSettings(plan="singer_vitl_vitt", overrides="steps=3600"))
    assert "4000.0 ms per step" in text and "3,600 steps: 4.0 hours, 16.0 chip hours" in text


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({}, "plan: empty"),
        ({"plan": "nothing.py"}, "no file nothing.py"),
        ({"plan": "evaluate"}, "has job 'evaluate'"),
        ({"plan": "singer_vitl_vitt", "overrides": "steps"}, "overrides: 'steps'; write key=value"),
        ({"plan": "singer_vitl_vitt", "overrides": "stepz=1"}, "stepz"),
        ({"plan": "singer_vitl_vitt", "overrides": "steps=-1"}, "steps: -1"),
        ({"plan": "singer_vitl_vitt", "topology": "v5e:3x3"}, "topology: 'v5e:3x3'"),
        ({"plan": "singer_vitl_vitt", "topology": "h900:8"}, "such as v5e:4x4"),
        ({"plan": "singer_vitl_vitt", "topology": "h100:8"}, "pip install 'jax[cuda13-local]'"),
        ({"plan": "singer_vitl_vitt", "batch_size": "many"}, "batch_size: 'many'"),
        ({"plan": "singer_vitl_vitt", "batch_size": "6"}, "not divisible"),
    ],
)
def test_invalid_settings(tmp_path, capsys, settings, named):
    config = plan_config()
    config.update(settings)
    assert main.run(config, tmp_path) == 2
    error = capsys.readouterr().err
    assert named in error and len(error.splitlines()) == 1


def test_without_the_compiler(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install libtpu"):
        chips.described("v5e:2x2")


def test_what_a_gpu_does_not_hold_does_not_fit(monkeypatch):
    """The GPU compiler accepts programs of any size."""
    taken = program.Program(None, None, 10**12, "")
    monkeypatch.setattr(roofline, "compile_step", lambda *arguments: taken)
    monkeypatch.setitem(chips.CHIPS, "cpu", chips.CHIPS["NVIDIA H100"])
    with pytest.raises(DoesNotFit, match="16 images a chip, which does not fit into its memory"):
        planned(PlanSettings(plan="singer_vitl_vitt", overrides=TINY), jax.devices()[:4])


def test_products_are_planned_as_they_run():
    """The job plans with the precision of the distillation: exact for float32, not for bfloat16."""
    config = plan_config()
    config.plan = "singer_vitl_vitt"
    assert settings_of(config).precision == "bfloat16"
    config.overrides = "precision=float32"
    assert settings_of(config).precision == "float32"
