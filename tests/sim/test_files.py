"""Whole nodes with a filesystem in virtual time: the seeds that once failed, fresh ones, and that a seed replays."""

from pathlib import Path

from corral.sim import harness
from tests.sim import files

SEEDS = Path(__file__).parent / "seeds.txt"


def test_shared_files_under_faults() -> None:
    for outcome in harness.run_seeds("files.shared", files.shared, SEEDS, fresh=1):
        assert outcome.result["operations"] > 100


def test_a_cluster_with_a_filesystem_replays() -> None:
    outcome = harness.replay(harness.fresh_seeds(1)[0], files.calm)
    assert outcome.result["operations"] > 100
