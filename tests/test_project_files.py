"""Tests of CHANGELOG.md, CITATION.cff and the templates of the repository."""

import re
from pathlib import Path

import yaml

import singer_jax

ROOT = Path(__file__).parents[1]


def versions() -> list[tuple[str, str]]:
    """Returns the versions of the changelog and their dates, newest first."""
    text = (ROOT / "CHANGELOG.md").read_text()
    return re.findall(r"^## \[(\d+\.\d+\.\d+)\] - (\d{4}-\d\d-\d\d)$", text, re.MULTILINE)


def test_the_changelog_has_the_form_of_keep_a_changelog():
    text = (ROOT / "CHANGELOG.md").read_text()
    assert text.startswith("# Changelog\n")
    sections = re.findall(r"^## (.*)$", text, re.MULTILINE)
    dated = [f"[{version}] - {date}" for version, date in versions()]
    assert [section for section in sections if section != "[Unreleased]"] == dated
    assert dated == sorted(dated, reverse=True)
    kinds = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    for section in re.split(r"^## .*$", text, flags=re.MULTILINE)[1:]:
        groups = re.findall(r"^### (.*)$", section, re.MULTILINE)
        assert set(groups) <= kinds and len(groups) == len(set(groups))
        assert not re.search(r"^\S.*:$", section, re.MULTILINE)  # a heading of another form


def test_the_citation_has_the_released_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0"
    version, date = versions()[0]
    assert singer_jax.__version__ == version == str(citation["version"])
    assert citation["date-released"] == date
    paper = citation["preferred-citation"]
    assert paper["authors"] and paper["title"].startswith("SiNGER")


def test_issue_templates_have_a_name_and_a_description():
    for file in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.md"):
        _, head, body = file.read_text().split("---\n", 2)
        assert {"name", "about", "labels"} <= yaml.safe_load(head).keys() and body.strip()
