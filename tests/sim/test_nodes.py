"""Whole nodes in virtual time: the seeds that once failed, a few fresh ones, and that a seed replays."""

from pathlib import Path

from corral.sim import harness
from tests.sim import nodes

SEEDS = Path(__file__).parent / "seeds.txt"


def test_a_calm_cluster_forms_and_works() -> None:
    outcome = harness.run(1, nodes.calm)
    assert outcome.result["operations"] > 100


def test_lock_workers_under_faults() -> None:
    for outcome in harness.run_seeds("nodes.locks", nodes.locks, SEEDS, fresh=3):
        assert outcome.result["operations"] > 100


def test_a_whole_cluster_replays() -> None:
    harness.replay(harness.fresh_seeds(1)[0], nodes.calm)
