"""Two comm engines, stepped by hand: the life of a session (COMM-1 to COMM-6)."""

import pytest

from corral.api.comm import PeerDown, PeerUp
from corral.base.errors import Busy
from corral.base.ids import MemberId
from corral.base.time import MILLISECOND, SECOND
from corral.comm import wire
from corral.comm.actions import Connect, Deliver, Limits, Outdated
from corral.wire.frame import ACK, REFUSE, USER_PORT_MIN, pack_header, parse
from tests.unit.comm.rig import DETECT, Host, Rig, hello, kinds

PORT = 64


def limits(**changes: int) -> Limits:
    return Limits(
        **{"session_timeout_ns": DETECT, "handshake_ns": DETECT, "stall_ns": 2 * SECOND, **changes},
    )


@pytest.fixture
def rig() -> Rig:
    return Rig()


def connected(rig: Rig, **kwargs: object) -> tuple[Host, Host]:
    one, two = rig.pair(**kwargs)
    rig.run(50 * MILLISECOND)
    assert isinstance(one.log[-1], PeerUp)
    assert isinstance(two.log[-1], PeerUp)
    return one, two


def send(host: Host, peer: Host, *payloads: bytes) -> None:
    for payload in payloads:
        assert host.send(peer.member, PORT, 7, payload)


def test_both_sides_hear_of_one_session_with_the_same_number(rig: Rig) -> None:
    one, two = connected(rig)
    assert one.changes() == [PeerUp(two.member, 1)]
    assert two.changes() == [PeerUp(one.member, 1)]


def test_messages_arrive_once_in_order_with_port_and_round(rig: Rig) -> None:
    one, two = connected(rig)
    send(one, two, b"a", b"b")
    one.send(two.member, PORT + 1, 8, b"c")
    rig.run(10 * MILLISECOND)
    delivered = [(e.peer, e.port, e.round_id, e.payloads) for e in two.log if isinstance(e, Deliver)]
    assert delivered == [
        (one.member, PORT, 7, [b"a"]),
        (one.member, PORT, 7, [b"b"]),
        (one.member, PORT + 1, 8, [b"c"]),
    ]


def test_one_wakeup_is_one_delivery_per_run_of_port_and_round(rig: Rig) -> None:
    one, two = connected(rig)
    session = one.engine.session_of(two.member)
    assert session is not None
    frames = [session.pack(port, 1, payload) for port, payload in ((64, b"a"), (64, b"b"), (65, b"c"), (64, b"d"))]
    rig.transmit(one.ends[session.connection], [frame for frame in frames if frame])
    rig.run(10 * MILLISECOND)
    runs = [(e.port, e.payloads) for e in two.log if isinstance(e, Deliver)]
    assert runs == [(64, [b"a", b"b"]), (65, [b"c"]), (64, [b"d"])]


def test_replies_carry_the_acknowledgement_and_silence_sends_a_pure_one(rig: Rig) -> None:
    one, two = connected(rig)
    session = one.engine.session_of(two.member)
    assert session is not None
    send(one, two, b"question")
    rig.run(2 * MILLISECOND)
    assert session.queued_frames == 1
    send(two, one, b"answer")
    rig.run(2 * MILLISECOND)
    assert session.queued_frames == 0
    send(one, two, b"remark")
    rig.run(10 * MILLISECOND)
    assert session.queued_frames == 1
    rig.run(30 * MILLISECOND)
    assert (session.queued_frames, session.queued_bytes) == (0, 0)


def test_many_frames_are_acknowledged_before_the_delay(rig: Rig) -> None:
    one, two = connected(rig, limits=limits(ack_delay_ns=10 * SECOND, ack_frames=8))
    send(one, two, *[b"x"] * 8)
    rig.run(5 * MILLISECOND)
    session = one.engine.session_of(two.member)
    assert session is not None
    assert session.queued_frames == 0


def test_a_session_outlives_its_connection_and_loses_nothing(rig: Rig) -> None:
    one, two = connected(rig)
    send(one, two, b"1", b"2")
    rig.run(10 * MILLISECOND)
    rig.delay = lambda: 30 * MILLISECOND
    send(one, two, b"3", b"4")
    send(two, one, b"a")
    rig.break_all()
    send(one, two, b"5")
    rig.delay = lambda: MILLISECOND
    rig.run(100 * MILLISECOND)
    assert two.messages() == [b"1", b"2", b"3", b"4", b"5"]
    assert one.messages() == [b"a"]
    assert one.changes() == [PeerUp(two.member, 1)]
    assert two.changes() == [PeerUp(one.member, 1)]
    assert one.engine.statistics().resends == 3


def test_a_refused_reconnect_ends_the_session_at_once_on_either_side(rig: Rig) -> None:
    for victim, survivor in ((0, 1), (1, 0)):
        rig = Rig()
        hosts = connected(rig)
        rig.kill(hosts[victim])
        rig.run(5 * MILLISECOND)
        down = hosts[survivor].changes()[-1]
        assert isinstance(down, PeerDown)
        assert down.refused


def test_a_dead_end_ends_the_session_after_its_timeout(rig: Rig) -> None:
    one, two = connected(rig)
    rig.cut.add(frozenset((1, 2)))
    rig.break_all("timed out")
    rig.run(DETECT - 2 * MILLISECOND)
    assert len(one.changes()) == len(two.changes()) == 1
    rig.run(5 * MILLISECOND)
    for host, peer in ((one, two), (two, one)):
        down = host.changes()[-1]
        assert isinstance(down, PeerDown)
        assert (down.peer, down.refused) == (peer.member, False)
    rig.cut.clear()
    rig.run(2 * SECOND)
    assert isinstance(one.changes()[-1], PeerUp)
    assert one.changes()[-1].session == two.changes()[-1].session > 1


def test_a_restarted_peer_is_a_new_member(rig: Rig) -> None:
    one, two = connected(rig)
    send(one, two, b"lost")
    rig.delay = lambda: 0
    rig.kill(two)
    again = rig.host(2, incarnation=9)
    again.engine.add_node(rig.now, 1, one.address)
    rig.run(200 * MILLISECOND)
    up, down, up_again = one.changes()
    assert isinstance(down, PeerDown)
    assert up == PeerUp(two.member, 1)
    assert up_again.peer == MemberId(2, 9, 0)
    assert again.messages() == []


def test_the_called_side_learns_of_a_restarted_caller(rig: Rig) -> None:
    one, two = connected(rig)
    rig.delay = lambda: 0
    rig.kill(one)
    again = rig.host(1, incarnation=5)
    again.engine.add_node(rig.now, 2, two.address)
    rig.act(again)
    rig.run(200 * MILLISECOND)
    assert [change.peer.incarnation for change in two.changes()] == [1, 1, 5]
    assert again.engine.session_of(two.member) is not None


def test_a_peer_that_lost_the_session_ends_it_here_too(rig: Rig) -> None:
    one, two = connected(rig)
    two.engine.end_session(rig.now, one.member, "for a test")
    two.engine.out.clear()  # its CLOSE never arrives
    rig.break_all()
    rig.run(200 * MILLISECOND)
    assert [type(change) for change in one.changes()] == [PeerUp, PeerDown, PeerUp]
    assert one.changes()[-1].session > 1


def test_dropping_tells_both_sides_and_calls_no_more(rig: Rig) -> None:
    one, two = connected(rig)
    one.engine.drop_peer(rig.now, two.member)
    rig.act(one)
    rig.run(SECOND)
    assert isinstance(one.changes()[-1], PeerDown)
    assert isinstance(two.changes()[-1], PeerDown)
    assert len(one.changes()) == len(two.changes()) == 2
    assert one.ends == {}


def test_over_the_byte_bound_the_session_ends_and_a_new_one_follows(rig: Rig) -> None:
    one, two = connected(rig, limits=limits(queue_bytes=1000))
    rig.delay = lambda: 100 * MILLISECOND
    while one.send(two.member, PORT, 1, bytes(200)):
        pass
    rig.delay = lambda: MILLISECOND
    rig.run(500 * MILLISECOND)
    assert [type(change) for change in one.changes()] == [PeerUp, PeerDown, PeerUp]
    assert "unacknowledged" in one.changes()[1].reason
    assert len(two.changes()) == 3


def test_a_user_port_gets_busy_instead(rig: Rig) -> None:
    one, two = connected(rig, limits=limits(user_queue_bytes=1000))
    for _ in range(4):
        one.send(two.member, USER_PORT_MIN, 1, bytes(200))
    with pytest.raises(Busy):
        one.send(two.member, USER_PORT_MIN, 1, bytes(200))
    assert len(one.changes()) == 1


def test_a_peer_that_acknowledges_nothing_loses_the_session(rig: Rig) -> None:
    one, two = connected(rig, limits=limits(ack_delay_ns=60 * SECOND))
    send(one, two, b"x")
    rig.run(SECOND)
    assert len(one.changes()) == 1
    rig.run(3 * SECOND)
    down = one.changes()[1]
    assert isinstance(down, PeerDown)
    assert "not acknowledged" in down.reason
    assert isinstance(one.changes()[-1], PeerUp)


@pytest.mark.parametrize("wait", range(0, 2 * DETECT, DETECT // 5))
def test_a_silent_peer_loses_the_session_within_recover(rig: Rig, wait: int) -> None:
    # Whoever judges after `recover` which of two cannot be reached must know by then whom else they cannot reach.
    recover = 5 * DETECT
    bounds = Limits.for_detect(DETECT, recover)
    bounds.ack_delay_ns = 60 * SECOND
    one, two = connected(rig, limits=bounds)
    rig.run(wait)
    send(one, two, b"x")
    rig.run(recover * 19 // 20)
    assert isinstance(one.changes()[1], PeerDown)


def test_steady_traffic_is_never_taken_for_a_stall(rig: Rig) -> None:
    one, two = connected(rig, limits=limits(stall_ns=100 * MILLISECOND))
    for _ in range(100):
        send(one, two, b"x")
        rig.run(10 * MILLISECOND)
    assert len(one.changes()) == 1


def test_nobody_sends_into_a_session_not_yet_told(rig: Rig) -> None:
    one, two = connected(rig)
    one.engine.end_session(rig.now, two.member, "for a test")
    assert not one.send(two.member, PORT, 1, b"x")
    rig.act(one)
    rig.run(SECOND)
    assert two.messages() == []


def test_a_newer_connection_replaces_the_one_the_caller_gave_up(rig: Rig) -> None:
    """The called side may not have noticed that the connection is gone."""
    one, two = connected(rig)
    session = one.engine.session_of(two.member)
    assert session is not None
    end = one.ends[session.connection]
    end.peer.open, was = False, True  # its end hears nothing of the break
    rig.breaks(end, "reset")
    end.peer.open = was
    send(one, two, b"kept")
    rig.run(100 * MILLISECOND)
    assert two.messages() == [b"kept"]
    assert len(two.changes()) == 1
    assert not end.peer.open


@pytest.mark.parametrize(
    "frame",
    [
        pack_header(1, PORT, 1, 5, 0, 1, 0),  # out of order
        pack_header(1, PORT, 1, 1, 9, 1, 0),  # acknowledges what was never sent
        pack_header(1, PORT, 1, 1, 0, 2, 0),  # of another session
        pack_header(2, 0, 0, 0, 9, 1, 0),
        pack_header(2, 0, 0, 0, 0, 1, 1) + b"x",  # an ACK with a body
        pack_header(3, 0, 0, 0, 0, 1, 0),
        pack_header(6, 0, 0, 0, 0, 1, 3) + b"abc",
        pack_header(1, PORT, 1, 1, 0, 1, 5),  # length lies
        b"short",
        b"",
    ],
)
def test_a_frame_that_must_not_be_ends_the_session_and_is_counted_and_told_once(rig: Rig, frame: bytes) -> None:
    one, two = connected(rig)
    session = one.engine.session_of(two.member)
    assert session is not None
    rig.transmit(one.ends[session.connection], [frame])
    rig.run(3 * MILLISECOND)
    down = two.changes()[1]
    assert isinstance(down, PeerDown)
    assert "protocol error" in down.reason
    assert two.rejects() == {"protocol error in a session": 1}
    rig.run(100 * MILLISECOND)
    assert isinstance(two.changes()[-1], PeerUp)


def test_what_came_before_the_wrong_frame_is_delivered_and_nothing_after_it(rig: Rig) -> None:
    one, two = connected(rig)
    session = one.engine.session_of(two.member)
    assert session is not None
    first, second, third = (session.pack(PORT, 1, payload) for payload in (b"1", b"2", b"3"))
    assert first
    assert second
    assert third
    rig.transmit(one.ends[session.connection], [first, third, second])
    rig.run(3 * MILLISECOND)
    assert two.messages() == [b"1"]
    assert [type(event).__name__ for event in two.log] == ["PeerUp", "Deliver", "Rejected", "PeerDown"]


def test_a_repeated_frame_is_dropped_and_counted(rig: Rig) -> None:
    one, two = connected(rig)
    session = one.engine.session_of(two.member)
    assert session is not None
    message = session.pack(PORT, 1, b"once")
    assert message
    rig.transmit(one.ends[session.connection], [message, message])
    rig.run(3 * MILLISECOND)
    assert two.messages() == [b"once"]
    assert two.engine.statistics().duplicates == 1
    assert len(two.changes()) == 1


def test_a_caller_that_did_not_notice_the_break_is_summoned(rig: Rig) -> None:
    for late in (5 * MILLISECOND, 3 * DETECT):  # before and after the session's end on the called side
        rig = Rig()
        one, two = connected(rig)
        session = two.engine.session_of(one.member)
        assert session is not None
        end = two.ends[session.connection]
        rig.cut.add(frozenset((1, 2)))
        rig.breaks(end, "timed out")
        end.peer.open = True
        rig.run(late)
        assert len(one.changes()) == 1
        rig.cut.clear()
        rig.run(2 * SECOND)
        assert one.up.get(two.member) == two.up.get(one.member) is not None
        send(one, two, b"again")
        rig.run(10 * MILLISECOND)
        assert two.messages() == [b"again"]


def test_a_late_summons_does_no_harm(rig: Rig) -> None:
    one, two = connected(rig)
    rig.break_all()
    rig.run(50 * MILLISECOND)
    heard = rig.say(rig.stranger(one, 2), hello(two.member, one.member, attempt=1, resume=1))
    assert kinds(heard) == [REFUSE]
    assert len(one.ends) == len(two.ends) == 1
    assert len(one.changes()) == 1


def test_participants_need_their_announcement_and_ticket(rig: Rig) -> None:
    low = rig.host(1, serial=3, ticket=b"low")
    high = rig.host(2, serial=1, ticket=b"high")
    low.engine.set_peer(rig.now, high.member, high.address, b"high")
    rig.act(low)
    rig.run(SECOND)
    assert low.changes() == []  # the other side has not been told yet: WAIT
    assert low.rejects() == high.rejects() == {}
    high.engine.set_peer(rig.now, low.member, low.address, b"low")
    rig.act(high)
    rig.run(2 * SECOND)
    assert [change.peer for change in low.changes()] == [high.member]
    assert [change.peer for change in high.changes()] == [low.member]


def test_another_process_at_a_participants_address_means_it_is_gone(rig: Rig) -> None:
    low = rig.host(1, serial=3)
    high = rig.host(2, serial=1)
    low.engine.set_peer(rig.now, high.member, high.address, b"")
    high.engine.set_peer(rig.now, low.member, low.address, b"")
    rig.act(low)
    rig.run(50 * MILLISECOND)
    rig.delay = lambda: 0
    rig.kill(high)
    impostor = rig.host(2, serial=2)
    rig.hosts[high.address] = impostor
    rig.run(100 * MILLISECOND)
    down = low.changes()[-1]
    assert isinstance(down, PeerDown)
    assert down.refused


def test_leaving_says_goodbye(rig: Rig) -> None:
    one, two = connected(rig)
    one.engine.leave(rig.now)
    rig.act(one)
    rig.run(10 * MILLISECOND)
    down = two.changes()[-1]
    assert isinstance(down, PeerDown)
    assert "leaves" in down.reason


def test_the_queue_lists_stay_short_under_one_way_traffic(rig: Rig) -> None:
    """Acknowledged entries are cut off, not kept for ever."""
    one, two = connected(rig, limits=limits(ack_frames=16))
    session = one.engine.session_of(two.member)
    assert session is not None
    for _ in range(300):
        send(one, two, *[b"x"] * 20)
        rig.run(MILLISECOND)
    assert len(session._unacked) < 4000
    assert len(two.messages()) > 5900


def test_frames_of_a_pure_ack_have_no_body(rig: Rig) -> None:
    one, two = connected(rig)
    heard: list[bytes] = []
    session = two.engine.session_of(one.member)
    assert session is not None
    original = rig.transmit
    rig.transmit = lambda end, messages: (heard.extend(messages), original(end, messages))[1]  # type: ignore[method-assign]
    send(one, two, b"x")
    rig.run(50 * MILLISECOND)
    assert kinds(heard) == [1, ACK]
    assert parse(heard[-1]).ack == 1


@pytest.mark.parametrize("forgetful", [1, 2], ids=["the caller", "the called side"])
def test_a_node_whose_incarnation_went_back_is_told_the_one_others_know(rig: Rig, forgetful: int) -> None:
    """Without memory and with a clock that went back it would knock for ever."""
    one, two = rig.pair(incarnation=7)
    rig.run(SECOND)
    old, other = (one, two) if forgetful == 1 else (two, one)
    rig.kill(old)
    again = rig.host(forgetful, incarnation=3)
    again.engine.add_node(rig.now, other.member.node, other.address)
    rig.act(again)
    rig.run(2 * SECOND)
    told = [event for event in again.log if isinstance(event, Outdated)]
    assert told[:1] == [Outdated(other.member.node, 7)]
    assert other.engine.session_of(again.member) is None, "COMM-5"


@pytest.mark.parametrize(
    ("code", "answerer", "known"),
    [
        (wire.REFUSE_INCARNATION, MemberId(2, 1, 0), 1),
        (wire.REFUSE_INCARNATION, MemberId(2, 1, 0), wire.KNOWN_MAX + 1),
        (wire.REFUSE_INCARNATION, MemberId(2, 1, 4), 9),
        (wire.REFUSE_INCARNATION, MemberId(3, 1, 0), 9),
        (wire.REFUSE_WAIT, MemberId(2, 1, 0), 9),
    ],
    ids=["no higher one", "beyond any clock", "a participant", "another node", "another reason"],
)
def test_a_refusal_that_proves_nothing_outdates_nobody(rig: Rig, code: int, answerer: MemberId, known: int) -> None:
    one = rig.host(1)
    one.engine.add_node(rig.now, 2, "n2.0")
    (connect,) = [action for action in one.engine.out if isinstance(action, Connect)]
    one.engine.connected(rig.now, connect.attempt, 90, bytes(32))
    refusal = wire.control(REFUSE, 0, 0, wire.Refuse(code, answerer, "", known))
    one.engine.received(rig.now, 90, [refusal])
    rig.act(one)
    assert not [event for event in one.log if isinstance(event, Outdated)]
