"""The filesystem after power loss: no seed violates a promise, and every planted bug is caught."""

import pytest

from corral.gfs.format import BlockDamaged
from corral.gfs.replay import JournalDamaged
from corral.gfs.superblock import Refused
from tests.sim import gfs_crash
from tests.sim.gfs_plants import PLANTS


@pytest.mark.parametrize("seed", range(8))
def test_every_cut_leaves_a_sound_filesystem_with_all_that_was_synced(seed: int) -> None:
    summary = gfs_crash.run(seed, operations=160, cuts=10)
    assert summary["writes"] > 20


def test_a_small_journal_that_goes_round_many_times() -> None:
    assert gfs_crash.run(1000, operations=500, cuts=6)["writes"] > 200


@pytest.mark.parametrize("name", sorted(PLANTS))
def test_a_planted_bug_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plant, promise = PLANTS[name]
    plant(monkeypatch)
    for seed in range(50):
        try:
            gfs_crash.run(seed, operations=160, cuts=8)
        except (gfs_crash.ViolationError, AssertionError) as error:
            assert str(error).startswith((promise, "GFS-"))
            return
        except (JournalDamaged, BlockDamaged, Refused, OSError):
            return
    pytest.fail(f"{name} was not caught in 50 seeds")
