"""What happens to the simulated cluster of `cman_cluster.py`. Every fault draws from the cluster's seed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from corral.base.ids import MemberId, NodeId
from corral.base.time import MILLISECOND
from corral.cman import wire
from corral.cman.events import Leave, Proved

if TYPE_CHECKING:
    from tests.sim.cman_cluster import Node, Session

DETECT = 500 * MILLISECOND

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


class Faults:
    """The faulty half of `Cluster`."""

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
            self.said = {key: said for key, said in self.said.items() if key in self.views}

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
