"""Tests of a run's page in a real browser, of comparisons, and of evaluation during training."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from etils import epath
from flax import nnx

import singer_jax
from singer_jax import main
from singer_jax.config import check_data, compare, evaluation, export, report
from singer_jax.evaluation.backbone import ModelSelection, load_backbone
from singer_jax.evaluation.results import VERSION
from singer_jax.models.weights import to_timm
from singer_jax.platform import parallel
from singer_jax.report.collect import LayerNorms, ModelMaps, Report
from singer_jax.report.page import write_comparison, write_page
from singer_jax.runs.checkpoints import fingerprint
from tests import tiny
from tests.damage import largest
from tests.data import official

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Creates two seeds of SiNGER and one of FitNet, evaluated during and after training."""
    folder = tmp_path_factory.mktemp("runs")
    teacher = tiny.write_teacher(folder / "teacher.safetensors")
    for name, method, seed in (("a", "singer", 0), ("b", "singer", 1), ("c", "fitnet", 0)):
        config = tiny.config(teacher, method)
        config.steps, config.seed, config.evals.every_steps, config.evals.images = 4, seed, 2, 40
        assert main.run(config, folder / name) == 0
        measure = evaluation()
        measure.run, measure.data.source, measure.data.workers = str(folder / name), "digits", 0
        measure.mesh.data = 1
        measure.probe.protocol, measure.probe.epochs = "fast", 1
        assert main.run(measure, folder / name / "evaluation") == 0
    return folder


def test_evaluation_while_training_is_in_the_metrics(runs):
    rows = [json.loads(line) for line in (runs / "a" / "metrics.jsonl").open()]
    evaluated = {row["step"]: row for row in rows if "eval/knn/top1" in row}
    assert set(evaluated) == {2, 4}
    for row in evaluated.values():
        assert 0 <= row["eval/knn/top1"] <= 100
        terms = [row[f"eval/val/loss_{name}"] for name in ("kd", "outlier", "info")]
        np.testing.assert_allclose(row["eval/val/loss"], sum(terms), rtol=1e-4)
    assert evaluated[2]["eval/val/loss"] != evaluated[4]["eval/val/loss"]


def test_evaluation_changes_nothing_in_the_run(runs, tmp_path):
    config = tiny.config(runs / "teacher.safetensors")
    config.steps = 4
    assert main.run(config, tmp_path) == 0
    alone, watched = (
        (folder / "student" / "model.safetensors").read_bytes() for folder in (tmp_path, runs / "a")
    )
    assert alone == watched


def test_evaluation_needs_a_test_split(runs, tmp_path, capsys):
    config = tiny.config(runs / "teacher.safetensors")
    config.data.source = str(tiny.write_images(tmp_path / "images", 9))
    config.evals.every_steps = 1
    assert main.run(config, tmp_path / "run") == 2
    assert "evals.every_steps" in capsys.readouterr().err


@pytest.fixture(scope="module")
def page(runs) -> Path:
    config = report()
    config.baselines, config.images = (str(runs / "c"),), 3
    assert main.run(config, runs / "a") == 0
    return runs / "a" / "report" / "index.html"


def test_the_page_needs_nothing_else(page):
    text = page.read_text()
    assert "http://" not in text.replace("http://www.w3.org", "") and "src=" not in text
    for heading in ("Results", "Patches", "Training", "Patch norms", "Null space", "Configuration"):
        assert f"<h2>{heading}" in text
    assert "digits top1" in text and "val/loss" in text
    assert len(text) < 2_000_000


@pytest.mark.skipif(
    CHROMIUM is None and not os.environ.get("CI"), reason="no Chromium on this machine"
)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_click_on_a_patch_redraws_the_maps(page, scheme):
    """Headless Chromium at the width of a phone must log no error to the console."""
    from playwright.sync_api import sync_playwright

    errors: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        context = browser.new_context(
            color_scheme=scheme, viewport={"width": 390, "height": 800}, offline=True
        )
        tab = context.new_page()
        tab.on("console", lambda m: errors.append(m.text) if m.type == "error" else None)
        tab.on("pageerror", lambda error: errors.append(str(error)))
        tab.on("requestfailed", lambda request: errors.append(request.url))
        tab.goto(page.as_uri())

        def drawn(model: str) -> str:
            return tab.eval_on_selector(f'canvas[data-model="{model}"]', "c => c.toDataURL()")

        models = tab.eval_on_selector_all("canvas", "all => all.map(c => c.dataset.model)")
        assert models == [
            "input",
            "teacher",
            "teacher, refined",
            "student, singer",
            "student, fitnet (c)",
        ]
        before = {model: drawn(model) for model in models}
        tab.click('canvas[data-model="input"]', position={"x": 5, "y": 5})
        corner = {model: drawn(model) for model in models}
        assert all(corner[model] != before[model] for model in models)
        width = tab.eval_on_selector("canvas", "c => c.clientWidth")
        tab.click('canvas[data-model="teacher"]', position={"x": width - 5, "y": width - 5})
        other = {model: drawn(model) for model in models}
        assert all(other[model] != corner[model] for model in models)
        # The chosen patch is as similar to itself as can be: the brightest colour, last corner.
        brightest = tab.eval_on_selector(
            'canvas[data-model="student, singer"]',
            "c => Array.from(c.getContext('2d').getImageData(3, 3, 1, 1).data.slice(0, 3))",
        )
        np.testing.assert_allclose(brightest, [252, 253, 191], atol=3)
        for label in ("cosine to the teacher", "principal components", "patch norm"):
            tab.get_by_role("button", name=label).click()
            # The teacher has no cosine to itself, and three components have no colour bar.
            teacher = tab.locator('canvas[data-model="teacher"]')
            assert teacher.is_visible() == (label != "cosine to the teacher")
            assert tab.locator("#scale").is_visible() == (label != "principal components")
        assert {model: drawn(model) for model in models} == before
        tab.locator("#images button").nth(1).click()
        assert drawn("input") != before["input"]
        # Nothing is wider than the phone.
        assert tab.evaluate("document.documentElement.scrollWidth") <= 390
        browser.close()
    assert errors == []


NAMES = (
    "<img src=x onerror=alert(1)>",
    "\"'><script>alert(2)</script><svg onload=alert(3)>",
    "</script></title></style><script>alert(4)</script><!--",
    "{{data}} {{sections}} {{script}} $\\nothing{$",
    "javascript:alert(5)",
)


@pytest.mark.skipif(
    CHROMIUM is None and not os.environ.get("CI"), reason="no Chromium on this machine"
)
def test_a_page_runs_no_script_from_a_name(tmp_path):
    """Names occur in title, columns, rows, settings, models, layers and metrics."""
    from playwright.sync_api import sync_playwright

    page, other = tmp_path / "index.html", tmp_path / "other.html"
    seen: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        tab = browser.new_context(offline=True).new_page()
        tab.on("dialog", lambda dialog: (seen.append(dialog.message), dialog.dismiss()))
        tab.on("console", lambda m: seen.append(m.text) if m.type == "error" else None)
        tab.on("pageerror", lambda error: seen.append(str(error)))
        for name in NAMES:
            write_page(epath.Path(page), _report_of(name))
            curve = [{"step": 1, "train/loss": 2.0, f"eval/{name}": 1.0}]
            write_comparison(epath.Path(other), {name: {name: name}}, {name: curve})
            for file in (page, other):
                tab.goto(file.as_uri())
                scripts = tab.eval_on_selector_all("script", "all => all.map(s => s.id)")
                assert scripts == ["data", ""]
                sources = tab.eval_on_selector_all("img", "all => all.map(i => i.src)")
                assert all(source.startswith("data:image/png") for source in sources)
                cells = tab.eval_on_selector_all(
                    "#results th", "all => all.map(c => c.textContent)"
                )
                assert cells == ["", name, name]
            tab.goto(page.as_uri())
            drawn = tab.eval_on_selector_all("canvas", "all => all.map(c => c.dataset.model)")
            assert drawn == ["input", name]
        assert seen == []
        # What a mistake would do: a name that stands in the page as it is.
        careless = page.read_text().replace("<h1>", f"{NAMES[0]}{NAMES[1]}<h1>")
        page.write_text(careless)
        tab.goto(page.as_uri())
        assert seen and all("Content Security Policy" in line for line in seen)
        browser.close()


def _report_of(name: str) -> Report:
    rng = np.random.default_rng(0)
    norms = rng.uniform(1, 2, 8).astype(np.float32)
    tokens = rng.normal(size=(1, 4, 3)).astype(np.float32)
    return Report(
        title=name,
        config={name: {name: name}},
        rows=[{"step": 1, f"train/{name}/loss": 1.0, f"eval/{name}/knn/top1": 2.0, name: 3.0}],
        images=np.zeros((1, 4, 4, 3), np.uint8),
        models=[ModelMaps(name, tokens, (2, 2), np.ones((1, 4), np.float32))],
        layers=[LayerNorms(name, norms, norms, norms, 1.5, 2)],
        results={name: {name: 1.0}},
        note=name,
    )


def test_the_page_names_models_and_data_as_the_user_did(page, runs):
    text = page.read_text()
    assert "<h1>a, step 4</h1>" in text
    teacher = f"{tiny.config(runs / 'teacher.safetensors').teacher.model}, weights {runs}/teacher"
    assert f"<dt>teacher</dt><dd>{teacher}.safetensors</dd>" in text
    assert "; method: singer</dd>" in text and "<dt>training images</dt><dd>digits" in text


def test_a_metric_of_one_step_is_a_number_and_no_chart(tmp_path):
    of_one = _report_of("x")
    steps = [row | {"step": step} for step in (1, 2) for row in of_one.rows]
    sections = []
    for rows in (of_one.rows, steps):
        write_page(epath.Path(tmp_path / "index.html"), dataclasses.replace(of_one, rows=rows))
        text = (tmp_path / "index.html").read_text()
        sections.append(text.split('id="training"')[1].split("</section>")[0])
    assert "<svg" not in sections[0] and "<th>x knn/top1</th><td>1</td><td>2</td>" in sections[0]
    assert sections[1].count("<svg") == 2 and "<table>" not in sections[1]


def test_a_run_without_a_checkpoint_has_no_report(tmp_path, capsys):
    assert main.run(report(), tmp_path) == 2
    assert "no config.json" in capsys.readouterr().err


def test_runs_that_differ_in_the_seed_share_a_row(runs, tmp_path, capsys):
    config = compare()
    config.runs = tuple(str(runs / name) for name in "abc")
    assert main.run(config, tmp_path) == 0
    found = json.loads((tmp_path / "compare.json").read_text())
    assert sorted(found["seeds"].values()) == [[0], [0, 1]]
    tops = [
        json.loads((runs / name / "evaluation" / "results.json").read_text())["tasks"]["digits"]
        for name in "ab"
    ]
    (singer,) = (row for name, row in found["rows"].items() if name.startswith("singer"))
    values = [row["top1"] for row in tops]
    assert singer["digits top1"]["mean"] == pytest.approx(np.mean(values))
    assert singer["digits top1"]["std"] == pytest.approx(np.std(values, ddof=1))
    printed = capsys.readouterr().out
    assert "+-" in printed and "fitnet" in printed
    assert "<table>" in (tmp_path / "compare" / "index.html").read_text()


@pytest.mark.parametrize(
    ("chosen", "words"), [(("a",), "at least two"), (("a", "nothing"), "no config.json")]
)
def test_what_cannot_be_compared_is_named(runs, tmp_path, capsys, chosen, words):
    config = compare()
    config.runs = tuple(str(runs / name) for name in chosen)
    assert main.run(config, tmp_path) == 2
    assert words in capsys.readouterr().err


def test_installed_data_are_counted_and_shown(tmp_path, capsys):
    official.ade20k(tmp_path / "data")
    official.pet(tmp_path / "data")
    config = check_data()
    config.data.path = str(tmp_path / "data")
    assert main.run(config, tmp_path / "out") == 0
    printed = capsys.readouterr().out
    assert "ade20k train: 4 images (the official split has 20,210)" in printed
    assert "pet test: 3 images" in printed and "3 classes" in printed
    assert "nyud: not installed" in printed
    assert {path.name for path in (tmp_path / "out").glob("*.png")} == {
        "ade20k_train.png",
        "ade20k_test.png",
        "pet_train.png",
        "pet_test.png",
    }


def test_runs_that_differ_in_more_than_the_seed_do_not_share_a_row(runs, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(runs / "b", other)
    content = json.loads((other / "config.json").read_text())
    content["optimizer"]["learning_rate"] = 0.5
    (other / "config.json").write_text(json.dumps(content))
    config = compare()
    config.runs = (str(runs / "a"), str(other))
    assert main.run(config, tmp_path / "out") == 0
    found = json.loads((tmp_path / "out" / "compare.json").read_text())["rows"]
    assert len(found) == 2 and any("optimizer.learning_rate=0.5" in name for name in found)
    config.runs = (str(runs / "a"), str(runs / "a"))
    assert main.run(config, tmp_path / "twice") == 2


def test_a_run_of_other_devices_can_be_shown(runs, tmp_path):
    shutil.copytree(runs / "a", tmp_path / "run")
    content = json.loads((tmp_path / "run" / "config.json").read_text())
    content["mesh"] = {"data": 64, "fsdp": 4}
    (tmp_path / "run" / "config.json").write_text(json.dumps(content))
    assert main.run(report(), tmp_path / "run") == 0


def evaluated(source: Path, run: Path, **changes: object) -> Path:
    """Copies a run and changes values of its results.json by dotted key; None removes a key."""
    shutil.copytree(source, run, ignore=shutil.ignore_patterns("checkpoints", "report"))
    file = run / "evaluation" / "results.json"
    content = json.loads(file.read_text())
    for key, value in changes.items():
        *sections, last = key.split(".")
        place = content
        for section in sections:
            place = place[section]
        place.pop(last) if value is None else place.update({last: value})
    file.write_text(json.dumps(content))
    return run


def compared(folder: Path, *run: Path) -> dict[str, dict]:
    config = compare()
    config.runs = tuple(map(str, run))
    assert main.run(config, folder) == 0
    return json.loads((folder / "compare.json").read_text())["rows"]


def test_results_say_how_they_were_made(runs):
    found = json.loads((runs / "a" / "evaluation" / "results.json").read_text())
    settings = evaluation().to_dict()
    expected = settings["probe"] | {"protocol": "fast", "epochs": 1, "learning_rates": [0.5]}
    assert found["settings"]["probe"] == expected
    assert found["settings"]["precision"] == "float32" and found["settings"]["seed"] == 0
    assert found["version"] == VERSION and set(found["data"]) == {"digits"}
    model = load_backbone(parallel.make_mesh(1), ModelSelection(run=str(runs / "a")))
    assert found["weights"] == {"step": 4, "digest": fingerprint(model.params)}


@pytest.mark.parametrize(
    ("key", "value", "other"),
    [
        ("settings.probe.epochs", 40, 1),
        ("settings.probe.learning_rates", [0.01], (0.5,)),
        ("settings.precision", "bfloat16", "float32"),
        ("version", VERSION + 1, VERSION),
        ("weights.step", 2, 4),
        ("data.digits", "another", None),
    ],
)
def test_evaluations_that_differ_are_not_averaged(runs, tmp_path, key, value, other):
    changed = evaluated(runs / "b", tmp_path / "b", **{key: value})
    rows = compared(tmp_path / "out", runs / "a", changed)
    assert len(rows) == 2
    last = key.removeprefix("settings.").removeprefix("weights.")
    stated = tuple(value) if isinstance(value, list) else value
    assert any(f"evaluation.{last}={stated}" in name for name in rows)
    assert other is None or any(f"evaluation.{last}={other}" in name for name in rows)
    for row in rows.values():  # of one run each
        assert row["digits top1"]["std"] is None and row["digits top1"]["runs"] == 1


def test_results_of_unknown_settings_are_averaged_with_none(runs, tmp_path, capsys):
    unknown = dict.fromkeys(("version", "settings", "data", "weights"))
    old = [evaluated(runs / name, tmp_path / name, **unknown) for name in "ab"]
    rows = compared(tmp_path / "out", *old, runs / "a", runs / "b")
    assert sorted(row["digits top1"]["runs"] for row in rows.values()) == [1, 1, 2]
    assert sum("evaluation=unknown settings: " in name for name in rows) == 2
    printed = capsys.readouterr().out
    assert printed.count("+-") == 2  # a task and a metric of the two that are known


def test_readers_take_the_newest_checkpoint_without_corruption(runs, tmp_path, caplog):
    run = tmp_path / "run"
    shutil.copytree(runs / "a", run)
    largest(run / "checkpoints" / "4" / "state").write_bytes(b"")
    loaded, expected = (
        to_timm(nnx.to_pure_dict(nnx.state(singer_jax.load_model(where, step=step))))
        for where, step in ((run, None), (runs / "a", 2))
    )
    for key, value in expected.items():
        np.testing.assert_array_equal(loaded[key], value)
    assert "checkpoint 4 is damaged" in caplog.text and "2 is read instead" in caplog.text

    leave = export()
    leave.run, leave.formats = str(run), ("timm",)
    assert main.run(leave, tmp_path / "out") == 0
    assert '"steps": 2' in (tmp_path / "out" / "student" / "config.json").read_text()

    config = report()
    config.images = 2
    assert main.run(config, run) == 0
    text = (run / "report" / "index.html").read_text()
    assert ", step 2</h1>" in text
    assert "measured on the student of step 4, not on the one shown" in text

    measure = evaluation()
    measure.run, measure.data.source, measure.data.workers = str(run), "digits", 0
    measure.mesh.data, measure.probe.protocol, measure.probe.epochs = 1, "fast", 1
    assert main.run(measure, run / "evaluation") == 0
    found = json.loads((run / "evaluation" / "results.json").read_text())
    assert found["weights"]["step"] == 2
    # A step that is asked for is read or named.
    measure.step = 4
    assert main.run(measure, tmp_path / "four") == 1
    measure.step = 3
    assert main.run(measure, tmp_path / "three") == 2
