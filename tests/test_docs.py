"""Tests of README and docs: the README is short, and all links and named files exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted((*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")))


def links(page: Path) -> list[Path]:
    """Returns the files that a page links to."""
    found = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text())
    return [(page.parent / link).resolve() for link in found if "://" not in link]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_named_files_are_there(page):
    for target in links(page):
        assert target.exists(), target
    text = page.read_text()
    # Files that are named without a link; commands by their module.
    folders = "singer_jax|configs|launch|tests|benchmarks|docs"
    for name in re.findall(rf"\b((?:{folders})/[\w./]++)(?!\{{)", text):
        assert (ROOT / name.rstrip("./")).exists(), name
    for name in re.findall(r"python -m ((?:benchmarks|singer_jax|tests)\.\w+)", text):
        place = ROOT / name.replace(".", "/")
        assert place.with_suffix(".py").exists() or (place / "__main__.py").exists(), name


def test_the_readme_is_short_and_leads_to_every_page():
    readme = ROOT / "README.md"
    assert len(readme.read_text().splitlines()) <= 130
    seen, left = set(), [readme]
    while left:
        page = left.pop()
        if page not in seen:
            seen.add(page)
            left += [target for target in links(page) if target.suffix == ".md"]
    assert {page for page in PAGES if page.parent.name == "docs"} <= seen
