"""The door of comm: all peers of one process, and whoever knocks (DESIGN 4 identity, 5 comm).

Decides, never acts: a method takes `now`, changes state and appends what is to be done to `out` (`comm/actions.py`), in
the order in which it has to happen. Whoever runs it drains `out` before and after each call and calls `tick` at
`deadline`.

An accepted connection is a *guest* until its hello is found good: it has a bounded time, guests are bounded in number
(in all and per node), and it can say one thing, HELLO. Then it belongs to the session of one peer.

Peers: corralds are configured by node and learn each other's incarnation from the handshake; participants are announced
with their full member id and ticket. A hello from anybody else gets REFUSE(WAIT) and the caller tries again, because
the announcement may be on its way.
"""

from typing import NamedTuple, final

from corral.base.errors import PeerError
from corral.base.ids import MemberId, NodeId
from corral.base.time import FOREVER, Instant
from corral.comm import seal, wire
from corral.comm.actions import Action, Counters, Limits, Shut, Write
from corral.comm.handshake import Identity
from corral.comm.session import SessionEngine, Shared
from corral.comm.wire import Hello, Refuse
from corral.wire import frame
from corral.wire.frame import HELLO, REFUSE, VERSION


@final
class _Guest:
    """An accepted connection before its hello. `half` is our part of the datagram key, drawn when it was accepted."""

    __slots__ = ("deadline", "half", "node")

    def __init__(self, node: NodeId | None, half: bytes, deadline: Instant) -> None:
        self.node = node
        self.half = half
        self.deadline = deadline


class PeerStatistics(NamedTuple):
    peer: MemberId
    session: int
    alive: bool
    connected: bool
    queued_frames: int
    queued_bytes: int


class Statistics(NamedTuple):
    """Sums since the start of the process. Frames and bytes are those of messages, each once however often sent."""

    frames_sent: int
    bytes_sent: int
    frames_received: int
    bytes_received: int
    resends: int
    duplicates: int
    sessions: int
    guests: int
    rejects: tuple[tuple[str, int], ...]
    peers: tuple[PeerStatistics, ...]


@final
class CommEngine:
    __slots__ = ("_by_connection", "_guests", "_members", "_nodes", "_shared", "deadline", "me", "out")

    def __init__(self, identity: Identity, limits: Limits) -> None:
        self._shared = Shared(identity, limits)
        self.me = identity.me
        self.out: list[Action] = self._shared.out
        self.deadline: Instant = FOREVER
        self._nodes: dict[NodeId, SessionEngine] = {}  # corralds
        self._members: dict[MemberId, SessionEngine] = {}  # participants
        self._by_connection: dict[int, SessionEngine] = {}  # open or greeting
        self._guests: dict[int, _Guest] = {}

    # --- who is expected ----------------------------------------------------------------------------------------------

    def add_node(self, now: Instant, node: NodeId, address: str) -> None:
        """The corrald of that node is expected, in any incarnation."""
        if node == self.me.node and self.me.serial == 0:
            return
        session = self._nodes.get(node)
        if session is not None:
            session.readdress(now, address, b"")
        else:
            session = self._nodes[node] = SessionEngine(self._shared, MemberId(node, 0, 0), address, b"")
            session.start(now)
        self._note(session)

    def set_peer(self, now: Instant, peer: MemberId, address: str, ticket: bytes) -> None:
        """That participant is expected."""
        if peer == self.me:
            return
        if peer.serial == 0:
            self.add_node(now, peer.node, address)
            return
        session = self._members.get(peer)
        if session is not None:
            session.readdress(now, address, ticket)
        else:
            session = self._members[peer] = SessionEngine(self._shared, peer, address, ticket)
            session.start(now)
        self._note(session)

    def drop_peer(self, now: Instant, peer: MemberId) -> None:
        """Not expected any more. For a corrald: its node is forgotten, whatever the incarnation."""
        session = self._nodes.pop(peer.node, None) if peer.serial == 0 else self._members.pop(peer, None)
        if session is not None:
            session.forget(now, wire.CLOSE_DROPPED, "no longer expected")
            self._unlink(session)

    def end_session(self, now: Instant, peer: MemberId, reason: str) -> None:
        """Breaks the session; the peer stays expected and a new one follows (a gate's OVERFLOW asks for this)."""
        session = self.session_of(peer)
        if session is not None:
            session.end(now, wire.CLOSE_OVERFLOW, reason)
            self._note(session)

    def leave(self, now: Instant) -> None:
        """The process ends in order: every peer is told, nothing is tried any more."""
        for session in self._sessions():
            session.forget(now, wire.CLOSE_LEAVING, "this member leaves")
        for connection in sorted(self._guests):
            self.out.append(Shut(connection))
        self._nodes.clear()
        self._members.clear()
        self._by_connection.clear()
        self._guests.clear()
        self.deadline = FOREVER

    def overflowed(self, now: Instant, session: SessionEngine) -> None:
        """`pack` refused: the queue is over its bound (COMM-4)."""
        session.end(now, wire.CLOSE_OVERFLOW, f"{session.queued_bytes} unacknowledged bytes are queued")
        self._note(session)

    def session_of(self, peer: MemberId) -> SessionEngine | None:
        """The living session with exactly that member."""
        session = self._nodes.get(peer.node) if peer.serial == 0 else self._members.get(peer)
        if session is None or not session.alive or session.peer != peer:
            return None
        return session

    def _sessions(self) -> list[SessionEngine]:
        nodes = [self._nodes[node] for node in sorted(self._nodes)]
        return nodes + [self._members[member] for member in sorted(self._members)]

    # --- connections we make ------------------------------------------------------------------------------------------

    def connected(self, now: Instant, attempt: int, connection: int, half: bytes) -> None:
        """A Connect succeeded; `half` is KEY_HALF fresh random bytes."""
        for session in self._sessions():
            if session.connected(now, attempt, connection, half):
                self._by_connection[connection] = session
                self._note(session)
                return
            self._note(session)
        self.out.append(Shut(connection))

    def connect_failed(self, now: Instant, attempt: int, refused: bool, reason: str) -> None:
        for session in self._sessions():
            session.connect_failed(now, attempt, refused, reason)
            self._note(session)

    # --- connections made to us ---------------------------------------------------------------------------------------

    def accepted(self, now: Instant, connection: int, node: NodeId | None, half: bytes) -> None:
        """A connection with a checked certificate of `node`; `half` is KEY_HALF fresh random bytes."""
        limits = self._shared.limits
        from_node = sum(1 for guest in self._guests.values() if guest.node == node)
        if len(self._guests) >= limits.guests or from_node >= limits.guests_per_node:
            self._shared.counters.reject("too many connections without a hello", node, f"{len(self._guests)} wait")
            self.out.append(Shut(connection))
            return
        guest = self._guests[connection] = _Guest(node, half, now + limits.handshake_ns)
        self.deadline = min(self.deadline, guest.deadline)

    def _greet(self, now: Instant, connection: int, guest: _Guest, messages: list[bytes]) -> None:
        """The guest's first words."""
        del self._guests[connection]
        try:
            first = frame.parse(messages[0])
            if first.kind != HELLO:
                raise PeerError(f"frame kind {first.kind} instead of HELLO")
            hello = wire.body_of(first)
        except PeerError as error:
            self._shared.counters.reject("malformed hello", guest.node, str(error))
            self.out.append(Shut(connection))
            return
        session = self._expected(hello.me)
        code = self._judge(hello, guest, session)
        if code:
            detail = f"{wire.REFUSALS[code]}: member {hello.me}"
            if code not in (wire.REFUSE_WAIT, wire.REFUSE_SESSION, wire.REFUSE_SIDE):
                self._shared.counters.reject(f"hello with {wire.REFUSALS[code]}", guest.node, detail)
            known = session.peer.incarnation if session is not None and code == wire.REFUSE_INCARNATION else 0
            refusal = wire.control(REFUSE, 0, 0, Refuse(code, self.me, detail, known))
            self.out.append(Write(connection, [refusal]))
            self.out.append(Shut(connection))
            if code == wire.REFUSE_SIDE and session is not None:
                session.summoned(now, hello)
                self._note(session)
            return
        assert session is not None
        old = session.connection
        session.accept(now, connection, hello, guest.half)
        self._by_connection.pop(old, None)
        self._by_connection[connection] = session
        if len(messages) > 1:
            session.receive(now, messages[1:])
        self._note(session)

    def _expected(self, member: MemberId) -> SessionEngine | None:
        return self._nodes.get(member.node) if member.serial == 0 else self._members.get(member)

    def _judge(self, hello: Hello, guest: _Guest, session: SessionEngine | None) -> int:
        """0, or why this hello is refused. The order matters: what proves an enemy comes before what may be haste."""
        identity = self._shared.identity
        if (hello.cluster, hello.uuid) != (identity.cluster, identity.uuid):
            return wire.REFUSE_CLUSTER
        if hello.me.node != guest.node or hello.me == self.me or hello.me.incarnation == 0:
            return wire.REFUSE_MEMBER
        if not hello.version_min <= VERSION <= hello.version_max or hello.incompatible & ~wire.INCOMPATIBLE:
            return wire.REFUSE_VERSION
        target = hello.target
        if (target.node, target.serial) != (self.me.node, self.me.serial):
            return wire.REFUSE_TARGET
        if target.incarnation not in (0, self.me.incarnation):
            return wire.REFUSE_TARGET
        if session is None:
            return wire.REFUSE_WAIT
        return session.judge(hello)

    # --- any connection -----------------------------------------------------------------------------------------------

    def received(self, now: Instant, connection: int, messages: list[bytes]) -> None:
        """All whole messages one wakeup brought on a connection, in order."""
        session = self._by_connection.get(connection)
        if session is not None:
            if session.connection == connection:
                session.receive(now, messages)
            else:
                session.answered(now, messages)
            self.settle(session, connection)
            return
        guest = self._guests.get(connection)
        if guest is not None:
            self._greet(now, connection, guest, messages)

    def open_session(self, connection: int) -> SessionEngine | None:
        """The session this connection carries: a runner in a hurry may call its `receive` itself, then `settle`."""
        session = self._by_connection.get(connection)
        return session if session is not None and session.connection == connection else None

    def settle(self, session: SessionEngine, connection: int) -> None:
        """After `receive` on this connection."""
        if session.connection != connection:
            self._unlink(session)
        if session.deadline < self.deadline:
            self.deadline = session.deadline

    def broken(self, now: Instant, connection: int, reason: str) -> None:
        self._guests.pop(connection, None)
        session = self._by_connection.pop(connection, None)
        if session is not None:
            session.broken(now, connection, reason)
            self._note(session)

    # --- datagrams ----------------------------------------------------------------------------------------------------

    def seal(self, peer: MemberId, payload: bytes) -> tuple[str, bytes] | None:
        """Address and datagram, or None without a session."""
        session = self.session_of(peer)
        if session is None or session.sealer is None:
            return None
        return session.address, session.sealer.seal(payload)

    def open(self, datagram: bytes) -> tuple[MemberId, bytes] | None:
        """Sender and payload of a fresh and authentic datagram of a living session; anything else is counted."""
        counters = self._shared.counters
        try:
            header = seal.parse(datagram)
        except PeerError as error:
            counters.reject("malformed datagram", None, str(error))
            return None
        session = self._nodes.get(header.node) if header.serial == 0 else self._member_with(header.node, header.serial)
        opener = None if session is None or not session.alive else session.opener(header.key_id)
        if session is None or opener is None:
            # Between a crash and the next session this is normal, so it is counted and not told.
            kind = seal.FINDINGS[seal.UNKNOWN_KEY]
            counters.rejects[kind] = counters.rejects.get(kind, 0) + 1
            return None
        finding = opener.open(datagram, header)
        if finding != seal.FRESH:
            # Nothing about the sender is proven, so the claimed node is not part of what is told once.
            counters.reject(seal.FINDINGS[finding], None, f"claims to be of node {header.node}")
            return None
        return session.peer, seal.payload_of(datagram)

    def _member_with(self, node: NodeId, serial: int) -> SessionEngine | None:
        """Incarnations are not in the header: of several only one can have a living session."""
        for member, session in self._members.items():
            if member.node == node and member.serial == serial and session.alive:
                return session
        return None

    # --- time ---------------------------------------------------------------------------------------------------------

    def tick(self, now: Instant) -> None:
        limits = self._shared.limits
        for connection in sorted(self._guests):
            guest = self._guests[connection]
            if now >= guest.deadline:
                del self._guests[connection]
                self._shared.counters.reject(
                    "no hello in time", guest.node, f"within {limits.handshake_ns // 1_000_000} ms"
                )
                self.out.append(Shut(connection))
        deadline = min((guest.deadline for guest in self._guests.values()), default=FOREVER)
        for session in self._sessions():
            if now >= session.deadline:
                session.tick(now)
                self._unlink(session)
            deadline = min(deadline, session.deadline)
        self.deadline = deadline

    def _note(self, session: SessionEngine) -> None:
        """A session was touched: keep the maps and the deadline true."""
        self._unlink(session)
        if session.deadline < self.deadline:
            self.deadline = session.deadline

    def _unlink(self, session: SessionEngine) -> None:
        """Connections the session has given up are nobody's now."""
        stale = [
            connection
            for connection, owner in self._by_connection.items()
            if owner is session and not session.owns(connection)
        ]
        for connection in stale:
            del self._by_connection[connection]

    # --- for people ---------------------------------------------------------------------------------------------------

    def statistics(self) -> Statistics:
        past = self._shared.counters
        counters = Counters([])
        for kept in ("frames_sent", "bytes_sent", "frames_received", "bytes_received"):
            setattr(counters, kept, getattr(past, kept))
        for session in self._sessions():
            session.count(counters)
        return Statistics(
            frames_sent=counters.frames_sent,
            bytes_sent=counters.bytes_sent,
            frames_received=counters.frames_received,
            bytes_received=counters.bytes_received,
            resends=past.resends,
            duplicates=past.duplicates,
            sessions=past.sessions,
            guests=len(self._guests),
            rejects=tuple(sorted(past.rejects.items())),
            peers=tuple(
                PeerStatistics(s.peer, s.session, s.alive, s.connection != 0, s.queued_frames, s.queued_bytes)
                for s in self._sessions()
            ),
        )
