"""Inputs that all trials share, and undisturbed runs."""

from __future__ import annotations

import functools
import os
import re
import resource
import shutil
from pathlib import Path

from tests import cli, tiny

STEPS, EVERY = 12, 3

_CONFIG = """
from tests import tiny

def get_config():
    config = tiny.config({teacher!r})
    config.steps, config.checkpoint.every_steps, config.log.every_steps = {steps}, {every}, 1
    config.data.source, config.data.path = "folder", {images!r}
    return config
"""


class Bench:
    """Inputs of all trials: configuration, teacher, images, compiled programs, undisturbed runs.

    Args:
      folder: where all of it is kept.
      alone: no other process uses /dev/shm.
      program: `cli.PROGRAM`, or `cli.LOOP`, which needs no images, teacher or configuration.
    """

    def __init__(self, folder: Path, alone: bool, program: tuple[str, ...] = cli.PROGRAM) -> None:
        self.folder, self.alone, self.program = folder, alone, program
        self.images, self.config_file = folder / "images", folder / "run.py"
        self.cache = Path(os.environ.get("JAX_COMPILATION_CACHE_DIR", folder / "compiled"))
        folder.mkdir(parents=True, exist_ok=True)
        if program == cli.LOOP:
            return
        tiny.write_images(self.images, 40)
        teacher = tiny.write_teacher(folder / "teacher.safetensors")
        self.config_file.write_text(
            _CONFIG.format(teacher=str(teacher), images=str(self.images), steps=STEPS, every=EVERY)
        )

    def arguments(self, workdir: Path) -> list[str]:
        """Returns the arguments of a run in a work directory."""
        if self.program == cli.LOOP:
            own = [f"--config.steps={STEPS}", f"--config.checkpoint.every_steps={EVERY}"]
        else:
            own = [f"--config={self.config_file}"]
        return [*own, f"--workdir={workdir}"]

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables of every command."""
        return cli.environment() | {
            "JAX_COMPILATION_CACHE_DIR": str(self.cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }

    def whole(self, *more: str, images: Path | None = None, processes: int = 1) -> Path:
        """Returns the work directory of an undisturbed run with all its checkpoints.

        Args:
          *more: arguments.
          images: other ones.
          processes: how many of them do it.
        """
        name = f"whole_{processes}{'_' + images.name if images else ''}{''.join(more)}"
        workdir = self.folder / re.sub(r"\W+", "_", name)
        if not (workdir / "student" / "config.json").exists():
            shutil.rmtree(workdir, ignore_errors=True)
            more += (f"--config.data.path={images}",) if images else ()
            arguments = [*self.arguments(workdir), *more]
            arguments += ["--config.checkpoint.keep=9", f"--config.mesh.data={processes}"]
            if processes > 1:
                started = cli.start_together(
                    self.environment, processes, *arguments, program=self.program
                )
            else:
                started = [cli.start(self.environment, *arguments, program=self.program)]
            for status, printed in map(cli.finish, started):
                assert status == 0, printed
        return workdir

    @functools.cached_property
    def broken(self) -> Path:
        """Returns a copy of the images of which some cannot be read."""
        folder = self.folder / "broken"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.images, folder)
        for number, file in enumerate(sorted(folder.iterdir())[::5]):
            content = file.read_bytes()
            file.unlink()
            if number % 2:
                os.mkfifo(file)
            else:
                file.write_bytes(content[: 50 * number])
        return folder

    @functools.cached_property
    def seconds(self) -> float:
        """Returns the CPU seconds of a run whose programs are compiled."""
        self.whole()
        begun, again = cpu_of_children(), self.folder / "again"
        run = cli.start(self.environment, *self.arguments(again), program=self.program)
        status, printed = cli.finish(run)
        assert status == 0, printed
        shutil.rmtree(again)
        return cpu_of_children() - begun


def cpu_of_children() -> float:
    """Returns the CPU seconds of the child processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
