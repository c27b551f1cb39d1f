"""Links and the lease, one heartbeat at a time. Node 1 is under test; its peers are written by hand."""

from typing import Any

import pytest

from corral.api.comm import PeerDown, PeerUp
from corral.base.engine import TICK, Received
from corral.base.ids import MemberId, NodeIncarnation, ViewId
from corral.base.time import SECOND
from corral.base.view import View
from corral.cman.events import (
    Accepted,
    ConnectivityChanged,
    FlagsChanged,
    LeaseExtended,
    LeaseLapsed,
    LinkDown,
    LinkUp,
    Proved,
)
from corral.cman.heartbeat import ECHOES_MAX, HeartbeatEngine
from corral.cman.quorum import first_record
from corral.cman.timing import Timing, guard_of
from corral.cman.wire import FORGOTTEN, QUIET, WILLING, Heartbeat

TIMING = Timing(SECOND)
BEAT = TIMING.heartbeat_ns
RECORD = first_record({1: 1, 2: 1, 3: 1}, TIMING.lease_ns)
START = 100 * SECOND
NO_ID = ViewId(0, 0)


def view(epoch: int, *nodes: int) -> View:
    return View(ViewId(epoch, nodes[0]), tuple(NodeIncarnation(n, 10) for n in nodes), True)


class Bench:
    """Node 1 with hand-written peers 2 and 3."""

    def __init__(self, *, quiet: bool = False, flags: int = WILLING) -> None:
        self.now = START
        self.counters = {2: 0, 3: 0}
        self.sent: list[tuple[int, Heartbeat]] = []
        self.echoed: list[tuple[int, int]] = []
        self.events: list[Any] = []
        self.engine = HeartbeatEngine(
            NodeIncarnation(1, 10), (1, 2, 3), TIMING, RECORD, START, quiet=quiet, flags=flags
        )
        for node in (2, 3):
            self.step(PeerUp(MemberId(node, 10, 0), 1))

    def step(self, *events: Any) -> None:
        for event in events:
            self.engine.step(self.now, event)
        ready = self.engine.ready()
        assert not ready.persist
        assert not ready.then_send
        self.sent += [(peer.node, message) for peer, message in ready.send]
        self.echoed += [(peer.node, self.now) for peer, message in ready.send if message.echo]
        self.events += ready.emit

    def sleep(self, span: int) -> None:
        end = self.now + span
        while self.engine.deadline <= end:
            self.now = max(self.now, self.engine.deadline)
            self.step(TICK)
        self.now = end

    def hear(self, node: int, **over: Any) -> None:
        """A heartbeat of that peer, which has heard all of ours; `echo=True` echoes the newest."""
        newest = self.newest(node).counter
        if over.get("echo") is True:
            over["echo"] = newest
        self.counters[node] += 1
        fields: dict[str, Any] = {
            "counter": self.counters[node],
            "to": 10,
            "ack": newest,
            "echo": 0,
            "up": (),
            "accepted": NO_ID,
            "installed": NO_ID,
            "flags": WILLING,
        }
        self.step(Received(MemberId(node, 10, 0), Heartbeat(**{**fields, **over})))

    def newest(self, node: int) -> Heartbeat:
        return next(message for peer, message in reversed(self.sent) if peer == node)

    def take(self, kind: type) -> list[Any]:
        taken = [event for event in self.events if isinstance(event, kind)]
        self.events = [event for event in self.events if not isinstance(event, kind)]
        return taken

    def converse(self, span: int, *nodes: int, **how: Any) -> None:
        """Those peers answer every interval."""
        for _ in range(span // BEAT):
            self.sleep(BEAT)
            for node in nodes:
                self.hear(node, **how)


# --- links -----------------------------------------------------------------------------------------------------------


def test_a_link_is_up_when_the_peer_is_heard_and_hears_us() -> None:
    bench = Bench()
    bench.hear(2, ack=0)
    assert not bench.take(LinkUp), "it has not heard us yet"
    bench.sleep(BEAT)
    bench.hear(2)
    assert bench.take(LinkUp) == [LinkUp(2, 10)]
    assert bench.engine.up == (2,)


def test_a_silent_peer_is_down_after_detect_and_no_sooner() -> None:
    bench = Bench()
    bench.converse(5 * BEAT, 2)
    heard_at = bench.now
    bench.sleep(SECOND - 1)
    assert bench.engine.up == (2,)
    bench.sleep(1)
    assert bench.take(LinkDown) == [LinkDown(2, 10, "no heartbeat")]
    assert bench.now == heard_at + SECOND


def test_a_peer_that_stops_hearing_us_is_down_although_we_hear_it() -> None:
    bench = Bench()
    bench.converse(5 * BEAT, 2)
    deaf = bench.newest(2).counter
    bench.converse(SECOND - BEAT, 2, ack=deaf)
    assert bench.engine.up == (2,)
    bench.converse(2 * BEAT, 2, ack=deaf)
    assert bench.take(LinkDown) == [LinkDown(2, 10, "it does not hear this node")]


def test_a_refused_reconnect_is_detection_at_once() -> None:
    bench = Bench()
    bench.converse(5 * BEAT, 2)
    bench.step(PeerDown(MemberId(2, 10, 0), 1, "reset", refused=True))
    assert bench.take(LinkDown) == [LinkDown(2, 10, "its corrald refuses connections")]


def test_a_broken_session_alone_is_no_detection() -> None:
    bench = Bench()
    bench.converse(5 * BEAT, 2)
    bench.step(PeerDown(MemberId(2, 10, 0), 1, "reset"))
    assert bench.engine.up == (2,)
    bench.sleep(SECOND)
    assert bench.engine.up == (), "but without a session no heartbeat comes"


def test_the_end_of_an_old_session_does_not_touch_the_new_one() -> None:
    bench = Bench()
    bench.converse(5 * BEAT, 2)
    bench.step(PeerUp(MemberId(2, 10, 0), 2), PeerDown(MemberId(2, 10, 0), 1, "late", refused=True))
    assert bench.engine.up == (2,)


def test_a_new_incarnation_takes_the_link_of_the_old_one_down() -> None:
    bench = Bench()
    bench.converse(5 * BEAT, 2)
    bench.step(PeerUp(MemberId(2, 11, 0), 2))
    assert bench.take(LinkDown) == [LinkDown(2, 10, "it has restarted")]
    bench.sleep(BEAT)
    assert bench.newest(2).to == 11
    bench.hear(2)
    assert bench.engine.up == ()
    assert bench.engine.dropped == 1, "the old one's heartbeats count no more"


def test_the_matrix_is_told_when_a_row_changes_and_only_then() -> None:
    bench = Bench()
    bench.converse(5 * BEAT, 2, up=(1,))
    bench.take(ConnectivityChanged)
    bench.converse(20 * BEAT, 2, up=(1,))
    assert bench.take(ConnectivityChanged) == []
    bench.hear(2, up=(1, 3))
    (changed,) = bench.take(ConnectivityChanged)
    assert {node: row.up for node, row in changed.rows.items()} == {1: {2}, 2: {1, 3}}


@pytest.mark.parametrize(
    "wrong",
    [
        {"to": 9},
        {"counter": 0},
        {"counter": 1 << 62},
        {"ack": 10**6},
        {"echo": 10**6},
        {"ack": -1},
        {"up": tuple(range(65))},
    ],
)
def test_implausible_heartbeats_are_counted_and_dropped(wrong: dict[str, Any]) -> None:
    bench = Bench()
    bench.hear(2, **wrong)
    assert bench.engine.dropped == 1
    bench.hear(2, counter=1)
    assert bench.take(LinkUp) == [LinkUp(2, 10)], "a plausible one still counts"


def test_heartbeats_of_strangers_are_dropped() -> None:
    bench = Bench()
    beat = Heartbeat(1, 10, 0, 0, (), NO_ID, NO_ID, 0)
    bench.step(PeerUp(MemberId(77, 1, 0), 1), Received(MemberId(77, 1, 0), beat), Received(MemberId(2, 10, 5), beat))
    assert bench.engine.dropped == 3


def test_repeated_and_late_heartbeats_keep_nothing_alive() -> None:
    bench = Bench()
    bench.converse(5 * BEAT, 2)
    for _ in range(11):
        bench.sleep(BEAT)
        bench.counters[2] -= 1
        bench.hear(2)
    assert bench.engine.up == ()


# --- echoes and the lease (CMAN-6, CMAN-7, CMAN-8) -------------------------------------------------------------------


def test_only_members_of_the_newest_accepted_view_are_echoed() -> None:
    bench = Bench()
    bench.converse(3 * BEAT, 2, 3)
    assert (bench.newest(2).echo, bench.newest(3).echo) == (0, 0)
    bench.step(Accepted(view(1, 1, 2)))
    bench.converse(3 * BEAT, 2, 3)
    assert bench.newest(2).echo == bench.newest(2).ack > 0
    assert bench.newest(3).echo == 0 < bench.newest(3).ack
    bench.step(Accepted(view(2, 1, 3)))
    bench.converse(3 * BEAT, 2, 3)
    assert bench.newest(2).echo == 0 < bench.newest(3).echo


def test_an_older_accepted_view_changes_nothing() -> None:
    bench = Bench()
    bench.step(Accepted(view(2, 1, 3)), Accepted(view(1, 1, 2)))
    bench.converse(3 * BEAT, 2, 3)
    assert bench.newest(2).echo == 0 < bench.newest(3).echo


def test_another_incarnation_of_a_member_is_not_echoed() -> None:
    bench = Bench()
    bench.step(Accepted(View(ViewId(1, 1), (NodeIncarnation(1, 10), NodeIncarnation(2, 9)), True)))
    bench.converse(3 * BEAT, 2)
    assert bench.newest(2).echo == 0


@pytest.mark.parametrize("silence", [{"quiet": True}, {"flags": WILLING | FORGOTTEN}, {"flags": 0}])
def test_nobody_is_echoed_while_quiet_without_memory_or_unwilling(silence: dict[str, Any]) -> None:
    bench = Bench(**silence)
    bench.step(Accepted(view(1, 1, 2)))
    bench.converse(5 * BEAT, 2)
    assert bench.newest(2).echo == 0


def test_quiet_ends_a_guard_after_the_start() -> None:
    bench = Bench(quiet=True)
    bench.step(Accepted(view(1, 1, 2)))
    bench.converse(8 * BEAT, 2)
    assert bench.newest(2).flags & QUIET
    assert bench.engine.quiet_until == START + guard_of(RECORD.lease_ns)
    bench.converse(4 * BEAT, 2)
    assert not bench.newest(2).flags & QUIET
    assert bench.newest(2).echo > 0


def test_the_lease_is_counted_from_the_sending_of_the_echoed_counter() -> None:
    bench = Bench()
    bench.converse(3 * BEAT, 2)
    sent_at, counter = bench.now, bench.newest(2).counter
    bench.take(LeaseExtended)
    bench.sleep(3 * BEAT)
    bench.hear(2, echo=counter)
    assert bench.take(LeaseExtended) == [LeaseExtended(sent_at + RECORD.lease_ns)]
    assert bench.engine.lease_until == sent_at + RECORD.lease_ns


def test_no_quorum_of_echoes_no_lease() -> None:
    bench = Bench()
    bench.converse(20 * BEAT, 2, 3)
    assert bench.take(LeaseExtended) == []
    assert bench.engine.lease_until == 0


def test_a_quiet_node_does_not_hear_itself() -> None:
    bench = Bench(quiet=True)
    bench.converse(5 * BEAT, 2, echo=True)
    assert bench.engine.lease_until == 0, "its own echo does not count, one peer is no quorum of three"
    bench.converse(BEAT, 2, 3, echo=True)
    assert bench.engine.lease_until > 0


def test_a_lease_that_is_not_extended_lapses_and_says_so() -> None:
    bench = Bench()
    bench.converse(5 * BEAT, 2, echo=True)
    until = bench.engine.lease_until
    bench.sleep(SECOND)
    assert bench.take(LeaseLapsed) == [LeaseLapsed(until)]
    bench.converse(BEAT, 2, echo=True)
    assert bench.engine.lease_until > bench.now


def test_a_cluster_of_one_holds_its_own_lease() -> None:
    engine = HeartbeatEngine(
        NodeIncarnation(1, 10), (1,), TIMING, first_record({1: 1}, TIMING.lease_ns), START, quiet=False, flags=WILLING
    )
    engine.step(START, TICK)
    assert engine.lease_until == START + TIMING.lease_ns


def test_the_guard_counts_from_the_first_echo_of_the_newest_counter() -> None:
    bench = Bench()
    bench.step(Accepted(view(1, 1, 2, 3)))
    bench.converse(5 * BEAT, 2, 3)
    last_heard = bench.now
    bench.sleep(BEAT)
    first_echo = next(at for peer, at in bench.echoed if peer == 2 and at >= last_heard)
    bench.sleep(3 * BEAT)  # 2 is dead; the same counter is echoed again and again
    survivors = view(2, 1, 3).members
    assert bench.engine.guard_until(survivors) == first_echo + guard_of(RECORD.lease_ns)
    assert bench.engine.guard_until(survivors) <= last_heard + SECOND, "no longer than detection"
    assert bench.engine.guard_until(view(2, 1, 2, 3).members) == 0, "nobody is missing"


def test_the_guard_knows_incarnations() -> None:
    bench = Bench()
    bench.step(Accepted(view(1, 1, 2)))
    bench.converse(5 * BEAT, 2)
    bench.sleep(BEAT)
    reborn = (NodeIncarnation(1, 10), NodeIncarnation(2, 11))
    assert bench.engine.guard_until(reborn) == bench.now + guard_of(RECORD.lease_ns)


def test_a_proof_of_death_ends_the_guard_of_that_incarnation_only() -> None:
    bench = Bench()
    bench.step(Accepted(view(1, 1, 2, 3)))
    bench.converse(5 * BEAT, 2, 3)
    bench.sleep(BEAT)
    alone = view(2, 1).members
    bench.step(Proved(2, 9))
    assert bench.engine.guard_until(view(2, 1, 3).members) > bench.now
    bench.step(Proved(2, 10))
    assert bench.engine.guard_until(view(2, 1, 3).members) == 0
    assert bench.engine.guard_until(alone) > bench.now, "3 may still hold a lease"
    assert bench.engine.echoes_end() == bench.engine.guard_until(alone)


def test_echoes_are_bounded_and_a_forgotten_one_still_guards() -> None:
    bench = Bench()
    for life in range(11, 11 + ECHOES_MAX + 20):
        bench.step(PeerUp(MemberId(2, life, 0), life))
        bench.step(Accepted(View(ViewId(life, 1), (NodeIncarnation(1, 10), NodeIncarnation(2, life)), True)))
        beat = Heartbeat(1, 10, 0, 0, (), NO_ID, NO_ID, WILLING)
        bench.step(Received(MemberId(2, life, 0), beat))
        bench.sleep(BEAT)
    assert len(bench.engine._echoes) == ECHOES_MAX
    everybody = tuple(bench.engine._echoes)
    assert bench.engine.guard_until(everybody) > 0, "the ones that had to go are remembered by their time"


def test_a_quiet_node_that_leaves_waits_for_the_end_of_its_quiet() -> None:
    """The life before it may have echoed somebody; the life after it will not be quiet."""
    bench = Bench(quiet=True)
    assert bench.engine.echoes_end() == bench.engine.quiet_until


def test_flags_travel() -> None:
    bench = Bench()
    bench.step(FlagsChanged(WILLING | FORGOTTEN))
    bench.sleep(BEAT)
    assert bench.newest(2).flags == WILLING | FORGOTTEN


def test_one_interval_one_heartbeat_to_each_peer() -> None:
    bench = Bench()
    bench.converse(5 * BEAT, 2, 3)
    bench.sent.clear()
    bench.converse(SECOND, 2, 3)
    assert [node for node, _ in bench.sent] == [2, 3] * 10


def test_news_travels_early_but_not_more_than_four_times_an_interval() -> None:
    bench = Bench()
    bench.converse(5 * BEAT, 2, 3)
    bench.sent.clear()
    for life in range(50):
        bench.step(FlagsChanged(WILLING if life % 2 else 0))
        bench.sleep(BEAT // 50)
    assert len(bench.sent) <= 2 * 5
