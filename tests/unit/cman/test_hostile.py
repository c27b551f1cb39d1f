"""Messages that are not what they should be: decoded or not, an engine survives them and keeps its promises."""

from random import Random
from typing import Any

import msgspec
import pytest

from corral.base.engine import Received
from corral.base.errors import PeerError
from corral.base.ids import MemberId, NodeIncarnation, ViewId
from corral.base.view import QuorumRecord, View
from corral.cman.events import Stop
from corral.cman.wire import (
    HEARTBEATS,
    MESSAGES,
    RECORDS,
    Accept,
    Carried,
    Heartbeat,
    Install,
    Leaving,
    Nack,
    Prepare,
    Promise,
    Propose,
    Reform,
    Removed,
    Status,
)
from corral.wire.codec import MESSAGE_MAX
from tests.unit.cman.bench import TIMING, Bench

MEMBERS = tuple(NodeIncarnation(node, 10) for node in (1, 2, 3))
VIEW = View(ViewId(2, 1), MEMBERS, True)
RECORD = QuorumRecord(ViewId(0, 0), ((1, 1), (2, 1), (3, 1)), 3, TIMING.lease_ns)
SAMPLES: tuple[Any, ...] = (
    Status(ViewId(1, 1), ViewId(1, 1), VIEW, 10),
    Prepare(2, MEMBERS),
    Promise(2, (VIEW,), MEMBERS, ViewId(1, 1), ViewId(1, 1), RECORD, 1, b"x"),
    Nack(2, ViewId(1, 1), 1),
    Propose(VIEW, RECORD, tuple(Carried(m, 1, b"x") for m in MEMBERS), (VIEW,), MEMBERS, ViewId(1, 1)),
    Accept(ViewId(1, 1)),
    Install(ViewId(1, 1)),
    Reform(ViewId(2, 1), True),
    Leaving(10),
    Removed(ViewId(1, 1)),
)
EDGES = (0, -1, 1, 2, 3, 10, 11, 1 << 31, (1 << 60) - 1, 1 << 60, (1 << 63) - 1, True, None, "", b"", [], [0], [1, 10])


@pytest.mark.parametrize("codec", [HEARTBEATS, MESSAGES, RECORDS], ids=["heartbeats", "messages", "records"])
def test_arbitrary_bytes_are_a_peer_error_or_a_message(codec: Any) -> None:
    rng = Random(5)
    for _ in range(2000):
        try:
            decoded = codec.decode(rng.randbytes(rng.randint(0, 60)))
        except PeerError:
            continue
        assert isinstance(decoded, codec.types)


@pytest.mark.parametrize("message", SAMPLES, ids=lambda message: type(message).__name__)
def test_messages_come_back_as_they_went(message: Any) -> None:
    assert MESSAGES.decode(MESSAGES.encode(message)) == message


def test_an_oversize_message_is_refused_before_it_is_decoded() -> None:
    with pytest.raises(PeerError, match="exceeds"):
        MESSAGES.decode(bytes(MESSAGE_MAX + 1))


def mangled(rng: Random, value: Any) -> Any:
    """One place of the tree replaced by something else."""
    if isinstance(value, list) and value and rng.random() < 0.8:
        i = rng.randrange(len(value))
        copy = list(value)
        if rng.random() < 0.2:
            copy = copy * rng.choice((0, 2, 40))
        else:
            copy[i] = mangled(rng, copy[i])
        return copy
    return rng.choice(EDGES)


def test_mangled_messages_neither_stop_the_engine_nor_break_a_promise() -> None:
    """A peer with a valid certificate sends nonsense: asserts (CMAN-2, 3, 4) hold, memory stays bounded."""
    rng = Random(9)
    bench = Bench().whole()
    engine = bench[2]
    accepted = 0
    for _ in range(6000):
        tree = msgspec.msgpack.decode(MESSAGES.encode(rng.choice(SAMPLES)))
        tree[1:] = [mangled(rng, field) if rng.random() < 0.4 else field for field in tree[1:]]
        try:
            message = MESSAGES.decode(msgspec.msgpack.encode(tree))
        except (PeerError, OverflowError):
            continue
        accepted += 1
        before = engine.state.promised
        engine.step(bench.now, Received(MemberId(rng.choice((1, 3)), 10, 0), message))
        engine.ready()
        assert engine.state.promised >= before
        if engine._gone or engine._excluded:  # it believed a peer that others hold its incarnation, or a newer view
            bench = Bench().whole()
            engine = bench[2]
    assert accepted > 1000
    assert len(engine.state.accepted) <= 16
    assert engine.dropped > 0


@pytest.mark.parametrize(
    "message",
    [
        Prepare(1 << 59, MEMBERS),
        Nack(2, ViewId(1 << 59, 1), 1),
        Status(ViewId(1 << 59, 1), ViewId(1, 1), None, 0),
        Reform(ViewId(1 << 59, 1), True),
    ],
    ids=lambda message: type(message).__name__,
)
def test_one_message_cannot_use_the_epochs_up(message: Any) -> None:
    bench = Bench().whole()
    bench.hear(2, 1, message)
    bench.kill(3)
    bench.sleep()
    view = bench[2].view
    assert view is not None
    assert view.id.epoch < 10
    assert bench.take(2, Stop)[-1].id == view.id


def test_heartbeat_round_trip() -> None:
    beat = Heartbeat(7, 10, 6, 5, (1, 2), ViewId(3, 1), ViewId(2, 1), 1)
    assert HEARTBEATS.decode(HEARTBEATS.encode(beat)) == beat
