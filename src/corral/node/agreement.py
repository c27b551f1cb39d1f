"""Runs cman's two engines of this node: heartbeats with the lease, and the agreement on views with its log."""

from collections.abc import Callable
from typing import Any, Final, final

from corral.api.comm import PeerDown, PeerUp
from corral.base.engine import Received
from corral.base.errors import PeerError
from corral.base.ids import Incarnation, MemberId, NodeId, NodeIncarnation
from corral.base.time import Nanoseconds
from corral.base.world import Store, World
from corral.cman.events import (
    Accepted,
    Active,
    Attach,
    CleanlyStopped,
    ConnectivityChanged,
    Excluded,
    Expel,
    FencingNow,
    FlagsChanged,
    Installed,
    KnownElsewhere,
    LeaseExtended,
    LeaseLapsed,
    Leave,
    Left,
    LinkDown,
    LinkUp,
    Outdated,
    Proved,
    RecordChanged,
    ServicesStopped,
    Stop,
)
from corral.cman.heartbeat import HeartbeatEngine
from corral.cman.membership import MembershipEngine
from corral.cman.quorum import check_record
from corral.cman.state import State, recover
from corral.cman.timing import Timing
from corral.cman.wire import HEARTBEATS, MESSAGES, RECORDS, Started
from corral.driver import Driver, each
from corral.node.chronicle import Chronicle
from corral.providers.native_comm import NativeComm
from corral.wire.frame import PORT_CMAN

COMPACT_AT: Final = 512  # records in the log that make a start rewrite it


async def begin_life(store: Store, wall_seconds: int, lease_ns: Nanoseconds) -> tuple[State, bool]:
    """Reads the log, makes this life's incarnation durable. Returns the state and whether to be quiet at first. Raises
    ConfigurationError, having written nothing, when others rely on another lease than the configured one."""
    records = [RECORDS.decode(payload) for payload in await store.read()]
    state = recover(records)
    if state.record is not None:
        check_record(state.record, lease_ns)
    quiet = state.quiet
    started = Started(state.next_incarnation(wall_seconds))
    state.apply(started)
    if len(records) > COMPACT_AT:
        await store.replace([RECORDS.encode(record) for record in state.compact()])
    else:
        await store.append([RECORDS.encode(started)])
    return state, quiet


@final
class Agreement:
    """`told(event)` gets what membership reports: Stop, Installed, Excluded, Outdated, Left, CleanlyStopped, and the
    lease: LeaseExtended, LeaseLapsed. `failed(error)`: the log cannot be written, nothing may be promised any more."""

    def __init__(
        self,
        world: World,
        comm: NativeComm,
        me: NodeIncarnation,
        nodes: tuple[NodeId, ...],
        timing: Timing,
        state: State,
        store: Store,
        chronicle: Chronicle,
        *,
        quiet: bool,
        stateful: bool,
        told: Callable[[Any], None],
        failed: Callable[[OSError], None],
    ) -> None:
        self._comm = comm
        self._chronicle = chronicle
        self._told = told
        self.dropped = 0
        now = world.now()
        self.membership: Final = MembershipEngine(me, nodes, timing, state, now, stateful=stateful)
        self.heartbeat: Final = HeartbeatEngine(
            me, nodes, timing, state.record, now, quiet=quiet, flags=self.membership.flags
        )
        self._agreeing: Driver[Any] = Driver(
            world,
            self.membership,
            "cman",
            transmit=each(lambda peer, message: comm.send(peer, PORT_CMAN, 0, MESSAGES.encode(message))),
            emit=self._agreed,
            store=store,
            encode=RECORDS.encode,
            failed=failed,
        )
        self._beating: Driver[Any] = Driver(
            world,
            self.heartbeat,
            "heartbeat",
            transmit=each(lambda peer, message: comm.datagram(peer, HEARTBEATS.encode(message))),
            emit=self._heard,
        )

    def start(self) -> None:
        self._comm.listen(PORT_CMAN, self._messages)
        self._comm.listen_datagrams(self._datagram)
        self._comm.watch(self._session)
        self._agreeing.start()
        self._beating.start()

    def stop(self) -> None:
        self._agreeing.stop()
        self._beating.stop()

    # -- what the node says

    def attach(self, event: Attach) -> None:
        self._agreeing.feed(event)

    def active(self, event: Active) -> None:
        self._agreeing.feed(event)

    def leave(self) -> None:
        self._agreeing.feed(Leave())

    def services_stopped(self) -> None:
        self._agreeing.feed(ServicesStopped())

    def proved(self, victim: NodeIncarnation) -> None:
        self._beating.feed(Proved(victim.node, victim.incarnation))

    def outdated(self, known: Incarnation) -> None:
        self._agreeing.feed(KnownElsewhere(known))

    def fencing(self, nodes: frozenset[NodeId]) -> None:
        self._agreeing.feed(FencingNow(nodes))

    def expel(self, member: NodeIncarnation) -> None:
        self._agreeing.feed(Expel(member))

    # -- what comes in

    def _session(self, change: PeerUp | PeerDown) -> None:
        if change.peer.serial == 0:
            self._beating.feed(change)
            self._agreeing.feed(change)

    def _messages(self, peer: MemberId, _round_id: int, payloads: list[bytes]) -> None:
        for payload in payloads:
            try:
                message = MESSAGES.decode(payload)
            except PeerError:
                self.dropped += 1
                continue
            self._agreeing.feed(Received(peer, message))

    def _datagram(self, peer: MemberId, payload: bytes) -> None:
        try:
            message = HEARTBEATS.decode(payload)
        except PeerError:
            self.dropped += 1
            return
        self._beating.feed(Received(peer, message))

    # -- what the engines say

    def _heard(self, event: object) -> None:
        if isinstance(event, LeaseExtended | LeaseLapsed):
            self._told(event)
        elif isinstance(event, ConnectivityChanged):
            self._agreeing.feed(event)
        elif isinstance(event, LinkUp):
            self._chronicle.note("link", f"link to node {event.node} is up")
        elif isinstance(event, LinkDown):
            self._chronicle.note("link", f"link to node {event.node} is down: {event.reason}")

    def _agreed(self, event: object) -> None:
        if isinstance(event, Accepted | RecordChanged | FlagsChanged):
            self._beating.feed(event)
            return
        if isinstance(event, Installed):
            self._beating.feed(event)
        assert isinstance(event, Installed | Stop | Excluded | Outdated | Left | CleanlyStopped)
        self._told(event)
