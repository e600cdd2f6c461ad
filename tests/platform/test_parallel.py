"""Values that several processes exchange."""

import threading
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils

from singer_jax.platform import parallel


def test_a_process_alone_holds_everything():
    assert parallel.of_each_process({"a"}) == [{"a"}]


@pytest.mark.parametrize("values", [[set(), {"a" * 300, "b"}], [{"a"}, {"a"}], [None, 1, "two"]])
def test_each_process_gets_what_all_hold(monkeypatch, values):
    """The processes are threads, which meet where processes would."""
    met = threading.Barrier(len(values), timeout=60)
    given: dict[int, np.ndarray] = {}
    own = threading.local()

    def gather(part: np.ndarray) -> np.ndarray:
        given[own.number] = part
        met.wait()
        parts = np.stack([given[number] for number in range(len(values))])
        met.wait()
        return parts

    def process(number: int) -> list:
        own.number = number
        return parallel.of_each_process(values[number])

    monkeypatch.setattr(jax, "process_count", lambda: len(values))
    monkeypatch.setattr(multihost_utils, "process_allgather", gather)
    with ThreadPoolExecutor(len(values)) as processes:
        found = list(processes.map(process, range(len(values))))
    assert found == [values] * len(values)
