"""Command line of singer_jax: train, evaluate and export distilled ViTs.

  python -m singer_jax.main --config=configs/NAME.py[:protocol] --workdir=DIR [--config.key=value]

or, if the package is installed, `singer-jax --config=NAME[:protocol] ...` with a shipped
configuration.

Exit status: 0: done. 1: the run failed; finished checkpoints are kept. 2: invalid configuration
or input; a one-line message names the setting. 75: stopped on request and saved; the same command
resumes the run.
"""

from __future__ import annotations

import ast
import importlib
import logging
import os
import re
import sys
from collections.abc import Mapping
from typing import Any

from absl import app, flags
from absl import logging as absl_logging
from ml_collections import ConfigDict, config_flags

from singer_jax.errors import InputError, RunError, Stopped, unknown
from singer_jax.io.files import as_path, config_file, shipped_configs, working_disks
from singer_jax.jobs import JOBS
from singer_jax.platform import signals
from singer_jax.settings.renamed import current_key
from singer_jax.settings.settings import flatten

# Jobs and settings are imported only when a job runs: the data loader's worker processes import
# this file again and must not initialise an accelerator.

_CONFIG = config_flags.DEFINE_config_file(
    "config",
    help_string="Config name or file, optionally followed by :paper or :recommended (default).",
    lock_config=True,
)
_WORKDIR = flags.DEFINE_string(
    "workdir", "", "Work directory of the run, also gs://; an existing run is resumed."
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "HOST:PORT of process 0, for several processes."
)
_PROCESSES = flags.DEFINE_integer("processes", None, "Number of processes of this job.")
_PROCESS = flags.DEFINE_integer("process", None, "Index of this process (0-based).")
_JOIN_TIMEOUT = flags.DEFINE_integer(
    "join_timeout", 300, "Seconds to wait for the other processes."
)


_TRAINING = ("distill", "quickstart", "study")
_WITHOUT_WORKDIR = ("models", "plan", "check_run", "replay")


def run(config: ConfigDict, workdir: str | os.PathLike[str], **joining: Any) -> int:
    """Runs the job of a configuration and returns the exit status.

    Args:
      config: configuration of the job.
      workdir: work directory, a local path or a URL such as gs://bucket/folder.
      **joining: arguments of `singer_jax.platform.hosts.join`.
    """
    try:
        folder = as_path(workdir)
        from singer_jax.config import settings_of
        from singer_jax.platform import hosts, parallel

        settings = settings_of(config)
        hosts.join(**joining)
        computing = parallel.computing(getattr(settings, "precision", None))
        with hosts.together(), working_disks(folder), computing:
            parallel.start()
            job = importlib.import_module(f"singer_jax.jobs.{settings.job}")
            getattr(job, settings.job)(settings, folder)
    except (InputError, RunError, Stopped) as error:
        print(f"singer_jax: {error}", file=sys.stderr)
        return error.status
    return 0


def main(argv: list[str]) -> int:
    """Runs the job that the flags describe and returns the exit status."""
    if len(argv) > 1:
        return _refuse(f"unexpected argument {argv[1]!r}; settings are --config.key=value")
    if not _WORKDIR.value and _CONFIG.value.get("job") not in _WITHOUT_WORKDIR:
        return _refuse("--workdir: missing; give the folder of the run")
    absl_logging.set_verbosity(absl_logging.WARNING)
    _quieten_libraries()
    log = logging.getLogger("singer_jax")
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False
    if _CONFIG.value.get("job") in _TRAINING:
        from singer_jax.platform import allocator

        allocator.keep_freed_memory()
    return run(
        _CONFIG.value,
        _WORKDIR.value,
        coordinator=_COORDINATOR.value,
        processes=_PROCESSES.value,
        process=_PROCESS.value,
        timeout=_JOIN_TIMEOUT.value,
    )


def _quieten_libraries() -> None:
    """Filters library messages about an error that is already reported in one line."""

    def is_news(record: logging.LogRecord) -> bool:
        # Errors of orbax's threads are raised again by the code that waits for the save, and its
        # warning about read-only access is expected.
        return not record.exc_info and not re.search("read.only=", record.getMessage())

    absl_logging.get_absl_handler().addFilter(is_news)
    raised, ignored = sys.excepthook, sys.unraisablehook

    def closed(error: BaseException | None) -> bool:
        return isinstance(error, RuntimeError) and str(error) == "Event loop is closed"

    def on_raised(kind: Any, error: Any, where: Any) -> None:
        if not closed(error):
            raised(kind, error, where)

    def on_ignored(given: Any) -> None:
        if not closed(given.exc_value):
            ignored(given)

    sys.excepthook, sys.unraisablehook = on_raised, on_ignored


def _refuse(message: str) -> int:
    print(f"singer_jax: {message}", file=sys.stderr)
    return 2


def parse_flags(argv: list[str]) -> list[str]:
    """Parses the flags and returns the positional arguments.

    If a flag is invalid, it prints one line and exits with status 2.
    """
    try:
        settings = [argument.lstrip("-") for argument in argv[1:] if argument.startswith("-")]
        if {"help", "helpshort"} & set(settings):
            print(_help())
            sys.exit(0)
        files = [s.removeprefix("config=") for s in settings if s.startswith("config=")]
        if not files and "helpfull" not in settings:
            raise InputError(
                "--config: missing; give a file as --config=configs/NAME.py; --help lists them"
            )
        files = [config_file(file) for file in files]
        paths = iter(files)
        argv = [
            f"--config={next(paths)}" if re.match("--?config=", argument) else argument
            for argument in argv
        ]
        try:
            return flags.FLAGS(argv)
        except (AttributeError, KeyError, flags.IllegalFlagValueError) as error:
            # The command line overrides a key that the configuration does not have, or a section.
            if isinstance(error, flags.Error) and "as a ConfigDict" not in str(error):
                raise
            known = flatten(flags.FLAGS["config"].parser.parse(files[-1]), empty=True)
            keys = [s.removeprefix("config.").split("=")[0] for s in settings if "config." in s]
            raise _unknown_key([key for key in keys if key not in known], known) from None
    except InputError as error:
        message = str(error)
    except flags.Error as error:
        # The last line is the message; the traceback of the configuration file precedes it.
        message = str(error).strip().splitlines()[-1].removeprefix("singer_jax.errors.InputError: ")
    sys.exit(_refuse(message))


def _unknown_key(keys: list[str], known: Mapping[str, Any]) -> InputError:
    """Returns the error for the first of some keys that a configuration does not have."""
    for key in keys:
        new = current_key(key)
        if new != key:
            return InputError(f"--config.{key} is now --config.{new}")
        section, overrides, field = key.partition(".overrides.")
        if overrides and f"{section}.overrides" in known:
            return InputError(
                f"{key}: give all overrides as one dict, such as "
                f"--config.{section}.overrides=\"{{'{field}': 3}}\""
            )
        inside = [other for other in known if other.startswith(f"{key}.")]
        if inside:
            return InputError(
                f"{key}: is a section, not a key; set one of its keys, such as {inside[0]}"
            )
        parent = key.rpartition(".")[0]
        beside = [other for other in known if parent and other.startswith(f"{parent}.")]
        return unknown("configuration key", key, beside or known)
    return InputError(
        "--config: an override is invalid; write --config.key=value (docs/configuration.md)"
    )


def _help() -> str:
    """Returns the usage: flags, commands, and configurations."""
    commands, others = {}, {}
    for name, file in shipped_configs().items():
        text = ast.get_docstring(ast.parse(file.read_text())) or ""
        (commands if name in JOBS else others)[name] = text.partition("\n")[0]
    lines = [__doc__.strip().partition("\n\n")[2], "", "Flags:"]
    own = flags.FLAGS.get_key_flags_for_module(sys.modules[__name__])
    lines += [f"  --{flag.name:15} {flag.help}" for flag in own]
    for title, found in (
        ("Commands, by the name of a configuration", commands),
        ("Configurations of the command distill", others),
    ):
        lines += ["", f"{title}:"]
        lines += [f"  {name:25} {text}" for name, text in sorted(found.items())]
    lines += ["", "docs/configuration.md lists the keys of each command."]
    return "\n".join(lines)


def console() -> None:
    """Runs the command `singer-jax`."""
    with signals.handled():
        app.run(main, flags_parser=parse_flags)


if __name__ == "__main__":
    console()
