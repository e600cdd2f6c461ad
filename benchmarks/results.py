"""Prints a benchmark's results and appends them to its data file, `benchmarks/results/NAME.jsonl`.

Each line of a data file is one row of a table:

  title      what was measured
  command    the command that printed the row; its benchmark is the name of the file
  date       of the measurement, in UTC
  machine    processor, cores and accelerator
  versions   of Python and of the libraries that matter
  commit     of the code, with a `+` after it if files were changed; null if it was not recorded
  row        the measured values by column; a pair is a range

`python -m benchmarks.report` makes the tables of benchmarks/README.md from these files.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import re
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
NUMBER = re.compile(r"-?(0|[1-9]\d*)(\.\d+)?")
THOUSANDS = re.compile(r"\d{1,3}(,\d{3})+")


def machine(device: str = "") -> str:
    """Returns the processor, the number of cores and the accelerator, as one text."""
    model = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.split(":", 1)[1].strip()
            break
    cores = len(os.sched_getaffinity(0))
    return f"{model}, {cores} cores" + (f", {device}" if device and device != "cpu" else "")


def versions(packages: Sequence[str]) -> str:
    """Returns the versions of Python and of packages, as in `python 3.11.7, jax 0.10.2`."""
    found = [f"python {platform.python_version()}"]
    found += [f"{package} {importlib.metadata.version(package)}" for package in packages]
    return ", ".join(found)


def commit() -> str | None:
    """Returns the short hash of the checked-out commit, with `+` if tracked files are changed."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments],
            cwd=Path(__file__).parent,
            check=True,
            capture_output=True,
            text=True,
        ).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ":!benchmarks/results")
        return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def benchmark(command: str) -> str:
    """Returns the name of the benchmark that a command runs; `jobs` for commands of the package."""
    found = re.match(r"(?:python -m|bash) benchmarks[./](\w+)", command)
    return found[1] if found else "jobs"


def encoded(value: object) -> str:
    """Returns a cell of a table as JSON: numbers keep their digits, `1.0..2.0` becomes a pair."""
    text = str(value).strip()
    number = text.replace(",", "") if THOUSANDS.fullmatch(text) else text
    if NUMBER.fullmatch(number):
        return number
    ends = text.split("..")
    if len(ends) == 2 and all(NUMBER.fullmatch(end) for end in ends):
        return f"[{ends[0]}, {ends[1]}]"
    return json.dumps(text, ensure_ascii=False)


def lines(header: Mapping[str, Any], rows: Sequence[Mapping[str, object]]) -> str:
    """Returns the lines of a data file for the rows of one run; empty cells are left out."""
    text = ""
    for row in rows:
        cells = {name: value for name, value in row.items() if str(value).strip()}
        body = ", ".join(f"{json.dumps(name)}: {encoded(value)}" for name, value in cells.items())
        text += json.dumps(header, ensure_ascii=False)[:-1] + f', "row": {{{body}}}}}\n'
    return text


def table(rows: Sequence[Mapping[str, object]]) -> str:
    """Returns rows as a Markdown table with the columns of all rows."""
    columns = list({column: None for row in rows for column in row})
    found = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for row in rows:
        cells = [str(row.get(column, "")).replace("|", "\\|") for column in columns]
        found.append("| " + " | ".join(cells) + " |")
    return "\n".join(found)


def report(
    title: str,
    command: str,
    rows: Sequence[Mapping[str, object]],
    device: str,
    packages: Sequence[str],
    keep: bool = True,
) -> None:
    """Prints a table and appends its rows to the data file of the benchmark.

    Args:
      title: What was measured.
      command: The command line; its benchmark names the data file.
      rows: Values by column.
      device: The accelerator, if any.
      packages: Names of packages whose versions are recorded.
      keep: Appends the rows; otherwise they are only printed.
    """
    print(table(rows))
    if not keep:
        return
    header = {
        "title": title,
        "command": command,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine(device),
        "versions": versions(packages),
        "commit": commit(),
    }
    file = RESULTS / f"{benchmark(command)}.jsonl"
    with file.open("a") as out:
        out.write(lines(header, rows))
    print(f"appended to {file}; update the page with `python -m benchmarks.report`")
