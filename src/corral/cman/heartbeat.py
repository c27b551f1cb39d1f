"""Heartbeats: which links are up, and until when this node may act (the lease). DESIGN 5, cman: Links, Lease guard.

Never persists and never waits for a disk; it has a driver of its own. Datagrams may be lost, repeated and reordered;
comm has checked their origin and thrown out replays.

Two answers travel in every heartbeat, and they are not the same:
  ack    "I hear you": the newest counter received on this link. Makes and keeps links.
  echo   "I count you as a living member": the newest counter received, but only to the (node, incarnation)s of the
         newest view accepted here, and never while quiet or without memory. Makes leases.

Why the lease is safe. X acts until L after it *sent* the newest counter that a quorum has echoed. A quorate view
without X has a member Y that was in that quorum, and Y stopped echoing X when it accepted the view. Y first echoed that
counter after X sent it, so once L(1 + rho) has passed on Y's clock since Y's last *new* echo, X's lease is over. Every
member waits that long (`guard_until`) before services start, since none knows which one is Y. A repeated echo of the
same counter gives X nothing new and does not prolong the wait.

CMAN-6   An echo goes only to members of the newest accepted view, and to nobody while quiet, without memory or
         unwilling (so none after a node has left).
CMAN-7   The lease is counted from the sending of a counter that a quorum of the record has echoed.
CMAN-8   Before `guard_until(view)` the lease of everybody outside the view that this node ever echoed has ended.

Source: the lease after Gray and Cheriton 1989, the guard after the "lease guard" of DESIGN 5.
"""

from typing import Final, final

from corral.api.comm import PeerDown, PeerUp
from corral.base.engine import Ready, Received, Tick
from corral.base.ids import NO_VIEW, Incarnation, MemberId, NodeId, NodeIncarnation, ViewId
from corral.base.time import MILLISECOND, Instant, Nanoseconds
from corral.base.view import QuorumRecord, View
from corral.cman.events import (
    Accepted,
    ConnectivityChanged,
    FlagsChanged,
    Installed,
    LeaseExtended,
    LeaseLapsed,
    LinkDown,
    LinkUp,
    Proved,
    RecordChanged,
    Row,
)
from corral.cman.timing import Timing, guard_of
from corral.cman.wire import EPOCH_MAX, FORGOTTEN, QUIET, WILLING, Heartbeat

HISTORY: Final = 256  # counters whose sending time is kept; an echo of an older one is worth nothing
ECHOES_MAX: Final = 256  # incarnations ever echoed whose lease may still run
UP_MAX: Final = 64  # nodes in one heartbeat's list

HeartbeatEvent = (
    PeerUp | PeerDown | Received[Heartbeat] | Accepted | Installed | RecordChanged | FlagsChanged | Proved | Tick
)


@final
class Link:
    """What is known of one peer in its present incarnation."""

    __slots__ = (
        "ack",
        "ack_at",
        "counter",
        "echo",
        "flags",
        "heard_at",
        "incarnation",
        "node",
        "peer",
        "seen_up",
        "session",
        "up",
    )

    def __init__(self, peer: MemberId, session: int) -> None:
        self.peer: Final = peer
        self.node: Final[NodeId] = peer.node
        self.incarnation: Final[Incarnation] = peer.incarnation
        self.session: int | None = session
        self.counter = 0  # newest of its counters received
        self.heard_at: Instant = 0
        self.ack = 0  # newest of mine it has heard
        self.ack_at: Instant = 0
        self.echo = 0  # newest of mine it has echoed as a member
        self.up = False
        self.seen_up: frozenset[NodeId] = frozenset()
        self.flags = 0

    def expires(self, detect_ns: Nanoseconds) -> Instant:
        return min(self.heard_at, self.ack_at) + detect_ns


@final
class HeartbeatEngine:
    """One per corrald. `lease_until` and `guard_until` are for direct calls; the rest comes as events (`events.py`)."""

    def __init__(
        self,
        me: NodeIncarnation,
        nodes: tuple[NodeId, ...],
        timing: Timing,
        record: QuorumRecord | None,
        now: Instant,
        *,
        quiet: bool,
        flags: int,
    ) -> None:
        """`quiet`: an earlier life of this node ran and did not stop cleanly (`State.quiet`)."""
        self.me: Final = me
        self.nodes: Final = tuple(sorted(nodes))
        self.timing: Final = timing
        self.record: QuorumRecord | None = record
        self.started_at: Final = now
        self.flags = flags & ~QUIET
        self.lease_until: Instant = 0
        self.dropped = 0  # messages that were not what they should be
        self._lapsed = True
        self._links: dict[NodeId, Link] = {}
        self._accepted_id: ViewId = NO_VIEW
        self._echoed: frozenset[NodeIncarnation] = frozenset()
        self._installed: ViewId = NO_VIEW
        self._echoes: dict[NodeIncarnation, tuple[int, Instant]] = {}  # newest counter echoed, when first
        self._echoes_floor: Instant = 0  # when the newest echo was sent whose entry had to make room
        # Counters go on above those of an earlier life of this boot, should a lost state directory have given this one
        # the same incarnation: no echo of theirs is ever taken for one of ours. (Beats are more than 1 ms apart.)
        self._counter = now // MILLISECOND
        self._sent_at: list[Instant] = [0] * HISTORY
        self._last_beat: Instant = now - timing.heartbeat_ns
        self._next_beat: Instant = now
        self._changed = True
        self._out = Ready()
        self.quiet_until: Instant = now + timing.guard_ns if quiet else now
        if quiet and record is not None:
            self.quiet_until = now + guard_of(record.lease_ns)
        self._quiet = quiet

    # --- the engine contract ---------------------------------------------------------------------------------------

    @property
    def deadline(self) -> Instant:
        due = self._next_beat
        if self._quiet and self.quiet_until < due:
            due = self.quiet_until
        if not self._lapsed and self.lease_until < due:
            due = self.lease_until
        detect_ns = self.timing.detect_ns
        for link in self._links.values():
            if link.up:
                due = min(due, link.expires(detect_ns))
        return due

    def step(self, now: Instant, event: HeartbeatEvent) -> None:
        if isinstance(event, Received):
            self._received(now, event.peer, event.message)
        elif isinstance(event, PeerUp):
            self._peer_up(now, event.peer, event.session)
        elif isinstance(event, PeerDown):
            self._peer_down(event)
        elif isinstance(event, Accepted):
            self._accepted(now, event.view)
        elif isinstance(event, Installed):
            self._installed = event.view.id
        elif isinstance(event, RecordChanged):
            self._record_changed(event.record)
        elif isinstance(event, FlagsChanged):
            if self.flags != event.flags & ~QUIET:
                self.flags = event.flags & ~QUIET
                self._changed = True
        elif isinstance(event, Proved):
            self._echoes.pop(NodeIncarnation(event.node, event.incarnation), None)
        self._check(now)

    def ready(self) -> Ready:
        out, self._out = self._out, Ready()
        return out

    # --- what others ask -------------------------------------------------------------------------------------------

    @property
    def quiet(self) -> bool:
        return self._quiet

    @property
    def up(self) -> tuple[NodeId, ...]:
        return tuple(node for node in sorted(self._links) if self._links[node].up)

    def guard_until(self, members: tuple[NodeIncarnation, ...]) -> Instant:
        """The earliest instant at which services of a view of `members` may start on this node (CMAN-8)."""
        inside = frozenset(members)
        newest = self._echoes_floor
        for member, (_, first_at) in self._echoes.items():
            if member not in inside and first_at > newest:
                newest = first_at
        return newest + self._guard_ns() if newest else 0

    def echoes_end(self) -> Instant:
        """When no echo of this node, of an earlier life neither, holds up any lease: a clean stop waits for it after it
        left, because the next life will not be quiet."""
        return max(self.guard_until(()), self.quiet_until if self._quiet else 0)

    # --- links -----------------------------------------------------------------------------------------------------

    def _peer_up(self, now: Instant, peer: MemberId, session: int) -> None:
        if peer.node not in self.nodes or peer.node == self.me.node or peer.serial != 0:
            self.dropped += 1
            return
        link = self._links.get(peer.node)
        if link is not None:
            if peer.incarnation == link.incarnation:
                link.session = session
                self._hurry(now)
                return
            # The newest session counts, also when a lost state directory made the incarnation fall.
            self._link_down(link, "it has restarted")
        self._links[peer.node] = Link(peer, session)
        self._hurry(now)

    def _peer_down(self, event: PeerDown) -> None:
        link = self._links.get(event.peer.node)
        if link is None or link.peer != event.peer or link.session != event.session:
            return
        link.session = None
        if event.refused:
            self._link_down(link, "its corrald refuses connections")

    def _link_down(self, link: Link, reason: str) -> None:
        if link.up:
            link.up = False
            self._changed = True
            self._out.emit.append(LinkDown(link.node, link.incarnation, reason))

    def _received(self, now: Instant, peer: MemberId, beat: Heartbeat) -> None:
        link = self._links.get(peer.node)
        if link is None or link.session is None or link.peer != peer or not self._plausible(beat):
            self.dropped += 1
            return
        if beat.counter <= link.counter:
            return  # late or repeated: nothing new in it
        link.counter = beat.counter
        link.heard_at = now
        if beat.ack > link.ack:
            link.ack = beat.ack
            link.ack_at = now
        elif beat.ack == 0:
            self._hurry(now)  # it has not heard of us yet
        seen_up = frozenset(beat.up)
        if seen_up != link.seen_up or beat.flags != link.flags:
            link.seen_up = seen_up
            link.flags = beat.flags
            self._changed = self._changed or link.up
        if not link.up and link.ack > 0 and link.expires(self.timing.detect_ns) > now:
            link.up = True
            self._changed = True
            self._out.emit.append(LinkUp(link.node, link.incarnation))
        if beat.echo > link.echo:
            link.echo = beat.echo
            self._extend_lease(now)

    def _plausible(self, beat: Heartbeat) -> bool:
        return (
            beat.to == self.me.incarnation
            and 0 < beat.counter < EPOCH_MAX
            and 0 <= beat.ack <= self._counter
            and 0 <= beat.echo <= self._counter
            and len(beat.up) <= UP_MAX
        )

    # --- the lease -------------------------------------------------------------------------------------------------

    def _silent(self) -> bool:
        """Neither votes nor echoes: quiet, without memory, or no (longer) willing to be a member."""
        return self._quiet or self.flags & (WILLING | FORGOTTEN) != WILLING

    def _guard_ns(self) -> Nanoseconds:
        return self.timing.guard_ns if self.record is None else guard_of(self.record.lease_ns)

    def _record_changed(self, record: QuorumRecord) -> None:
        self.record = record
        if self._quiet:
            self.quiet_until = max(self.quiet_until, self.started_at + guard_of(record.lease_ns))

    def _accepted(self, now: Instant, view: View) -> None:
        if view.id > self._accepted_id:
            self._accepted_id = view.id
            self._echoed = frozenset(view.members)
            self._hurry(now)

    def _extend_lease(self, now: Instant) -> None:
        """CMAN-7. The newest counter that nodes with a quorum of votes have echoed; this node hears itself."""
        record = self.record
        if record is None:
            return
        echoes: list[tuple[int, int]] = []
        for node, votes in record.voters:
            if node == self.me.node:
                if not self._silent():
                    echoes.append((self._counter, votes))
            else:
                link = self._links.get(node)
                if link is not None and link.echo:
                    echoes.append((link.echo, votes))
        echoes.sort(reverse=True)
        counted = 0
        for counter, votes in echoes:
            counted += votes
            if counted >= record.quorum:
                if self._counter - counter < HISTORY:
                    self._lease(now, self._sent_at[counter % HISTORY] + record.lease_ns)
                return

    def _lease(self, now: Instant, until: Instant) -> None:
        if until > self.lease_until:
            self.lease_until = until
            if until > now:
                self._lapsed = False
            self._out.emit.append(LeaseExtended(until))

    # --- sending ---------------------------------------------------------------------------------------------------

    def _hurry(self, now: Instant) -> None:
        """Something others wait for has changed: beat early, but not more than four times an interval."""
        self._next_beat = min(self._next_beat, max(now, self._last_beat + self.timing.heartbeat_ns // 4))

    def _check(self, now: Instant) -> None:
        if self._quiet and now >= self.quiet_until:
            self._quiet = False
            self._changed = True
        detect_ns = self.timing.detect_ns
        for link in self._links.values():
            if link.up and link.expires(detect_ns) <= now:
                silent = link.heard_at + detect_ns <= now
                self._link_down(link, "no heartbeat" if silent else "it does not hear this node")
        if self._changed:
            self._changed = False
            self._hurry(now)
            self._out.emit.append(self._connectivity())
        if now >= self._next_beat:
            self._beat(now)
        if not self._lapsed and now >= self.lease_until:
            self._lapsed = True
            self._out.emit.append(LeaseLapsed(self.lease_until))

    def _own_flags(self) -> int:
        return self.flags | (QUIET if self._quiet else 0)

    def _connectivity(self) -> ConnectivityChanged:
        rows = {self.me.node: Row(self.me.incarnation, frozenset(self.up), self._own_flags())}
        for node in sorted(self._links):
            link = self._links[node]
            if link.up:
                rows[node] = Row(link.incarnation, link.seen_up, link.flags)
        return ConnectivityChanged(rows)

    def _beat(self, now: Instant) -> None:
        self._counter += 1
        self._sent_at[self._counter % HISTORY] = now
        self._last_beat = now
        self._next_beat = now + self.timing.heartbeat_ns
        up = self.up
        flags = self._own_flags()
        for node in sorted(self._links):
            link = self._links[node]
            if link.session is None:
                continue
            echo = self._echo(now, link)
            beat = Heartbeat(
                self._counter, link.incarnation, link.counter, echo, up, self._accepted_id, self._installed, flags
            )
            self._out.send.append((link.peer, beat))
        self._extend_lease(now)

    def _echo(self, now: Instant, link: Link) -> int:
        """CMAN-6. What this heartbeat echoes to that peer; notes when a counter was echoed first."""
        member = NodeIncarnation(link.node, link.incarnation)
        if not link.counter or self._silent() or member not in self._echoed:
            return 0
        newest = self._echoes.get(member)
        if newest is None or newest[0] < link.counter:
            self._echoes[member] = (link.counter, now)
            if len(self._echoes) > ECHOES_MAX:
                self._forget_oldest_echo()
        return link.counter

    def _forget_oldest_echo(self) -> None:
        oldest = min(self._echoes, key=lambda member: (self._echoes[member][1], member))
        self._echoes_floor = max(self._echoes_floor, self._echoes.pop(oldest)[1])
