"""Several MembershipEngines on a table: links are declared, messages wait until somebody delivers them.

No heartbeats, no clock but `sleep`; a write is durable at once unless a test says otherwise.
"""

from typing import Any

from corral.api.comm import PeerDown, PeerUp
from corral.base.engine import TICK, Received
from corral.base.ids import MemberId, NodeId, NodeIncarnation
from corral.base.time import SECOND
from corral.cman.events import Attach, ConnectivityChanged, FlagsChanged, Installed, Row, Stop
from corral.cman.membership import MembershipEngine
from corral.cman.quorum import first_record
from corral.cman.state import first_state, recover
from corral.cman.timing import Timing
from corral.cman.wire import MESSAGES, QUIET, WILLING, Record, Started

TIMING = Timing(SECOND)
START = 100 * SECOND


class Bench:
    """`bench[2]` is the engine of node 2."""

    def __init__(self, nodes: int = 3, *, forgetful: tuple[NodeId, ...] = ()) -> None:
        self.now = START
        self.nodes = tuple(range(1, nodes + 1))
        self.record = first_record(dict.fromkeys(self.nodes, 1), TIMING.lease_ns)
        self.logs: dict[NodeId, list[Record]] = {
            node: [] if node in forgetful else first_state(self.record) for node in self.nodes
        }
        self.engines: dict[NodeId, MembershipEngine] = {}
        self.incarnations: dict[NodeId, int] = {}
        self.flags: dict[NodeId, int] = {}
        self.quiet: set[NodeId] = set()
        self.deaf: set[NodeId] = set()  # links are up, messages vanish
        self.links: set[tuple[NodeId, NodeId]] = set()
        self.wire: list[tuple[NodeId, MemberId, Any]] = []  # sender, receiver, message
        self.events: dict[NodeId, list[Any]] = {node: [] for node in self.nodes}
        self.session = 0

    def __getitem__(self, node: NodeId) -> MembershipEngine:
        return self.engines[node]

    # --- lives ---

    def start(self, *nodes: NodeId, incarnation: int = 10) -> None:
        for node in nodes:
            log = self.logs[node]
            log.append(Started(incarnation))
            self.incarnations[node] = incarnation
            self.events[node] = []
            engine = MembershipEngine(NodeIncarnation(node, incarnation), self.nodes, TIMING, recover(log), self.now)
            self.engines[node] = engine
            self.flags[node] = engine.flags
            self.act(node)

    def kill(self, node: NodeId) -> None:
        del self.engines[node]
        self.unlink(*((node, other) for other in self.nodes if other != node))
        self.wire = [entry for entry in self.wire if entry[1].node != node]

    # --- events ---

    def step(self, node: NodeId, *events: Any) -> None:
        for event in events:
            self.engines[node].step(self.now, event)
        self.act(node)

    def act(self, node: NodeId) -> None:
        ready = self.engines[node].ready()
        self.wire += [(node, peer, message) for peer, message in ready.send]
        self.logs[node] += ready.persist
        self.wire += [(node, peer, message) for peer, message in ready.then_send]
        self.events[node] += ready.emit
        for event in ready.emit:
            if isinstance(event, FlagsChanged):
                self.flags[node] = event.flags
                self.tell_links()
            elif isinstance(event, Stop):
                self.step(node, Attach(event.id, f"of {node}".encode()))

    def sleep(self, span: int = TIMING.detect_ns) -> None:
        end = self.now + span
        self.deliver()
        while True:
            due = sorted((engine.deadline, node) for node, engine in self.engines.items())
            if not due or due[0][0] > end:
                break
            self.now = max(self.now, due[0][0])
            self.step(due[0][1], TICK)
            self.deliver()
        self.now = end

    # --- links and messages ---

    def link(self, *pairs: tuple[NodeId, NodeId]) -> None:
        """Sessions come up, then links."""
        for a, b in pairs:
            self.session += 1
            for me, other in ((a, b), (b, a)):
                self.links.add((me, other))
                self.step(me, PeerUp(MemberId(other, self.incarnations[other], 0), self.session))
        self.deliver()
        self.tell_links()

    def link_all(self) -> None:
        running = sorted(self.engines)
        self.link(*((a, b) for a in running for b in running if a < b and (a, b) not in self.links))

    def unlink(self, *pairs: tuple[NodeId, NodeId]) -> None:
        for pair in pairs:
            self.links -= {pair, pair[::-1]}
        self.tell_links()

    def row(self, node: NodeId) -> Row:
        up = frozenset(other for me, other in self.links if me == node)
        return Row(self.incarnations[node], up, self.flags[node] | (QUIET if node in self.quiet else 0))

    def tell_links(self) -> None:
        for node in sorted(self.engines):
            mine = self.row(node)
            rows = {node: mine, **{other: self.row(other) for other in sorted(mine.up)}}
            self.step(node, ConnectivityChanged(rows))

    def deliver(self, only: type | None = None) -> None:
        """Until nothing of that kind is under way."""
        while True:
            found = next((e for e in self.wire if only is None or isinstance(e[2], only)), None)
            if found is None:
                return
            self.wire.remove(found)
            sender, receiver, message = found
            engine = None if receiver.node in self.deaf else self.engines.get(receiver.node)
            if engine is not None and engine.me.incarnation == receiver.incarnation:
                self.hear(receiver.node, sender, message)

    def hear(self, node: NodeId, sender: NodeId, message: Any) -> None:
        decoded = MESSAGES.decode(MESSAGES.encode(message))
        self.step(node, Received(MemberId(sender, self.incarnations[sender], 0), decoded))

    def drop(self, kind: type) -> list[Any]:
        dropped = [entry for entry in self.wire if isinstance(entry[2], kind)]
        self.wire = [entry for entry in self.wire if not isinstance(entry[2], kind)]
        return dropped

    def sent(self, node: NodeId, kind: type) -> list[Any]:
        return [message for sender, _, message in self.wire if sender == node and isinstance(message, kind)]

    def peer_down(self, a: NodeId, b: NodeId) -> None:
        for me, other in ((a, b), (b, a)):
            if me in self.engines:
                session = self.engines[me]._sessions[other]
                self.step(me, PeerDown(session.peer, session.session, "broken"))

    # --- results ---

    def take(self, node: NodeId, kind: type) -> list[Any]:
        taken = [event for event in self.events[node] if isinstance(event, kind)]
        self.events[node] = [event for event in self.events[node] if not isinstance(event, kind)]
        return taken

    def installed(self, node: NodeId) -> Installed:
        found: Installed = self.take(node, Installed)[-1]
        return found

    def whole(self) -> "Bench":
        """All nodes up in one view; the events so far are forgotten."""
        self.start(*self.nodes)
        self.link_all()
        self.sleep()
        for node in self.nodes:
            view = self.engines[node].view
            assert view is not None
            assert view.nodes == self.nodes
            assert not self.engines[node].stopped
            self.events[node] = []
        return self


def willing(node: NodeId, *up: NodeId, incarnation: int = 10) -> Row:
    return Row(incarnation, frozenset(up), WILLING)
