"""Queries: every bit of them, from every member, whoever masters the name."""

import pytest
from tests.unit.dlm.members import Members, member

from corral.api.dlm import (
    CR,
    EX,
    IV,
    NL,
    PR,
    PW,
    QUERY_ALL,
    QUERY_BLOCKING,
    QUERY_EQUAL,
    QUERY_HIGHER,
    QUERY_LOCAL,
    QUERY_LOWER,
    QUERY_NOT_BLOCKING,
    QUERY_QUEUES,
    QUERY_REQUESTED,
    QUEUE_CONVERT,
    QUEUE_GRANT,
    QUEUE_WAIT,
    THIS_LOCK,
    VALBLK,
    Request,
)

EVERYTHING = QUERY_QUEUES | QUERY_ALL


@pytest.fixture
def crowd():
    """On member 1 handle 1 holds PR, on 2 handle 2 holds CR, on 3 handle 3 waits PR -> PW and on 1 handle 4 waits."""
    members = Members(1, 2, 3)
    members.submit(1, 1, 1, Request("lock", b"r", PR))
    members.submit(2, 1, 2, Request("lock", b"r", CR))
    members.submit(3, 1, 3, Request("lock", b"r", NL))
    members.submit(3, 1, 3, Request("convert", mode=PW))
    members.submit(1, 1, 4, Request("lock", b"r", EX))
    return members


def asked(members, node, bits, *, handle=0, name=b"r", limit=0):
    request = Request("query", b"" if handle else name, flags=bits, lock=handle, owner=limit)
    return members.ask(node, 1, handle, request)


def locks(completion):
    return sorted(info.lock for info in completion.report.locks)


@pytest.mark.parametrize("node", [1, 2, 3])
def test_every_member_hears_the_same(crowd, node):
    done = asked(crowd, node, EVERYTHING)
    report = done.report
    assert (done.status, report.name, report.master) == (0, b"r", member(1))
    assert (report.granted, report.converting, report.waiting) == (2, 1, 1)
    assert [
        (info.member, info.client, info.lock, info.state, info.granted, info.requested) for info in report.locks
    ] == [
        (member(1), 1, 1, QUEUE_GRANT, PR, IV),
        (member(2), 1, 2, QUEUE_GRANT, CR, IV),
        (member(3), 1, 3, QUEUE_CONVERT, NL, PW),
        (member(1), 1, 4, QUEUE_WAIT, IV, EX),
    ]


@pytest.mark.parametrize(
    ("bits", "expected"),
    [
        (QUEUE_GRANT | QUERY_ALL, [1, 2]),
        (QUEUE_CONVERT | QUERY_ALL, [3]),
        (QUEUE_WAIT | QUERY_ALL, [4]),
        (QUERY_QUEUES | QUERY_HIGHER | CR, [1]),
        (QUERY_QUEUES | QUERY_EQUAL | CR, [2]),
        (QUERY_QUEUES | QUERY_LOWER | CR, [3, 4]),
        (QUERY_QUEUES | QUERY_HIGHER | QUERY_REQUESTED | PR, [3, 4]),
        (QUERY_QUEUES | QUERY_EQUAL | QUERY_REQUESTED | PW, [3]),
        (QUERY_BLOCKING | PW, [1]),
        (QUERY_BLOCKING | EX, [1, 2]),
        (QUERY_NOT_BLOCKING | PW, [2]),
        (QUERY_NOT_BLOCKING | NL, [1, 2]),
    ],
)
def test_the_bits_choose(crowd, bits, expected):
    assert locks(asked(crowd, 2, bits)) == expected


@pytest.mark.parametrize(
    ("node", "handle", "bits", "expected"),
    [
        (3, 3, QUERY_BLOCKING, [1]),
        (1, 4, QUERY_BLOCKING, [1, 2]),
        (1, 1, QUERY_BLOCKING, []),  # it asks for nothing
        (1, 1, QUERY_QUEUES | QUERY_EQUAL | THIS_LOCK, [1]),
        (2, 2, QUERY_QUEUES | QUERY_HIGHER | THIS_LOCK, [1]),
        (3, 3, QUERY_QUEUES | QUERY_HIGHER | QUERY_REQUESTED | THIS_LOCK, [4]),
    ],
)
def test_the_asking_lock_gives_the_mode(crowd, node, handle, bits, expected):
    assert locks(asked(crowd, node, bits, handle=handle)) == expected


def test_too_many_locks_are_cut_off_and_said_to_be(crowd):
    done = asked(crowd, 3, EVERYTHING, limit=2)
    assert (done.status, locks(done)) == (-7, [1, 2])
    assert (done.report.granted, done.report.converting, done.report.waiting) == (2, 1, 1)


def test_locally_only_what_is_known_there(crowd):
    assert locks(asked(crowd, 1, EVERYTHING | QUERY_LOCAL)) == [1, 2, 3, 4]
    done = asked(crowd, 3, EVERYTHING | QUERY_LOCAL)
    assert (done.report.master, locks(done)) == (member(1), [3])
    assert not crowd.on_the_way


def test_the_value_is_told_with_its_sequence():
    members = Members(1, 2)
    members.submit(1, 1, 1, Request("lock", b"v", EX, VALBLK))
    members.submit(1, 1, 1, Request("convert", mode=EX, flags=VALBLK, value=b"one"))
    members.submit(1, 1, 1, Request("convert", mode=NL, flags=VALBLK, value=b"two"))
    report = asked(members, 2, EVERYTHING, name=b"v").report
    assert (report.value.rstrip(b"\0"), report.value_valid, report.sequence) == (b"two", True, 2)


@pytest.mark.parametrize(
    "bits",
    [0, QUERY_ALL, QUERY_QUEUES, QUERY_QUEUES | 0x700, QUERY_QUEUES | QUERY_HIGHER | THIS_LOCK, EVERYTHING | 0x80],
)
def test_bits_that_do_not_go_together(crowd, bits):
    assert asked(crowd, 1, bits).status == -22


def test_names_nobody_uses_and_locks_one_does_not_have(crowd):
    for node in (1, 2, 3):
        assert asked(crowd, node, EVERYTHING, name=b"unheard of").status == -2
        assert asked(crowd, node, EVERYTHING, handle=77).status == -2


def test_a_stale_idea_of_the_master_is_put_right_by_the_directory():
    members = Members(1, 2, 3, toss_ns=100)
    names = [b"name %d" % number for number in range(12)]
    for name in names:
        members.submit(1, 1, names.index(name) + 1, Request("lock", name, EX))
        members.submit(2, 1, names.index(name) + 1, Request("lock", name, NL))
    for handle in range(1, len(names) + 1):
        members.submit(1, 1, handle, Request("unlock"))
        members.submit(2, 1, handle, Request("unlock"))
    engine = members.engines[1]
    members.now += 200
    engine.space.expire(members.now, 100)  # 1 forgets, 2 still believes in it
    members.step(1, _nothing())
    for name in names:
        members.submit(3, 1, 100 + names.index(name), Request("lock", name, PR))
        done = asked(members, 2, EVERYTHING, name=name)
        assert (done.status, done.report.master) == (0, member(3))


def _nothing():
    from corral.base.engine import TICK

    return TICK


def test_a_query_that_a_round_interrupts_is_asked_again():
    members = Members(1, 2, 3)
    members.submit(1, 1, 1, Request("lock", b"r", EX))
    members.submit(2, 1, 2, Request("lock", b"r", NL))
    members.held_back = True
    assert members.submit(2, 1, 2, Request("query", flags=EVERYTHING)) == []
    members.held_back = False
    del members.engines[1]
    members.heard.clear()
    members.recover()
    (done,) = [event for node, event in members.heard if node == 2 and hasattr(event, "completion")]
    assert done.completion.report.master in (member(2), member(3))
    assert [info.lock for info in done.completion.report.locks] == [2]


def test_while_the_lease_has_lapsed_nothing_is_answered():
    members = Members(1)
    members.submit(1, 1, 1, Request("lock", b"r", EX))
    members.lapse(1)
    assert members.submit(1, 1, 1, Request("query", flags=EVERYTHING)) == []
    members.heard.clear()
    members.renew(1)
    assert [event.completion.status for _, event in members.heard] == [0]
