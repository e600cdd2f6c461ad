"""Freed memory stays with the process."""

import platform
import subprocess
import sys

import pytest

from tests import cli

PROGRAM = """
import resource, threading

from singer_jax.platform import allocator

allocator.keep_freed_memory()

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    b"x" * 2**27  # 128 MiB, freed at once
    found.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

found = []
for _ in range(3):
    thread = threading.Thread(target=faults)
    thread.start()
    thread.join()
print(*found)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="settings of glibc")
def test_the_memory_of_a_thread_is_allocated_once():
    given = cli.environment() | {"JAX_PLATFORMS": "cpu"}
    own = ("MALLOC_", "GLIBC_TUNABLES")  # with settings of the user's, it does nothing
    environment = {name: value for name, value in given.items() if not name.startswith(own)}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True
    )
    first, *others = map(int, done.stdout.split())
    assert first > 10 * max(1, *others)  # pages
