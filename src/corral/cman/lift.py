"""Recovery control: in which order the services of a view stop, start and finish (DESIGN 2, 4, 5).

One LiftEngine a node. The coordinator of an installed, quorate view runs the lift; the others follow it.

    Stop(view)        a proposal was promised: every group stops here, from the top, at once
    Installed(view)   what the members attached to their promises is merged, by each in the same way: the newest group
                      table, the highest round, the newest active view and what must be fenced since
    FENCE             coordinator begins the global round; a member's Done means: all victims are fenced or averted, and
                      its lease guard has passed. All Done: the view is *active*
    per stack         groups by level; a level begins when the ones below it in its stack have finished
    round             Begin (persist the id, stop, start local members) -> Done -> all Done: Finish

A change within a view (a participant joins, leaves, is gone, or cannot reach another) begins a new round of that group,
which stops the groups above it in the stack; a round under way is abandoned by the newer one. What an abandoned round
should have recovered carries over, because `failed` counts from the last *finished* round (groups.py).

Invariants
  LIFT-1, LIFT-2  groups.py
  LIFT-3  a round id is persisted here before anything of that round leaves or starts; ids only rise
  LIFT-4  no group above FENCE starts in a view that is not active
  LIFT-5  a group starts only when every group below it in its stack has finished its newest round
  LIFT-6  a Finish is emitted only for the newest round begun here
  LIFT-7  a promise leaves when everything has stopped, and after that nothing of the view before is taken in: what a
          member attached to it stays true
  LIFT-8  a member that departed in a round of a group is in no later round of that group, unless it joins again when a
          round with its departure has finished
  LIFT-9  a round is the same on every member
  LIFT-10 after the faults end everything asked for is settled and every group has finished, within a bound

The model is CMAN 2004 (`cman-kernel/src/sm_*.c`); deviations: the coordinator counts instead of two-phase barriers (its
own failure makes a new view, which starts over), and the lift runs per stack above FENCE.
"""

from typing import Final, final

from msgspec.structs import replace

from corral.api.cman import FENCE_GROUP
from corral.base.engine import Ready, Received, Tick
from corral.base.ids import MemberId, NodeId, NodeIncarnation, ViewId
from corral.base.time import FOREVER, Instant, Nanoseconds
from corral.base.view import Round, Slotted, View
from corral.base.world import ProcessId
from corral.cman.groups import Group, free_number
from corral.cman.lift_events import (
    EvictLocal,
    Fenced,
    FinishGroup,
    Installed,
    Left,
    LiftEvent,
    LocalDone,
    LocalGone,
    LocalJoin,
    LocalLeave,
    LocalReach,
    Promised,
    Refused,
    StartFence,
    StartGroup,
    StopAll,
    Stopped,
    ViewActive,
)
from corral.cman.lift_wire import (
    Attachment,
    Begin,
    Depart,
    Done,
    Evict,
    Finish,
    Identity,
    Join,
    LiftMessage,
    LiftState,
    Refuse,
    Unreachable,
)
from corral.wire.frame import GROUP_PORT_MIN

HELD_MAX: Final = 1024  # messages kept of a view that is not installed here yet
GROUPS_MAX: Final = 1024
ROUND_END: Final = 1 << 32  # a round is the upper half of a lock's token
JOINS_MAX: Final = 1024  # that wait for a round to finish
JOIN_PATIENCE: Final = 4  # times `recover` that a join waits, for the slot of a failed member or its own departure


@final
class _Running:
    """A round on its way, as the coordinator counts it."""

    __slots__ = ("round", "waiting")

    def __init__(self, round: Round, waiting: set[NodeId]) -> None:
        self.round = round
        self.waiting = waiting


@final
class LiftEngine:
    def __init__(
        self,
        me: NodeIncarnation,
        process: ProcessId,
        configured: tuple[NodeId, ...],
        recover_ns: Nanoseconds,
        state: LiftState,
    ) -> None:
        self.me: Final = me
        self.deadline: Instant = FOREVER
        self.view: View | None = None
        self.active = False
        self.groups: dict[str, Group] = {}
        self.rounds: dict[str, Round] = {}  # the newest round begun here, by group
        self.dropped = 0  # messages that made no sense here and now
        self._process = process
        self._configured = configured
        self._recover_ns = recover_ns
        self._state = state
        self._table_view = ViewId(0, 0)
        self._table_sequence = 0
        self._heard = 0  # sequence of the newest Begin of this view
        self._last_number = GROUP_PORT_MIN - 1
        self._ready = Ready()
        self._stopped = True
        self._promised = False  # and the next view is not installed yet
        self._held: list[tuple[MemberId, LiftMessage]] = []
        # What participants of this node want, until the table says so. Each is told once a view.
        self._joins: dict[tuple[MemberId, str], LocalJoin] = {}
        self._departs: dict[tuple[MemberId, str], bool] = {}  # -> clean; group "" means gone from all
        self._joined: set[tuple[MemberId, str]] = set()  # participants of this node that were told so
        self._local_waiting: dict[str, set[MemberId]] = {}
        # The coordinator's part. `_plan` is its own table, ahead of `groups`: with every change it has ordered, also
        # those whose turn has not come yet. `groups` is what was announced, the same on every member.
        self._plan: dict[str, Group] = {}
        self._sequence = 0  # of the newest Begin
        self._running: dict[str, _Running] = {}
        self._finished: dict[str, int] = {}  # group -> id of the round that finished in this view
        self._waiting_joins: dict[tuple[str, MemberId], tuple[Join, Instant]] = {}  # and since when
        self._members_since: set[NodeIncarnation] = set()  # of the newest active view and those accepted since
        self._unreachable: dict[tuple[str, MemberId, MemberId], Instant] = {}
        self._evicted: set[MemberId] = set()
        self._round_high = state.round

    # -- what others may ask

    @property
    def coordinating(self) -> bool:
        return self.view is not None and self.view.quorate and self.view.id.coordinator == self.me.node

    @property
    def _ordering(self) -> bool:
        """FENCE has finished: what a coordinator orders now, everybody hears after that, itself too."""
        return self.coordinating and FENCE_GROUP in self._finished

    @property
    def state(self) -> LiftState:
        return self._state

    def identities(self, node: NodeIncarnation) -> list[ProcessId]:
        """Every process of that incarnation that was ever announced."""
        for identity in self._state.identities:
            if identity.node == node:
                return list(identity.processes)
        return []

    def waiting_for(self) -> dict[str, tuple[NodeId, ...]]:
        """On the coordinator: rounds under way and the nodes that have not reported Done."""
        return {name: tuple(sorted(run.waiting)) for name, run in sorted(self._running.items())}

    def joins_waiting(self) -> dict[MemberId, str]:
        """What participants of this node wait for that can join only when a round has finished."""
        found = {}
        for member, name in sorted(self._joins):
            group = self.groups.get(name)
            if group is not None and (reason := _why_not_yet(group, member)):
                found[member] = reason
        return found

    def attachment(self) -> Attachment:
        return Attachment(
            state=self._state,
            process=self._process,
            table_view=self._table_view,
            table_sequence=self._table_sequence,
            last_number=self._last_number,
            table=tuple(self.groups[name] for name in sorted(self.groups)),
        )

    # -- the contract

    def ready(self) -> Ready:
        ready, self._ready = self._ready, Ready()
        return ready

    def step(self, now: Instant, event: LiftEvent) -> None:
        if isinstance(event, Received):
            self._receive(now, event.peer, event.message)
        elif isinstance(event, Promised):
            self._promised = True
            self._stop()
            self._ready.emit.append(Stopped(event.id, self.attachment()))
        elif isinstance(event, Installed):
            self._install(now, event)
        elif isinstance(event, LocalDone):
            self._local_done(event)
        elif isinstance(event, LocalJoin):
            assert (event.member, event.group) not in self._departs, "a member joins again when it has left"
            self._joins[event.member, event.group] = event
            self._tell_join(event)
        elif isinstance(event, LocalLeave):
            if (event.member, event.group) not in self._departs:
                self._joins.pop((event.member, event.group), None)
                self._departs[event.member, event.group] = True
                self._tell_depart(event.member, event.group)
        elif isinstance(event, LocalGone):
            self._forget_member(event.member)
            self._departs[event.member, ""] = False
            self._tell_depart(event.member, "")
        elif isinstance(event, LocalReach):
            self._tell_coordinator(Unreachable(self._view_id(), event.group, event.member, event.peer, event.down))
        elif isinstance(event, Fenced):
            self._fenced(event.node)
        elif isinstance(event, Tick):
            self._judge_unreachable(now)
            self._judge_joins(now)
            self._arm()

    # -- views

    def _view_id(self) -> ViewId:
        return self.view.id if self.view is not None else ViewId(0, 0)

    def _stop(self) -> None:
        if not self._stopped:
            self._stopped = True
            self.active = False
            self._ready.emit.append(StopAll())

    def _install(self, now: Instant, event: Installed) -> None:
        self._stop()
        self._promised = False
        view = event.view
        self.view = view
        self.active = False
        self._heard = 0
        self._plan.clear()
        self._running.clear()
        self._finished.clear()
        self._waiting_joins.clear()
        self._unreachable.clear()
        self._evicted.clear()
        self._local_waiting.clear()
        self.deadline = FOREVER
        self._merge(view, event)
        held, self._held = self._held, []
        if self.coordinating:
            self._begin_fence(event)
        for peer, message in held:
            self._receive(now, peer, message)

    def _merge(self, view: View, event: Installed) -> None:
        """Identical on every member: it sees nothing but the attachments, which are."""
        brought = [event.attachments[member] for member in view.members if member in event.attachments]
        attachments = [attachment for attachment in brought if _is_plausible(attachment)]
        self.dropped += len(brought) - len(attachments)
        newest = max(attachments, key=lambda a: (a.table_view, a.table_sequence), default=None)
        if newest is not None and (newest.table_view, newest.table_sequence) >= (
            self._table_view,
            self._table_sequence,
        ):
            self.groups = {group.name: group for group in newest.table}
            self._table_view, self._table_sequence = newest.table_view, newest.table_sequence
            self._last_number = newest.last_number
        states = [self._state, *(attachment.state for attachment in attachments)]
        self._round_high = max(state.round for state in states)
        identities = _merge_identities(
            [identity for state in states for identity in state.identities]
            + [Identity(member, (attachment.process,)) for member, attachment in sorted(event.attachments.items())]
        )
        self._members_since = {member for accepted in event.accepted for member in accepted.members}
        known = self._members_since | set(view.members)
        fenced = {node for state in states for node in state.fenced} & known
        self._save(
            LiftState(
                round=self._round_high,  # who brought it may be gone in the next view
                fenced=tuple(sorted(fenced)),
                identities=_keep_identities(identities, known),
            )
        )

    def _owed(self, event: Installed) -> set[NodeIncarnation]:
        """Every incarnation that may still act on what an active view gave it, and is not here."""
        assert self.view is not None
        return self._members_since - set(self._state.fenced) - set(event.left) - set(self.view.members)

    def _save(self, state: LiftState) -> None:
        assert state.round >= self._state.round, "LIFT-3"
        if state != self._state:
            self._state = state
            self._ready.persist.append(state)

    def _fenced(self, node: NodeIncarnation) -> None:
        state = self._state
        if node not in state.fenced:
            self._save(replace(state, fenced=tuple(sorted({*state.fenced, node}))))

    # -- the coordinator

    def _next_round(self) -> int:
        self._round_high += 1
        return self._round_high

    def _broadcast(self, message: Begin | Finish) -> None:
        """To all, and taken in here first: when it leaves, what this node would attach to a promise knows of it."""
        assert self.view is not None
        if isinstance(message, Begin):
            self._begun(message)
        else:
            self._finish(message)
        for member in self.view.members:
            if member != self.me:
                self._ready.then_send.append((member.corrald(), message))

    def _begin_fence(self, event: Installed) -> None:
        assert self.view is not None
        view = self.view
        before = set(event.accepted[0].members) if event.accepted else set()
        members = tuple(Slotted(member.corrald(), slot) for slot, member in enumerate(view.members))
        failed = tuple(Slotted(node.corrald(), 0) for node in sorted(self._owed(event)))
        round = Round(
            id=self._next_round(),
            group=FENCE_GROUP,
            members=members,
            failed=failed,
            joined=tuple(m.corrald() for m in view.members if m not in before),
            left=tuple(node.corrald() for node in sorted(event.left)),
        )
        clean = tuple(m for m in view.members if m not in event.unclean)
        nodes = set(view.nodes)
        absent = tuple(node for node in self._configured if node not in nodes)
        self._running[FENCE_GROUP] = _Running(round, set(view.nodes))
        self._sequence = 0
        self._broadcast(Begin(view.id, 0, round, None, clean=clean, startup=event.first, absent=absent))

    def _change(self, group: Group) -> None:
        """Puts a changed group into the plan; its round follows by `_advance`."""
        self._plan[group.name] = group
        self._running.pop(group.name, None)
        self._finished.pop(group.name, None)

    def _advance(self) -> None:
        """Begins every round whose turn it is."""
        for name in sorted(self._plan, key=lambda n: (self._plan[n].level, n)):
            group = self._plan[name]
            if name in self._running or name in self._finished:
                continue
            if any(below.name not in self._finished for below in _stack_below(self._plan, group)):
                continue
            for above in _stack_above(self._plan, group):
                self._running.pop(above.name, None)
                self._finished.pop(above.name, None)
            self._begin(group)

    def _begin(self, group: Group) -> None:
        assert self.view is not None
        assert self._ordering, "LIFT-4"
        assert all(below.name in self._finished for below in _stack_below(self._plan, group)), "LIFT-5"
        round = group.round(self._next_round())
        self._sequence += 1
        self._running[group.name] = _Running(round, set(self.view.nodes))
        self._broadcast(Begin(self.view.id, self._sequence, round, group))

    def _count(self, now: Instant, peer: MemberId, message: Done) -> None:
        run = self._running.get(message.group)
        if run is None or run.round.id != message.round:
            return  # of a round that a newer one abandoned
        run.waiting.discard(peer.node)
        if run.waiting:
            return
        del self._running[message.group]
        self._finished[message.group] = message.round
        self._broadcast(Finish(self._view_id(), message.round, message.group))
        if message.group == FENCE_GROUP:
            assert self.view is not None
            here = frozenset(self.view.members)
            for name in sorted(self.groups):
                self._change(self.groups[name].of_nodes(here))
        else:
            self._plan[message.group] = self._plan[message.group].finished(run.round)
            if not self._plan[message.group].members:
                del self._plan[message.group]
            for name, member in sorted(self._waiting_joins):
                if name == message.group:
                    self._join(*self._waiting_joins.pop((name, member)))
            self._arm()
        self._advance()

    def _join(self, message: Join, since: Instant) -> None:
        group = self._plan.get(message.group)
        if group is None:
            if len(self._plan) >= GROUPS_MAX:
                self._refuse(message, f"the cluster has its {GROUPS_MAX} service groups; leave one first")
                return
            self._last_number = free_number(self._plan, self._last_number)
            group = Group(message.group, message.level, self._last_number, message.slots, (), (), ())
        if group.entry(message.member) is not None:
            return
        if group.level != message.level:
            self._refuse(message, f"group {message.group} runs at level {group.level}, not {message.level}")
            return
        if group.members and group.slots != message.slots:
            group = replace(group, slots=max(group.slots, message.slots))
        if _why_not_yet(group, message.member):
            if len(self._waiting_joins) >= JOINS_MAX:
                self._refuse(message, f"{JOINS_MAX} others wait to join service groups; try again when some have")
                return
            self._waiting_joins[message.group, message.member] = message, since
            self._arm()
            return
        added = group.with_member(message.member, message.address, message.ticket, message.process)
        if added is None:
            self._refuse(message, f"members have all {group.slots} slots of {message.group}; let one leave first")
            return
        self._change(added)
        self._advance()

    def _refuse(self, message: Join | Depart, reason: str) -> None:
        departure = isinstance(message, Depart)
        refusal = Refuse(self._view_id(), message.group, message.member, departure, reason)
        self._ready.then_send.append((_home(message.member), refusal))

    def _judge_joins(self, now: Instant) -> None:
        """Who waits for others does so for a while: their recovery may need an operator."""
        for key, (message, since) in sorted(self._waiting_joins.items()):
            if now - since >= JOIN_PATIENCE * self._recover_ns:
                del self._waiting_joins[key]
                reason = _why_not_yet(self._plan[message.group], message.member) or "its round has not finished"
                self._refuse(message, f"{reason}; see what its recovery waits for, then try again")

    def _depart(self, message: Depart) -> None:
        for name, member in sorted(self._waiting_joins):
            if member == message.member and message.group in ("", name):
                del self._waiting_joins[name, member]
        for group in _groups_of(self._plan, message.member):
            if message.group in ("", group.name):
                self._change(group.without(frozenset((message.member,)), clean=message.clean))
        # Where it was announced as a member, the round that takes it out is the answer.
        if not any(message.group in ("", group.name) for group in _groups_of(self.groups, message.member)):
            self._refuse(message, "it is not a member")
        self._unreachable = {k: v for k, v in self._unreachable.items() if message.member not in k[1:]}
        self._advance()

    def _reach(self, now: Instant, message: Unreachable) -> None:
        group = self._plan.get(message.group)
        if group is None:
            return
        if group.entry(message.member) is None or group.entry(message.peer) is None:
            return
        key = (message.group, message.member, message.peer)
        if not message.down:
            self._unreachable.pop(key, None)
            return
        if key in self._unreachable:
            return  # told again, in the round that the first telling began
        self._unreachable[key] = now
        self._arm()
        # Even with the same members a broken session means a new round (DESIGN 4): what was under way in it is lost.
        self._change(group)
        self._advance()

    def _arm(self) -> None:
        due = [since + self._recover_ns for key, since in self._unreachable.items() if self._mutual(key)]
        due += [since + JOIN_PATIENCE * self._recover_ns for _, since in self._waiting_joins.values()]
        self.deadline = min(due, default=FOREVER)

    def _mutual(self, key: tuple[str, MemberId, MemberId]) -> bool:
        group, member, peer = key
        return (group, peer, member) in self._unreachable

    def _judge_unreachable(self, now: Instant) -> None:
        """Two participants that could not talk for `recover`: the one that reaches fewer goes (tie: the higher id)."""
        for key, since in sorted(self._unreachable.items()):
            group, member, peer = key
            if not self._mutual(key) or now - since < self._recover_ns or {member, peer} & self._evicted:
                continue
            victim = max(member, peer, key=lambda m: (self._unreached(group, m), m))
            self._evicted.add(victim)
            other = peer if victim == member else member
            reason = f"it and {other} of {group} could not talk for {self._recover_ns / 1e9:g} s"
            self._ready.then_send.append((_home(victim), Evict(self._view_id(), victim, reason)))
        self._unreachable = {k: v for k, v in self._unreachable.items() if not {k[1], k[2]} & self._evicted}

    def _unreached(self, group: str, member: MemberId) -> int:
        """How many it cannot talk to. One side's word is enough: the other may have had nothing to say to it."""
        pairs = {frozenset((one, other)) for name, one, other in self._unreachable if name == group}
        return sum(member in pair for pair in pairs)

    # -- every member

    def _tell_coordinator(self, message: LiftMessage) -> None:
        if self.view is None or not self.view.quorate:
            return
        coordinator = self.view.id.coordinator
        incarnation = self.view.incarnation_of(coordinator)
        assert incarnation is not None
        self._ready.then_send.append((MemberId(coordinator, incarnation, 0), message))

    def _tell_join(self, join: LocalJoin) -> None:
        if self.active:
            self._tell_coordinator(
                Join(
                    self._view_id(),
                    join.group,
                    join.level,
                    join.slots,
                    join.member,
                    join.address,
                    join.ticket,
                    join.process,
                )
            )

    def _tell_depart(self, member: MemberId, group: str) -> None:
        if self.active:
            self._tell_coordinator(Depart(self._view_id(), group, member, self._departs[member, group]))

    def _receive(self, now: Instant, peer: MemberId, message: LiftMessage) -> None:
        view = self.view
        if view is None or message.view > view.id:
            if len(self._held) < HELD_MAX:
                self._held.append((peer, message))
            else:
                self.dropped += 1
            return
        if (
            self._promised  # LIFT-7: the next view counts from what was attached
            or message.view != view.id
            or NodeIncarnation(peer.node, peer.incarnation) not in view.members
        ):
            self.dropped += 1
            return
        if isinstance(message, Begin | Finish | Refuse | Evict):
            if peer.node != view.id.coordinator:
                self.dropped += 1
            elif isinstance(message, Begin):
                self._begun(message)
            elif isinstance(message, Finish):
                self._finish(message)
            elif isinstance(message, Refuse):
                self._refused(message)
            else:
                self._ready.emit.append(EvictLocal(message.member, message.reason))
        elif not self.coordinating:
            self.dropped += 1
        elif isinstance(message, Done):
            self._count(now, peer, message)
        elif message.member.node != peer.node or message.member.incarnation != peer.incarnation:
            self.dropped += 1  # nobody speaks for another node's participants
        elif not self._ordering:
            self.dropped += 1  # nothing is asked before the view is active
        elif isinstance(message, Join):
            self._join(message, now)
        elif isinstance(message, Depart):
            self._depart(message)
        else:
            self._reach(now, message)

    def _refused(self, message: Refuse) -> None:
        key = (message.member, message.group)
        if message.departure:
            if message.group and (group := self.groups.get(message.group)) and group.entry(message.member):
                return  # the round that took it out was lost with its session: the next view tells
            if self._departs.pop(key, None) is not None and message.group:
                self._ready.emit.append(Left(message.member, message.group))
        elif self._joins.pop(key, None) is not None:
            self._ready.emit.append(Refused(message.member, message.group, message.reason))

    def _begun(self, message: Begin) -> None:
        assert self.view is not None
        round = message.round
        last = self.rounds.get(round.group)
        if (last is not None and round.id <= last.id) or not 0 < round.id < ROUND_END:
            self.dropped += 1
            return
        if message.group is not None and message.sequence != self._heard + 1:
            self.dropped += 1  # one before it was lost with its session: a table with a hole is not the newest
            return
        self._heard = message.sequence
        self._stopped = False
        self._round_high = max(self._round_high, round.id)
        self.rounds[round.group] = round
        if message.group is None:
            self._save(replace(self._state, round=max(self._state.round, round.id)))
            self._local_waiting[FENCE_GROUP] = {self.me.corrald()}
            self._ready.emit.append(StartFence(round, frozenset(message.clean), message.startup, message.absent))
            return
        if not self.active:
            self.dropped += 1  # LIFT-4; a coordinator that obeys it never gets here
            return
        self._begun_group(message, message.group, round)

    def _begun_group(self, message: Begin, group: Group, round: Round) -> None:
        before = self.groups.get(group.name)
        self.groups[group.name] = group
        self._table_view, self._table_sequence = message.view, message.sequence
        self._last_number = max(self._last_number, group.number)
        announced = [
            Identity(NodeIncarnation(e.member.node, e.member.incarnation), (e.process,)) for e in group.members
        ]
        identities = _merge_identities([*self._state.identities, *announced])
        kept = _keep_identities(identities, self._members_since | {entry.node for entry in announced})
        self._save(replace(self._state, round=max(self._state.round, round.id), identities=kept))
        self._settle(group, before)
        stops = tuple(above.name for above in _stack_above(self.groups, group))
        for name in stops:
            self._local_waiting.pop(name, None)
        local = tuple(e.member for e in group.members if self._is_local(e.member))
        self._local_waiting[group.name] = set(local)
        starting = tuple(member for member in local if (member, group.name) in self._joined)
        self._ready.emit.append(StartGroup(group, round, starting, stops))
        if not local:
            self._tell_coordinator(Done(message.view, round.id, group.name))

    def _settle(self, group: Group, before: Group | None) -> None:
        """What participants of this node asked for and now stands in the table is no longer asked."""
        for entry in group.members:
            key = (entry.member, group.name)
            if self._joins.pop(key, None) is not None:
                self._joined.add(key)
        for entry in before.members if before is not None else ():
            if group.entry(entry.member) is not None:
                continue
            self._joined.discard((entry.member, group.name))
            if self._departs.pop((entry.member, group.name), None) is not None:
                self._ready.emit.append(Left(entry.member, group.name))
            if not _groups_of(self.groups, entry.member):
                self._departs.pop((entry.member, ""), None)

    def _is_local(self, member: MemberId) -> bool:
        return member.node == self.me.node and member.incarnation == self.me.incarnation

    def _forget_member(self, member: MemberId) -> None:
        for key in [key for key in self._joins if key[0] == member]:
            del self._joins[key]
        for key in [key for key in self._departs if key[0] == member]:
            del self._departs[key]

    def _local_done(self, event: LocalDone) -> None:
        round = self.rounds.get(event.group)
        waiting = self._local_waiting.get(event.group)
        if round is None or waiting is None or round.id != event.round_id or self.view is None:
            return
        waiting.discard(event.member)
        if not waiting:
            self._tell_coordinator(Done(self.view.id, round.id, event.group))

    def _finish(self, message: Finish) -> None:
        round = self.rounds.get(message.group)
        if round is None or round.id != message.round:
            self.dropped += 1
            return
        assert round.id == message.round, "LIFT-6"
        if message.group == FENCE_GROUP:
            self._finish_fence(round)
            return
        group = self.groups.get(message.group)
        if group is None:
            return
        if group.members:
            self.groups[message.group] = group.finished(round)
        else:
            del self.groups[message.group]
            self.rounds.pop(message.group, None)
        self._ready.emit.append(FinishGroup(message.group, round))

    def _finish_fence(self, round: Round) -> None:
        assert self.view is not None
        view = self.view
        self.active = True
        self._members_since = set(view.members)
        identities = _keep_identities(list(self._state.identities), self._members_since)
        self._save(replace(self._state, fenced=(), identities=identities))
        self._ready.emit.append(ViewActive(view))
        for member, group in sorted(self._departs):
            self._tell_depart(member, group)
        for _, join in sorted(self._joins.items()):
            self._tell_join(join)


def _home(member: MemberId) -> MemberId:
    return NodeIncarnation(member.node, member.incarnation).corrald()


def _why_not_yet(group: Group, member: MemberId) -> str:
    """Empty: it can join now, or never."""
    if member in group.left:
        return f"the round of {group.name} in which it left has not finished"  # until then it could not fail again
    failed = group.failed()
    if failed and group.free_slot() is None:
        names = ", ".join(f"{entry.slot} of {entry.member}" for entry in failed)
        return f"no slot of {group.name} is free and what has failed is still not recovered (slot {names})"
    return ""


def _groups_of(table: dict[str, Group], member: MemberId) -> list[Group]:
    return [table[name] for name in sorted(table) if table[name].entry(member) is not None]


def _stack_below(table: dict[str, Group], group: Group) -> list[Group]:
    return [g for g in table.values() if g.stack == group.stack and g.stack and g.level < group.level]


def _stack_above(table: dict[str, Group], group: Group) -> list[Group]:
    above = [g for g in table.values() if g.stack == group.stack and g.stack and g.level > group.level]
    return sorted(above, key=lambda g: (-g.level, g.name))


def _is_plausible(attachment: Attachment) -> bool:
    """What a member says of itself may be wrong, but not so wrong that no round could follow it."""
    return 0 <= attachment.state.round < ROUND_END - 1


def _merge_identities(identities: list[Identity]) -> list[Identity]:
    merged: dict[NodeIncarnation, set[ProcessId]] = {}
    for identity in identities:
        merged.setdefault(identity.node, set()).update(identity.processes)
    return [Identity(node, tuple(sorted(merged[node]))) for node in sorted(merged)]


def _keep_identities(identities: list[Identity], owed: set[NodeIncarnation]) -> tuple[Identity, ...]:
    return tuple(identity for identity in identities if identity.node in owed)
