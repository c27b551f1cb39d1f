"""The filesystem after power loss: no seed violates a promise, and every planted bug is caught."""

import pytest

from corral.gfs.format import BlockDamaged
from corral.gfs.replay import JournalDamaged
from corral.gfs.superblock import Refused
from tests.sim import gfs_crash, gfs_nodes
from tests.sim.gfs_plants import NODE_PLANTS, PLANTS
from tests.unit.gfs.world import StuckError


@pytest.mark.parametrize("seed", range(8))
def test_every_cut_leaves_a_sound_filesystem_with_all_that_was_synced(seed: int) -> None:
    summary = gfs_crash.run(seed, operations=160, cuts=10)
    assert summary["writes"] > 20


def test_a_small_journal_that_goes_round_many_times() -> None:
    assert gfs_crash.run(1000, operations=500, cuts=6)["writes"] > 200


@pytest.mark.parametrize("seed", range(12))
def test_three_mounts_see_one_filesystem_and_survive_each_other(seed: int) -> None:
    assert gfs_nodes.run(seed)["blasts"] > 20


# The seed that caught a bug when it was planted is tried first; all fifty are, before it counts as missed.
FIRST = {
    "hand_over_without_data": 3,
    "hand_over_without_revokes": 32,
    "no_replay": 12,
    "no_revokes": 7,
    "trust_torn_commits": 8,
}


def seeds(name: str) -> list[int]:
    first = FIRST.get(name, 0)
    return [first, *(seed for seed in range(50) if seed != first)]


def caught(seed: int) -> bool:
    """By a checker, an invariant, or by the filesystem refusing what it finds."""
    try:
        gfs_crash.run(seed, operations=160, cuts=8)
    except (AssertionError, JournalDamaged, BlockDamaged, Refused, OSError):
        return True
    return False


@pytest.mark.parametrize("name", sorted(PLANTS))
def test_a_planted_bug_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    PLANTS[name](monkeypatch)
    assert any(caught(seed) for seed in seeds(name))


def caught_by_nodes(seed: int) -> bool:
    try:
        gfs_nodes.run(seed, kind=("kill", "sequential")[seed % 2])
    except (AssertionError, BlockDamaged, JournalDamaged, OSError, StuckError):
        return True
    return False


@pytest.mark.parametrize("name", sorted(NODE_PLANTS))
def test_a_bug_planted_between_nodes_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    NODE_PLANTS[name](monkeypatch)
    assert any(caught_by_nodes(seed) for seed in seeds(name))
