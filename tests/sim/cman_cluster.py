"""A whole cluster of cman engines on a heap of events: one seed, one run, one verdict.

Modelled, all drawn from the seed: clocks that drift by up to rho, delay, loss and reordering of datagrams, sessions
that break at different times on both sides, one-way and partial partitions, slow writes, crashes between a write and
what should have followed it, pauses, lost state directories, power cuts of everything, clean leaves. Each run draws
from a few kinds of fault only, so that some runs are all crashes and others all partitions.

Recovery above cman is reduced to its core: in an installed quorate view each member waits for its lease guard and tells
the coordinator; when all have, the view is *active*, and a member serves while it is in that view, not stopped, and its
lease runs. When a corrald crashes its participants may live on as *zombies*: they serve until the lease they last saw
ends.

The faults are in `cman_faults.py`, what is checked while it runs in `cman_checks.py`.
"""

import heapq
import zlib
from collections.abc import Callable, Sequence
from random import Random
from typing import Any, NamedTuple

from corral.api.comm import PeerDown, PeerUp
from corral.base.engine import TICK, Ready, Received
from corral.base.ids import MemberId, NodeId, NodeIncarnation, ViewId
from corral.base.time import FOREVER, MILLISECOND, SECOND
from corral.base.view import View
from corral.cman import wire
from corral.cman.events import (
    Accepted,
    Active,
    Attach,
    CleanlyStopped,
    ConnectivityChanged,
    Excluded,
    FlagsChanged,
    Installed,
    LeaseExtended,
    Left,
    Outdated,
    RecordChanged,
    ServicesStopped,
    Stop,
)
from corral.cman.heartbeat import HeartbeatEngine
from corral.cman.membership import MembershipEngine
from corral.cman.quorum import first_record
from corral.cman.state import first_state, recover
from corral.cman.timing import RHO_PPM, Timing
from tests.sim.cman_checks import Checks, Violation
from tests.sim.cman_faults import DETECT, FAULTS, Faults

TIMING = Timing(DETECT, heartbeats_per_detect=5)
DRIFT = RHO_PPM // 2 - 10  # ppm either way: two clocks differ by less than rho
WALL_START = 1_700_000_000
LIVENESS_BOUND = 6 * TIMING.recover_ns


class Zombie(NamedTuple):
    """Participants that outlived their corrald."""

    node: NodeId
    view: ViewId
    lease_until: int  # on the node's clock


class Session:
    """One TLS connection between two corralds. Each side may notice its end at another time."""

    __slots__ = ("broken", "last", "number", "peers", "up")

    def __init__(self, number: int, peers: dict[NodeId, MemberId]) -> None:
        self.number = number
        self.peers = peers
        self.up: set[NodeId] = set()  # sides that were told PeerUp
        self.last: dict[NodeId, int] = {}  # per receiver: when its newest message arrives (FIFO)
        self.broken = False


class Node:
    """One machine: a clock, a disk and perhaps a running corrald."""

    def __init__(self, cluster: "Cluster", node: NodeId) -> None:
        self.cluster = cluster
        self.node = node
        self.ppm = cluster.rng.choice((-DRIFT, 0, DRIFT, cluster.rng.randint(-DRIFT, DRIFT)))
        self.offset = cluster.rng.randint(SECOND, 1000 * SECOND)
        self.log: list[bytes] = []  # what is durable
        self.life = 0  # counts starts; events of an earlier life are void
        self.running = False
        self.paused = False
        self.backlog: list[tuple[Callable[..., None], tuple[Any, ...]]] = []
        self.incarnation = 0
        self.zombies: list[Zombie] = []

    # --- clock ---

    def clock(self) -> int:
        now = self.cluster.now
        return self.offset + now + now * self.ppm // 1_000_000

    def real(self, local: int) -> int:
        """The first instant at which the clock shows at least `local`."""
        at = max((local - self.offset) * 1_000_000 // (1_000_000 + self.ppm), self.cluster.now)
        while self.offset + at + at * self.ppm // 1_000_000 < local:
            at += 1
        return at

    # --- life ---

    def start(self) -> None:
        cluster = self.cluster
        state = recover(wire.RECORDS.decode(entry) for entry in self.log)
        quiet = state.quiet
        self.incarnation = state.next_incarnation(WALL_START + cluster.now // SECOND)
        started = wire.Started(self.incarnation)
        state.apply(started)
        self.life += 1
        self.running = True
        self.paused = False
        self.backlog = []
        self.me = NodeIncarnation(self.node, self.incarnation)
        self.unwritten: list[Ready] = []
        self.writing = False
        self.lease_until = 0
        self.active: ViewId | None = None
        self.done: dict[ViewId, set[NodeId]] = {}
        self.sessions: dict[NodeId, Session] = {}
        self.armed = {"beat": FOREVER, "member": FOREVER}
        self.write([started])
        self.member = MembershipEngine(self.me, cluster.nodes_ids, cluster.timing, state, self.clock())
        self.beat = HeartbeatEngine(
            self.me,
            cluster.nodes_ids,
            cluster.timing,
            state.record,
            self.clock(),
            quiet=quiet,
            flags=self.member.flags,
        )
        self.feed_beat(TICK)
        for other in cluster.nodes.values():
            if other.running and other is not self:
                cluster.connect_later(self.node, other.node)

    def crash(self, *, zombies: bool) -> None:
        """The process ends. What was being written may have reached the disk, or its first records, or nothing."""
        rng = self.cluster.rng
        records = [record for ready in self.unwritten for record in ready.persist]
        if records:
            self.write(records[: rng.randint(0, len(records))])
        if zombies and self.active is not None and self.clock() < self.lease_until:
            self.zombies.append(Zombie(self.node, self.active, self.lease_until))
        self.running = False
        self.life += 1
        self.active = None
        self.unwritten = []
        for session in list(self.sessions.values()):
            self.cluster.break_session(session, refused=rng.random() < 0.5, by=self.node)
        self.sessions = {}

    # --- the driver, in miniature ---

    def feed_beat(self, *events: Any) -> None:
        now = self.clock()
        for event in events:
            self.beat.step(now, event)
        ready = self.beat.ready()
        for peer, message in ready.send:
            self.cluster.datagram(self, peer, message)
        for event in ready.emit:
            if isinstance(event, ConnectivityChanged):
                self.feed_member(event)
            elif isinstance(event, LeaseExtended):
                lapsed = self.clock() >= self.lease_until
                self.lease_until = event.until
                if lapsed:
                    self.cluster.check_serving(self)
        self.arm("beat", self.beat.deadline)

    def feed_member(self, *events: Any) -> None:
        now = self.clock()
        for event in events:
            self.member.step(now, event)
        ready = self.member.ready()
        self.arm("member", self.member.deadline)
        for peer, message in ready.send:
            self.cluster.message(self, peer, message)
        if ready.persist or self.unwritten or self.writing:
            if ready.persist or ready.then_send or ready.emit:
                self.unwritten.append(ready)
                if not self.writing:
                    self.writing = True
                    self.cluster.later(self.cluster.write_ns(self), self.written, node=self)
        else:
            self.follow(ready)

    def written(self) -> None:
        batch, self.unwritten = self.unwritten, []
        self.write([record for ready in batch for record in ready.persist])
        self.writing = False
        for ready in batch:
            life = self.life
            self.follow(ready)
            if self.life != life:
                return
        if self.unwritten and not self.writing:
            self.writing = True
            self.cluster.later(self.cluster.write_ns(self), self.written, node=self)

    def follow(self, ready: Ready) -> None:
        for peer, message in ready.then_send:
            self.cluster.message(self, peer, message)
        for event in ready.emit:
            self.cluster.note(self.node, event)
            self.emitted(event)
            if not self.running:
                return

    def write(self, records: list[Any]) -> None:
        for record in records:
            self.log.append(wire.RECORDS.encode(record))
            self.cluster.check_write(self, record)

    def arm(self, which: str, deadline: int) -> None:
        if deadline >= FOREVER:
            return
        at = self.real(deadline)
        if at < self.armed[which]:
            self.armed[which] = at
            self.cluster.at(at, self.wake, which, at, node=self)

    def wake(self, which: str, at: int) -> None:
        if self.armed[which] != at:
            return
        self.armed[which] = FOREVER
        if which == "beat":
            self.feed_beat(TICK)
        else:
            self.feed_member(TICK)

    # --- what cman reports ---

    def emitted(self, event: Any) -> None:
        cluster = self.cluster
        if isinstance(event, Stop):
            self.active = None
            answer = Attach(event.id, f"{self.node}.{self.incarnation}".encode())
            cluster.later(cluster.rng.randint(0, 2 * MILLISECOND), self.feed_member, answer, node=self)
        elif isinstance(event, Accepted):
            cluster.check_accepted(self, event.view)
            self.feed_beat(event)
        elif isinstance(event, Installed):
            cluster.check_installed(self, event)
            self.feed_beat(event)
            if event.view.quorate:
                self.await_guard(event.view)
        elif isinstance(event, RecordChanged | FlagsChanged):
            self.feed_beat(event)
        elif isinstance(event, Excluded | Outdated):
            if isinstance(event, Excluded):
                cluster.count("excluded")
            self.crash(zombies=False)
            self.zombies = []  # corrald waits until its participants are gone
            cluster.restart_later(self)
        elif isinstance(event, Left):
            if event.clean:
                cluster.at(self.real(self.beat.echoes_end()), self.feed_member, ServicesStopped(), node=self)
            else:
                self.crash(zombies=False)
                cluster.restart_later(self)
        elif isinstance(event, CleanlyStopped):
            cluster.count("clean stops")
            self.crash(zombies=False)
            cluster.restart_later(self)

    # --- recovery, in miniature ---

    def await_guard(self, view: View) -> None:
        if self.member.view is not view or self.member.stopped:
            return
        guard = self.beat.guard_until(view.members)
        if self.clock() < guard:
            self.cluster.at(self.real(guard), self.await_guard, view, node=self)
            return
        coordinator = self.cluster.nodes[view.id.coordinator]
        self.cluster.later(self.cluster.delay_ns(), coordinator.heard_done, view, self.node, node=coordinator)

    def heard_done(self, view: View, node: NodeId) -> None:
        done = self.done.setdefault(view.id, set())
        done.add(node)
        if done != set(view.nodes) or view.incarnation_of(self.node) != self.incarnation:
            return
        self.cluster.note(self.node, Active(view.id))
        self.cluster.count("active views")
        self.cluster.active_views[view.id] = view
        for member in view.members:
            other = self.cluster.nodes[member.node]
            if other.incarnation == member.incarnation:
                self.cluster.later(self.cluster.delay_ns(), other.activate, view, node=other)

    def activate(self, view: View) -> None:
        if self.member.view is None or self.member.view.id != view.id or self.member.stopped:
            return
        if self.member.state.promised != view.id:
            return
        self.active = view.id
        self.feed_member(Active(view.id))
        self.cluster.check_serving(self)

    def serving(self) -> ViewId | None:
        if self.running and self.active is not None and self.clock() < self.lease_until:
            return self.active
        return None


class Cluster(Faults, Checks):
    """`run(seed)` makes one, hurts it for a while, heals it and waits for it."""

    def __init__(self, seed: int, size: int) -> None:
        self.rng = Random(seed)
        self.now = 0
        self.heap: list[tuple[int, int, Node | None, int, Callable[..., None], tuple[Any, ...]]] = []
        self.sequence = 0
        self.counts: dict[str, int] = {}
        self.trace: list[str] | None = None
        self.digest = 0
        self.cut: set[tuple[NodeId, NodeId]] = set()  # directions that lose everything
        self.loss = 0.0
        self.slow = 0  # extra delay, ns at most
        self.slow_disk = 0
        self.hung_disk: NodeId = 0  # this node's writes take very long
        self.calm = False
        self.session_number = 0
        self.connecting: set[tuple[NodeId, NodeId]] = set()
        self.views: dict[ViewId, View] = {}
        self.quorate_epochs: dict[int, View] = {}
        self.promised_with_memory: dict[ViewId, set[NodeId]] = {}
        self.accepted_on_disk: dict[ViewId, set[NodeIncarnation]] = {}
        self.said: dict[ViewId, Installed] = {}
        self.active_views: dict[ViewId, View] = {}
        self.installed_quorate: dict[int, View] = {}
        self.ambush: type | None = None
        self.kinds = self.rng.sample(FAULTS, self.rng.randint(1, len(FAULTS)))
        self.timing = Timing(DETECT, heartbeats_per_detect=5)
        if self.rng.random() < 0.3:  # knobs: nothing but liveness may depend on them
            self.timing.patience_ns = self.rng.choice((DETECT // 10, DETECT // 2))  # type: ignore[misc]
            self.timing.phase_ns = self.rng.choice((DETECT // 10, DETECT))  # type: ignore[misc]
        self.nodes_ids = tuple(range(1, size + 1))
        self.record = first_record(dict.fromkeys(self.nodes_ids, 1), TIMING.lease_ns)
        self.nodes = {node: Node(self, node) for node in self.nodes_ids}
        for node in self.nodes.values():
            node.write(first_state(self.record))

    # --- heap ---

    def at(self, when: int, fn: Callable[..., None], *args: Any, node: Node | None = None) -> None:
        self.sequence += 1
        life = node.life if node is not None else 0
        heapq.heappush(self.heap, (max(when, self.now), self.sequence, node, life, fn, args))

    def later(self, delay: int, fn: Callable[..., None], *args: Any, node: Node | None = None) -> None:
        self.at(self.now + delay, fn, *args, node=node)

    def run_until(self, end: int, done: Callable[[], bool] | None = None) -> bool:
        heap = self.heap
        while heap and heap[0][0] <= end:
            self.now, _, node, life, fn, args = heapq.heappop(heap)
            if node is None:
                fn(*args)
            elif life == node.life:
                if node.paused:
                    node.backlog.append((fn, args))
                    continue
                fn(*args)
            if done is not None and done():
                return True
        self.now = max(self.now, end)
        return False

    # --- chance ---

    def delay_ns(self) -> int:
        delay = self.rng.randint(20_000, 2 * MILLISECOND)
        return delay + (self.rng.randint(0, self.slow) if self.slow else 0)

    def write_ns(self, node: Node) -> int:
        delay = self.rng.randint(200_000, 4 * MILLISECOND)
        if node.node == self.hung_disk:
            delay += self.rng.randint(DETECT, 8 * DETECT)
        return delay + (self.rng.randint(0, self.slow_disk) if self.slow_disk else 0)

    def count(self, what: str, by: int = 1) -> None:
        self.counts[what] = self.counts.get(what, 0) + by

    def note(self, node: NodeId, event: Any) -> None:
        line = f"{self.now} {node} {event}"
        self.digest = zlib.crc32(line.encode(), self.digest)
        if self.trace is not None:
            self.trace.append(f"{self.now / DETECT:8.3f} {node} {event}")

    # --- network ---

    def datagram(self, sender: Node, peer: MemberId, message: wire.Heartbeat) -> None:
        session = sender.sessions.get(peer.node)
        if session is None or (sender.node, peer.node) in self.cut:
            return
        if self.loss and self.rng.random() < self.loss:
            return
        receiver = self.nodes[peer.node]
        self.later(self.delay_ns(), self.datagram_arrives, receiver, session, sender.node, message, node=receiver)

    def datagram_arrives(self, receiver: Node, session: Session, sender: NodeId, message: wire.Heartbeat) -> None:
        if receiver.sessions.get(sender) is session:
            receiver.feed_beat(Received(session.peers[sender], message))

    def message(self, sender: Node, peer: MemberId, message: Any) -> None:
        if self.trace is not None:
            self.trace.append(f"{self.now / DETECT:8.3f} {sender.node} -> {peer.node} {message}")
        if self.ambush is type(message) and self.rng.random() < 0.5:
            self.spring(sender, peer)
        session = sender.sessions.get(peer.node)
        if session is None or session.peers[peer.node] != peer or session.broken:
            return
        when = max(self.now + self.delay_ns(), session.last.get(peer.node, 0) + 1)
        session.last[peer.node] = when
        receiver = self.nodes[peer.node]
        self.at(when, self.message_arrives, receiver, session, sender.node, message, node=receiver)

    def message_arrives(self, receiver: Node, session: Session, sender: NodeId, message: Any) -> None:
        if (sender, receiver.node) in self.cut:
            # TCP: it comes when the path is whole again, in order, or never, when the session breaks first.
            when = max(self.now + 10 * MILLISECOND, session.last.get(receiver.node, 0) + 1)
            if session.broken:
                return
            self.at(when, self.message_arrives, receiver, session, sender, message, node=receiver)
            return
        if receiver.sessions.get(sender) is session:
            receiver.feed_member(Received(session.peers[sender], message))

    def connect_later(self, a: NodeId, b: NodeId) -> None:
        pair = (min(a, b), max(a, b))
        if pair not in self.connecting:
            self.connecting.add(pair)
            self.later(self.rng.randint(MILLISECOND, 40 * MILLISECOND), self.connect, pair)

    def connect(self, pair: tuple[NodeId, NodeId]) -> None:
        a, b = self.nodes[pair[0]], self.nodes[pair[1]]
        self.connecting.discard(pair)
        if not a.running or not b.running or b.node in a.sessions or a.node in b.sessions:
            return
        if a.paused or b.paused or pair in self.cut or pair[::-1] in self.cut:
            self.connecting.add(pair)
            self.later(self.rng.randint(20 * MILLISECOND, 100 * MILLISECOND), self.connect, pair)
            return
        self.session_number += 1
        peers = {node.node: MemberId(node.node, node.incarnation, 0) for node in (a, b)}
        session = Session(self.session_number, peers)
        for node in (a, b):
            other = pair[0] + pair[1] - node.node
            node.sessions[other] = session
            session.last[node.node] = self.now + self.delay_ns()
            up = PeerUp(peers[other], session.number)
            self.at(session.last[node.node], self.peer_event, node, other, session, up, node=node)

    def peer_event(self, node: Node, other: NodeId, session: Session, event: PeerUp | PeerDown) -> None:
        if node.sessions.get(other) is not session:
            return
        if isinstance(event, PeerUp):
            session.up.add(node.node)
        else:
            del node.sessions[other]
            self.connect_later(node.node, other)
            if node.node not in session.up:
                return
        node.feed_beat(event)
        node.feed_member(event)

    def break_session(self, session: Session, *, refused: bool, by: NodeId | None = None) -> None:
        """Both sides notice, each when it does; messages under way may still arrive before."""
        if session.broken:
            return
        session.broken = True
        for number in session.peers:
            if number == by:
                continue
            other = next(n for n in session.peers if n != number)
            node = self.nodes[number]
            down = PeerDown(session.peers[other], session.number, "broken", refused and by is not None)
            when = session.last[number] + self.rng.randint(1, 20 * MILLISECOND)
            self.at(when, self.peer_event, node, other, session, down, node=node)

    def whole(self) -> bool:
        """One quorate view of all nodes, and every node serves in it."""
        if len({node.serving() for node in self.nodes.values()}) != 1:
            return False
        return all(
            node.running and node.serving() is not None and len(node.member.view.nodes) == len(self.nodes)  # type: ignore[union-attr]
            for node in self.nodes.values()
        )


def run(
    seed: int,
    *,
    size: int = 0,
    faults: int = 6,
    kinds: Sequence[str] = (),
    trace: list[str] | None = None,
) -> dict[str, int]:
    """One seed. Raises Violation; returns counts, the virtual milliseconds it took to heal, and a digest.

    `kinds` narrows the faults the run draws from, for hunting one thing.
    """
    rng = Random(seed ^ 0x5EED)
    cluster = Cluster(seed, size or rng.choice((1, 2, 3, 3, 3, 4, 5, 5, 7)))
    cluster.trace = trace
    if kinds:
        cluster.kinds = list(kinds)
    for node in cluster.nodes.values():
        cluster.later(cluster.rng.randint(0, DETECT if rng.random() < 0.8 else 4 * DETECT), cluster.restart, node, 0)
    when = cluster.rng.randint(DETECT, 6 * DETECT)
    for _ in range(faults):
        cluster.at(when, cluster.fault)
        when += cluster.rng.choice((0, DETECT // 10, DETECT, 3 * DETECT)) + cluster.rng.randint(0, DETECT)
    cluster.run_until(when)
    cluster.calm = True
    cluster.cut = set()
    cluster.fault_loss_ends()
    for node in cluster.nodes.values():
        cluster.resume(node, node.life)
        node.zombies = [zombie for zombie in node.zombies if node.clock() < zombie.lease_until]
        if not node.running:
            cluster.restart_later(node)
    healed = cluster.now
    if not cluster.run_until(healed + LIVENESS_BOUND, cluster.whole):
        states = "; ".join(
            f"{n.node}: {n.member.view} waits {n.member.waiting()!r}" if n.running else f"{n.node} is down"
            for n in cluster.nodes.values()
        )
        raise Violation(f"CMAN-11: no whole view {LIVENESS_BOUND // MILLISECOND} ms after the last fault: {states}")
    cluster.check_sequence()
    return {
        "seed": seed,
        "nodes": len(cluster.nodes),
        "heal_ms": (cluster.now - healed) // MILLISECOND,
        "virtual_ms": cluster.now // MILLISECOND,
        "digest": cluster.digest,
        **cluster.counts,
    }
