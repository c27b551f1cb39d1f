"""Membership: who is in the next view, and the agreement on it. DESIGN 5, cman: Agreement, Who is in, Lost memory.

One engine, two roles. As a *member* it promises, accepts and installs; as *coordinator*, which is the lowest id with a
memory in the set it would propose, it runs attempts (`agreement.py`). Which set that is `target.py` says from the
matrix of links that the HeartbeatEngine reports.

States of a node       in a view: `view` is set and not `stopped`
                       stopped:   it promised something that is not installed here yet; nothing runs
                       excluded:  a quorate view went on without it; only a new incarnation comes back
                       leaving:   its participants are gone; the others make a view without it and mark it as left
A promise stops everything, so whoever promised keeps asking (Reform) until a view is installed. A coordinator that does
not move for `patience`, or a member that does not answer twice, is left out of this node's choice for `recover`.

CMAN-1   View ids are unique; epochs are unique among quorate views, across restarts of everything too.
CMAN-2   A view is installed only after every member has accepted it.
CMAN-3   A node accepts only what it promised: promised == (epoch, coordinator) of the proposal.
CMAN-5   A quorate view of an epoch above that of another quorate view, if that was installed, has a member that
         accepted it; so an incarnation left out of an installed quorate view is in no later one.
CMAN-9   A node without memory is not counted in any quorum, and gets memory from an installed quorate view only.

Deviations from DESIGN. A node without memory never coordinates: it might use a view id of its earlier life again. "The
largest fully connected quorate set" is taken among sets that keep the most members of the newest quorate view;
otherwise a newcomer with a bad link could displace a member.
"""

from typing import Final, final

from corral.api.comm import PeerDown, PeerUp
from corral.base.engine import Ready, Received, Tick
from corral.base.ids import Incarnation, MemberId, NodeId, NodeIncarnation, ViewId
from corral.base.time import FOREVER, Instant
from corral.base.view import View
from corral.cman import agreement
from corral.cman.agreement import Attempt
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
    Leave,
    Left,
    Outdated,
    RecordChanged,
    Row,
    ServicesStopped,
    Stop,
)
from corral.cman.state import State
from corral.cman.target import Target, target_of
from corral.cman.timing import Timing
from corral.cman.wire import (
    ATTACHMENT_MAX,
    DISPLACING,
    EPOCH_JUMP_MAX,
    EPOCH_MAX,
    FORGOTTEN,
    OUTDATED,
    PROMISED,
    QUIET,
    STATEFUL,
    UNREACHABLE,
    UNWILLING,
    WAIT,
    WILLING,
    Accept,
    AcceptedView,
    ActiveView,
    CleanStop,
    ExcludedBy,
    Forgotten,
    Install,
    InstalledView,
    Leaving,
    Message,
    Nack,
    Prepare,
    Promise,
    Promised,
    Propose,
    Record,
    RecordHeld,
    Reform,
    Removed,
    Status,
)

MembershipEvent = (
    PeerUp
    | PeerDown
    | Received[Message]
    | ConnectivityChanged
    | Attach
    | Active
    | Leave
    | ServicesStopped
    | KnownElsewhere
    | FencingNow
    | Expel
    | Tick
)


@final
class MembershipEngine:
    """One per corrald. `view`, `stopped` and `waiting()` are for status; the rest comes as events (`events.py`)."""

    def __init__(
        self,
        me: NodeIncarnation,
        nodes: tuple[NodeId, ...],
        timing: Timing,
        state: State,
        now: Instant,
        *,
        stateful: bool = False,
    ) -> None:
        """`state` with Started(me.incarnation) applied and durable; `stateful`: participants of an earlier life may be
        left (DESIGN 4, corrald dies)."""
        assert state.incarnation == me.incarnation, "Started must be durable first"
        self.me: Final = me
        self.nodes: Final = tuple(sorted(nodes))
        self.timing: Final = timing
        self.state: Final = state
        self.view: View | None = None  # newest installed in this life
        self.stopped = True
        self.dropped = 0  # messages that were not what they should be
        self.newest: View | None = state.newest  # newest quorate view known to have been accepted anywhere
        self._stateful: Final = stateful
        self._born: Final = now
        self._sessions: dict[NodeId, PeerUp] = {}
        self._heard: set[NodeId] = set()  # whose Status has come in the present session
        self._rows: dict[NodeId, Row] = {}
        self._attempt: Attempt | None = None
        self._pending: Propose | None = None  # newest proposal accepted in this life
        self._record = state.record  # the one views here are counted over; without memory only hearsay
        self._first_epoch = EPOCH_MAX  # of this life's first promise
        self._attachment = b""
        self._epoch_seen = 0
        self._installed_at: Instant = now
        self._broken = False  # a session between two members of `view` broke, or one of them is stopped
        self._leaving: dict[NodeId, Incarnation] = {}  # others that asked to be left out
        self._barred: dict[NodeId, Incarnation] = {}  # must start again first
        self._fencing: frozenset[NodeId] = frozenset()  # an agent works on them: they may stay, but not join
        self._stalled: dict[NodeId, Instant] = {}  # left out of the choice until then
        self._misses: dict[NodeId, int] = {}
        self._failures = 0
        self._retry_at: Instant = now
        self._wanted: tuple[NodeIncarnation, ...] = ()
        self._wanted_at: Instant = now
        self._progress_at: Instant = now
        self._asked_at: Instant = -timing.detect_ns
        self._due: Instant = FOREVER
        self._excluded = False
        self._gone = False  # left, or outdated
        self._left_cleanly = False
        self._leave_by: Instant = FOREVER  # leaving when not FOREVER
        self._whole_since: Instant = now
        self._dwelling = state.excluded  # an excluded node waits until its links were whole for `recover`
        self._out = Ready()
        self._flags = self.flags

    # --- the engine contract ---------------------------------------------------------------------------------------

    @property
    def deadline(self) -> Instant:
        due = min(self._due, self._leave_by)
        if self._attempt is not None:
            due = min(due, self._attempt.due)
        if self._dwelling:
            due = min(due, self._whole_since + self.timing.recover_ns)
        return due

    def step(self, now: Instant, event: MembershipEvent) -> None:
        if isinstance(event, Received):
            self._received(now, event.peer, event.message)
        elif isinstance(event, ConnectivityChanged):
            self._connectivity(now, event.rows)
        elif isinstance(event, PeerUp):
            self._peer_up(event)
        elif isinstance(event, PeerDown):
            self._peer_down(now, event)
        elif isinstance(event, Attach):
            self._attached(now, event)
        elif isinstance(event, Active):
            if event.id > self.state.active:
                self._persist(ActiveView(event.id))
        elif isinstance(event, Leave):
            self._leave(now)
        elif isinstance(event, ServicesStopped) and self._left_cleanly:
            if not self._quiet():  # else an earlier life's echoes may still count, and the next one must be quiet too
                self._persist(CleanStop())
            self._out.emit.append(CleanlyStopped())
        elif isinstance(event, KnownElsewhere):
            self._outdated(event.known)
        elif isinstance(event, FencingNow):
            self._fencing = event.nodes
        elif isinstance(event, Expel):
            self._expel(event.member)
        self._timers(now)
        self._consider(now)
        self._tell_flags()

    def ready(self) -> Ready:
        out, self._out = self._out, Ready()
        return out

    # --- what others ask -------------------------------------------------------------------------------------------

    @property
    def flags(self) -> int:
        """For the HeartbeatEngine's constructor; later changes come as FlagsChanged."""
        flags = WILLING if self._willing() else 0
        if self.state.record is None:
            flags |= FORGOTTEN
        return flags | (STATEFUL if self._stateful else 0)

    def waiting(self) -> str:
        """What this node waits for, for status; empty when it is in a view and nothing is going on."""
        if self._excluded or self._gone:
            return "for its restart as a new incarnation" if self._excluded else "for its end"
        if self._dwelling:
            return "until its links have been whole for `recover`"
        if self._attempt is not None:
            phase = "promise" if self._attempt.proposal is None else "acceptance"
            return f"for the {phase} of nodes {','.join(map(str, self._attempt.missing()))}"
        if self.stopped and self.state.record is None:
            return "for a quorate view: this node has no memory (`corral init` makes a new cluster)"
        if self.stopped:
            return f"for a view of {','.join(str(member.node) for member in self._wanted) or 'nodes it cannot reach'}"
        if self.view is not None and not self.view.quorate:
            return "for a quorum of votes"
        return ""

    # --- small helpers ---------------------------------------------------------------------------------------------

    def _persist(self, record: Record) -> None:
        self.state.apply(record)
        self._out.persist.append(record)

    def _tell(self, node: NodeId, message: Message) -> None:
        """After everything decided so far is durable. Without a session the message is lost with it."""
        session = self._sessions.get(node)
        if session is not None:
            self._out.then_send.append((session.peer, message))

    def _tell_flags(self) -> None:
        if self._flags != self.flags:
            self._flags = self.flags
            self._out.emit.append(FlagsChanged(self._flags))

    def _plausible(self, epoch: int) -> bool:
        return 0 <= epoch < min(EPOCH_MAX, self.state.promised.epoch + EPOCH_JUMP_MAX)

    def _willing(self) -> bool:
        return not (self._excluded or self._gone or self._dwelling)

    def _entered(self) -> bool:
        """Has this life accepted a quorate view?"""
        newest = self.state.newest
        return newest is not None and self.me in newest.members

    def _status(self, node: NodeId) -> Status:
        state = self.state
        known, since = state.known.get(node, 0), state.since.get(node, 0)
        return Status(state.promised, state.installed, self.newest, known, since)

    def can_spare(self, member: NodeIncarnation) -> bool:
        """Would the other members of this quorate view still be a quorum?"""
        view, record = self.view, self._record
        if view is None or record is None or not view.quorate or member not in view.members:
            return False
        rest = {m.node: self._rows[m.node].flags for m in view.members if m != member and m.node in self._rows}
        return record.quorate(agreement.voters(rest))

    # --- sessions and links ----------------------------------------------------------------------------------------

    def _peer_up(self, event: PeerUp) -> None:
        node = event.peer.node
        if node not in self.nodes or node == self.me.node or event.peer.serial != 0:
            self.dropped += 1
            return
        self._sessions[node] = event
        self._heard.discard(node)
        self._tell(node, self._status(node))
        if self._leave_by != FOREVER:
            self._tell(node, Leaving(self.me.incarnation))
        view = self.view
        if view is not None and view.incarnation_of(node) == event.peer.incarnation:
            self._tell(node, Install(view.id))  # the first one may have been lost with the old session

    def _peer_down(self, now: Instant, event: PeerDown) -> None:
        node = event.peer.node
        session = self._sessions.get(node)
        if session is None or session.session != event.session or session.peer != event.peer:
            return
        del self._sessions[node]
        self._heard.discard(node)
        view = self.view
        if view is not None and view.incarnation_of(node) == event.peer.incarnation:
            self._broken = True
        attempt = self._attempt
        if attempt is not None and any(member.node == node for member in attempt.members):
            self._abandon(now, at_once=True)

    def _connectivity(self, now: Instant, rows: dict[NodeId, Row]) -> None:
        before = self._rows.get(self.me.node)
        self._rows = rows
        mine = rows[self.me.node].up
        heard = frozenset(other for node in mine for other in rows[node].up) - {self.me.node}
        if not heard <= mine or (before is not None and not before.up <= mine):
            self._whole_since = now
        attempt = self._attempt
        if attempt is not None and not all(self._linked(member) for member in attempt.members):
            self._abandon(now, at_once=True)

    def _linked(self, member: NodeIncarnation) -> bool:
        if member == self.me:
            return True
        row = self._rows.get(member.node)
        return row is not None and row.incarnation == member.incarnation

    def _remembers(self, member: NodeIncarnation) -> bool:
        flags = self.flags if member == self.me else self._rows[member.node].flags
        return not flags & FORGOTTEN

    def _quiet(self) -> bool:
        row = self._rows.get(self.me.node)
        return row is None or bool(row.flags & QUIET)

    # --- who should be in ------------------------------------------------------------------------------------------

    def _eligible(self, now: Instant, node: NodeId, row: Row) -> bool:
        return (
            bool(row.flags & WILLING)
            and self._stalled.get(node, now) <= now
            and self._leaving.get(node) != row.incarnation
            and self._barred.get(node) != row.incarnation
            and row.incarnation >= self.state.known.get(node, 0)
            and not self._waits(NodeIncarnation(node, row.incarnation))
        )

    def _waits(self, member: NodeIncarnation) -> bool:
        """WAIT: an agent that works on this node was started against an earlier life, and would hit this one."""
        if member.node not in self._fencing or (self.view is not None and member in self.view.members):
            return False
        return self.newest is None or member not in self.newest.members

    def _target(self, now: Instant) -> Target | None:
        mine = self._rows.get(self.me.node)
        if mine is None:
            return None
        rows = {node: row for node, row in self._rows.items() if node in mine.up and self._eligible(now, node, row)}
        rows[self.me.node] = Row(self.me.incarnation, mine.up, self.flags | (mine.flags & QUIET))
        newest = self.newest
        kept = frozenset() if newest is None else frozenset(m.node for m in newest.members if self._linked(m))
        return target_of(rows, self._record, kept)

    def _needed(self, target: Target) -> bool:
        view = self.view
        if view is None or self.stopped or self._broken or view.members != target.members:
            return True
        return target.quorate and not view.quorate

    def _starts(self, target: Target) -> Instant:
        """When an attempt at this target may begin: a loss acts at once, a gain waits for more of its kind."""
        view = self.view
        if view is None:
            if len(target.members) == len(self.nodes):
                return self._wanted_at
            return max(self._wanted_at + self.timing.settle_ns, self._born + self.timing.form_ns)
        if self.stopped or self._broken or not all(self._linked(member) for member in view.members):
            return self._wanted_at
        if any(member not in target.members for member in view.members):
            # A link between others is down, by a row that may be older than the view, which had all links up.
            return max(self._wanted_at, self._installed_at + self.timing.settle_ns)
        return self._wanted_at + self.timing.settle_ns

    def _consider(self, now: Instant) -> None:
        """Is another view needed, and is it this node that proposes it?"""
        self._due = FOREVER
        if self._attempt is not None or not self._willing() or self._leave_by != FOREVER:
            return
        for _ in self.nodes:  # each turn passes over one coordinator that does not move
            target = self._target(now)
            if target is None or not self._needed(target):
                self._wanted = ()
                break
            if target.members != self._wanted:
                self._wanted = target.members
                self._wanted_at = now
            coordinator = target.coordinator
            if coordinator == self.me.node:
                self._propose_when_due(now, target)
                break
            due = max(self._starts(target), self._progress_at) + self.timing.patience_ns
            if now < due:
                self._due = due
                self._ask(now, coordinator)
                break
            self._stalled[coordinator] = now + self.timing.recover_ns
        for until in self._stalled.values():
            if until > now:
                self._due = min(self._due, until)

    def _propose_when_due(self, now: Instant, target: Target) -> None:
        if any(member != self.me and member.node not in self._heard for member in target.members):
            return  # its session comes back, or its link goes down soon
        due = max(self._starts(target), self._retry_at)
        if self.stopped and self.state.promised.coordinator != self.me.node and self._first_epoch != EPOCH_MAX:
            due = max(due, self._progress_at + self.timing.phase_ns)  # another coordinator is at work
        if now >= due:
            self._prepare(now, target.members)
        else:
            self._due = due

    def _ask(self, now: Instant, coordinator: NodeId) -> None:
        """The coordinator may not know that this node is stopped, or went on to another view."""
        if self.view is None:
            return
        due = max(self._asked_at + self.timing.detect_ns, self._progress_at + self.timing.settle_ns)
        if now >= due:
            self._asked_at = now
            self._tell(coordinator, Reform(self.state.promised, self._broken))
            due = now + self.timing.detect_ns
        self._due = min(self._due, due)

    # --- coordinator -----------------------------------------------------------------------------------------------

    def _prepare(self, now: Instant, members: tuple[NodeIncarnation, ...]) -> None:
        epoch = 1 + max(self.state.promised.epoch, self._epoch_seen)
        attempt = Attempt(ViewId(epoch, self.me.node), members)
        attempt.due = now + self.timing.phase_ns
        self._attempt = attempt
        self._promise(attempt.id)
        for member in members:
            if member != self.me:
                self._tell(member.node, Prepare(epoch, members))

    def _promised(self, now: Instant, peer: MemberId, promise: Promise) -> None:
        attempt = self._attempt
        if not agreement.valid_promise(promise):
            self.dropped += 1
            return
        if attempt is None or attempt.proposal is not None or promise.epoch != attempt.id.epoch:
            return
        if NodeIncarnation(peer.node, peer.incarnation) not in attempt.members:
            return
        attempt.promises[peer.node] = promise
        self._misses.pop(peer.node, None)
        if not attempt.missing():
            self._propose(now, attempt)

    def _propose(self, now: Instant, attempt: Attempt) -> None:
        newest = agreement.newest_quorate(view for p in attempt.promises.values() for view in p.accepted)
        self._learn(newest)
        if self._excluded:
            return
        outsiders = agreement.outsiders(attempt, newest)
        record = agreement.newest_record(attempt)
        if outsiders or record is None:
            for member in outsiders:
                self._barred[member.node] = member.incarnation
                self._tell(member.node, self._status(member.node))
            self._abandon(now, at_once=bool(outsiders) and self._failures < 3)
            return
        leaving = frozenset(NodeIncarnation(node, self._leaving[node]) for node in self._leaving)
        proposal = agreement.proposal_of(attempt, record, leaving)
        attempt.proposal = proposal
        attempt.accepts.add(self.me.node)
        attempt.due = now + self.timing.phase_ns
        self._accept(proposal)
        for member in attempt.members:
            if member != self.me:
                self._tell(member.node, proposal)
        if not attempt.missing():
            self._complete(now, attempt)

    def _accepts(self, now: Instant, peer: MemberId, message: Accept) -> None:
        attempt = self._attempt
        if attempt is None or attempt.proposal is None or message.id != attempt.id:
            return
        if NodeIncarnation(peer.node, peer.incarnation) not in attempt.members:
            return
        attempt.accepts.add(peer.node)
        if not attempt.missing():
            self._complete(now, attempt)

    def _complete(self, now: Instant, attempt: Attempt) -> None:
        """Every member has accepted, and durably (CMAN-2): so the notice need not wait for our own disk."""
        assert attempt.proposal is not None
        assert not attempt.missing(), "CMAN-2"
        self._attempt = None
        for member in attempt.members:
            session = self._sessions.get(member.node)
            if session is not None:
                self._out.send.append((session.peer, Install(attempt.id)))
        self._install(now, attempt.proposal)
        for leaver in attempt.proposal.left:
            session = self._sessions.get(leaver.node)
            if session is not None and session.peer.incarnation == leaver.incarnation:
                self._tell(leaver.node, Removed(attempt.id))

    def _nacked(self, now: Instant, peer: MemberId, nack: Nack) -> None:
        if self._plausible(nack.promised.epoch):
            self._epoch_seen = max(self._epoch_seen, nack.promised.epoch)
        attempt = self._attempt
        if attempt is None or nack.epoch != attempt.id.epoch:
            return
        if NodeIncarnation(peer.node, peer.incarnation) not in attempt.members:
            return
        self._misses.pop(peer.node, None)
        self._abandon(now, at_once=nack.reason == PROMISED and self._failures == 0)
        if nack.reason in (DISPLACING, WAIT):
            self._retry_at = now + self.timing.detect_ns

    def _abandon(self, now: Instant, *, at_once: bool) -> None:
        """The members stay stopped, so this node tries again."""
        self._attempt = None
        self._failures += 1
        self._retry_at = now if at_once else now + self.timing.back_off_ns(self._failures, self.me.node)

    # --- member ----------------------------------------------------------------------------------------------------

    def _promise(self, view_id: ViewId) -> None:
        self._persist(Promised(view_id))  # asserts CMAN-4
        self._first_epoch = min(self._first_epoch, view_id.epoch)
        self.stopped = True
        self._out.emit.append(Stop(view_id))

    def _attached(self, now: Instant, event: Attach) -> None:
        """What stopped is attached, and only then the promise leaves: nothing of the view before goes on after it."""
        assert len(event.data) <= ATTACHMENT_MAX
        if event.id != self.state.promised or not self._willing():
            return  # a newer promise stops it once more
        self._attachment = event.data
        promise = self._own_promise(event.id.epoch)
        attempt = self._attempt
        if event.id.coordinator != self.me.node:
            self._tell(event.id.coordinator, promise)
        elif attempt is not None and attempt.id == event.id:
            attempt.promises[self.me.node] = promise
            if not attempt.missing():
                self._propose(now, attempt)

    def _own_promise(self, epoch: int) -> Promise:
        state = self.state
        flags = self.flags | (QUIET if self._quiet() else 0)
        known = (tuple(state.accepted), state.left, state.installed, state.active, state.record)
        return Promise(epoch, *known, flags, self._attachment)

    def _prepared(self, now: Instant, peer: MemberId, prepare: Prepare) -> None:
        members = prepare.members
        proposer = NodeIncarnation(peer.node, peer.incarnation)
        well_formed = agreement.valid_members(members) and prepare.epoch > 0 and self._plausible(prepare.epoch)
        if not well_formed or proposer not in members or peer.node == self.me.node:
            self.dropped += 1
            return
        if self.me not in members:
            return  # meant for an earlier life
        self._stalled.pop(peer.node, None)
        reason = self._refusal(prepare, proposer)
        if reason == OUTDATED:
            self._tell(peer.node, self._status(peer.node))
        if reason:
            self._tell(peer.node, Nack(prepare.epoch, self.state.promised, reason))
            return
        self._attempt = None  # the lower id goes first
        self._progress_at = now
        self._promise(ViewId(prepare.epoch, peer.node))

    def _refusal(self, prepare: Prepare, proposer: NodeIncarnation) -> int:
        if not self._willing():
            return UNWILLING
        if proposer.incarnation < self.state.known.get(proposer.node, 0):
            return OUTDATED
        if prepare.epoch <= self.state.promised.epoch:
            return PROMISED
        if not all(self._linked(member) for member in prepare.members):
            return UNREACHABLE
        if any(member < proposer and self._remembers(member) for member in prepare.members):
            return UNREACHABLE  # that one should propose it
        if any(self._waits(member) for member in prepare.members):
            return WAIT  # a promise would stop the agents, and knocking would go on stopping them
        view = self.view
        if view is not None and view.quorate and not self.stopped and proposer not in view.members:
            for member in view.members:
                row = self._rows.get(member.node)
                well = row is not None and row.incarnation == member.incarnation and row.flags & WILLING
                if well and member not in prepare.members and self._leaving.get(member.node) != member.incarnation:
                    return DISPLACING
        return 0

    def _proposed(self, now: Instant, peer: MemberId, proposal: Propose) -> None:
        view = proposal.view
        if not agreement.valid_proposal(proposal) or peer.node != view.id.coordinator or self.me not in view.members:
            self.dropped += 1
            return
        if self.state.promised != view.id or not self._willing():
            self._tell(peer.node, Nack(view.id.epoch, self.state.promised, PROMISED))
            return
        if self.state.accepted_id == view.id:
            return
        self._progress_at = now
        self._accept(proposal)
        self._tell(peer.node, Accept(view.id))

    def _accept(self, proposal: Propose) -> None:
        view = proposal.view
        assert self.state.promised == view.id, "CMAN-3"
        self._persist(AcceptedView(view, proposal.left, proposal.active))
        held = self.state.record
        if held is not None and proposal.record.version > held.version:
            self._hold(proposal)
        self._record = proposal.record
        self._pending = proposal
        self._out.emit.append(Accepted(view))
        self._learn(view if view.quorate else None)

    def _hold(self, proposal: Propose) -> None:
        self._persist(RecordHeld(proposal.record))
        self._out.emit.append(RecordChanged(proposal.record))

    def _installs(self, now: Instant, peer: MemberId, message: Install) -> None:
        pending = self._pending
        if pending is None or pending.view.id != message.id or self.state.promised != message.id or not self.stopped:
            return
        if NodeIncarnation(peer.node, peer.incarnation) not in pending.view.members:
            self.dropped += 1
            return
        self._install(now, pending)

    def _install(self, now: Instant, proposal: Propose) -> None:
        view = proposal.view
        self._persist(InstalledView(view.id))
        if self.state.record is None and view.quorate:
            self._hold(proposal)  # CMAN-9: this quorate view did not count us
        self.view = view
        self.stopped = False
        self._installed_at = now
        self._broken = False
        self._failures = 0
        self._wanted = ()
        self._pending = None
        attachments = tuple((entry.member, entry.attachment) for entry in proposal.carried)
        self._out.emit.append(
            Installed(
                view,
                proposal.record,
                attachments,
                proposal.accepted,
                proposal.active,
                proposal.left,
                agreement.unclean(proposal),
            )
        )
        if any(member != self.me and member.node not in self._sessions for member in view.members):
            self._broken = True  # a session broke while the agreement ran
        for node in sorted(self._sessions):
            peer = self._sessions[node].peer
            other = NodeIncarnation(node, peer.incarnation)
            if other not in view.members and other not in proposal.left:
                self._tell(node, self._status(node))

    # --- exclusion, memory, leaving --------------------------------------------------------------------------------

    def _learn(self, view: View | None) -> None:
        """Somebody accepted this quorate view. If it leaves this incarnation out, others may go on without it."""
        if view is not None and (self.newest is None or view.id > self.newest.id):
            self.newest = view
        newest, own = self.newest, self.state.newest
        if self._excluded or self._gone or newest is None or own is None:
            return
        if newest.id > own.id and self.me not in newest.members and self._entered():
            self._excluded = True
            self.stopped = True
            self._attempt = None
            self._persist(ExcludedBy(newest.id))
            self._out.emit.append(Excluded(newest))

    def _told(self, peer: MemberId, status: Status) -> None:
        newest = status.newest
        if newest is not None and not (newest.quorate and agreement.valid_members(newest.members)):
            self.dropped += 1
            return
        if not self._plausible(max(status.promised.epoch, newest.id.epoch if newest is not None else 0)):
            self.dropped += 1
            return
        self._epoch_seen = max(self._epoch_seen, status.promised.epoch)
        self._heard.add(peer.node)
        if status.known == self.me.incarnation and status.since < self._first_epoch:
            # Members come into views by promising only: an earlier life made that promise, and it is forgotten.
            self._forget(status.known)
            return
        if not self._outdated(status.known):
            self._learn(newest)

    def _outdated(self, known: Incarnation) -> bool:
        if known > self.me.incarnation:
            self._forget(known)
        return known > self.me.incarnation

    def _forget(self, known: Incarnation) -> None:
        """Others hold an incarnation of this node that it does not remember."""
        if self._gone:
            return
        self._gone = True
        self._attempt = None
        self._persist(Forgotten(known))
        self._out.emit.append(Outdated(known))

    def _expel(self, member: NodeIncarnation) -> None:
        """Every other member chooses its next view without it; not at the price of the quorum."""
        if member != self.me and self.can_spare(member):
            self._barred[member.node] = member.incarnation

    def _reform(self, peer: MemberId, reform: Reform) -> None:
        view = self.view
        if view is None or self.stopped or not self._plausible(reform.promised.epoch):
            return
        if view.incarnation_of(peer.node) != peer.incarnation:
            return  # a newcomer; its links say when it may come in
        if reform.promised > view.id or (reform.broken and reform.promised == view.id):
            self._epoch_seen = max(self._epoch_seen, reform.promised.epoch)
            self._broken = True

    def _leave(self, now: Instant) -> None:
        if self._gone or self._leave_by != FOREVER:
            return
        view = self.view
        if view is None or view.members == (self.me,) or not self._sessions:
            self._leave_done(clean=True)
            return
        self._leave_by = now + self.timing.recover_ns
        self._attempt = None
        for node in sorted(self._sessions):
            self._tell(node, Leaving(self.me.incarnation))

    def _leave_done(self, *, clean: bool) -> None:
        self._leave_by = FOREVER
        self._gone = True
        self._left_cleanly = clean
        self.stopped = True
        self._attempt = None
        self._tell_flags()  # first of all: from now on the HeartbeatEngine echoes nobody, so that `echoes_end` holds
        self._out.emit.append(Left(clean))

    # --- dispatch --------------------------------------------------------------------------------------------------

    def _received(self, now: Instant, peer: MemberId, message: Message) -> None:
        session = self._sessions.get(peer.node)
        if session is None or session.peer != peer:
            self.dropped += 1
            return
        if isinstance(message, Prepare):
            self._prepared(now, peer, message)
        elif isinstance(message, Promise):
            self._promised(now, peer, message)
        elif isinstance(message, Propose):
            self._proposed(now, peer, message)
        elif isinstance(message, Accept):
            self._accepts(now, peer, message)
        elif isinstance(message, Install):
            self._installs(now, peer, message)
        elif isinstance(message, Nack):
            self._nacked(now, peer, message)
        elif isinstance(message, Status):
            self._told(peer, message)
        elif isinstance(message, Reform):
            self._reform(peer, message)
        elif isinstance(message, Leaving):
            if message.incarnation == peer.incarnation:
                self._leaving[peer.node] = peer.incarnation
        elif isinstance(message, Removed) and self._leave_by != FOREVER:
            self._leave_done(clean=True)

    def _timers(self, now: Instant) -> None:
        if self._dwelling and now >= self._whole_since + self.timing.recover_ns:
            self._dwelling = False
        if now >= self._leave_by:
            self._leave_done(clean=False)
        attempt = self._attempt
        if attempt is not None and now >= attempt.due:
            for node in attempt.missing():
                if node == self.me.node:
                    continue  # our own disk is slow
                self._misses[node] = self._misses.get(node, 0) + 1
                if self._misses[node] >= 2:
                    del self._misses[node]
                    self._stalled[node] = now + self.timing.recover_ns
            self._abandon(now, at_once=False)
