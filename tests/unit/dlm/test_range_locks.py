"""Locks on a part of a resource: conflicts, order, circles, conversions, and what a recovery makes of them."""

import pytest
from tests.unit.dlm.members import Members

from corral.api.dlm import (
    CR,
    CW,
    EX,
    NL,
    NOQUEUE,
    PR,
    PW,
    QUERY_ALL,
    QUERY_QUEUES,
    QUEUE_CONVERT,
    QUEUE_GRANT,
    VALBLK,
    Request,
)
from corral.base.engine import Received
from corral.base.ids import MemberId
from corral.dlm.events import Blocked, Done

LAST = (1 << 64) - 1
EINVAL, EAGAIN, EDEADLK = -22, -11, -35


class Bytes:
    """Two members; client n of member 1 or 2 has lock n on b"r", mastered by the other or by itself."""

    def __init__(self, *nodes):
        self.members = Members(*(nodes or (1, 2)))
        self.at = {}

    def lock(self, handle, mode, span, *, node=1, flags=0):
        self.at[handle] = node
        return self.heard(self.members.submit(node, 1, handle, Request("lock", b"r", mode, flags, range=span)))

    def convert(self, handle, mode, span=None, flags=0):
        request = Request("convert", mode=mode, flags=flags, range=span)
        return self.heard(self.members.submit(self.at[handle], 1, handle, request))

    def unlock(self, handle):
        return self.heard(self.members.submit(self.at[handle], 1, handle, Request("unlock")))

    def heard(self, events):
        said = {event.handle: event.completion.status for _, event in events if isinstance(event, Done)}
        said |= {-event.handle: event.mode for _, event in events if isinstance(event, Blocked)}
        return said

    def queue(self, bit, node=1):
        done = self.members.ask(node, 9, 0, Request("query", b"r", flags=QUERY_ALL | QUERY_QUEUES))
        return {
            lock.lock: (lock.granted, lock.range, lock.requested, lock.requested_range)
            for lock in done.report.locks
            if lock.state == bit
        }


@pytest.mark.parametrize("node", [1, 2])
def test_only_where_they_overlap_are_two_in_each_others_way(node):
    r = Bytes()
    assert r.lock(1, EX, (0, 9)) == {1: 0}
    assert r.lock(2, EX, (10, 19), node=node) == {2: 0}
    assert r.lock(3, PR, (20, LAST), node=node) == {3: 0}
    assert r.lock(4, PR, (9, 9), node=node, flags=NOQUEUE) == {4: EAGAIN}
    assert r.lock(5, CR, None, node=node, flags=NOQUEUE) == {5: EAGAIN}
    assert r.lock(6, PR, (30, 39), node=node) == {6: 0}
    assert r.lock(7, EX, (5, 25), node=node) == {-1: EX, -2: EX, -3: EX}
    assert r.unlock(1) == {1: -0x10002}
    assert r.unlock(2) == {2: -0x10002}
    assert r.unlock(3) == {3: -0x10002, 7: 0}


def test_order_holds_among_those_that_want_some_of_the_same():
    r = Bytes()
    r.lock(1, EX, (0, 9))
    assert r.lock(2, EX, (5, 15)) == {-1: EX}
    assert r.lock(3, PR, (20, 29)) == {3: 0}, "nobody before it wants that"
    assert r.lock(4, PR, (12, 13)) == {}, "the second was there first"
    assert r.lock(5, NL, (15, 15)) == {}
    assert r.lock(6, NL, (16, 16)) == {6: 0}
    assert r.unlock(1)[2] == 0


@pytest.mark.parametrize("node", [1, 2])
def test_a_conversion_may_change_the_range(node):
    r = Bytes()
    r.lock(1, EX, None, node=node)
    assert r.convert(1, EX, (0, 9)) == {1: 0}
    assert r.queue(QUEUE_GRANT) == {1: (EX, (0, 9), -1, None)}
    r.lock(2, EX, (10, 19))
    assert r.convert(1, EX, (0, 10)) == {-2: EX}
    assert r.queue(QUEUE_CONVERT) == {1: (EX, (0, 9), EX, (0, 10))}
    assert r.convert(2, EX, (11, 19))[1] == 0
    assert r.convert(1, PR) == {1: 0}, "without a range it keeps the one it has"
    assert r.queue(QUEUE_GRANT)[1] == (PR, (0, 10), -1, None)
    assert r.convert(1, EX, (0, LAST), flags=NOQUEUE) == {1: EAGAIN}
    assert r.queue(QUEUE_GRANT)[1] == (PR, (0, 10), -1, None)


def test_a_circle_of_three_is_closed_by_nobody():
    r = Bytes()
    for handle in (1, 2, 3):
        r.lock(handle, EX, (handle * 10, handle * 10 + 9))
    assert r.convert(1, EX, (20, 29)) == {-2: EX}
    assert r.convert(2, EX, (30, 39)) == {-3: EX}
    assert r.convert(3, EX, (10, 11)) == {3: EDEADLK}
    assert r.unlock(3) == {3: -0x10002, 2: 0, 1: 0}, "each has left what the one before it wanted"
    assert r.convert(2, EX, (20, 20)) == {-1: EX}
    assert r.convert(1, EX, (29, 30)) == {1: EDEADLK}, "the order of the two closes it as well"
    assert r.unlock(1)[2] == 0


@pytest.mark.parametrize("span", [(5, 4), (-1, 4), (0, 1 << 64)])
def test_what_is_no_range_is_refused_by_everybody(span):
    r = Bytes()
    assert r.lock(1, EX, span) == {1: EINVAL}
    r.lock(2, EX, None)
    assert r.convert(2, EX, span) == {2: EINVAL}


# --- recovery ------------------------------------------------------------------------------------------------------


def lost_master(handles, converts, *, answers_come):
    """Members 1 and 2 hold ranges of what member 3 masters; it dies with conversions under way."""
    r = Bytes(1, 2, 3)
    r.members.submit(3, 1, 99, Request("lock", b"r", NL))  # the first to ask is the master
    assert r.members.engines[3].space.resources.get(b"r").complete
    for handle, (mode, span) in handles.items():
        assert r.lock(handle, mode, span, node=1 + handle % 2)[handle] == 0
    r.members.held_back = True
    for handle, (mode, span) in converts.items():
        r.convert(handle, mode, span)
    if answers_come:
        for node, peer, message in list(r.members.on_the_way):
            if peer == 3:
                r.members.step(3, Received(MemberId(node, 1, 1), message), talk=False)
    del r.members.engines[3]
    r.members.held_back = False
    r.members.heard.clear()
    r.members.recover()
    return r


@pytest.mark.parametrize("answers_come", [False, True])
@pytest.mark.parametrize(
    ("before", "asked", "expected"),
    [
        ((EX, (0, 9)), (EX, (0, 4)), (EX, (0, 4))),
        ((EX, (0, 9)), (PR, (0, 19)), (PR, (0, 19))),
        ((PR, (0, 9)), (EX, (5, 19)), (EX, (5, 19))),
        ((EX, (0, 9)), (EX, (20, 29)), (EX, (20, 29))),
        ((PR, (0, 9)), (CW, (0, 9)), (CW, (0, 9))),
        ((PW, None), (CR, (3, 3)), (CR, (3, 3))),
    ],
)
def test_conversions_whose_master_is_lost_come_through(before, asked, expected, answers_come):
    r = lost_master({1: before}, {1: asked}, answers_come=answers_come)
    assert r.queue(QUEUE_GRANT) == {1: (*expected, -1, None)}
    for engine in r.members.engines.values():
        for lock in engine.space.locks.in_order():
            if lock.address & 0xFFFFFFFF == 1:
                assert (lock.granted, lock.extent, lock.pending) == (*expected, 0)


@pytest.mark.parametrize("answers_come", [False, True])
def test_who_gave_up_a_part_does_not_have_it_after_the_loss_whatever_the_master_did(answers_come):
    """1 moves from 0-9 to 10-19, which 2 has: it waits. The part it may have left is nobody's; what both ranges share
    it keeps."""
    r = lost_master({1: (EX, (0, 9)), 2: (EX, (12, 19))}, {1: (EX, (5, 14))}, answers_come=answers_come)
    assert r.queue(QUEUE_CONVERT) == {1: (EX, (5, 9), EX, (5, 14))}
    assert r.lock(3, EX, (0, 4), node=2) == {3: 0}
    assert r.lock(4, EX, (9, 9), node=2, flags=NOQUEUE) == {4: EAGAIN}
    r.members.submit(r.at[1], 1, 1, Request("cancel"))
    assert r.queue(QUEUE_GRANT)[1] == (EX, (5, 9), -1, None)
    lock = r.members.engines[r.at[1]].space.locks.get(1 << 32 | 1)
    assert (lock.granted, lock.extent) == (EX, (5, 9)), "its holder was told"


def test_values_of_range_locks_are_not_trusted_after_a_loss():
    """Each of the two may have been about to write the one value; neither kept the other from it."""
    for second, trusted in (((10, 19), False), (None, True)):
        r = Bytes(1, 2, 3)
        r.members.submit(3, 1, 99, Request("lock", b"r", NL))
        for handle, mode, span in ((1, PW, (0, 9) if second else None), (2, PW if second else CR, second)):
            asked = Request("lock", b"r", mode, VALBLK, range=span)
            r.members.submit(handle, 1, handle, asked)
        del r.members.engines[3]
        r.members.recover()
        found = [engine.space.resources.get(b"r") for engine in r.members.engines.values()]
        (resource,) = [resource for resource in found if resource.complete]
        assert resource.value_valid == trusted
