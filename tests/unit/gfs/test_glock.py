"""The glock engine stepped by hand: what is granted, asked, given up, and in which order."""

from typing import Any

import pytest

from corral.api.dlm import CW, EUNLOCK, EXPEDITE, NL, NOQUEUE, NOQUEUEBAST, PR, Completion
from corral.api.dlm import EX as DLM_EX
from corral.gfs.glock import (
    EX,
    IDLE,
    INODE,
    INVALIDATING,
    IO,
    IOPEN,
    NOEXP,
    SH,
    TRY,
    TRY_CALLBACK,
    UN,
    Glock,
    GlockTable,
    Holder,
)

AT_ONCE = NOQUEUE | NOQUEUEBAST
EAGAIN = -11
EDEADLK = -35


class Stepped:
    """A table and the shell's part, done by hand."""

    def __init__(self, *, min_hold_ns: int = 0) -> None:
        self.table = GlockTable(local=False, min_hold_ns=min_hold_ns)
        self.now = 1000
        self.glock = self.table.get(INODE, 7)

    def want(self, state: int, flags: int = 0) -> Holder:
        holder = Holder(state, flags)
        self.table.enqueue(self.now, self.glock, holder)
        return holder

    def asked(self) -> list[tuple[str, int, int]]:
        """What was sent to the lock manager since the last look."""
        requests, self.table.requests = self.table.requests, []
        return [(request.op, request.mode, request.flags) for _, request in requests]

    def syncs(self) -> list[int]:
        syncs, self.table.syncs = self.table.syncs, []
        return [target for _, target in syncs]

    def answer(self, status: int = 0) -> None:
        if not self.glock.handle and status == 0:
            self.glock.handle = 1
        self.table.completed(self.now, self.glock, Completion(status, 0, 0, b"", False, 0))

    def blocking(self, mode: int) -> None:
        self.table.blocking(self.now, self.glock, mode)

    def release(self, state: int) -> None:
        self.table.release(self.now, self.glock, state)

    def demoted(self, target: int) -> None:
        self.table.begin_sync(self.glock)
        self.table.synced(self.now, self.glock, target)

    def cached(self, state: int) -> None:
        """As after a hold that is over."""
        holder = self.want(state)
        self.asked()
        self.answer()
        assert holder.granted
        self.release(state)


@pytest.fixture
def s() -> Stepped:
    return Stepped()


def test_a_hold_asks_once_and_stays_cached(s: Stepped) -> None:
    holder = s.want(SH)
    assert s.asked() == [("lock", PR, AT_ONCE)]
    s.answer()
    assert holder.granted
    s.release(SH)
    assert s.table.try_hold(s.glock, SH)
    assert s.asked() == []


def test_who_has_to_wait_does_so_as_a_conversion(s: Stepped) -> None:
    # As a new request it would wait until no conversion waits: for ever, beside nodes that take turns.
    holder = s.want(EX)
    assert s.asked() == [("lock", DLM_EX, AT_ONCE)]
    s.answer(EAGAIN)
    assert s.asked() == [("lock", NL, EXPEDITE)]
    s.answer()
    assert s.asked() == [("convert", DLM_EX, 0)]
    assert not holder.granted
    s.answer()
    assert holder.granted


def test_whoever_gives_up_waiting_leaves_the_lock_to_the_next(s: Stepped) -> None:
    first = s.want(EX)
    s.asked()
    s.table.cancel(s.now, s.glock, first)
    s.answer(EAGAIN)
    assert s.asked() == []
    second = s.want(SH)
    assert s.asked() == [("lock", NL, EXPEDITE)]
    s.answer()
    s.answer()
    assert second.granted


def test_shared_holders_go_together_and_an_exclusive_one_alone(s: Stepped) -> None:
    s.cached(EX)
    assert s.table.try_hold(s.glock, SH)
    assert s.table.try_hold(s.glock, SH)
    assert not s.table.try_hold(s.glock, EX)
    exclusive = s.want(EX)
    later = s.want(SH)
    assert not s.table.try_hold(s.glock, SH)  # nobody overtakes the queue
    s.release(SH)
    s.release(SH)
    assert exclusive.granted
    assert not later.granted
    s.release(EX)
    assert later.granted


def test_another_node_waits_for_the_holders_and_then_for_the_sync(s: Stepped) -> None:
    s.cached(EX)
    assert s.table.try_hold(s.glock, EX)
    s.blocking(PR)
    assert s.syncs() == []
    assert not s.table.try_hold(s.glock, SH)
    mine = s.want(SH)
    s.release(EX)
    assert s.syncs() == [SH]
    assert s.asked() == []  # nothing is lowered before the sync is done
    s.demoted(SH)
    assert s.asked() == [("convert", PR, 0)]
    s.answer()
    assert mine.granted
    assert s.glock.state == SH


@pytest.mark.parametrize(("mode", "target"), [(PR, SH), (CW, UN), (DLM_EX, UN)])
def test_what_is_left_depends_on_who_asks(s: Stepped, mode: int, target: int) -> None:
    s.cached(EX)
    s.blocking(mode)
    assert s.syncs() == [target]


def test_a_blocking_callback_that_does_not_concern_us_is_ignored(s: Stepped) -> None:
    s.cached(SH)
    s.blocking(PR)
    assert s.syncs() == []
    assert s.table.try_hold(s.glock, SH)


def test_a_stronger_demand_during_a_demotion_follows_it(s: Stepped) -> None:
    s.cached(EX)
    s.blocking(PR)
    assert s.syncs() == [SH]
    s.blocking(DLM_EX)
    s.demoted(SH)
    s.asked()
    s.answer()
    assert s.syncs() == [UN]


def test_shared_to_exclusive_keeps_what_is_cached_while_it_waits(s: Stepped) -> None:
    s.cached(SH)
    mine = s.want(EX)
    assert s.asked() == [("convert", DLM_EX, 0)]
    s.blocking(DLM_EX)  # somebody else queued behind
    assert s.syncs() == []
    s.answer()
    assert mine.granted
    s.release(EX)
    s.table.tick(s.now)
    assert s.syncs() == [UN]


def test_of_two_that_would_convert_at_once_one_goes_through_unlocked(s: Stepped) -> None:
    s.cached(SH)
    mine = s.want(EX)
    assert s.asked() == [("convert", DLM_EX, 0)]
    s.answer(EDEADLK)
    assert s.syncs() == [UN]
    s.demoted(UN)
    assert s.asked() == [("convert", 0, 0)]
    s.answer()
    assert s.asked() == [("convert", DLM_EX, 0)]
    s.answer()
    assert mine.granted


def test_try_fails_instead_of_waiting_and_may_tell_the_holders(s: Stepped) -> None:
    mine = s.want(EX, TRY | TRY_CALLBACK)
    assert s.asked() == [("lock", DLM_EX, AT_ONCE)]
    s.answer(EAGAIN)
    assert mine.failed
    assert not mine.granted
    assert s.glock.state == UN


def test_the_holder_a_lock_was_fetched_for_has_it_before_it_goes_again() -> None:
    s = Stepped(min_hold_ns=50)
    mine = s.want(EX)
    s.asked()
    s.answer()
    assert mine.granted
    s.release(EX)
    s.blocking(DLM_EX)
    assert s.syncs() == []  # not before the minimum hold time
    assert s.table.try_hold(s.glock, EX)
    s.release(EX)
    assert s.table.deadline == 1050
    s.now = 1050
    s.table.tick(s.now)
    assert s.syncs() == [UN]


def test_a_lock_that_was_costly_to_give_up_is_kept_longer_next_time() -> None:
    s = Stepped(min_hold_ns=50)
    s.want(EX)
    s.asked()
    s.answer()
    s.release(EX)
    s.now += 50
    s.blocking(DLM_EX)
    assert s.syncs() == [UN]
    s.now += 8000
    s.table.begin_sync(s.glock)
    s.table.synced(s.now, s.glock, UN)
    s.asked()
    s.answer()
    s.want(EX)
    s.asked()
    s.answer()
    assert s.glock.hold_until == s.now + 1000  # one part in eight of 8000


def test_a_demand_that_comes_before_the_grant_is_kept() -> None:
    s = Stepped()
    mine = s.want(EX)
    s.asked()
    s.blocking(PR)
    s.answer()
    assert mine.granted
    s.release(EX)
    s.table.tick(s.now)
    assert s.syncs() == [SH]


# --- the gate --------------------------------------------------------------------------------------------------------


def test_a_closed_gate_lets_pass_what_is_cached_and_what_recovers(s: Stepped) -> None:
    s.cached(SH)
    s.table.close_gate()
    assert s.table.try_hold(s.glock, SH)
    s.release(SH)
    ordinary = s.want(EX)
    assert s.asked() == []
    s.table.cancel(s.now, s.glock, ordinary)
    recovering = s.want(EX, NOEXP)
    assert s.asked() == [("convert", DLM_EX, 0)]
    s.answer()
    assert recovering.granted


def test_a_grant_that_was_on_its_way_is_not_used_while_the_gate_is_closed(s: Stepped) -> None:
    mine = s.want(EX)
    s.asked()
    s.table.close_gate()
    s.answer()
    assert not mine.granted
    assert not s.table.try_hold(s.glock, SH)
    s.table.open_gate(s.now)
    assert mine.granted


def test_recovery_does_not_wait_in_line_behind_those_who_wait_for_it(s: Stepped) -> None:
    s.table.close_gate()
    waiting = s.want(SH)
    recovering = s.want(EX, NOEXP)
    assert s.asked() == [("lock", DLM_EX, AT_ONCE)]
    s.answer()
    assert recovering.granted
    s.release(EX)
    assert waiting.granted  # cached now, and recovery is through with it
    on_its_way = s.want(EX)
    assert not on_its_way.granted


def test_a_gated_grant_may_still_be_given_away(s: Stepped) -> None:
    mine = s.want(EX)
    s.asked()
    s.table.close_gate()
    s.answer()
    s.blocking(DLM_EX)
    s.table.tick(s.now)
    assert s.syncs() == [UN]
    assert not mine.granted


# --- invalidation and the end ----------------------------------------------------------------------------------------


def test_reads_are_served_while_the_kernel_drops_its_pages(s: Stepped) -> None:
    s.cached(EX)
    s.blocking(DLM_EX)
    assert s.glock.phase == INVALIDATING
    assert not s.table.try_hold(s.glock, SH)
    assert s.table.try_hold_io(s.glock, SH)
    assert s.glock.io_served == 1
    with pytest.raises(AssertionError, match="GFS-2"):
        s.table.begin_sync(s.glock)
    s.release(SH)
    s.demoted(UN)
    assert not s.table.try_hold_io(s.glock, SH)


def test_given_up_is_unlocked_and_forgotten(s: Stepped) -> None:
    s.cached(EX)
    s.table.give_up(s.now, s.glock)
    s.demoted(UN)
    assert s.asked() == [("unlock", 0, 0)]
    s.glock.handle = 0
    s.table.completed(s.now, s.glock, Completion(EUNLOCK, 0, 0, b"", False, 0))
    assert s.glock.forgotten
    assert s.table.get(INODE, 7) is not s.glock


def test_given_up_but_wanted_again_is_fetched_anew(s: Stepped) -> None:
    s.cached(EX)
    s.table.give_up(s.now, s.glock)
    mine = s.want(SH)
    s.demoted(UN)
    assert s.asked() == [("unlock", 0, 0)]
    s.glock.handle = 0
    s.table.completed(s.now, s.glock, Completion(EUNLOCK, 0, 0, b"", False, 0))
    assert s.asked() == [("lock", PR, AT_ONCE)]
    s.answer()
    assert mine.granted


def test_dirty_state_cannot_be_left_behind(s: Stepped) -> None:
    s.cached(EX)
    s.blocking(DLM_EX)
    s.glock.dirty = 1
    s.table.begin_sync(s.glock)
    with pytest.raises(AssertionError, match="GFS-2"):
        s.table.synced(s.now, s.glock, UN)


def test_a_local_table_grants_at_once_and_sends_nothing() -> None:
    table = GlockTable(local=True)
    glock: Glock = table.get(INODE, 1)
    assert table.try_hold(glock, SH)
    assert not table.try_hold(glock, EX)
    waiting: Any = Holder(EX, 0)
    table.enqueue(0, glock, waiting)
    table.release(0, glock, SH)
    assert waiting.granted
    assert table.requests == []
    assert glock.phase == IDLE


def test_a_write_that_waited_before_the_invalidation_is_served_in_it() -> None:
    """The kernel has its pages locked: it could not drop them before the answer, which would wait for the demotion."""
    stepped = Stepped()
    first = stepped.want(EX)
    stepped.answer()
    assert first.granted
    stepped.blocking(DLM_EX)
    write, other, second = stepped.want(EX, IO), stepped.want(EX), stepped.want(EX, IO)
    assert not write.granted
    stepped.release(EX)
    assert stepped.glock.phase == INVALIDATING
    assert write.granted
    assert not second.granted
    stepped.release(EX)
    assert second.granted
    assert not other.granted
    stepped.release(EX)
    assert stepped.glock.io_served == 2
    assert stepped.syncs() == [UN]


def test_a_write_is_not_served_under_a_gated_lock_that_is_asked_back() -> None:
    """It would be acknowledged on top of what a journal still to be replayed holds, and then overwritten by it."""
    stepped = Stepped()
    write = stepped.want(EX, IO)
    stepped.table.close_gate()
    stepped.answer()
    assert stepped.glock.gated
    stepped.blocking(DLM_EX)
    assert stepped.glock.phase == INVALIDATING
    assert not write.granted
    assert not stepped.table.try_hold_io(stepped.glock, EX)
    stepped.table.open_gate(stepped.now)
    assert write.granted


def test_an_open_file_does_not_keep_others_from_opening_it() -> None:
    """EX may be cached from a reclaim of the block's earlier life; the open itself needs SH only, and lasts."""
    stepped = Stepped()
    stepped.glock = stepped.table.get(IOPEN, 7)
    reclaim = stepped.want(EX)
    stepped.answer()
    stepped.release(EX)
    opened = stepped.want(SH)
    assert reclaim.granted
    assert opened.granted
    stepped.asked()
    stepped.blocking(PR)
    again = stepped.want(SH)
    assert stepped.syncs() == [SH]
    stepped.table.begin_sync(stepped.glock)
    stepped.table.synced(stepped.now, stepped.glock, SH)
    assert stepped.asked() == [("convert", PR, 0)]
    stepped.answer()
    assert stepped.glock.state == SH
    assert again.granted
