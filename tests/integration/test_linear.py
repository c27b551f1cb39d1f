"""Real clients of a three-node cluster under faults: their histories are those of one lock, counter, semaphore, queue.

A short round here; `make linear MINUTES=10` goes on for as long as it is told.
"""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.linear.run import Cluster, one_round

ROUND_SECONDS = 8.0


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path / "c")
    try:
        yield cluster
    finally:
        cluster.end()


def test_histories_of_real_clients_under_kill_and_pause_are_linearizable(cluster: Cluster, tmp_path: Path) -> None:
    directory = tmp_path / "records"
    directory.mkdir()
    seed = time.time_ns() % 1_000_000_000
    result = one_round(cluster, directory, seed, ROUND_SECONDS)
    print(result)
    assert result["faults"]
    for kind in ("lock", "counter", "semaphore", "queue"):
        assert result[kind]["operations"] > 20, result
