"""Sphinx configuration of the documentation site.

  pip install ".[docs]"
  python -m sphinx -W -b html docs docs/_build

The pages are written for GitHub too. Their links to files outside docs/ lead to a page of the site
where there is one (`ROOT_PAGES`), and to a download of the file elsewhere.
"""

from __future__ import annotations

import dataclasses
import inspect
import os
import re
import sys
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
ROOT = DOCS.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("JAX_PLATFORMS", "cpu")  # the API pages import the package

from flax import nnx  # noqa: E402
from sphinx.domains.python import PyObject  # noqa: E402
from sphinx.util.inspect import stringify_signature  # noqa: E402

import singer_jax  # noqa: E402
from singer_jax.settings.settings import Settings  # noqa: E402

project = "singer_jax"
author = "The singer_jax authors"
copyright = "2026, the singer_jax authors"
version = release = singer_jax.__version__

extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax", "myst_nb"]
exclude_patterns = ["_build", "jupyter_execute"]  # both are written by a build
html_theme = "sphinx_book_theme"
html_title = "singer_jax"
html_theme_options = {"show_toc_level": 2, "home_page_in_toc": True, "navbar_persistent": []}
html_copy_source = html_show_sourcelink = False

# The notebook is stored with its outputs; a test executes it (tests/test_site.py).
nb_execution_mode = "off"
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 4  # anchors as on GitHub

autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
napoleon_numpy_docstring = False
napoleon_use_ivar = True

ROOT_PAGES = {
    "project/contributing": "CONTRIBUTING.md",
    "project/security": "SECURITY.md",
    "project/changelog": "CHANGELOG.md",
    "project/benchmarks": "benchmarks/README.md",
}
"""Pages of the site whose text is a file outside docs/."""


def _site_link(target: Path, anchor: str, docname: str) -> str:
    """Returns the link from a page of the site to a file of the repository."""
    pages = {ROOT / file: DOCS / f"{page}.md" for page, file in ROOT_PAGES.items()}
    pages[ROOT / "README.md"] = DOCS / "index.md"
    goal = pages.get(target, target)
    path = os.path.relpath(goal, (DOCS / docname).parent)
    if goal.suffix == ".md" and DOCS not in goal.parents:
        return f"path:{path}"  # a download
    return path + anchor


def _read_source(app: Any, docname: str, content: list[str]) -> None:
    """Takes the text of a page of `ROOT_PAGES` from its file, and adapts links that leave docs/."""
    if docname.startswith("api/") or not (DOCS / f"{docname}.md").exists():
        return
    folder = (DOCS / docname).parent
    if docname in ROOT_PAGES:
        file = ROOT / ROOT_PAGES[docname]
        content[0], folder = file.read_text(), file.parent
        app.env.note_dependency(str(file))

    def link(found: re.Match[str]) -> str:
        text, target, anchor = found[1], found[2], found[3] or ""
        file = (folder / target).resolve()
        if "://" in target or target.startswith("mailto:"):
            return found[0]
        if file.is_dir():
            return text
        return f"[{text}]({_site_link(file, anchor, docname)})"

    content[0] = re.sub(r"\[([^][]*)\]\(([^)#\s]+)(#[^)\s]*)?\)", link, content[0])


def _describe_settings(app: Any, what: str, name: str, thing: Any, *rest: Any) -> None:
    """Adds the fields of settings to the docstring of their class."""
    lines = rest[-1]
    if not (isinstance(thing, type) and issubclass(thing, Settings)):
        return
    if not dataclasses.fields(thing):
        return
    lines += ["", "Attributes:"]
    for field in dataclasses.fields(thing):
        known = field.metadata.get("setting")
        if known:
            unit = f" Unit: {known.unit}." if known.unit else ""
            text = f"{known.meaning}{unit} Default: `{known.default!r}`."
        else:
            text = "A section with settings of its own."
        lines.append(f"  {field.name}: {text}")
    lines.append("")


def _shorten(app: Any, what: str, name: str, thing: Any, options: Any, *rest: Any) -> Any:
    """Returns a signature without the modules of its types; that of `__init__` for an NNX module.

    The metaclass of NNX has the signature (*args, **kwargs).
    """
    if isinstance(thing, type) and issubclass(thing, nnx.Module):
        parameters = list(inspect.signature(thing.__init__).parameters.values())[1:]
        rest = (stringify_signature(inspect.Signature(parameters)), None)
    short = [text and re.sub(r"~?\b(?:[a-z_]\w*\.)+(?=\w)", "", text) for text in rest]
    return tuple(text and text.replace("~", "").replace("<factory>", "...") for text in short)


def _literals(app: Any, what: str, name: str, thing: Any, *rest: Any) -> None:
    """Turns Markdown's `code`, which the docstrings use, into literals of reStructuredText."""
    lines = rest[-1]
    # Several attributes with one description; napoleon would take the first for a type.
    text = re.sub(r"^( +\w+)((?:, \w+)+: )", _joined, "\n".join(lines), flags=re.MULTILINE)
    # Code in single backticks, perhaps with a letter behind it; or a bar, which means nothing here.
    text = re.sub(r"(?<!`)`([^`]+)`(?!`)(\w?)|\|", _literal, text)
    lines[:] = text.split("\n")


def _joined(found: re.Match[str]) -> str:
    return found[1] + found[2].rstrip().replace(" ", "") + " "


def _literal(found: re.Match[str]) -> str:
    if found[0] == "|":
        return "\\|"
    return f"``{found[1]}``" + (f"\\ {found[2]}" if found[2] else "")


def setup(app: Any) -> None:
    """Connects the functions above, and names the attributes of a class as its docstring does."""
    for field in PyObject.doc_field_types:
        if field.name == "variable":
            field.label = "Attributes"
    app.connect("source-read", _read_source)
    app.connect("autodoc-process-signature", _shorten)
    app.connect("autodoc-process-docstring", _describe_settings, priority=300)
    app.connect("autodoc-process-docstring", _literals, priority=400)
