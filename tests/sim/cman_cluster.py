"""A whole cluster of cman engines on a heap of events: one seed, one run, one verdict.

Modelled, all drawn from the seed: clocks that drift by up to rho, delay, loss and reordering of datagrams, sessions
that break at different times on both sides, one-way and partial partitions, slow writes, crashes between a write and
what should have followed it, pauses, lost state directories, power cuts of everything, clean leaves. Each run draws
from a few kinds of fault only, so that some runs are all crashes and others all partitions.

Recovery above cman is reduced to its core: in an installed quorate view each member waits for its lease guard and tells
the coordinator; when all have, the view is *active*, and a member serves while it is in that view, not stopped, and its
lease runs. When a corrald crashes its participants may live on as *zombies*: they serve until the lease they last saw
ends.

Checked while it runs (`Violation` names the number):
  CMAN-1  quorate views have different epochs, and no view id means two views
  CMAN-2  when a view is installed anywhere, every member has accepted it on its disk
  CMAN-3  what is accepted on a disk is what that disk promised last
  CMAN-4  the epoch promised on a disk never falls
  CMAN-5  an incarnation left out of an installed quorate view is in no later one
  CMAN-9  a member without memory is not needed for the quorum of any view
  CMAN-10 at every instant the processes that serve are all in one active view
  CMAN-11 after the faults end, one quorate, active view of all nodes serves within a bound
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
    Leave,
    Left,
    Outdated,
    Proved,
    RecordChanged,
    ServicesStopped,
    Stop,
)
from corral.cman.heartbeat import HeartbeatEngine
from corral.cman.membership import MembershipEngine
from corral.cman.quorum import first_record
from corral.cman.state import first_state, recover
from corral.cman.timing import RHO_PPM, Timing

DETECT = 500 * MILLISECOND
TIMING = Timing(DETECT, heartbeats_per_detect=5)
DRIFT = RHO_PPM // 2 - 10  # ppm either way: two clocks differ by less than rho
WALL_START = 1_700_000_000
LIVENESS_BOUND = 6 * TIMING.recover_ns


class Violation(AssertionError):
    """An invariant does not hold; the message begins with its number."""


class Zombie(NamedTuple):
    """Participants that outlived their corrald."""

    node: NodeId
    view: ViewId
    lease_until: int  # on the node's clock


class Session:
    """One TLS connection between two corralds. Each side may notice its end at another time."""

    __slots__ = ("broken", "down", "last", "number", "peers", "up")

    def __init__(self, number: int, peers: dict[NodeId, MemberId]) -> None:
        self.number = number
        self.peers = peers
        self.up: set[NodeId] = set()  # sides that were told PeerUp
        self.down: set[NodeId] = set()  # sides that were told PeerDown
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
        self.restart_after = 0

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
        self.feed_member(Attach(f"{self.node}.{self.incarnation}".encode()))
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


FAULTS = (
    "fault_crash",
    "fault_crashes",
    "fault_one_way",
    "fault_partition",
    "fault_pause",
    "fault_state_loss",
    "fault_power_cut",
    "fault_session",
    "fault_loss",
    "fault_hung_disk",
    "fault_ambush",
    "fault_leave",
    "fault_proof",
)


AMBUSHED = (wire.Prepare, wire.Promise, wire.Propose, wire.Accept, wire.Install)


class Cluster:
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

    # --- faults ---

    def pick(self) -> Node:
        return self.nodes[self.rng.choice(self.nodes_ids)]

    def fault(self) -> None:
        kind = self.rng.choice(self.kinds)
        self.note(0, kind)
        self.count("faults")
        getattr(self, kind)()

    def fault_crash(self) -> None:
        node = self.pick()
        if node.running:
            node.crash(zombies=self.rng.random() < 0.7)
            self.restart_later(node)

    def fault_crashes(self) -> None:
        """Several corralds at once, and back at once, while what they served lives on."""
        for node in self.nodes.values():
            if node.running and self.rng.random() < 0.6:
                node.crash(zombies=True)
                self.later(self.rng.randint(MILLISECOND, 50 * MILLISECOND), self.restart, node, node.life)

    def fault_state_loss(self) -> None:
        node = self.pick()
        remembering = sum(self.remembers(other) for other in self.nodes.values() if other is not node)
        if remembering >= self.record.quorum:
            if node.running:
                node.crash(zombies=self.rng.random() < 0.5)
                self.restart_later(node)
            node.log = []
            # It may use the id of an inquorate view of its earlier life again; of a quorate one, never.
            self.views = {key: view for key, view in self.views.items() if view.quorate or key.coordinator != node.node}

    def fault_power_cut(self) -> None:
        for node in self.nodes.values():
            if node.running:
                node.crash(zombies=False)
                self.restart_later(node)
            node.zombies = []

    def fault_one_way(self) -> None:
        a, b = self.pick().node, self.pick().node
        if a != b:
            self.cut_for({(a, b)})

    def fault_partition(self) -> None:
        side = {node for node in self.nodes_ids if self.rng.random() < 0.5}
        pairs = {(a, b) for a in side for b in self.nodes_ids if b not in side}
        if self.rng.random() < 0.3:
            pairs = {pair for pair in pairs if self.rng.random() < 0.5}
        self.cut_for(pairs | {(b, a) for a, b in pairs})

    def cut_for(self, pairs: set[tuple[NodeId, NodeId]]) -> None:
        self.cut |= pairs
        for a, b in sorted(pairs):
            session = self.nodes[a].sessions.get(b) if self.nodes[a].running else None
            if session is not None and self.rng.random() < 0.7:
                self.later(self.rng.randint(0, 3 * DETECT), self.break_if_cut, session, (a, b))
        self.later(self.span(), self.heal, pairs)

    def break_if_cut(self, session: Session, pair: tuple[NodeId, NodeId]) -> None:
        if pair in self.cut:
            self.break_session(session, refused=False)

    def heal(self, pairs: set[tuple[NodeId, NodeId]]) -> None:
        self.cut -= pairs

    def fault_pause(self) -> None:
        node = self.pick()
        if node.running and not node.paused:
            node.paused = True
            self.later(self.span(), self.resume, node, node.life)

    def resume(self, node: Node, life: int) -> None:
        if node.life == life and node.paused:
            node.paused = False
            backlog, node.backlog = node.backlog, []
            for fn, args in backlog:
                if node.life == life:
                    fn(*args)

    def fault_session(self) -> None:
        node = self.pick()
        if node.running and node.sessions:
            self.break_session(node.sessions[self.rng.choice(sorted(node.sessions))], refused=False)

    def fault_loss(self) -> None:
        self.loss = self.rng.choice((0.05, 0.2, 0.5))
        self.slow = self.rng.choice((0, DETECT // 10, DETECT))
        self.slow_disk = self.rng.choice((0, DETECT // 10, 2 * DETECT))
        self.later(self.span(), self.fault_loss_ends)

    def fault_loss_ends(self) -> None:
        self.loss, self.slow, self.slow_disk, self.hung_disk = 0.0, 0, 0, 0

    def fault_hung_disk(self) -> None:
        """One disk takes seconds for a record while the node's heartbeats go on."""
        self.hung_disk = self.pick().node
        self.later(4 * DETECT, self.fault_loss_ends)

    def fault_ambush(self) -> None:
        """A message of the next agreement meets a second failure."""
        self.ambush = self.rng.choice(AMBUSHED)

    def spring(self, sender: Node, peer: MemberId) -> None:
        self.ambush = None
        self.note(0, "ambush")
        kind = self.rng.randrange(3)
        if kind == 0:  # the message is held up, its session may live on
            self.cut |= {(sender.node, peer.node)}
            self.later(self.span(), self.heal, {(sender.node, peer.node)})
        else:
            victim = sender if kind == 1 else self.nodes[peer.node]
            self.later(self.rng.randint(0, 3 * MILLISECOND), self.strike, victim, victim.life)

    def strike(self, victim: Node, life: int) -> None:
        if victim.running and victim.life == life:
            victim.crash(zombies=True)
            self.restart_later(victim)

    def fault_leave(self) -> None:
        node = self.pick()
        if node.running and not node.paused:
            node.active = None  # its participants are gone before it asks to leave
            node.feed_member(Leave())

    def fault_proof(self) -> None:
        """What is really gone is proven to be."""
        for node in self.nodes.values():
            if not node.running and not node.zombies and node.incarnation:
                for other in self.nodes.values():
                    if other.running and not other.paused:
                        other.feed_beat(Proved(node.node, node.incarnation))

    def span(self) -> int:
        """How long a fault lasts: from a blink to longer than recover."""
        return self.rng.choice((DETECT // 4, DETECT, 2 * DETECT, 4 * DETECT)) + self.rng.randint(0, DETECT)

    def restart_later(self, node: Node) -> None:
        delay = 10 * MILLISECOND if self.calm else self.rng.choice((10 * MILLISECOND, DETECT // 2, self.span()))
        self.later(delay, self.restart, node, node.life)

    def restart(self, node: Node, life: int) -> None:
        if node.life == life and not node.running:
            node.start()

    # --- checks ---

    def remembers(self, node: Node) -> bool:
        return recover(map(wire.RECORDS.decode, node.log)).record is not None

    def check_write(self, node: Node, record: Any) -> None:
        if isinstance(record, wire.Promised):
            before = [r for r in map(wire.RECORDS.decode, node.log[:-1]) if isinstance(r, wire.Promised)]
            if before and record.id.epoch <= before[-1].id.epoch:
                raise Violation(f"CMAN-4: node {node.node} promised {before[-1].id}, now {record.id}")
            if self.remembers(node):
                self.promised_with_memory.setdefault(record.id, set()).add(node.node)
        elif isinstance(record, wire.AcceptedView):
            promises = [r for r in map(wire.RECORDS.decode, node.log) if isinstance(r, wire.Promised)]
            if not promises or promises[-1].id != record.view.id:
                raise Violation(f"CMAN-3: node {node.node} accepted {record.view} over another promise")
            member = NodeIncarnation(node.node, record.view.incarnation_of(node.node) or 0)
            self.accepted_on_disk.setdefault(record.view.id, set()).add(member)

    def check_accepted(self, node: Node, view: View) -> None:
        known = self.views.setdefault(view.id, view)
        if known != view:
            raise Violation(f"CMAN-1: {view.id} is both {known} and {view}")
        if view.quorate and not self.record.quorate(self.promised_with_memory.get(view.id, set())):
            raise Violation(f"CMAN-9: {view} has a quorum only with nodes that have no memory")
        if view.quorate:
            other = self.quorate_epochs.setdefault(view.id.epoch, view)
            if other.id != view.id:
                raise Violation(f"CMAN-1: quorate {other} and {view} share an epoch")

    def check_installed(self, node: Node, event: Installed) -> None:
        view = event.view
        self.count("installed")
        missing = set(view.members) - self.accepted_on_disk.get(view.id, set())
        if missing:
            raise Violation(f"CMAN-2: node {node.node} installed {view}, not accepted by {sorted(missing)}")
        if view.quorate:
            self.installed_quorate[view.id.epoch] = view

    def check_serving(self, node: Node) -> None:
        mine = node.serving()
        if mine is None:
            return
        self.count("service starts")
        for other in self.nodes.values():
            theirs = other.serving()
            if theirs is not None and theirs != mine:
                raise Violation(f"CMAN-10: node {node.node} serves in {mine} while {other.node} serves in {theirs}")
            for zombie in other.zombies:
                if zombie.view != mine and other.clock() < zombie.lease_until:
                    raise Violation(
                        f"CMAN-10: node {node.node} serves in {mine}, a participant of {other.node} in {zombie.view}"
                    )

    def check_sequence(self) -> None:
        lost: set[NodeIncarnation] = set()
        before: View | None = None
        for epoch in sorted(self.installed_quorate):
            view = self.installed_quorate[epoch]
            back = lost.intersection(view.members)
            if back:
                raise Violation(f"CMAN-5: {sorted(back)} came back in {view}")
            if before is not None:
                lost |= set(before.members) - set(view.members)
            before = view

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
