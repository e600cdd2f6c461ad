"""Tests of the benchmarks' data files and of the page that is made from them."""

import json
import re

import pytest

from benchmarks import report, results

FILES = sorted(results.RESULTS.glob("*.jsonl"))
FIELDS = {"title", "command", "date", "machine", "versions", "commit", "row"}


def test_the_page_equals_its_data():
    text = report.PAGE.read_text()
    assert report.page(text) == text, "run python -m benchmarks.report"


def test_every_data_file_is_on_the_page_and_has_a_benchmark():
    shown = set(re.findall(r"<!-- results (\w+)", report.PAGE.read_text()))
    assert shown == {file.stem for file in FILES}
    for file in FILES:
        for row in report.read(file.stem):
            assert results.benchmark(row.command) in (file.stem, "jobs"), row


def test_no_benchmark_names_the_former_log():
    folder = report.PAGE.parent
    files = [file for kind in ("py", "sh", "md") for file in folder.rglob(f"*.{kind}")]
    assert [file for file in files if "RESULTS.md" in file.read_text()] == []


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_each_row_has_its_machine_and_versions(file):
    for line in file.read_text().splitlines():
        found = json.loads(line)
        assert found.keys() == FIELDS
        assert re.match(r"\d{4}-\d\d-\d\d", found["date"])
        assert all(found[name] for name in FIELDS - {"commit"})


def test_values_keep_their_digits():
    rows = [
        {"a": "1.10", "b": "1.20..2.00", "c": "12,345", "d": 'a "b"', "e": "", "f": 3, "g": "1e-3"}
    ]
    (line,) = results.lines({"title": "t"}, rows).splitlines()
    found = json.loads(line, parse_float=report.Decimal)["row"]
    shown = {name: report.cell(value) for name, value in found.items()}
    assert shown == {
        "a": "1.10",
        "b": "1.20 to 2.00",
        "c": "12,345",
        "d": 'a "b"',
        "f": "3",
        "g": "1e-3",
    }


def test_the_newest_run_of_each_machine_is_current(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    for date, machine, value in (("01", "a", 1), ("03", "a", 3), ("02", "a", 2), ("01", "b", 4)):
        header = {"title": "t", "command": "c", "date": f"2026-01-{date}", "machine": machine}
        header |= {"versions": "v", "commit": "0"}
        with (tmp_path / "x.jsonl").open("a") as file:
            file.write(results.lines(header, [{"k": "p", "n": value}, {"k": "q", "n": value}]))
    rows = report.read("x")
    shown = [[row.row["n"] for row in run] for run in report.current(rows, [])]
    assert sorted(shown) == [[3, 3], [4, 4]]
    assert [[r.row["n"] for r in run] for run in report.current(rows, ["k"])] == [[3, 3]]


def test_a_benchmark_appends_to_its_file(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    for command in ("python -m benchmarks.step --batch 4", "bash benchmarks/accelerator.sh"):
        results.report("title", command, [{"what": "a", "s": 1.5}], "", ("jax",), keep=False)
        assert not list(tmp_path.glob("*.jsonl")) or command.startswith("bash")
        results.report("title", command, [{"what": "a", "s": 1.5}], "", ("jax",))
    assert {file.stem for file in tmp_path.glob("*")} == {"step", "accelerator"}
    (row,) = report.read("step")
    assert row.row == {"what": "a", "s": report.Decimal("1.5")}
    assert "| a | 1.5 |" in capsys.readouterr().out
