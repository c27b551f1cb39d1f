"""The native provider of api.comm: the comm engine over World.network (DESIGN 5, comm).

Sends leave from inside `send`, one frame per call, and the World's connection makes one write of what a loop turn
queued there. All else the engine decides goes through its list of actions, drained here in order, also when a callback
run by the drain adds to it; it is empty before the engine is fed from outside, so that no send of a callback can
overtake the frames of a handshake. No task or future per message: the only tasks are connection attempts.

    await comm.start("10.0.0.1:7700")      listens (TLS, and UDP on the same port number)
    comm.add_node(2, "10.0.0.2:7700")      a corrald, in whatever incarnation
    comm.set_peer(member, address, ticket) a participant
"""

import asyncio
from collections.abc import Callable
from typing import Final, final

from corral.api.comm import PeerDown, PeerUp
from corral.base.ids import Incarnation, MemberId, NodeId
from corral.base.time import FOREVER
from corral.base.world import Buffer, Connection, DatagramSocket, Listener, Timer, World
from corral.comm.actions import Abandon, Action, Connect, Deliver, Limits, Outdated, Rejected, Shut, Write
from corral.comm.engine import CommEngine, Statistics
from corral.comm.handshake import Identity
from corral.comm.seal import PAYLOAD_MAX
from corral.comm.session import SessionEngine
from corral.comm.wire import KEY_HALF
from corral.wire.frame import PORT_MAX

DeliverTo = Callable[[MemberId, int, list[bytes]], None]
BIND_TRIES: Final = 16  # for a port that is free on both TCP and UDP, when any port will do

__all__ = ["Limits", "NativeComm", "Rejected", "Statistics"]


@final
class _Wire:
    """One connection: the World's handler, and the number the engine knows it by."""

    __slots__ = ("_comm", "connection", "number", "reason")

    def __init__(self, comm: "NativeComm", number: int) -> None:
        self._comm = comm
        self.number = number
        self.connection: Connection | None = None
        self.reason: str | None = None  # broken before `connect` returned

    def received(self, messages: list[bytes]) -> None:
        """The path of every message, so it is one function: receive, and hand over if that is all there is to do."""
        comm = self._comm
        engine = comm._engine
        out = engine.out
        session = engine.open_session(self.number)
        if session is None or out or comm._acting:
            comm._received(self.number, messages)
            return
        session.receive(comm._world.now(), messages)
        if session.deadline < engine.deadline or session.connection != self.number:
            engine.settle(session, self.number)
        if len(out) == 1 and isinstance(action := out[0], Deliver):
            out.clear()
            comm._acting = True
            try:
                comm._hand_over(action.port, action.peer, action.round_id, action.payloads)
            finally:
                comm._acting = False
        if out:
            comm._act()
        elif engine.deadline < comm._timer_at:
            comm._arm()

    def broken(self, reason: str) -> None:
        if self.connection is None:
            self.reason = reason
        else:
            self._comm._broken(self.number, reason)


@final
class NativeComm:
    """`cluster` and `cluster_uuid` are compared in every hello; `ticket` is what announced this participant (empty for
    a corrald). `rejected` hears of peers' mistakes, once per kind and node; `outdated` that a node of the cluster knows
    a higher incarnation of this corrald and will not talk to it."""

    def __init__(
        self,
        world: World,
        me: MemberId,
        *,
        cluster: str,
        cluster_uuid: bytes,
        limits: Limits,
        ticket: bytes = b"",
        rejected: Callable[[Rejected], None] | None = None,
        outdated: Callable[[Incarnation], None] | None = None,
    ) -> None:
        self.me: Final = me
        self._world = world
        self._engine = CommEngine(Identity(cluster, cluster_uuid, me, ticket), limits)
        self._rejected = rejected
        self._outdated = outdated
        self._ports: dict[int, DeliverTo] = {}
        self._watchers: list[Callable[[PeerUp | PeerDown], None]] = []
        self._rest: Callable[[MemberId, int, int, list[bytes]], None] | None = None
        self._datagrams: Callable[[MemberId, bytes], None] | None = None
        self._up: dict[MemberId, SessionEngine] = {}  # whose PeerUp was told and whose PeerDown was not
        self._connections: dict[int, Connection] = {}
        self._next_connection = 1
        self._dials: dict[int, asyncio.Task[None]] = {}
        self._listener: Listener | None = None
        self._socket: DatagramSocket | None = None
        self._timer: Timer | None = None
        self._timer_at = FOREVER
        self._acting = False
        self._loop = asyncio.get_running_loop()
        self._scheduled = False
        self._loopback: list[tuple[int, int, bytes]] = []
        self._closed = False

    # --- life --------------------------------------------------------------------------------------------------------

    async def start(self, address: str, *, datagrams: bool = True) -> None:
        """Listens at `address`; port 0 takes one that is free for both connections and datagrams. Raises OSError."""
        host, _, port = address.rpartition(":")
        for last in [False] * (BIND_TRIES - 1 if port == "0" else 0) + [True]:
            listener = await self._world.network.listen(address, self._accept)
            if not datagrams:
                self._listener = listener
                return
            _, _, bound = listener.address.rpartition(":")
            try:
                self._socket = await self._world.network.datagrams(f"{host}:{bound}", self._datagram_received)
            except OSError:
                listener.close()
                if last:
                    raise
            else:
                self._listener = listener
                return

    def close(self) -> None:
        """Tells every peer; nothing is delivered or told after this."""
        if self._closed:
            return
        self._closed = True
        self._engine.leave(self._world.now())
        self._drain()
        self._ports.clear()
        self._loopback.clear()
        for _, dial in sorted(self._dials.items()):
            dial.cancel()
        for _, connection in sorted(self._connections.items()):
            connection.close()
        self._connections.clear()
        if self._listener is not None:
            self._listener.close()
        if self._socket is not None:
            self._socket.close()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    @property
    def address(self) -> str:
        assert self._listener is not None, "start first"
        return self._listener.address

    def statistics(self) -> Statistics:
        return self._engine.statistics()

    # --- the contract ------------------------------------------------------------------------------------------------

    def send(self, peer: MemberId, port: int, round_id: int, payload: bytes) -> None:
        session = self._up.get(peer)
        if session is None:
            if peer == self.me and not self._closed:
                self._loopback.append((port, round_id, payload))
                self._schedule()
            return
        if not session.alive or session.announced != session.session:
            return  # its PeerDown is on the way; a session that began since is not the one the caller means
        message = session.pack(port, round_id, payload)
        if message is None:
            self._engine.overflowed(self._world.now(), session)
            self._schedule()
        elif session.connection:
            self._connections[session.connection].send((message,))

    def listen(self, port: int, deliver: DeliverTo) -> None:
        assert 0 < port <= PORT_MAX
        assert port not in self._ports, f"port {port} has a listener"
        self._ports[port] = deliver

    def listen_rest(self, deliver: Callable[[MemberId, int, int, list[bytes]], None]) -> None:
        """What comes for ports without a listener: `deliver(peer, port, round, payloads)`. A participant keeps there
        what faster members of a group send before it has heard the group's number."""
        self._rest = deliver

    def unlisten(self, port: int) -> None:
        self._ports.pop(port, None)

    def watch(self, changed: Callable[[PeerUp | PeerDown], None]) -> None:
        self._watchers.append(changed)

    def set_peer(self, peer: MemberId, address: str, ticket: bytes) -> None:
        self._engine.set_peer(self._world.now(), peer, address, ticket)
        self._schedule()

    def drop_peer(self, peer: MemberId) -> None:
        self._engine.drop_peer(self._world.now(), peer)
        self._schedule()

    # --- beyond the contract: corralds, heartbeats -------------------------------------------------------------------

    def add_node(self, node: NodeId, address: str) -> None:
        """The corrald of that node is expected there; its incarnation is learned, the newest wins."""
        self._engine.add_node(self._world.now(), node, address)
        self._schedule()

    def drop_node(self, node: NodeId) -> None:
        self.drop_peer(MemberId(node, 0, 0))

    def end_session(self, peer: MemberId, reason: str) -> None:
        """Breaks the session, PeerDown follows in the next turn; the peer stays expected."""
        self._engine.end_session(self._world.now(), peer, reason)
        self._schedule()

    def datagram(self, peer: MemberId, payload: bytes) -> None:
        """Best effort, authenticated, at most PAYLOAD_MAX bytes; dropped without a session."""
        assert len(payload) <= PAYLOAD_MAX
        sealed = self._engine.seal(peer, payload)
        if sealed is not None and self._socket is not None:
            self._socket.send(*sealed)

    def listen_datagrams(self, deliver: Callable[[MemberId, bytes], None]) -> None:
        self._datagrams = deliver

    # --- from the World ----------------------------------------------------------------------------------------------

    def _accept(self, connection: Connection) -> _Wire:
        wire = self._wire()
        wire.connection = connection
        if self._closed:
            connection.close()
            return wire
        self._connections[wire.number] = connection
        half = self._world.random_bytes(KEY_HALF)
        self._engine.accepted(self._world.now(), wire.number, connection.node, half)
        self._schedule()
        return wire

    def _wire(self) -> _Wire:
        number = self._next_connection
        self._next_connection += 1
        return _Wire(self, number)

    async def _dial(self, action: Connect) -> None:
        wire = self._wire()
        try:
            connection = await self._world.network.connect(action.address, action.node, wire)
        except (OSError, ValueError) as error:  # ValueError: a peer announced what is no address
            self._dials.pop(action.attempt, None)
            refused = isinstance(error, ConnectionRefusedError)
            self._engine.connect_failed(self._world.now(), action.attempt, refused, str(error))
            self._act()
            return
        self._dials.pop(action.attempt, None)
        wire.connection = connection
        if self._closed:
            connection.close()
            return
        self._connections[wire.number] = connection
        now = self._world.now()
        self._engine.connected(now, action.attempt, wire.number, self._world.random_bytes(KEY_HALF))
        if wire.reason is not None:
            self._broken(wire.number, wire.reason)
        self._act()

    def _received(self, number: int, messages: list[bytes]) -> None:
        if self._engine.out:
            self._act()
        self._engine.received(self._world.now(), number, messages)
        self._act()

    def _broken(self, number: int, reason: str) -> None:
        self._connections.pop(number, None)
        if not self._closed:
            self._engine.broken(self._world.now(), number, reason)
            self._act()

    def _datagram_received(self, _address: str, datagram: bytes) -> None:
        opened = self._engine.open(datagram)
        if opened is None:
            self._act()  # it may be worth telling
        elif self._datagrams is not None and opened[0] in self._up:
            self._datagrams(*opened)

    def _tick(self) -> None:
        self._timer = None
        self._timer_at = FOREVER
        self._engine.tick(self._world.now())
        self._act()

    # --- acting ------------------------------------------------------------------------------------------------------

    def _schedule(self) -> None:
        """Callbacks never run inside the caller's own call: the next loop turn acts, unless a drain is under way."""
        if not self._scheduled and not (self._acting and not self._loopback) and not self._closed:
            self._scheduled = True
            self._loop.call_soon(self._turn)

    def _turn(self) -> None:
        self._scheduled = False
        if self._closed:
            return
        if self._loopback:
            self._deliver_loopback()
        self._act()

    def _act(self) -> None:
        if self._acting or self._closed:
            return
        self._acting = True
        try:
            self._drain()
        finally:
            self._acting = False
        self._arm()

    def _arm(self) -> None:
        """One timer for all of comm: it may fire early, the engine does not mind; it is never moved back."""
        deadline = self._engine.deadline
        if deadline < self._timer_at and not self._closed:
            if self._timer is not None:
                self._timer.cancel()
            self._timer_at = deadline
            self._timer = self._world.call_at(deadline, self._tick)

    def _drain(self) -> None:
        """Does what the engine decided, in order; callbacks may make it decide more, or close all this."""
        out = self._engine.out
        while out:
            actions = out[:]
            out.clear()
            for action in actions:
                if isinstance(action, Deliver):
                    if not self._closed:
                        self._hand_over(action.port, action.peer, action.round_id, action.payloads)
                elif isinstance(action, Write):
                    connection = self._connections.get(action.connection)
                    if connection is not None:
                        messages: list[Buffer] = [*action.messages]
                        connection.send(messages)
                else:
                    self._do(action)

    def _hand_over(self, port: int, peer: MemberId, round_id: int, payloads: list[bytes]) -> None:
        deliver = self._ports.get(port)
        if deliver is not None:
            deliver(peer, round_id, payloads)
        elif self._rest is not None:
            self._rest(peer, port, round_id, payloads)

    def _do(self, action: Action) -> None:
        if isinstance(action, PeerUp | PeerDown):
            self._tell(action)
        elif isinstance(action, Connect):
            dial = self._world.spawn(self._dial(action), f"comm: connect to node {action.node}")
            self._dials[action.attempt] = dial
        elif isinstance(action, Abandon):
            abandoned = self._dials.pop(action.attempt, None)
            if abandoned is not None:
                abandoned.cancel()
        elif isinstance(action, Shut):
            connection = self._connections.pop(action.connection, None)
            if connection is not None:
                connection.close()
        elif isinstance(action, Rejected) and self._rejected is not None:
            self._rejected(action)
        elif isinstance(action, Outdated) and self._outdated is not None:
            self._outdated(action.known)

    def _tell(self, change: PeerUp | PeerDown) -> None:
        if isinstance(change, PeerDown):
            self._up.pop(change.peer, None)
        else:
            session = self._engine.session_of(change.peer)
            if session is not None and session.session == change.session:
                session.announced = change.session
                self._up[change.peer] = session
        if not self._closed:
            for changed in list(self._watchers):
                changed(change)

    def _deliver_loopback(self) -> None:
        """What this member sent to itself in the last turn, in order, consecutive messages of one port together."""
        queued, self._loopback = self._loopback, []
        start = 0
        while start < len(queued):
            port, round_id, _ = queued[start]
            end = start
            while end < len(queued) and queued[end][0] == port and queued[end][1] == round_id:
                end += 1
            self._hand_over(port, self.me, round_id, [payload for _, _, payload in queued[start:end]])
            start = end
