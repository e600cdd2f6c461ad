"""Makes the tables of benchmarks/README.md from the data files in benchmarks/results/.

  python -m benchmarks.report

A table stands between two comments. The first names the data file and may choose rows and columns:

  <!-- results plans where="chips=v5e:2x2" columns="configuration, GiB" key="configuration" -->
  <!-- end -->

Without `key`, the newest run of each title on each machine is shown. With `key`, the newest row of
each value of these columns, over all runs. `title` chooses the rows whose title begins with it.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
from collections.abc import Callable, Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any

from benchmarks.results import RESULTS, table

PAGE = Path(__file__).parent / "README.md"
BLOCK = re.compile(r"(<!-- results (?P<options>.*?) -->\n).*?(?=<!-- end -->)", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of a data file; benchmarks/results.py describes the fields."""

    title: str
    command: str
    date: str
    machine: str
    versions: str
    commit: str | None
    row: dict[str, Any]

    @property
    def run(self) -> tuple[str | None, ...]:
        """Returns what the rows of one run share."""
        return self.title, self.machine, self.date, self.command, self.versions, self.commit


def read(name: str) -> list[Row]:
    """Reads the data file of a benchmark; numbers keep their digits."""
    text = (RESULTS / f"{name}.jsonl").read_text()
    return [Row(**json.loads(line, parse_float=Decimal)) for line in text.splitlines()]


def newest(rows: list[Row], key: Callable[[Row], Any]) -> dict[Any, Row]:
    """Returns the newest row of each key; of the same date, the last."""
    found: dict[Any, Row] = {}
    for row in sorted(rows, key=lambda row: row.date[:10]):
        found[key(row)] = row
    return found


def current(rows: list[Row], key: list[str]) -> list[list[Row]]:
    """Returns the rows of each table of the page."""
    if key:
        chosen = newest(rows, lambda row: (row.title, *(row.row.get(name) for name in key)))
        order = list(dict.fromkeys((r.title, *(r.row.get(name) for name in key)) for r in rows))
        titles = dict.fromkeys(row.title for row in rows)
        return [[chosen[place] for place in order if place[0] == title] for title in titles]
    last = newest(rows, lambda row: (row.title, row.machine))
    return [[row for row in rows if row.run == kept.run] for kept in last.values()]


def cell(value: Any) -> str:
    """Returns a value as it is shown in a table."""
    if isinstance(value, list):
        return " to ".join(cell(end) for end in value)
    if isinstance(value, int) and value >= 10000:
        return f"{value:,}"
    return str(value)


def caption(rows: list[Row]) -> str:
    """Returns the line under a table: dates, machines, versions and commits of its rows."""

    def all_of(values: list[str]) -> str:
        return "; ".join(dict.fromkeys(values))

    commits = [f"commit {row.commit}" for row in rows if row.commit]
    dates = sorted({row.date[:10] for row in rows})
    parts = [" to ".join(dict.fromkeys((dates[0], dates[-1])))]
    parts += [all_of([row.machine for row in rows]), all_of([row.versions for row in rows])]
    return "; ".join(filter(None, (*parts, all_of(commits)))) + "."


def block(options: Mapping[str, str], name: str) -> str:
    """Returns the tables of one place of the page."""
    rows = [row for row in read(name) if row.title.startswith(options.get("title", ""))]
    for condition in filter(None, options.get("where", "").split(";")):
        column, allowed = condition.strip().split("=", 1)
        rows = [row for row in rows if str(row.row.get(column)) in allowed.split("|")]
    columns = [column.strip() for column in options.get("columns", "").split(",") if column]
    key = [column.strip() for column in options.get("key", "").split(",") if column]
    text = ""
    for shown in current(rows, key):
        cells = [{column: cell(value) for column, value in row.row.items()} for row in shown]
        if columns:
            cells = [{column: row.get(column, "") for column in columns} for row in cells]
        text += f"\n**{shown[0].title}**\n\n"
        commands = list(dict.fromkeys(row.command for row in shown))
        text += f"`{commands[0]}`\n\n" if len(commands) == 1 else ""
        text += f"{table(cells)}\n\n{caption(shown)}\n"
    return text + "\n"


def page(text: str) -> str:
    """Returns the page with its tables made again."""

    def made(match: re.Match[str]) -> str:
        name, *options = shlex.split(match["options"])
        return match[1] + block(dict(option.split("=", 1) for option in options), name)

    return BLOCK.sub(made, text)


def main() -> None:
    """Writes benchmarks/README.md."""
    PAGE.write_text(page(PAGE.read_text()))


if __name__ == "__main__":
    main()
