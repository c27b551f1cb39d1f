"""Comm engines joined by hand: a network of lists, no sockets, no event loop.

`Rig` moves virtual time. Whatever an engine asks for happens `delay()` later, connections keep their order per
direction, and everything an engine tells its user is in `Host.log`. A test breaks links, kills hosts, holds bytes back
by setting `delay`, or speaks to an engine itself through `Rig.stranger`.
"""

import heapq
from collections.abc import Callable
from typing import Any

from corral.api.comm import PeerDown, PeerUp
from corral.base.ids import MemberId
from corral.base.time import FOREVER, MILLISECOND
from corral.comm import wire
from corral.comm.actions import Abandon, Connect, Deliver, Limits, Rejected, Shut, Write
from corral.comm.engine import CommEngine
from corral.comm.handshake import Identity
from corral.wire.frame import HELLO, parse

CLUSTER = "testers"
UUID = bytes(range(16))
DETECT = 500 * MILLISECOND


class End:
    """One end of a connection. `number` is what its host's engine calls it."""

    def __init__(self, host: "Host | None", number: int) -> None:
        self.host = host
        self.number = number
        self.peer: End
        self.arrives = 0  # nothing sent to this end arrives before
        self.open = True
        self.heard: list[bytes] = []  # a stranger's end has no engine: its frames are kept here
        self.broken = ""


class Host:
    def __init__(self, rig: "Rig", member: MemberId, address: str, ticket: bytes, limits: Limits) -> None:
        self.rig = rig
        self.member = member
        self.address = address
        self.engine = CommEngine(Identity(CLUSTER, UUID, member, ticket), limits)
        self.log: list[Any] = []
        self.ends: dict[int, End] = {}
        self.up: dict[MemberId, int] = {}
        self.alive = True
        self.on_event: Callable[[Any], None] = lambda event: None

    def send(self, peer: MemberId, port: int, round_id: int, payload: bytes) -> bool:
        """As NativeComm.send: into the session whose PeerUp was told, or nowhere."""
        session = self.engine.session_of(peer)
        if session is None or self.up.get(peer) != session.session:
            return False
        message = session.pack(port, round_id, payload)
        if message is None:
            self.engine.overflowed(self.rig.now, session)
            self.rig.act(self)
            return False
        if session.connection:
            self.rig.transmit(self.ends[session.connection], [message])
        return True

    def messages(self) -> list[bytes]:
        return [payload for event in self.log if isinstance(event, Deliver) for payload in event.payloads]

    def changes(self) -> list[PeerUp | PeerDown]:
        return [event for event in self.log if isinstance(event, PeerUp | PeerDown)]

    def rejects(self) -> dict[str, int]:
        return dict(self.engine.statistics().rejects)


class Rig:
    def __init__(self) -> None:
        self.now = 1_000 * MILLISECOND
        self.hosts: dict[str, Host] = {}
        self.delay: Callable[[], int] = lambda: MILLISECOND
        self.cut: set[frozenset[int]] = set()  # pairs of nodes between which nothing passes
        self._queue: list[tuple[int, int, Callable[[], None]]] = []
        self._order = 0
        self._numbers = 0
        self._dials: dict[tuple[Host, int], bool] = {}

    # --- building ---

    def host(
        self,
        node: int,
        *,
        incarnation: int = 1,
        serial: int = 0,
        ticket: bytes = b"",
        limits: Limits | None = None,
    ) -> Host:
        """Starts at its address, instead of whoever was there."""
        address = f"n{node}.{serial}"
        host = Host(self, MemberId(node, incarnation, serial), address, ticket, limits or Limits.for_detect(DETECT))
        self.hosts[address] = host
        return host

    def pair(self, **kwargs: Any) -> tuple[Host, Host]:
        """Two corralds that know each other's node; 1 calls, 2 is called."""
        one, two = self.host(1, **kwargs), self.host(2, **kwargs)
        one.engine.add_node(self.now, 2, two.address)
        two.engine.add_node(self.now, 1, one.address)
        self.act(one)
        self.act(two)
        return one, two

    def kill(self, host: Host) -> None:
        """As SIGKILL: the kernel closes what the process had; what was sent already still travels."""
        host.alive = False
        if self.hosts.get(host.address) is host:
            del self.hosts[host.address]
        for end in list(host.ends.values()):
            self._close(end)

    def stranger(self, host: Host, node: int | None) -> End:
        """A connection to `host` from somebody with the certificate of `node`."""
        mine, its = self._join(None, host)
        host.engine.accepted(self.now, its.number, node, bytes(32))
        self.act(host)
        return mine

    def say(self, end: End, *messages: bytes) -> list[bytes]:
        """A stranger speaks; returns all it has heard after things settled."""
        self.transmit(end, list(messages))
        self.run(20 * MILLISECOND)
        return end.heard

    # --- time ---

    def later(self, delay: int, do: Callable[[], None]) -> None:
        self.at(self.now + delay, do)

    def at(self, when: int, do: Callable[[], None]) -> None:
        self._order += 1
        heapq.heappush(self._queue, (when, self._order, do))

    def run(self, span: int) -> None:
        until = self.now + span
        while self.step(until):
            pass
        self.now = until

    def step(self, until: int) -> bool:
        """The next thing that happens up to `until`; False: nothing."""
        timers = [(host.engine.deadline, address) for address, host in self.hosts.items()]
        timer, address = min(timers, default=(FOREVER, ""))
        event = self._queue[0][0] if self._queue else FOREVER
        if min(timer, event) > until:
            return False
        if event <= timer:
            when, _, do = heapq.heappop(self._queue)
            self.now = max(self.now, when)
            do()
        else:
            self.now = max(self.now, timer)
            host = self.hosts[address]
            host.engine.tick(self.now)
            assert host.engine.deadline > self.now, "COMM-10: a deadline that was kept has to move"
            self.act(host)
        return True

    # --- acting ---

    def act(self, host: Host) -> None:
        out = host.engine.out
        while out:
            action = out.pop(0)
            if isinstance(action, Write):
                if action.connection in host.ends:
                    self.transmit(host.ends[action.connection], action.messages)
            elif isinstance(action, Shut):
                if action.connection in host.ends:
                    self._close(host.ends[action.connection])
            elif isinstance(action, Connect):
                self._connect(host, action)
            elif isinstance(action, Abandon):
                self._dials.pop((host, action.attempt), None)
            else:
                self._tell(host, action)

    def _tell(self, host: Host, event: PeerUp | PeerDown | Deliver | Rejected) -> None:
        host.log.append(event)
        if isinstance(event, PeerUp):
            host.up[event.peer] = event.session
        elif isinstance(event, PeerDown):
            host.up.pop(event.peer, None)
        host.on_event(event)

    def _connect(self, host: Host, action: Connect) -> None:
        self._dials[host, action.attempt] = True

        def arrive() -> None:
            if (host, action.attempt) not in self._dials or not host.alive:
                return
            if frozenset((host.member.node, action.node)) in self.cut:
                return
            target = self.hosts.get(action.address)
            del self._dials[host, action.attempt]
            if target is None:
                host.engine.connect_failed(self.now, action.attempt, True, "nobody listens")
            else:
                mine, its = self._join(host, target)
                target.engine.accepted(self.now, its.number, host.member.node, bytes([target.member.node]) * 32)
                self.act(target)
                host.engine.connected(self.now, action.attempt, mine.number, bytes([host.member.node]) * 32)
            self.act(host)

        self.later(self.delay(), arrive)

    def _join(self, one: Host | None, two: Host) -> tuple[End, End]:
        self._numbers += 1
        ends = End(one, self._numbers * 2), End(two, self._numbers * 2 + 1)
        ends[0].peer, ends[1].peer = ends[1], ends[0]
        for end in ends:
            if end.host is not None:
                end.host.ends[end.number] = end
        return ends

    def transmit(self, end: End, messages: list[bytes]) -> None:
        if not end.open:
            return

        def arrive() -> None:
            there = end.peer
            if there.host is None:
                there.heard.extend(messages)
            elif there.open and there.host.alive and not self._parted(end):
                there.host.engine.received(self.now, there.number, list(messages))
                self.act(there.host)

        self._send(end, arrive)

    def _parted(self, end: End) -> bool:
        nodes = [side.host.member.node for side in (end, end.peer) if side.host is not None]
        return frozenset(nodes) in self.cut

    def _send(self, end: End, arrive: Callable[[], None]) -> None:
        end.peer.arrives = max(end.peer.arrives, self.now + self.delay())
        self.at(end.peer.arrives, arrive)

    def _close(self, end: End) -> None:
        """The other end hears of it behind all data."""
        if not end.open:
            return

        def arrive() -> None:
            self.breaks(end.peer, "closed by the peer")

        self._send(end, arrive)
        end.open = False
        if end.host is not None:
            end.host.ends.pop(end.number, None)

    def breaks(self, end: End, reason: str) -> None:
        """One end finds its connection broken."""
        if not end.open:
            return
        end.open = False
        end.broken = reason
        if end.host is not None and end.host.alive:
            end.host.ends.pop(end.number, None)
            end.host.engine.broken(self.now, end.number, reason)
            self.act(end.host)

    def break_all(self, reason: str = "reset") -> None:
        """Every connection breaks at both ends; what was on its way is lost."""
        for host in list(self.hosts.values()):
            for end in list(host.ends.values()):
                end.peer.open, was = False, end.peer.open
                self.breaks(end, reason)
                end.peer.open = was
                self.breaks(end.peer, reason)


def hello(me: MemberId, target: MemberId, /, **changes: Any) -> bytes:
    """A good hello, but for `changes`."""
    fields: dict[str, Any] = {
        "cluster": CLUSTER,
        "uuid": UUID,
        "me": me,
        "target": target,
        "ticket": b"",
        "attempt": 1,
        "resume": 0,
        "received": 0,
        "version_min": 1,
        "version_max": 1,
        "compatible": 0,
        "read_only_compatible": 0,
        "incompatible": 0,
        "key_half": bytes(32),
    }
    return wire.control(HELLO, 0, 0, wire.Hello(**{**fields, **changes}))


def kinds(messages: list[bytes]) -> list[int]:
    return [parse(message).kind for message in messages]
