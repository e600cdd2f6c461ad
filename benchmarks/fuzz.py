"""Fuzzes every reader of untrusted files: no crash, no hang, no memory beyond a limit.

  pip install ".[fuzz]"
  python -m benchmarks.fuzz --seconds 600 --findings /dev/shm/findings

Each entry point is fuzzed in its own process. The inputs are guided by coverage if atheris is
installed and the entry point is Python code; otherwise valid files are changed at random. An input
is a finding if it raises another exception than those that a command reports in one line
(`InputError`, `RunError`, `UnreadableImage`), takes more than 5 CPU seconds, ends the process, or
lets it grow by more than 512 MiB. All limits of `singer_jax.io.limits` are set to a twentieth of
their defaults, so that files of a few kilobytes reach them.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from benchmarks.results import report
from singer_jax.io import limits

SLOW, GROWTH = 5.0, 512  # seconds, MiB
_HARD = 2**32  # bytes; a process that asks for more gets none
# What atheris instruments.
_GUIDED = ("singer_jax", "zipfile", "pickletools", "json", "PIL", "scipy.io")
_PACKAGES = ("numpy", "pillow", "simplejpeg", "scipy", "h5py", "safetensors", "tensorflow-datasets")


class Watched:
    """Runs an entry point on one input after the other and keeps the findings.

    Args:
      enter: reads the content of a file.
      folder: folder of the inputs that are findings.
      name: name of the entry point.
    """

    def __init__(self, enter: Callable[[bytes], None], folder: Path, name: str) -> None:
        from singer_jax.data.images import UnreadableImage
        from singer_jax.errors import InputError, RunError

        self.enter, self.folder, self.name = enter, folder, name
        self.expected = (InputError, RunError, UnreadableImage)
        self.executions, self.findings = 0, {}
        self.start = self.written = time.monotonic()
        self.largest = _resident() + GROWTH
        folder.mkdir(parents=True, exist_ok=True)

    def __call__(self, data: bytes) -> None:
        begun, wrong = time.process_time(), ""
        # The input is kept in case it ends the process.
        (self.folder / f"{self.name}.last").write_bytes(data)
        try:
            self.enter(data)
        except self.expected as error:
            if len(str(error).splitlines()) > 1:
                wrong = f"{type(error).__name__} of several lines"
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            wrong = f"{type(error).__name__} in {Path(place.filename).name}:{place.lineno}"
        took, now = time.process_time() - begun, time.monotonic()
        if took > SLOW:
            wrong = wrong or f"slow: {took:.0f} s"
        if _resident() > self.largest:
            wrong = wrong or f"memory: {_resident()} MiB"
            self.largest = 2 * _resident()
        self.executions += 1
        if wrong and wrong not in self.findings:
            kept = self.folder / f"{self.name}-{hashlib.sha1(data).hexdigest()[:12]}"
            kept.write_bytes(data)
            self.findings[wrong] = kept.name
        if wrong or now - self.written > 1:
            self.tell()

    def tell(self) -> None:
        """Writes the progress."""
        self.written = time.monotonic()
        progress = {"executions": self.executions, "seconds": self.written - self.start}
        text = json.dumps(progress | {"findings": self.findings})
        (self.folder / f"{self.name}.json").write_text(text)


def _resident() -> int:
    """Returns the largest resident memory so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def change(seed: bytes, rng: random.Random) -> bytes:
    """Returns a valid file with changed bits and numbers, and pieces removed, doubled or moved."""
    data = bytearray(seed)
    for _ in range(rng.choice((1, 1, 2, 4, 8))):
        at, size = rng.randrange(len(data) + 1), rng.choice((1, 2, 4, 8, 64))
        match rng.randrange(6):
            case 0 if at < len(data):
                data[at] ^= 1 << rng.randrange(8)
            case 1:
                number = rng.choice((0, 1, 2**7, 2**15, 2**31 - 1, 2**31, 2**63, 2**64 - 1))
                packed = number.to_bytes(8, rng.choice(("little", "big")))
                data[at : at + size] = packed[:size] if rng.random() < 0.5 else packed[-size:]
            case 2:
                del data[at : at + size]
            case 3:
                data[at:at] = data[at : at + size]
            case 4:
                data[at:at] = rng.choice((b"0", b"-1", b"9" * 30, b"1e999", b"[", b'"', b"null"))
            case 5:
                other = rng.randrange(len(data) + 1)
                data[at : at + size] = data[other : other + size]
    return bytes(data)


def fuzz(name: str, folder: Path, seconds: float, executions: int, guided: bool) -> None:
    """Fuzzes an entry point in this process for some seconds or executions."""
    if guided:
        import atheris

        with atheris.instrument_imports(include=list(_GUIDED)):
            from benchmarks import fuzz_targets
    else:
        from benchmarks import fuzz_targets
    inside = folder / f"{name}.files"
    shutil.rmtree(inside, ignore_errors=True)
    inside.mkdir(parents=True)
    seeds, enter = fuzz_targets.ENTRIES[name](inside)
    for seed in seeds:
        enter(seed)  # imports the modules that are imported on first use
    virtual = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (virtual + _HARD, resource.RLIM_INFINITY))
    watched = Watched(enter, folder, name)
    if guided:
        corpus = folder / f"{name}.corpus"
        shutil.rmtree(corpus, ignore_errors=True)
        corpus.mkdir()
        for number, seed in enumerate(seeds):
            (corpus / str(number)).write_bytes(seed)
        # This class checks memory and time, because libFuzzer would end at the first finding.
        options = ["-max_len=20000", "-rss_limit_mb=0", "-timeout=600", "-verbosity=0"]
        options += [f"-max_total_time={int(seconds)}", f"-runs={executions or -1}"]
        atheris.Setup([sys.argv[0], str(corpus), *options], watched)
        atheris.Fuzz()  # does not return
    rng = random.Random(0)
    while time.monotonic() - watched.start < (seconds or 1e9):
        if executions and watched.executions >= executions:
            break
        watched(change(rng.choice(seeds), rng))
    watched.tell()


def campaign(
    names: list[str], folder: Path, seconds: float, executions: int
) -> list[dict[str, object]]:
    """Fuzzes each entry point in its own process and returns the rows of the table.

    Args:
      names: names of the entry points.
      folder: folder of the findings.
      seconds: time of each entry point; 0: no limit.
      executions: executions of each entry point; 0: no limit.
    """
    from benchmarks.fuzz_targets import COMPILED

    rows = []
    for name in names:
        guided = bool(importlib.util.find_spec("atheris")) and name not in COMPILED
        command = [sys.executable, "-m", "benchmarks.fuzz", "--only", name, "--inside"]
        command += ["--seconds", str(seconds), "--executions", str(executions)]
        command += ["--findings", str(folder), *(["--guided"] if guided else [])]
        environment = os.environ | {limits.FACTOR: "0.05", "JAX_PLATFORMS": "cpu"}
        (folder / f"{name}.json").unlink(missing_ok=True)
        try:
            done = subprocess.run(
                command, env=environment, check=False, text=True,
                stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                timeout=(2 * seconds + 300) if seconds else None,
            )  # fmt: skip
            last = " ".join(done.stderr[-500:].split())
            ended = f"status {done.returncode}: {last}" if done.returncode else ""
        except subprocess.TimeoutExpired:
            ended = "hangs"
        file = folder / f"{name}.json"
        progress = (
            json.loads(file.read_text()) if file.is_file() else {"executions": 0, "seconds": 0}
        )
        found = list(progress.get("findings", {})) + (
            [f"the process ended: {ended}"] if ended else []
        )
        rows.append(
            {
                "entry point": name,
                "guided by coverage": "yes" if guided else "no",
                "executions": f"{progress['executions']:,}",
                "seconds": round(progress["seconds"]),
                "findings": len(found),
                "which": "; ".join(found),
            }
        )
    return rows


def main() -> None:
    """Fuzzes all entry points, or one in this process with --inside."""
    from_line = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    from_line.add_argument("--seconds", type=float, default=600, help="time of each entry point")
    from_line.add_argument(
        "--executions", type=int, default=0, help="executions of each entry point; 0: no limit"
    )
    from_line.add_argument(
        "--findings", type=Path, default=Path("findings"), help="folder of the findings"
    )
    from_line.add_argument("--only", help="one entry point")
    from_line.add_argument("--keep", action="store_true", help="append to benchmarks/results")
    from_line.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    from_line.add_argument("--guided", action="store_true", help=argparse.SUPPRESS)
    given = from_line.parse_args()
    if given.inside and given.guided:
        fuzz(given.only, given.findings, given.seconds, given.executions, True)
    from benchmarks.fuzz_targets import ENTRIES

    names = [given.only] if given.only else list(ENTRIES)
    if given.inside:
        for name in names:
            fuzz(name, given.findings, given.seconds, given.executions, False)
        return
    given.findings.mkdir(parents=True, exist_ok=True)
    rows = campaign(names, given.findings, given.seconds, given.executions)
    report(
        "Fuzzing of the readers of files",
        f"python -m benchmarks.fuzz --seconds {given.seconds:g}"
        + (f' --only "{given.only}"' if given.only else ""),
        rows,
        "",
        _PACKAGES,
        given.keep,
    )
    sys.exit(any(row["findings"] for row in rows))


if __name__ == "__main__":
    main()
