"""The engine's edges: hostile messages, the fast path, the bounds, time."""

import random

import pytest

from corral.api.dlm import EX, NL, NOQUEUE, PR, VALBLK, Request
from corral.base.engine import TICK, Received
from corral.base.errors import PeerError
from corral.base.ids import MemberId
from corral.base.time import FOREVER, SECOND
from corral.base.view import Round, Slotted
from corral.dlm.engine import LockspaceEngine
from corral.dlm.events import Done, Finish, Lease, Lost, RoundDone, SpaceLost, Start, Stop, Submit
from corral.dlm.solo import solo
from corral.dlm.wire import (
    CODEC,
    Blocking,
    Cancel,
    Claim,
    Completed,
    Convert,
    Master,
    Masters,
    Names,
    NotMaster,
    Reached,
    RecoverLock,
    RecoverLocks,
    Remove,
    Unlock,
)
from corral.dlm.wire import Request as Asking

ME, PEER, STRANGER = MemberId(1, 1, 1), MemberId(2, 1, 1), MemberId(9, 1, 1)
ZERO = bytes(8)
MINE = b"d"  # a name whose directory is ME


def with_peer():
    """A running engine with one peer that says only what the test says."""
    engine = LockspaceEngine(ME, "edge", 8, lease_until=FOREVER)
    engine.step(0, Start(Round(1, "dlm:edge", (Slotted(ME, 0), Slotted(PEER, 1)), (), (), ())))
    engine.step(0, Received(PEER, Reached(1)))
    engine.step(0, Received(PEER, Reached(3)))
    engine.step(0, Finish(1))
    assert [type(event) for event in engine.ready().emit] == [RoundDone]
    assert engine.space.directory_of(MINE) == ME
    return engine


HOSTILE = [
    Asking(1, 1, b"", EX, 0, 1, None, True),
    Asking(1, 1, b"x" * 65, EX, 0, 1, None, True),
    Asking(-1, 1, MINE, EX, 0, 1, None, True),
    Asking(1, 0, MINE, EX, 0, 1, None, True),
    Asking(1, 1, MINE, EX, 0, 1, b"short", True),
    Unlock(1, 1, NOQUEUE, None),
    Unlock(1, 1, 0, bytes(9)),
    Master(MINE, PEER, 0),
    Remove(b"nobody has heard of it", 1 << 70 >> 8),
    Convert(1, 1 << 63, PR, 0, None),
]


@pytest.mark.parametrize("message", HOSTILE, ids=lambda message: repr(message)[:60])
def test_messages_no_member_sends_are_dropped(message):
    engine = with_peer()
    before = (len(engine.space.resources), len(engine.space.copies))
    engine.step(0, Received(PEER, message))
    assert (len(engine.space.resources), len(engine.space.copies)) == before
    assert not engine.ready().emit


def test_illegal_operations_of_peers_are_refused_not_done():
    engine = with_peer()
    engine.step(0, Submit(0, [(1, 1, Request("lock", MINE, PR))]))
    engine.ready()
    engine.step(0, Received(PEER, Asking(8, 1, MINE, 9, 0, 1, None, False)))
    engine.step(0, Received(PEER, Convert(99, 5, EX, 0, None)))
    answers = [message.status for _, message in engine.ready().send]
    assert answers == [-22, -2]


def test_a_token_from_the_far_future_poisons_nothing():
    engine = with_peer()
    for message in (Remove(MINE, 1 << 62), Remove(MINE, -1)):
        engine.step(0, Received(PEER, message))
    assert engine.counters.hostile == 2
    engine.step(0, Submit(0, [(1, 1, Request("lock", MINE, EX))]))
    (done,) = engine.ready().emit
    assert done.completion.token == (1 << 32) + 1


def test_a_stranger_is_not_listened_to():
    engine = with_peer()
    engine.step(0, Received(STRANGER, Asking(1, 1, MINE, EX, 0, 1, None, True)))
    assert engine.counters.hostile == 1
    assert not engine.space.copies


def test_a_forged_answer_completes_nothing():
    engine = with_peer()
    engine.step(0, Submit(0, [(1, 1, Request("lock", b"a", EX))]))
    (sent,) = engine.ready().send
    assert sent[0] == PEER
    for forged in (
        Completed(1, 1, 0, 0, EX, 5, None, 0, False),  # before anybody said who is master
        Completed(1, 2, 0, 0, EX, 5, None, 0, False),
    ):
        engine.step(0, Received(PEER, forged))
    engine.step(0, Received(PEER, Master(b"a", PEER, 0)))
    for forged in (
        Completed(1, 1, 0, 0, 9, 5, None, 0, False),
        Completed(1, 1, 3, 0, EX, 5, None, 0, False),
        Completed(1, 1, 0, 0, EX, 5, b"short", 0, False),
        Blocking(1, 7),
    ):
        engine.step(0, Received(PEER, forged))
    assert not engine.ready().emit
    engine.step(0, Received(PEER, Completed(1, 1, 0, 0, EX, 5, None, 0, False)))
    (done,) = engine.ready().emit
    assert (done.completion.mode, done.completion.token) == (EX, 5)


@pytest.mark.parametrize("seed", range(20))
def test_no_sequence_of_decodable_messages_raises(seed):
    rng = random.Random(seed)
    engine = with_peer()
    engine.step(0, Submit(0, [(n, n, Request("lock", rng.choice((b"a", b"d", b"h")), PR)) for n in range(1, 5)]))
    for step in range(400):
        if rng.random() < 0.02:
            engine.step(step, rng.choice((Stop(), Finish(1), TICK, Lease(step + 50))))
        elif rng.random() < 0.02:
            members = (Slotted(ME, 0), Slotted(PEER, 1))
            engine.step(step, Start(Round(step + 2, "dlm:edge", members, (), (), ())))
            engine.step(step, Received(PEER, Reached(1)))
        message = CODEC.decode(CODEC.encode(anything(rng)))
        engine.step(step, Received(PEER, message))
        engine.ready()
    assert engine.counters.hostile


def anything(rng):
    lock = rng.choice((1, 2, 3, 4, 5, 1 << 33))
    operation = rng.randrange(4)
    mode = rng.randrange(-2, 8)
    flags = rng.choice((0, 0, VALBLK, NOQUEUE, 0x40, 0x10, rng.getrandbits(20)))
    value = rng.choice((None, None, ZERO, b"odd"))
    name = rng.choice((b"a", b"d", b"h", b"", b"x" * 70))
    record = RecoverLock(name, lock, 0, mode, rng.randrange(-2, 7), flags, operation, 5, value, 1, True)
    return rng.choice(
        (
            Asking(lock, operation, name, mode, flags, 0, value, rng.random() < 0.5),
            Convert(lock, operation, mode, flags, value),
            Unlock(lock, operation, flags, value),
            Cancel(lock, operation),
            Completed(lock, operation, rng.choice((0, 1, -11, -0x10002)), flags, mode, 3, value, 1, True),
            Blocking(lock, mode),
            Master(name, rng.choice((ME, PEER, STRANGER)), 0),
            NotMaster(lock, operation),
            Remove(name, rng.getrandbits(40)),
            Names([name, b"n%d" % lock]),
            Claim([name]),
            Masters([name], [rng.choice((ME, PEER))] * rng.randrange(3)),
            RecoverLocks([record]),
            Reached(rng.randrange(5)),
        )
    )


def test_undecodable_bytes_are_the_peers_error():
    for payload in (b"", b"\x00", b"\x93\x01\x02\x03", CODEC.encode(Reached(1))[:-1], b"\xff" * 100):
        with pytest.raises(PeerError):
            CODEC.decode(payload)


# --- the fast path ---------------------------------------------------------------------------------------------------


def test_the_fast_path_does_what_submit_does():
    fast, slow = solo(0, "fast", 8), solo(0, "slow", 8)
    rng = random.Random(1)
    for number in range(3000):
        handle = rng.randrange(1, 4)
        op = rng.choice(("lock", "convert", "unlock"))
        flags = rng.choice((0, VALBLK))
        value = rng.choice((None, b"v%d" % number)) if op != "lock" else None
        asked = Request(op, rng.choice((b"x", b"y")), rng.randrange(6), flags, value=value)
        slow.step(number, Submit(0, [(handle, number, asked)]))
        said = slow.ready().emit
        got = fast.complete_now(number, 0, handle, asked)
        if got is None:
            fast.step(number, Submit(0, [(handle, number, asked)]))
            assert [repr(event) for event in fast.ready().emit] == [repr(event) for event in said]
        else:
            (done,) = said
            assert got == done.completion


def test_the_fast_path_is_closed_while_stopped_lapsed_or_lost():
    engine = solo(0, "fast")
    asked = Request("lock", b"x", EX)
    engine.step(0, Lease(100))
    assert engine.complete_now(100, 0, 1, asked) is None
    engine.step(0, Lease(FOREVER))
    engine.step(0, Stop())
    assert engine.complete_now(0, 0, 1, asked) is None
    engine.step(0, Lost())
    assert engine.complete_now(0, 0, 1, asked) is None
    assert [type(event) for event in engine.ready().emit] == [SpaceLost]
    engine.step(0, Submit(0, [(1, 1, asked)]))
    (done,) = engine.ready().emit
    assert isinstance(done, Done)
    assert done.completion.status == -107


def test_a_lapsed_engine_asks_for_no_wakeups_in_the_past():
    engine = solo(0, "idle", toss_ns=SECOND)
    engine.step(0, Submit(0, [(1, 1, Request("lock", b"x", NL)), (1, 2, Request("unlock"))]))
    assert engine.deadline == SECOND
    engine.step(0, Lease(SECOND // 2))
    engine.step(SECOND, TICK)
    assert engine.deadline == FOREVER
    engine.step(SECOND, Lease(FOREVER))
    engine.step(SECOND, TICK)
    assert not engine.space.resources
