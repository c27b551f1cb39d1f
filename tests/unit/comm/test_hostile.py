"""Who is let in, and what becomes of everybody else: counted by kind, told once, closed, memory bounded (COMM-5)."""

import contextlib
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corral.api.comm import PeerDown, PeerUp
from corral.base.errors import PeerError
from corral.base.ids import MemberId
from corral.base.time import MILLISECOND, SECOND
from corral.comm import wire
from corral.comm.actions import LOGGED_MAX, Limits, Rejected
from corral.comm.seal import parse as parse_datagram
from corral.wire.frame import CLOSE, DATA, HELLO, REFUSE, WELCOME, pack_header, parse
from tests.unit.comm.rig import DETECT, Host, Rig, hello, kinds

CALLER = MemberId(1, 5, 0)


@pytest.fixture
def rig() -> Rig:
    return Rig()


def called(rig: Rig, **kwargs: Any) -> Host:
    """Node 2, which expects to be called by node 1."""
    host = rig.host(2, **kwargs)
    host.engine.add_node(rig.now, 1, "n1.0")
    return host


def refusal(heard: list[bytes]) -> wire.Refuse:
    assert kinds(heard) == [REFUSE]
    body = wire.body_of(parse(heard[0]))
    assert isinstance(body, wire.Refuse)
    return body


@pytest.mark.parametrize(
    ("changes", "code", "kind"),
    [
        ({"cluster": "others"}, wire.REFUSE_CLUSTER, "hello with another cluster"),
        ({"uuid": bytes(16)}, wire.REFUSE_CLUSTER, "hello with another cluster"),
        ({"me": MemberId(3, 5, 0)}, wire.REFUSE_MEMBER, "hello with member id does not fit the certificate"),
        ({"me": MemberId(1, 0, 0)}, wire.REFUSE_MEMBER, "hello with member id does not fit the certificate"),
        ({"target": MemberId(3, 0, 0)}, wire.REFUSE_TARGET, "hello with another process was called"),
        ({"target": MemberId(2, 77, 0)}, wire.REFUSE_TARGET, "hello with another process was called"),
        ({"target": MemberId(2, 0, 4)}, wire.REFUSE_TARGET, "hello with another process was called"),
        ({"ticket": b"found it"}, wire.REFUSE_TICKET, "hello with wrong ticket"),
        ({"attempt": 0}, wire.REFUSE_ATTEMPT, "hello with stale connection attempt"),
        ({"version_min": 2, "version_max": 9}, wire.REFUSE_VERSION, "hello with no common wire version"),
        ({"version_min": 0, "version_max": 0}, wire.REFUSE_VERSION, "hello with no common wire version"),
        ({"incompatible": 1}, wire.REFUSE_VERSION, "hello with no common wire version"),
    ],
)
def test_a_wrong_hello_is_refused_counted_and_told(rig: Rig, changes: dict[str, Any], code: int, kind: str) -> None:
    host = called(rig)
    end = rig.stranger(host, 1)
    heard = rig.say(end, hello(CALLER, MemberId(2, 0, 0), **changes))
    assert refusal(heard).code == code
    assert end.broken
    assert host.rejects() == {kind: 1}
    assert [event.kind for event in host.log if isinstance(event, Rejected)] == [kind]
    assert host.changes() == []


def test_a_good_hello_is_welcomed(rig: Rig) -> None:
    host = called(rig)
    heard = rig.say(rig.stranger(host, 1), hello(CALLER, MemberId(2, 0, 0), compatible=0xFF))
    assert kinds(heard) == [WELCOME]
    assert host.changes() == [PeerUp(CALLER, 1)]


def test_an_unknown_member_is_told_to_wait_and_not_complained_about(rig: Rig) -> None:
    host = called(rig)
    heard = rig.say(rig.stranger(host, 1), hello(MemberId(1, 5, 9), MemberId(2, 0, 0)))
    assert refusal(heard).code == wire.REFUSE_WAIT
    assert host.rejects() == {}


def test_the_higher_id_can_summon_but_not_call(rig: Rig) -> None:
    host = rig.host(2)
    host.engine.add_node(rig.now, 3, "n3.0")
    heard = rig.say(rig.stranger(host, 3), hello(MemberId(3, 5, 0), MemberId(2, 0, 0)))
    assert refusal(heard).code == wire.REFUSE_SIDE
    assert host.changes() == []
    assert host.rejects() == {}


def test_an_older_incarnation_never_replaces_a_newer(rig: Rig) -> None:
    host = called(rig)
    rig.say(rig.stranger(host, 1), hello(CALLER, MemberId(2, 0, 0)))
    heard = rig.say(rig.stranger(host, 1), hello(MemberId(1, 4, 0), MemberId(2, 0, 0), attempt=50))
    assert refusal(heard).code == wire.REFUSE_INCARNATION
    assert host.changes() == [PeerUp(CALLER, 1)]


def test_an_older_attempt_never_replaces_a_newer(rig: Rig) -> None:
    host = called(rig)
    rig.say(rig.stranger(host, 1), hello(CALLER, MemberId(2, 0, 0), attempt=8))
    heard = rig.say(rig.stranger(host, 1), hello(CALLER, MemberId(2, 0, 0), attempt=7))
    assert refusal(heard).code == wire.REFUSE_ATTEMPT
    assert host.changes() == [PeerUp(CALLER, 8)]


def test_resuming_what_never_was_is_refused_without_harm(rig: Rig) -> None:
    host = called(rig)
    rig.say(rig.stranger(host, 1), hello(CALLER, MemberId(2, 0, 0)))
    heard = rig.say(rig.stranger(host, 1), hello(CALLER, MemberId(2, 0, 0), attempt=2, resume=9))
    assert refusal(heard).code == wire.REFUSE_SESSION
    heard = rig.say(rig.stranger(host, 1), hello(CALLER, MemberId(2, 0, 0), attempt=3, resume=1, received=4))
    assert refusal(heard).code == wire.REFUSE_PROTOCOL
    assert host.changes() == [PeerUp(CALLER, 1)]


@pytest.mark.parametrize(
    "garbage",
    [
        b"",
        b"GET / HTTP/1.1\r\n\r\n" * 4,
        bytes(40),
        pack_header(DATA, 1, 0, 1, 0, 1, 0),
        pack_header(HELLO, 0, 0, 0, 0, 0, 0),
        pack_header(HELLO, 0, 0, 0, 0, 0, 4) + b"\xc1\xc1\xc1\xc1",
        pack_header(HELLO, 0, 0, 0, 0, 0, 3) + b"\x93\x03\x01",
        pack_header(HELLO, 0, 0, 0, 0, 0, 3000) + b"\x91" * 3000,
        wire.control(CLOSE, 0, 0, wire.Close(1, "bye")),
        hello(CALLER, MemberId(2, 0, 0), me=MemberId(0, 1, 0)),
        hello(CALLER, MemberId(2, 0, 0), me=MemberId(-1, 1, 0)),
        hello(CALLER, MemberId(2, 0, 0), me=MemberId(1, -1, 0)),
        hello(CALLER, MemberId(2, 0, 0), target=MemberId(99999, 1, 0)),
        hello(CALLER, MemberId(2, 0, 0), attempt=-1),
        hello(CALLER, MemberId(2, 0, 0), attempt=1 << 63),
        hello(CALLER, MemberId(2, 0, 0), key_half=b"short"),
        hello(CALLER, MemberId(2, 0, 0), ticket=bytes(65)),
        hello(CALLER, MemberId(2, 0, 0), cluster="c" * 65),
    ],
)
def test_garbage_instead_of_a_hello_closes_the_connection(rig: Rig, garbage: bytes) -> None:
    host = called(rig)
    end = rig.stranger(host, 1)
    assert rig.say(end, garbage) == []
    assert end.broken
    assert host.rejects() == {"malformed hello": 1}
    assert host.engine.statistics().guests == 0


def test_a_mistake_is_told_once_per_node_but_always_counted(rig: Rig) -> None:
    host = called(rig)
    for _ in range(5):
        rig.say(rig.stranger(host, 1), b"garbage")
    rig.say(rig.stranger(host, 3), b"garbage")
    assert host.rejects() == {"malformed hello": 6}
    assert [event.node for event in host.log] == [1, 3]


def test_after_a_welcome_the_next_mistake_is_news_again(rig: Rig) -> None:
    host = called(rig)
    rig.say(rig.stranger(host, 1), b"garbage")
    rig.say(rig.stranger(host, 1), hello(CALLER, MemberId(2, 0, 0)))
    rig.say(rig.stranger(host, 1), b"garbage")
    assert sum(isinstance(event, Rejected) for event in host.log) == 2


def test_what_is_remembered_as_told_is_bounded(rig: Rig) -> None:
    host = called(rig)
    for node in range(1, 2 * LOGGED_MAX):
        host.engine._shared.counters.reject("kind", node, "x" * 10_000)
    told = [event for event in host.engine.out if isinstance(event, Rejected)]
    assert len(told) == LOGGED_MAX
    assert max(len(event.detail) for event in told) <= 200


def test_a_guest_that_says_nothing_is_shown_out_in_time(rig: Rig) -> None:
    host = called(rig)
    end = rig.stranger(host, 1)
    rig.run(SECOND + 5 * MILLISECOND)
    assert end.broken
    assert host.rejects() == {"no hello in time": 1}


def test_guests_are_bounded_per_node_and_in_all(rig: Rig) -> None:
    bounds = Limits(session_timeout_ns=DETECT, handshake_ns=60 * SECOND, stall_ns=SECOND, guests=6, guests_per_node=4)
    host = called(rig, limits=bounds)
    first = [rig.stranger(host, 1) for _ in range(5)]
    second = [rig.stranger(host, 3) for _ in range(4)]
    rig.run(10 * MILLISECOND)
    assert [bool(end.broken) for end in first] == [False] * 4 + [True]
    assert [bool(end.broken) for end in second] == [False] * 2 + [True] * 2
    assert host.engine.statistics().guests == 6


def answering(rig: Rig, answer: bytes) -> Host:
    """Node 1 calls node 2, whose answer is `answer`."""
    caller = rig.host(1)
    caller.engine.add_node(rig.now, 2, "n2.0")
    caller.engine.out.clear()
    rig._numbers += 1
    mine, its = rig._join(caller, caller)
    its.host = None
    caller.ends = {mine.number: mine}
    caller.engine.connected(rig.now, 1, mine.number, bytes(32))
    rig.act(caller)
    rig.transmit(its, [answer])
    rig.run(5 * MILLISECOND)
    return caller


def welcome(**changes: Any) -> bytes:
    fields: dict[str, Any] = {
        "cluster": "testers",
        "uuid": bytes(range(16)),
        "me": MemberId(2, 5, 0),
        "ticket": b"",
        "attempt": 1,
        "session": 1,
        "received": 0,
        "version": 1,
        "compatible": 0,
        "read_only_compatible": 0,
        "incompatible": 0,
        "key_half": bytes(32),
    }
    return wire.control(WELCOME, changes.get("session", 1), 0, wire.Welcome(**{**fields, **changes}))


def test_a_good_welcome_opens(rig: Rig) -> None:
    assert answering(rig, welcome()).changes() == [PeerUp(MemberId(2, 5, 0), 1)]


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"garbage",
        pack_header(DATA, 1, 0, 1, 0, 1, 0),
        pack_header(WELCOME, 0, 0, 0, 0, 1, 2) + b"\x91\x04",
        welcome(cluster="others"),
        welcome(uuid=bytes(16)),
        welcome(me=MemberId(3, 5, 0)),
        welcome(me=MemberId(2, 5, 1)),
        welcome(ticket=b"x"),
        welcome(attempt=2),
        welcome(session=2),
        welcome(received=1),
        welcome(version=2),
        welcome(incompatible=4),
    ],
)
def test_a_wrong_answer_opens_nothing_and_the_caller_tries_again(rig: Rig, answer: bytes) -> None:
    caller = answering(rig, answer)
    assert caller.changes() == []
    assert caller.rejects() == {"wrong answer to a hello": 1}
    assert caller.engine.deadline < rig.now + SECOND


def test_a_welcome_from_before_a_restart_is_nobodys(rig: Rig) -> None:
    caller = answering(rig, wire.control(REFUSE, 0, 0, wire.Refuse(wire.REFUSE_TARGET, MemberId(2, 9, 0), "restarted")))
    assert caller.engine._nodes[2].peer == MemberId(2, 9, 0)
    rig.delay = lambda: SECOND  # the next call is under way
    rig.run(20 * MILLISECOND)
    rig.delay = lambda: MILLISECOND
    ours, its = rig._join(caller, caller)
    its.host = None
    attempt = caller.engine._nodes[2]._attempt
    caller.engine.connected(rig.now, attempt, ours.number, bytes(32))
    rig.transmit(its, [welcome(attempt=attempt, session=attempt)])
    rig.run(5 * MILLISECOND)
    assert caller.changes() == []
    assert caller.rejects() == {"answer of a stale incarnation": 1}


def test_a_refusals_text_is_made_printable(rig: Rig) -> None:
    refused = wire.control(REFUSE, 0, 0, wire.Refuse(wire.REFUSE_TICKET, MemberId(2, 5, 0), "\x1b[31mred\n"))
    caller = answering(rig, refused)
    told = [event for event in caller.log if isinstance(event, Rejected)]
    assert [event.detail for event in told] == ["?[31mred?"]


def test_an_unanswered_hello_is_given_up(rig: Rig) -> None:
    caller, _ = rig.pair()
    rig.transmit = lambda end, messages: None  # type: ignore[method-assign]
    rig.run(SECOND + 50 * MILLISECOND)
    assert caller.rejects() == {"hello unanswered": 1}


# --- every decoder, any bytes ----------------------------------------------------------------------------------------

mutation = st.tuples(st.integers(0, 400), st.integers(0, 255))


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=300))
def test_no_bytes_make_a_decoder_raise_anything_but_peer_error(data: bytes) -> None:
    for decode in (
        parse,
        parse_datagram,
        wire.CODEC.decode,
        lambda b: wire.body_of(parse(b)),
        *(lambda b, k=k: wire.body_of(parse(pack_header(k, 0, 0, 0, 0, 0, len(b)) + b)) for k in (HELLO, CLOSE)),
    ):
        with contextlib.suppress(PeerError):
            decode(data)


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from([hello(CALLER, MemberId(2, 0, 0)), welcome(), wire.control(CLOSE, 1, 0, wire.Close(1, "x"))]),
    st.lists(mutation, min_size=1, max_size=4),
)
def test_damaged_frames_reach_an_engine_and_nothing_but_counters_change(frame: bytes, damage: list[Any]) -> None:
    rig = Rig()
    host = called(rig)
    damaged = bytearray(frame)
    for where, value in damage:
        damaged[where % len(damaged)] ^= value
    heard = rig.say(rig.stranger(host, 1), bytes(damaged))
    assert host.engine.statistics().guests == 0
    up = kinds(heard) == [WELCOME]
    assert [type(change) for change in host.changes()] == [PeerUp] * up


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=120), st.lists(mutation, max_size=4), st.booleans())
def test_any_bytes_on_an_open_connection_end_it_or_are_a_frame(tail: bytes, damage: list[Any], whole: bool) -> None:
    rig = Rig()
    host = called(rig)
    end = rig.stranger(host, 1)
    rig.say(end, hello(CALLER, MemberId(2, 0, 0)))
    frame = bytearray((pack_header(DATA, 64, 1, 1, 0, 1, len(tail)) if whole else b"") + tail)
    for where, value in damage:
        if frame:
            frame[where % len(frame)] ^= value
    rig.say(end, bytes(frame))
    changes = host.changes()
    assert isinstance(changes[0], PeerUp)
    assert all(isinstance(change, PeerDown) for change in changes[1:])
    assert len(changes) <= 2
