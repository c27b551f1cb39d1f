"""Whole nodes with a filesystem in virtual time: the seeds that once failed, and that a seed replays.

Fresh ones are the campaign's: each takes ten seconds and more.
"""

from pathlib import Path

from corral.sim import harness
from tests.sim import files

SEEDS = Path(__file__).parent / "seeds.txt"


def test_shared_files_under_faults() -> None:
    for outcome in harness.run_seeds("files.shared", files.shared, SEEDS, fresh=0):
        assert outcome.result["operations"] > 100


def test_a_cluster_with_a_filesystem_replays() -> None:
    outcome = harness.replay(17, files.calm)
    assert outcome.result["operations"] > 100
