"""Every timer follows from detect and recover."""

import pytest

from corral.base.errors import ConfigurationError
from corral.base.time import MILLISECOND, SECOND
from corral.cman.timing import RHO_PPM, Timing, guard_of

DETECTS = [50 * MILLISECOND, 500 * MILLISECOND, 2 * SECOND, 2 * SECOND + 1, 60 * SECOND]


@pytest.mark.parametrize("detect", DETECTS)
def test_lease_is_what_the_design_says(detect: int) -> None:
    timing = Timing(detect)
    assert timing.lease_ns == detect - timing.heartbeat_ns - detect * RHO_PPM // 1_000_000
    assert timing.recover_ns == 5 * detect


@pytest.mark.parametrize("detect", DETECTS)
def test_guard_after_a_plain_crash_ends_before_its_detection(detect: int) -> None:
    """The last counter of a dead node is echoed first at most one heartbeat after it came."""
    timing = Timing(detect)
    assert timing.heartbeat_ns + timing.guard_ns <= detect


@pytest.mark.parametrize("lease", [1, 999, 10**6, 397_500_000, 10**12 + 7])
def test_guard_outlasts_a_lease_on_the_slowest_clock_rho_allows(lease: int) -> None:
    # My clock may run (1 + rho) times as fast as the one that counts the lease.
    assert guard_of(lease) * 1_000_000 >= lease * (1_000_000 + RHO_PPM)


def test_table_names_every_timer_once() -> None:
    table = Timing(SECOND).table()
    names = [name for name, _, _ in table]
    assert len(set(names)) == len(names)
    assert {"detect", "recover", "heartbeat", "lease", "guard"} <= set(names)
    assert all(length > 0 and meaning for _, length, meaning in table)


def test_back_off_grows_to_detect_and_differs_between_nodes() -> None:
    timing = Timing(SECOND)
    lengths = [timing.back_off_ns(attempt, 1) for attempt in range(1, 40)]
    assert lengths == sorted(lengths)
    assert lengths[-1] <= timing.detect_ns + timing.retry_ns
    assert len({timing.back_off_ns(3, node) for node in range(1, 33)}) == 32


@pytest.mark.parametrize(("detect", "recover", "words"), [(1, 0, "detect is"), (SECOND, SECOND, "recover is")])
def test_impossible_lengths_are_refused_with_a_sentence(detect: int, recover: int, words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        Timing(detect, recover)
