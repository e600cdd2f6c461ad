"""Tests of README and docs: links, anchors, files, commands, and quoted messages exist."""

import ast
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from absl import flags
from ml_collections import config_flags

import singer_jax
from singer_jax.config import settings_of
from singer_jax.io.files import config_file
from singer_jax.methods import METHODS

ROOT = Path(__file__).parents[1]
PAGES = sorted((*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "benchmarks/README.md"))
PAGES = [page for page in PAGES if page.exists() and "_build" not in page.parts]
IDS = [str(page.relative_to(ROOT)) for page in PAGES]


def links(page: Path) -> list[tuple[Path, str]]:
    """Returns the files that a page links to, each with its anchor."""
    found = re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]*))?\)", page.read_text())
    local = [(link, anchor) for link, anchor in found if ":" not in link]
    return [((page.parent / link).resolve() if link else page, anchor) for link, anchor in local]


def anchors(page: Path) -> set[str]:
    """Returns the anchors of a page's headings, as GitHub makes them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.S | re.M)
    titles = re.findall(r"^#+ (.*)$", text, flags=re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_links_anchors_and_named_files_exist(page):
    for target, anchor in links(page):
        assert target.exists(), target
        assert not anchor or anchor in anchors(target), (target.name, anchor)
    text = page.read_text()
    # Files that are named without a link; commands by their module.
    folders = "singer_jax|configs|launch|tests|benchmarks|docs"
    for name in re.findall(rf"(?<![\w/.])((?:{folders})/[\w./]++)(?![\{{*])", text):
        generated = "NAME" in name or name == "docs/_build"
        assert generated or (ROOT / name.rstrip("./")).exists(), name
    for name in re.findall(r"python -m ((?:benchmarks|singer_jax|tests)\.\w+)", text):
        place = ROOT / name.replace(".", "/")
        assert place.with_suffix(".py").exists() or (place / "__main__.py").exists(), name


def commands(page: Path) -> Iterator[list[str]]:
    """Yields the arguments of each command with `--config=` in an indented or fenced block."""
    text = page.read_text().replace("\\\n", " ")
    fenced = re.findall(r"^```(?:bash|sh|shell|text|console)?\n(.*?)^```", text, flags=re.S | re.M)
    blocks = [*(line.strip() for block in fenced for line in block.splitlines())]
    blocks += [line.strip() for line in text.splitlines() if line.startswith("    ")]
    for line in blocks:
        if re.search(r"(?<!\S)--config=", line):
            yield shlex.split(line, comments=True)


COMMANDS = [(page, command) for page in PAGES for command in commands(page)]


@pytest.mark.parametrize(
    ("page", "command"), COMMANDS, ids=lambda given: getattr(given, "name", "")
)
def test_commands_are_valid(page, command, monkeypatch):
    """Parses the flags of a command as the command line does, and reads its settings."""
    given = [one for one in command if one.startswith("--config")]
    file = next(one for one in given if one.startswith("--config=")).removeprefix("--config=")
    if "my_" in file:  # a file that the reader writes
        return
    monkeypatch.chdir(ROOT)
    arguments = [one for one in given if not one.startswith("--config=")]
    monkeypatch.setattr(sys, "argv", ["test", f"--config={config_file(file)}", *arguments])
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", lock_config=True, flag_values=values)
    values(sys.argv)
    settings_of(values.config)


def messages() -> list[str]:
    """Returns all string literals of the package; a line feed replaces each formatted value."""
    found = set()
    for file in sorted((ROOT / "singer_jax").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.add(re.sub(r"%[.\d]*[sdfr](?: %%)?", "\n", node.value))
            elif isinstance(node, ast.JoinedStr):
                parts = (getattr(part, "value", None) for part in node.values)
                found.add("".join(part if isinstance(part, str) else "\n" for part in parts))
    return sorted(found)


def test_quoted_messages_exist_in_the_code():
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    quoted = re.findall(r"^\| `([^`]+)` \|", page, flags=re.M)
    assert len(quoted) > 30
    known = messages()
    for message in quoted:
        pattern = re.compile(".*".join(map(re.escape, message.split("…"))), re.S)
        assert any(pattern.search(text) for text in known), message


def test_every_method_is_described():
    page = (ROOT / "docs" / "methods.md").read_text()
    listed = set(re.findall(r"^\| `(\w+)` \|", page.split("## Notation")[0], flags=re.M))
    assert listed == set(METHODS)
    settings = (ROOT / "docs" / "api" / "settings.md").read_text()
    for method in METHODS.values():
        for name in (method.__name__, method.Settings.__name__):
            assert name in singer_jax.__all__, name
        assert f".. autoclass:: {method.Settings.__name__}\n" in settings


def test_the_readme_is_short_and_leads_to_every_page():
    readme = ROOT / "README.md"
    assert len(readme.read_text().splitlines()) <= 130
    seen, left = set(), [readme, ROOT / "docs" / "index.md"]
    while left:
        page = left.pop()
        if page not in seen:
            seen.add(page)
            left += [target for target, _ in links(page) if target.suffix == ".md"]
    pages = {page for page in PAGES if page.parent == ROOT / "docs"}
    assert pages <= seen, pages - seen


def test_every_page_is_in_a_table_of_contents():
    docs = ROOT / "docs"
    listed = {docs / "index.md"}
    for page in (docs / "index.md", docs / "api" / "index.md"):
        for tree in re.findall(r"^```\{toctree\}\n(.*?)^```", page.read_text(), flags=re.S | re.M):
            names = [line for line in tree.splitlines() if re.fullmatch(r"[\w/*]+", line)]
            listed |= {found for name in names for found in page.parent.glob(f"{name}.md")}
    assert {page for page in PAGES if docs in page.parents} <= listed
