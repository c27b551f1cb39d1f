"""Targets: every engine, told things no correct member would say, in the middle of an ordinary life.

What this node's own side does (rounds, requests, time) is legal; what comes from peers is anything that decodes. A
peer's mistake is counted and dropped: whatever leaves the engine as an exception, an assert above all, is a finding.
The canary of an engine is the same case with the bound that nothing was ever dropped, or with a guard removed.
"""

from collections.abc import Callable
from random import Random
from typing import Any
from unittest import mock

from corral.api.comm import PeerDown, PeerUp
from corral.api.dlm import EX, NOQUEUE, PR, VALBLK, Request
from corral.base.engine import TICK, Received
from corral.base.ids import MemberId, NodeIncarnation, ViewId
from corral.base.time import FOREVER, MILLISECOND, SECOND
from corral.base.view import QuorumRecord, View
from corral.base.world import ProcessId
from corral.cman import lift_wire
from corral.cman import wire as cman_wire
from corral.cman.events import Accepted, Active, Attach, ConnectivityChanged, Row
from corral.cman.events import Stop as MembershipStop
from corral.cman.heartbeat import HeartbeatEngine
from corral.cman.lift import LiftEngine
from corral.cman.lift_events import (
    Fenced,
    LocalDone,
    LocalJoin,
    LocalLeave,
    Promised,
    Refused,
    StartFence,
    StartGroup,
)
from corral.cman.lift_events import Installed as LiftInstalled
from corral.cman.lift_events import Left as LiftLeft
from corral.cman.membership import MembershipEngine
from corral.cman.state import State, recover
from corral.cman.timing import Timing
from corral.comm import wire as comm_wire
from corral.comm.actions import Connect, Limits
from corral.comm.engine import CommEngine
from corral.comm.session import Identity
from corral.dlm import wire as dlm_wire
from corral.dlm.engine import LockspaceEngine
from corral.dlm.events import ClientGone, Finish, Lease, Submit
from corral.dlm.events import RoundDone as DlmRoundDone
from corral.dlm.events import Start as DlmStart
from corral.dlm.events import Stop as DlmStop
from corral.fence import wire as fence_wire
from corral.fence.engine import FenceEngine
from corral.fence.events import AttemptDone, FenceRequest, ManualAck, RunAttempt, Start, Stop
from corral.wire import frame
from corral.wire.codec import Codec
from tests.fuzz.decoders import control_frame, datagram, frame_bytes
from tests.fuzz.generate import Values, damage, encode
from tests.fuzz.target import Target
from tests.unit.comm.rig import CLUSTER, UUID, hello
from tests.unit.fence.bench import make_round, two_methods

ME = MemberId(2, 5, 0)
PEERS = (MemberId(1, 5, 0), MemberId(3, 5, 0))
MEMBERS = tuple(sorted((ME, *PEERS)))
LIVES = tuple(NodeIncarnation(member.node, member.incarnation) for member in MEMBERS)
STRANGERS = (MemberId(1, 4, 0), MemberId(4, 5, 0), MemberId(3, 5, 1))
GROUPS = ("fence", "dlm:home", "gfs:home", "x")
EVENTS = 60


def some_member(random: Random) -> MemberId:
    return random.choice(MEMBERS) if random.random() < 0.9 else random.choice(STRANGERS)


def some_life(random: Random) -> NodeIncarnation:
    member = some_member(random)
    return NodeIncarnation(member.node, member.incarnation)


class Peers:
    """Makes messages of a family that decode, about things that exist."""

    def __init__(self, codec: Codec[Any], known: dict[type, Callable[[Random], Any]]) -> None:
        self.codec = codec
        self.values = Values({MemberId: some_member, NodeIncarnation: some_life, **known}, sane=0.93)

    def message(self, random: Random) -> Any:
        for _ in range(20):
            data = encode(self.values.of(random.choice(self.codec.types), random))
            if data is None:
                continue
            try:
                return self.codec.decode(data)
            except Exception:
                continue
        raise AssertionError("the family has no message that decodes")


def sender(random: Random) -> MemberId:
    return random.choice(PEERS) if random.random() < 0.95 else random.choice((*STRANGERS, ME))


def target(name: str, case: Callable[[Random], int], guard: Any = None) -> Target:
    """`case` returns how much was dropped. `guard`: a context manager that removes one, for the canary."""

    def judged(random: Random) -> str:
        return "dropped" if case(random) else "quiet"

    def canary(random: Random) -> str:
        if guard is not None:
            with guard():
                return judged(random)
        assert not case(random), "planted: nothing may be dropped"
        return "quiet"

    return Target(name, judged, canary, ("dropped",))


# --- fence -----------------------------------------------------------------------------------------------------------

FENCE = Peers(
    fence_wire.CODEC,
    {
        int: lambda random: random.choice((0, 1, 2, 3, 4, 5, 6, 7, 8, 9)),
        NodeIncarnation: lambda random: NodeIncarnation(
            random.choice((1, 2, 3, 4, 4, 5)), random.choice((0, 4, 5, 5, 6))
        ),
    },
)


def fence_case(random: Random) -> int:
    engine = FenceEngine(ME.node, two_methods([1, 2, 3, 4], concurrent=random.choice((1, 8)), retry_delay=1))
    now, round_id = SECOND, 0
    open_attempts: list[int] = []
    done: list[int] = []
    for _ in range(EVENTS):
        now += random.choice((0, 0, MILLISECOND, SECOND, 20 * SECOND))
        kind = random.random()
        event: Any = Received(sender(random), FENCE.message(random))
        if kind < 0.12:
            round_id += random.choice((1, 1, 2))
            event = fence_round(round_id, random)
        elif kind < 0.16:
            event = Stop()
        elif kind < 0.30 and open_attempts:
            event = AttemptDone(open_attempts.pop(), random.random() < 0.4, "text")
        elif kind < 0.34:
            event = ManualAck(NodeIncarnation(random.choice((1, 3, 4, 9)), 0), "ann")
        elif kind < 0.38:
            event = FenceRequest(NodeIncarnation(random.choice((1, 3, 4, 9)), random.choice((0, 5))), "why")
        elif kind < 0.50:
            event = TICK
        engine.step(now, event)
        ready = engine.ready()
        for _peer, message in ready.send:
            fence_wire.CODEC.decode(fence_wire.CODEC.encode(message))  # what we send is what others take
        open_attempts.extend(emitted.attempt for emitted in ready.emit if isinstance(emitted, RunAttempt))
        done.extend(emitted.round for emitted in ready.emit if type(emitted).__name__ == "RoundDone")
        engine.status(now)
        engine.fencing(4)
    assert len(done) == len(set(done)), "a round done twice"
    return engine.status(now).dropped


def fence_round(round_id: int, random: Random) -> Start:
    members = [life for life in LIVES if life.node == ME.node or random.random() < 0.8]
    gone = [life for life in (*LIVES, NodeIncarnation(4, 5)) if life not in members and random.random() < 0.7]
    joined = [life for life in members if random.random() < 0.3]
    clean = frozenset(life for life in members if random.random() < 0.8)
    return Start(make_round(round_id, members, gone, joined), clean, random.random() < 0.2, (4,))


def fence_guard() -> Any:
    return mock.patch.object(
        FenceEngine, "_victim_in_turn", lambda engine, peer, incarnation, turn: engine._victims.get(incarnation)
    )


# --- dlm -------------------------------------------------------------------------------------------------------------

DLM = Peers(
    dlm_wire.CODEC,
    {
        int: lambda random: random.choice(
            (-1, 0, 1, 2, 3, 4, 5, 1 << 32 | 1, 1 << 32 | 2, 2 << 32 | 1, 0x7FFFFFFF << 32)
        ),
        bytes: lambda random: random.choice((b"a", b"b", b"c", b"x" * 8, b"y" * 32)),
    },
)


def dlm_case(random: Random) -> int:
    engine = LockspaceEngine(
        ME, "home", 8, lease_until=FOREVER if random.random() < 0.8 else 3 * SECOND, toss_ns=SECOND
    )
    now, round_id, handle, cookie = SECOND, 0, 0, 0
    running: list[int] = []
    handles: list[int] = []
    for _ in range(EVENTS):
        now += random.choice((0, 0, MILLISECOND, SECOND))
        kind = random.random()
        event: Any = Received(sender(random), DLM.message(random))
        if kind < 0.08 or not round_id:
            round_id += 1
            members = [life for life in LIVES if life.node == ME.node or random.random() < 0.8]
            event = DlmStart(make_round(round_id, members, [life for life in LIVES if life not in members]))
            running.clear()
        elif kind < 0.10:
            event = DlmStop()
        elif kind < 0.20 and running:
            event = Finish(running.pop())
        elif kind < 0.22:
            event = Lease(now + random.choice((0, SECOND, 100 * SECOND)))
        elif kind < 0.24:
            event = ClientGone(1)
        elif kind < 0.40:
            cookie += 1
            if handles and random.random() < 0.5:
                asked = Request(random.choice(("convert", "unlock", "cancel")), mode=random.choice((0, PR, EX)))
                event = Submit(1, [(random.choice(handles), cookie, asked)])
            else:
                handle += 1
                handles.append(handle)
                flags = random.choice((0, 0, NOQUEUE, VALBLK))
                asked = Request("lock", random.choice((b"a", b"b", b"c")), random.choice((0, PR, EX)), flags)
                event = Submit(1, [(handle, cookie, asked)])
        elif kind < 0.48:
            event = TICK
        if isinstance(event, ClientGone):
            handles.clear()
        engine.step(now, event)
        ready = engine.ready()
        for _peer, message in ready.send:
            dlm_wire.CODEC.decode(dlm_wire.CODEC.encode(message))
        running.extend(emitted.round_id for emitted in ready.emit if isinstance(emitted, DlmRoundDone))
        # A peer alone may not make a round done: without this most cases would never run.
        if engine.state.startswith("recovering") and random.random() < 0.5:
            for peer in PEERS:
                for stage in range(6):
                    engine.step(now, Received(peer, dlm_wire.Reached(stage)))
            running.extend(e.round_id for e in engine.ready().emit if isinstance(e, DlmRoundDone))
    return engine.counters.hostile + engine.counters.stale


# --- cman ------------------------------------------------------------------------------------------------------------

TIMING = Timing(500 * MILLISECOND)
NODES = (1, 2, 3)
RECORD = QuorumRecord(ViewId(1, 1), ((1, 1), (2, 1), (3, 1)), 3, TIMING.lease_ns)


def some_view_id(random: Random) -> ViewId:
    return ViewId(random.choice((0, 1, 2, 3, 4, 5, 1 << 60, 1 << 62)), random.choice((0, 1, 1, 2, 3, 4)))


def some_view(random: Random) -> View:
    members = tuple(life for life in LIVES if random.random() < 0.8)
    if random.random() < 0.1:
        members = (*members, some_life(random))
    return View(some_view_id(random), members, random.random() < 0.8)


def some_record(random: Random) -> QuorumRecord:
    if random.random() < 0.5:
        return RECORD
    voters = tuple((random.choice((0, 1, 2, 3, 9)), random.choice((-1, 0, 1, 1 << 40))) for _ in range(3))
    lease = random.choice((0, -1, 1, 1 << 62))
    return QuorumRecord(some_view_id(random), voters, random.choice((-1, 0, 1, 3, 1 << 40)), lease)


CMAN_KNOWN: dict[type, Callable[[Random], Any]] = {
    ViewId: some_view_id,
    View: some_view,
    QuorumRecord: some_record,
    int: lambda random: random.choice((0, 1, 2, 3, 4, 5, 5, 6, 1 << 60, (1 << 60) + 1)),
    bytes: lambda random: random.choice((b"", b"attachment")),
}
MEMBERSHIP = Peers(cman_wire.MESSAGES, CMAN_KNOWN)
HEARTBEATS = Peers(cman_wire.HEARTBEATS, CMAN_KNOWN)


def fresh_state() -> State:
    records: list[cman_wire.Record] = [cman_wire.RecordHeld(RECORD), cman_wire.CleanStop()]
    return recover([*records, cman_wire.Started(ME.incarnation)])


def heartbeat_case(random: Random) -> int:
    now = SECOND
    me = NodeIncarnation(ME.node, ME.incarnation)
    engine = HeartbeatEngine(me, NODES, TIMING, RECORD, now, quiet=random.random() < 0.2, flags=cman_wire.WILLING)
    session = 0
    for peer in PEERS:
        session += 1
        engine.step(now, PeerUp(peer, session))
    for _ in range(2 * EVENTS):
        now += random.choice((0, MILLISECOND, 20 * MILLISECOND, SECOND))
        kind = random.random()
        event: Any = Received(sender(random), HEARTBEATS.message(random))
        if kind < 0.05:
            session += 1
            event = PeerUp(random.choice(PEERS), session)
        elif kind < 0.08:
            event = PeerDown(random.choice(PEERS), session, "cut")
        elif kind < 0.12:
            event = Accepted(View(ViewId(random.randint(1, 5), 1), LIVES, True))
        elif kind < 0.3:
            event = TICK
        engine.step(now, event)
        ready = engine.ready()
        for _peer, beat in ready.send:
            cman_wire.HEARTBEATS.decode(cman_wire.HEARTBEATS.encode(beat))
        assert engine.lease_until <= now + TIMING.lease_ns, "a lease longer than L"
        engine.guard_until(LIVES)
    return engine.dropped


def membership_case(random: Random) -> int:
    now = SECOND
    me = NodeIncarnation(ME.node, ME.incarnation)
    engine = MembershipEngine(me, NODES, TIMING, fresh_state(), now)
    session = 0
    for peer in PEERS:
        session += 1
        engine.step(now, PeerUp(peer, session))
    for _ in range(EVENTS):
        now += random.choice((0, MILLISECOND, 100 * MILLISECOND, SECOND))
        kind = random.random()
        event: Any = Received(sender(random), MEMBERSHIP.message(random))
        if kind < 0.06:
            session += 1
            event = PeerUp(random.choice(PEERS), session)
        elif kind < 0.08:
            event = PeerDown(random.choice(PEERS), session, "cut")
        elif kind < 0.25:
            up = frozenset(NODES)
            flags = cman_wire.WILLING
            event = ConnectivityChanged({life.node: Row(life.incarnation, up, flags) for life in LIVES})
        elif kind < 0.28 and engine.view is not None and engine.view.quorate:
            event = Active(engine.view.id)
        elif kind < 0.45:
            event = TICK
        engine.step(now, event)
        ready = engine.ready()
        for _peer, message in (*ready.send, *ready.then_send):
            cman_wire.MESSAGES.decode(cman_wire.MESSAGES.encode(message))
        for record in ready.persist:
            cman_wire.RECORDS.decode(cman_wire.RECORDS.encode(record))
        for decision in ready.emit:
            if isinstance(decision, MembershipStop):
                engine.step(now, Attach(decision.id, b"mine"))
        engine.waiting()
    return engine.dropped


PROCESS = ProcessId(7, 1, "boot")
LIFT = Peers(
    lift_wire.CODEC,
    {
        ViewId: lambda random: ViewId(random.choice((1, 2, 3, 3, 4)), 1 if random.random() < 0.5 else 2),
        str: lambda random: random.choice(GROUPS),
        int: lambda random: random.choice((0, 1, 2, 3, 4, 5, 6, 8, 64, 65, 65535, 65536, -1)),
        ProcessId: lambda random: PROCESS,
    },
)


def lift_case(random: Random) -> int:
    now, epoch = SECOND, 0
    me = NodeIncarnation(ME.node, ME.incarnation)
    engine = LiftEngine(me, PROCESS, NODES, 2 * SECOND, lift_wire.LiftState())
    others = {
        life: LiftEngine(life, PROCESS, NODES, 2 * SECOND, lift_wire.LiftState()).attachment()
        for life in LIVES
        if life != me
    }
    doing: list[LocalDone] = []
    honest: list[tuple[MemberId, lift_wire.Done]] = []
    ours = "out"  # our participant of dlm:home, which joins again when it has left
    for _ in range(EVENTS):
        now += random.choice((0, MILLISECOND, SECOND))
        kind = random.random()
        events: list[Any] = [Received(sender(random), LIFT.message(random))]
        if kind < 0.10 or not epoch:
            epoch += 1
            coordinator = random.choice((1, 2))
            view = View(ViewId(epoch, coordinator), LIVES, True)
            attachments = {**others, me: engine.attachment()}
            events = [Promised(view.id), LiftInstalled(view, attachments, (), first=epoch == 1)]
        elif kind < 0.25 and doing:
            events = [doing.pop()]
        elif kind < 0.45 and honest:
            events = [Received(*honest.pop(0))]
        elif kind < 0.52 and ours == "out":
            ours = "in"
            events = [LocalJoin(MemberId(2, 5, 1), "dlm:home", 1, 4, "host:1", b"t", PROCESS)]
        elif 0.52 <= kind < 0.55 and ours == "in":
            ours = "leaving"
            events = [LocalLeave(MemberId(2, 5, 1), "dlm:home")]
        elif 0.55 <= kind < 0.57:
            events = [Fenced(NodeIncarnation(4, 5))]
        elif 0.57 <= kind < 0.63:
            events = [TICK]
        for event in events:
            engine.step(now, event)
            ready = engine.ready()
            for peer, message in (*ready.send, *ready.then_send):
                lift_wire.CODEC.decode(lift_wire.CODEC.encode(message))
                if isinstance(message, lift_wire.Begin) and peer != ME and random.random() < 0.8:
                    honest.append((peer, lift_wire.Done(message.view, message.round.id, message.round.group)))
            for record in ready.persist:
                lift_wire.STATE_CODEC.decode(lift_wire.STATE_CODEC.encode(record))
            for emitted in ready.emit:
                if isinstance(emitted, StartFence):
                    doing.append(LocalDone(ME, "fence", emitted.round.id))
                elif isinstance(emitted, StartGroup):
                    doing.extend(LocalDone(member, emitted.group.name, emitted.round.id) for member in emitted.local)
                elif isinstance(emitted, LiftLeft) or (isinstance(emitted, Refused) and ours == "in"):
                    ours = "out"
    return engine.dropped


# --- comm ------------------------------------------------------------------------------------------------------------


def comm_case(random: Random) -> int:
    limits = Limits(session_timeout_ns=SECOND, handshake_ns=SECOND, stall_ns=2 * SECOND, guests=8, queue_bytes=5000)
    engine = CommEngine(Identity(CLUSTER, UUID, ME, b""), limits)
    now, connections, attempt = SECOND, 100, 0
    for node in (1, 3):
        engine.add_node(now, node, f"n{node}:1")
    open_connections: list[int] = []
    attempts: list[int] = []
    for _ in range(EVENTS):
        now += random.choice((0, MILLISECOND, 100 * MILLISECOND, SECOND))
        kind = random.random()
        if kind < 0.15:
            connections += 1
            open_connections.append(connections)
            engine.accepted(now, connections, random.choice((1, 1, 3, 4, None)), bytes(32))
            if random.random() < 0.7:
                attempt += 1
                engine.received(now, connections, [hello(PEERS[0], ME, attempt=attempt)])
        elif kind < 0.25 and attempts:
            connections += 1
            if random.random() < 0.7:
                open_connections.append(connections)
                engine.connected(now, attempts.pop(), connections, bytes(32))
            else:
                engine.connect_failed(now, attempts.pop(), random.random() < 0.5, "refused")
        elif kind < 0.75 and open_connections:
            frames = [comm_frame(random) for _ in range(random.randint(1, 3))]
            engine.received(now, random.choice(open_connections), frames)
        elif kind < 0.80 and open_connections:
            engine.broken(now, open_connections.pop(random.randrange(len(open_connections))), "cut")
        elif kind < 0.85:
            engine.open(datagram(random))
        else:
            engine.tick(now)
        attempts.extend(action.attempt for action in engine.out if isinstance(action, Connect))
        engine.out.clear()
    statistics = engine.statistics()
    assert statistics.guests <= limits.guests, "more guests than allowed"
    return sum(count for _kind, count in statistics.rejects)


def comm_frame(random: Random) -> bytes:
    kind = random.random()
    if kind < 0.35:
        number = random.choice((0, 1, 1, 2, 3, 1 << 40))
        body = random.randbytes(random.choice((0, 10, 3000)))
        return (
            frame.pack_header(
                frame.DATA, 3, 1, number, random.choice((0, 0, 1, 1 << 40)), random.choice((1, 2, 3, 4)), len(body)
            )
            + body
        )
    if kind < 0.5:
        return frame.pack_header(frame.ACK, 0, 0, 0, random.choice((0, 1, 9)), random.choice((1, 2, 3)), 0)
    if kind < 0.65:
        good = hello(random.choice(PEERS), ME, attempt=random.choice((1, 2, 9)), resume=random.choice((0, 1, 5)))
        return good if random.random() < 0.5 else damage(good, random)
    if kind < 0.8:
        fields = (
            CLUSTER,
            UUID,
            random.choice((*PEERS, *STRANGERS)),
            b"",
            random.choice((1, 2, 3)),
            random.choice((0, 1, 2, 3)),
        )
        welcome = comm_wire.Welcome(*fields, random.choice((0, 0, 5)), random.choice((0, 1, 2)), 0, 0, 0, bytes(32))
        return comm_wire.control(frame.WELCOME, welcome.session, 0, welcome)
    return control_frame(random) if kind < 0.9 else frame_bytes(random)


def targets() -> list[Target]:
    return [
        target("fence-engine", fence_case, fence_guard),
        target("dlm-engine", dlm_case),
        target("heartbeat-engine", heartbeat_case),
        target("membership-engine", membership_case),
        target("lift-engine", lift_case),
        target("comm-engine", comm_case),
    ]
