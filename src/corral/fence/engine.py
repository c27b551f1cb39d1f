"""Which failed nodes must be cut off, who does it, and that it has been done (DESIGN 5, fence).

One FenceEngine a node; the lift starts it with the global round of every quorate view, as the lowest level.

    Start(round)   victims = the round's failed incarnations (and, when the cluster first forms, every configured node
                   that is not a clean member). Known facts are told to all members again.
    turn           the order is: members that were there before by id, then the joined by id. Turn t of a victim belongs
                   to order[t mod n]; it tries the victim's methods in order, each once, then says TurnFailed. After a
                   whole rotation everybody waits `retry_delay`; so on for ever.
    attempt        RunAttempt -> AttemptDone. Ok: VictimDone to all. The other members only know that it runs
                   (Attempting), so that none lets the victim join in the middle of it (`fencing`).
    RoundDone      when every victim of the round is known to be fenced or averted, and no agent begun here still works
                   on a node that is a member.
    Stop           agents at work are told to stop; a success that comes anyway is a fact like any other.

Facts (ledger.py) stay true, so their order against anything else does not matter; turns belong to one round.

Invariants
  FENCE-1  RoundDone only when each failed incarnation is fenced, or its node has joined again clean
  FENCE-2  no attempt is begun against an incarnation that is a member
  FENCE-4  RoundDone only when no attempt begun here is running against a node that is a member
  FENCE-5  fencing runs in quorate views only
  FENCE-6  ledger.py
  FENCE-7  a member begins an attempt only in its own turn, and one per victim at a time
(FENCE-3, liveness, is the simulator's: every victim that can be fenced by some member's method is.)

The model is fenced (cluster3 `fence/fenced/recover.c`) with Pacemaker's topology. Deviations: turns pass to other
members instead of one master for ever; the delay belongs to each victim instead of to the daemon; a rejoin ends a fence
only between attempts, because a joiner gets WAIT while an agent works on it.
"""

from typing import Final, final

from msgspec.structs import replace

from corral.api.fence import (
    AGENT,
    ANY_INCARNATION,
    EXTERNAL,
    MANUAL,
    MEMBER,
    NONE,
    OVERRIDE,
    FenceConfig,
    FenceDeferred,
    FenceFailed,
    FenceStarted,
    FenceStatus,
    Method,
)
from corral.base.engine import Ready, Received, Tick
from corral.base.ids import MemberId, NodeId, NodeIncarnation
from corral.base.time import FOREVER, Instant, Nanoseconds, from_seconds
from corral.base.view import Round
from corral.fence.attempt import GRACE, Attempt, has_room_for, make_attempt, method_of
from corral.fence.events import (
    AttemptDone,
    CancelAttempt,
    ExpelNode,
    External,
    FenceRequest,
    ManualAck,
    Refused,
    RoundDone,
    Start,
    Stop,
)
from corral.fence.ledger import Ledger, told
from corral.fence.plan import Delays, round_victims, turn_order
from corral.fence.status import Timings, describe
from corral.fence.victim import Repeats, Victim, worth_telling
from corral.fence.wire import (
    HISTORY_REPLY_MAX,
    TEXT_MAX,
    Attempting,
    FencePlease,
    HistoryQuery,
    HistoryReply,
    Message,
    TurnFailed,
    VictimDone,
)

REQUESTS_MAX: Final = 64  # victims somebody asked for, beside those of the round
HELD_MAX: Final = 4096  # messages kept of rounds that others have begun before this node

Event = Start | Stop | AttemptDone | ManualAck | External | FenceRequest | Received[Message] | Tick


@final
class FenceEngine:
    """Step it with `Event`s; it emits what `fence/events.py` lists under *out* and the events of `api/fence.py`."""

    __slots__ = (
        "_attempts",
        "_clean",
        "_config",
        "_delays",
        "_done",
        "_dropped",
        "_has_history",
        "_held",
        "_ledger",
        "_me",
        "_members",
        "_next_attempt",
        "_order",
        "_out",
        "_repeats",
        "_retry",
        "_round",
        "_running",
        "_victims",
        "_wanted",
        "deadline",
    )

    def __init__(self, me: NodeId, config: FenceConfig) -> None:
        self._me: Final = me
        self._config = config
        self._delays = Delays(config)
        self._retry = from_seconds(config.retry_delay)
        self._round: Round | None = None
        self._running = False  # between Start and Stop
        self._done = True  # RoundDone was said for this round
        self._members: dict[NodeId, MemberId] = {}
        self._clean: frozenset[NodeIncarnation] = frozenset()
        self._order: tuple[NodeId, ...] = ()
        self._wanted: frozenset[NodeIncarnation] = frozenset()  # the victims RoundDone is about
        self._victims: dict[NodeIncarnation, Victim] = {}
        self._attempts: dict[int, Attempt] = {}
        self._next_attempt = 1
        self._ledger = Ledger()
        self._repeats = Repeats()
        self._has_history = False
        self._held: list[tuple[MemberId, Message]] = []  # of rounds that have not begun here yet
        self._dropped = 0
        self._out = Ready()
        self.deadline: Instant = FOREVER

    # --- the engine contract -------------------------------------------------------------------------------------

    def step(self, now: Instant, event: Event) -> None:
        if isinstance(event, Tick):
            self._give_up_late_attempts(now)
        elif isinstance(event, Received):
            self._receive(now, event.peer, event.message)
        elif isinstance(event, AttemptDone):
            self._attempt_done(now, event)
        elif isinstance(event, Start):
            self._start(now, event)
        elif isinstance(event, Stop):
            self._stop()
        elif isinstance(event, FenceRequest):
            self._requested(now, event)
        elif isinstance(event, ManualAck):
            self._acknowledged(now, event)
        else:
            self._fenced_outside(now, event)
        if self._running:
            self._advance(now)
        self._rearm(now)

    def ready(self) -> Ready:
        out, self._out = self._out, Ready()
        return out

    # --- questions -----------------------------------------------------------------------------------------------

    def fencing(self, node: NodeId) -> bool:
        """An agent works on this node, as far as is known here: its join is answered WAIT."""
        for attempt in self._attempts.values():
            if attempt.victim.node == node and attempt.action == "off":
                return True
        return any(victim.node == node and victim.remote != "" for victim in self._victims.values())

    def fenced(self, victim: NodeIncarnation) -> bool:
        return victim in self._ledger

    def status(self, now: Instant) -> FenceStatus:
        timings = Timings(now, self._me, self._order if self._running else ())
        running = {attempt.victim: attempt for attempt in self._attempts.values() if attempt.action == "off"}
        return FenceStatus(
            round=self._round.id if self._round is not None else 0,
            done=self._done,
            members=tuple(sorted(self._members)),
            victims=tuple(
                describe(victim, running.get(victim.incarnation), timings) for victim in self._waiting_victims()
            ),
            waits_for=self._waits_for(now, timings, running),
            history=tuple(told(fact) for fact in self._ledger.recent(HISTORY_REPLY_MAX)),
            dropped=self._dropped,
        )

    def _waits_for(self, now: Instant, timings: Timings, running: dict[NodeIncarnation, Attempt]) -> str:
        if self._done:
            return ""
        if not self._running:
            return "waiting for a quorate view: fencing stands still without one"
        for victim in self._waiting_victims():
            if victim.gates:
                return describe(victim, running.get(victim.incarnation), timings).waits_for
        for attempt in self._attempts.values():
            return f"waiting for the abandoned fence agent against node {attempt.victim.node} to end"
        return ""

    # --- rounds --------------------------------------------------------------------------------------------------

    def _start(self, now: Instant, event: Start) -> None:
        round = event.round
        assert event.quorate, "FENCE-5"
        if self._round is not None and round.id <= self._round.id:
            self._dropped += 1  # the lift has begun a newer one already
            return
        self._stop()
        before = self._victims
        self._round = round
        self._running = True
        self._done = False
        self._members = {member.node: member for member in round.member_ids}
        self._clean = event.clean
        assert self._me in self._members, "a round is started on its members only"
        joined = {member.node for member in round.joined}
        self._order = turn_order(round)
        wanted = self._wanted = self._round_victims(event)
        self._victims = {}
        self._avert(now, wanted, event)
        self._admit_victims(now, wanted, before, joining=event.startup or bool(joined))
        self._carry_requests(before)
        self._repeats.retain(self._victims)
        for victim in sorted(wanted):
            fact = self._ledger.fact(victim)
            if fact is not None:
                self._broadcast(replace(fact, round=round.id))
        self._ask_history(joined)
        held, self._held = self._held, []
        for peer, message in held:
            self._receive(now, peer, message)

    def _round_victims(self, event: Start) -> frozenset[NodeIncarnation]:
        wanted = round_victims(event, startup=self._config.startup)
        for victim in sorted(wanted):
            member = self._members.get(victim.node)
            assert member is None or member.incarnation != victim.incarnation, "FENCE-2"
        return wanted

    def _avert(self, now: Instant, wanted: frozenset[NodeIncarnation], event: Start) -> None:
        """A node that joined again clean has shown that nothing of its earlier lives is left."""
        for victim in sorted(wanted):
            if self._rejoined_clean(victim) and victim not in self._ledger:
                self._learn(now, self._fact(victim, MEMBER, NONE, by=victim.node), tell=False)

    def _rejoined_clean(self, victim: NodeIncarnation) -> bool:
        member = self._members.get(victim.node)
        return (
            member is not None
            and member.incarnation > victim.incarnation
            and NodeIncarnation(member.node, member.incarnation) in self._clean
        )

    def _admit_victims(
        self, now: Instant, wanted: frozenset[NodeIncarnation], before: dict[NodeIncarnation, Victim], joining: bool
    ) -> None:
        """Each victim's delay runs from when it became one, over abandoned rounds. When one of those waited for has
        come back in the meantime others may follow: all wait again, at least post_join_delay (fenced's delay loop)."""
        came_back = any(victim.gates and self._came_back(victim.incarnation, wanted) for victim in before.values())
        for incarnation in sorted(wanted):
            if incarnation in self._ledger:
                continue
            old = before.get(incarnation)
            if came_back or old is None or not old.gates:
                not_before = now + self._delays.of(incarnation, joining or came_back)
            else:
                not_before = old.not_before if old.waits_delay else now
            self._victims[incarnation] = Victim(incarnation, min(not_before, FOREVER), gates=True)

    def _came_back(self, victim: NodeIncarnation, wanted: frozenset[NodeIncarnation]) -> bool:
        """It is no victim any more because its node joined again, not because it was fenced."""
        fact = self._ledger.fact(victim)
        return victim not in wanted if fact is None else fact.how == MEMBER

    def _carry_requests(self, before: dict[NodeIncarnation, Victim]) -> None:
        for incarnation in sorted(before):
            waits = not before[incarnation].gates and incarnation not in self._ledger
            if waits and incarnation not in self._victims:
                self._add_request(incarnation, 0)

    def _stop(self) -> None:
        if not self._running:
            return
        self._running = False
        for victim in self._victims.values():
            victim.remote = ""
        for attempt_id in sorted(self._attempts):
            attempt = self._attempts[attempt_id]
            if attempt.action == "off" and not attempt.abandoned:
                attempt.abandoned = True
                self._cancel(attempt)

    def _ask_history(self, joined: set[NodeId]) -> None:
        if self._me in joined and not self._has_history and self._order[0] != self._me:
            assert self._round is not None
            self._out.send.append((self._members[self._order[0]], HistoryQuery(self._round.id)))

    # --- what to do now ------------------------------------------------------------------------------------------

    def _advance(self, now: Instant) -> None:
        for victim in self._waiting_victims():
            self._pursue(now, victim)
        self._finish()

    def _waiting_victims(self) -> list[Victim]:
        return [self._victims[key] for key in sorted(self._victims) if key not in self._ledger]

    def _pursue(self, now: Instant, victim: Victim) -> None:
        fencer = self._order[victim.turn % len(self._order)]
        if now < victim.not_before:
            return
        victim.waits_delay = False
        if fencer != self._me:
            if victim.turn >= victim.deferrals and victim.turn < len(self._order):  # told in the first rotation only
                victim.deferrals = victim.turn + 1
                self._out.emit.append(FenceDeferred(victim.incarnation, fencer))
            return
        fencing = self._config.nodes.get(victim.node)
        if fencing is None or victim.method >= len(fencing.methods):
            self._end_turn(now, victim)
            self._pursue(now, victim)
            return
        if self._node_is_worked_on(victim):
            return
        method = fencing.methods[victim.method]
        if has_room_for(method, self._attempts, self._config):
            self._begin(now, victim, method)

    def _node_is_worked_on(self, victim: Victim) -> bool:
        """One agent per node at a time; one that switches a node on again gives way."""
        busy = False
        for attempt_id in sorted(self._attempts):
            attempt = self._attempts[attempt_id]
            if attempt.victim.node == victim.node:
                busy = True
                if attempt.action == "on" and attempt.live:
                    self._cancel(attempt)
        return busy

    def _begin(self, now: Instant, victim: Victim, method: Method) -> None:
        assert self._round is not None
        member = self._members.get(victim.node)
        assert member is None or member.incarnation != victim.incarnation.incarnation, "FENCE-2"
        assert self._order[victim.turn % len(self._order)] == self._me, "FENCE-7"
        assert all(attempt.victim != victim.incarnation for attempt in self._attempts.values()), "FENCE-7"
        self._run(now, victim.incarnation, method, "off")
        self._out.emit.append(FenceStarted(victim.incarnation, method.name, self._me))
        self._broadcast(Attempting(self._round.id, victim.incarnation, victim.turn, method.name))

    def _run(self, now: Instant, victim: NodeIncarnation, method: Method, action: str) -> None:
        attempt, order = make_attempt(self._next_attempt, now, victim, method, action, self._config)
        self._next_attempt += 1
        self._attempts[attempt.id] = attempt
        self._out.emit.append(order)

    def _cancel(self, attempt: Attempt) -> None:
        self._out.emit.append(CancelAttempt(attempt.id))
        if attempt.action == "on":
            attempt.live = False

    def _end_turn(self, now: Instant, victim: Victim) -> None:
        assert self._round is not None
        if not self._config.nodes.get(victim.node):
            self._failed(victim, "", f"no method to fence node {victim.node} is configured here")
        self._broadcast(TurnFailed(self._round.id, victim.incarnation, victim.turn, victim.last_error[:TEXT_MAX]))
        self._turn_over(now, victim, victim.turn)

    def _turn_over(self, now: Instant, victim: Victim, turn: int) -> None:
        victim.turn = turn + 1
        victim.method = 0
        victim.remote = ""
        if victim.turn % len(self._order) == 0:
            victim.not_before = now + self._retry

    def _finish(self) -> None:
        if self._done or self._round is None:
            return
        if any(victim.gates for victim in self._waiting_victims()):
            return
        for attempt in self._attempts.values():
            if attempt.action == "off" and attempt.victim.node in self._members:
                return  # FENCE-4
        for entry in self._round.failed:
            assert NodeIncarnation(entry.member.node, entry.member.incarnation) in self._ledger, "FENCE-1"
        self._done = True
        self._out.emit.append(RoundDone(self._round.id))

    def _rearm(self, now: Instant) -> None:
        deadline = FOREVER
        for attempt in self._attempts.values():
            deadline = min(deadline, attempt.gives_up_at)
        if self._running:
            for victim in self._waiting_victims():
                # One whose time has come waits for an answer, a message or a free device, not for time.
                if victim.not_before > now:
                    deadline = min(deadline, victim.not_before)
        self.deadline = deadline

    # --- what agents answer --------------------------------------------------------------------------------------

    def _attempt_done(self, now: Instant, event: AttemptDone) -> None:
        attempt = self._attempts.pop(event.attempt, None)
        if attempt is None:
            self._dropped += 1
            return
        text = event.text[:TEXT_MAX]
        if attempt.action == "on":
            if not event.ok and attempt.live:
                told_times = self._repeats.count(attempt.victim, attempt.method, text)
                self._out.emit.append(
                    FenceFailed(
                        attempt.victim, attempt.method, self._me, f"fenced, but not back on: {text}", told_times
                    )
                )
            return
        if not attempt.live:
            return  # given up by time: a timeout is a failure, whatever comes later
        if event.ok:
            self._attempt_succeeded(now, attempt, text, event.wall_seconds)
        else:
            self._attempt_failed(attempt, text or "the agent failed and did not say why")

    def _attempt_succeeded(self, now: Instant, attempt: Attempt, text: str, wall_seconds: int) -> None:
        fact = self._fact(
            attempt.victim,
            AGENT,
            attempt.proof,
            method=attempt.method,
            agent=attempt.agents,
            by=self._me,
            duration_ns=max(0, now - attempt.started),
            text=text,
            wall_seconds=wall_seconds,
        )
        self._learn(now, fact, tell=True)
        method = method_of(attempt, self._config)
        if method is not None and method.action == "reboot" and attempt.victim.node not in self._members:
            self._run(now, attempt.victim, method, "on")

    def _attempt_failed(self, attempt: Attempt, text: str) -> None:
        victim = self._victims.get(attempt.victim)
        if attempt.abandoned or victim is None or attempt.victim in self._ledger:
            return  # the next round starts over; or somebody else's word made it unnecessary
        assert self._order[victim.turn % len(self._order)] == self._me, "FENCE-7"
        self._failed(victim, attempt.method, text)
        victim.method += 1

    def _failed(self, victim: Victim, method: str, text: str) -> None:
        victim.failures += 1
        victim.last_error = text
        repeats = self._repeats.count(victim.incarnation, method, text)
        if worth_telling(repeats):
            self._out.emit.append(FenceFailed(victim.incarnation, method, self._me, text, repeats))

    def _give_up_late_attempts(self, now: Instant) -> None:
        for attempt_id in sorted(self._attempts):
            attempt = self._attempts[attempt_id]
            if now < attempt.gives_up_at:
                continue
            if attempt.live:
                self._cancel(attempt)
                attempt.live = False
                attempt.gives_up_at = now + GRACE
                if attempt.action == "off":
                    self._attempt_failed(attempt, "the agent did not end in time")
            else:
                del self._attempts[attempt_id]  # the runner broke its promise; waiting on would help nobody
                text = "the agent cannot be stopped, and is not waited for any longer"
                told_times = self._repeats.count(attempt.victim, attempt.method, text)
                self._out.emit.append(FenceFailed(attempt.victim, attempt.method, self._me, text, told_times))

    # --- what members say ----------------------------------------------------------------------------------------

    def _receive(self, now: Instant, peer: MemberId, message: Message) -> None:
        if message.round > (self._round.id if self._round is not None else 0):
            # The peer's round has begun and ours has not: it may be with members that are not here yet.
            if len(self._held) < HELD_MAX:
                self._held.append((peer, message))
            else:
                self._dropped += 1
            return
        if self._members.get(peer.node) != peer:
            self._dropped += 1
            return
        if isinstance(message, VictimDone):
            if message.victim in self._wanted or message.victim in self._victims:
                self._learn(now, message, tell=False)
            else:
                self._ledger.recall([message])
            return
        if self._round is None or message.round != self._round.id or not self._running:
            self._dropped += 1
        elif isinstance(message, TurnFailed):
            self._peer_failed(now, peer.node, message)
        elif isinstance(message, Attempting):
            self._peer_attempts(peer.node, message)
        elif isinstance(message, FencePlease):
            self._pleased(now, message)
        elif isinstance(message, HistoryQuery):
            self._out.send.append((peer, HistoryReply(self._round.id, self._ledger.recent(HISTORY_REPLY_MAX))))
        else:
            self._has_history = True
            self._ledger.recall(message.facts)

    def _peer_failed(self, now: Instant, peer: NodeId, message: TurnFailed) -> None:
        victim = self._victim_in_turn(peer, message.victim, message.turn)
        if victim is None:
            self._dropped += 1
            return
        victim.failures += 1
        victim.last_error = message.text
        self._turn_over(now, victim, message.turn)

    def _peer_attempts(self, peer: NodeId, message: Attempting) -> None:
        victim = self._victim_in_turn(peer, message.victim, message.turn)
        if victim is None:
            self._dropped += 1
            return
        victim.turn = message.turn
        victim.remote = message.method

    def _victim_in_turn(self, peer: NodeId, incarnation: NodeIncarnation, turn: int) -> Victim | None:
        """The victim, if that turn can be the peer's: this one or a later one, none of mine being between. It is later
        when the peer heard of the end of the turns between before this node did."""
        victim = self._victims.get(incarnation)
        count = len(self._order)
        if victim is None or incarnation in self._ledger or not victim.turn <= turn < victim.turn + count:
            return None
        if self._order[turn % count] != peer:
            return None
        if any(self._order[between % count] == self._me for between in range(victim.turn, turn)):
            return None
        return victim

    def _learn(self, now: Instant, fact: VictimDone, *, tell: bool) -> None:
        member = self._members.get(fact.victim.node)
        if member is not None and member.incarnation == fact.victim.incarnation:
            self._dropped += 1  # nobody fences a member; were it true, it would fail and be fenced again
            return
        if not self._ledger.record(fact, self._wanted.union(self._victims)):
            return
        self._out.emit.append(told(fact))
        self._repeats.forget(fact.victim)
        victim = self._victims.get(fact.victim)
        if victim is not None:
            victim.remote = ""
        for attempt_id in sorted(self._attempts):
            attempt = self._attempts[attempt_id]
            if attempt.victim == fact.victim and attempt.action == "off":
                self._cancel(attempt)
        if tell and self._running:
            self._broadcast(fact)

    def _fact(
        self,
        victim: NodeIncarnation,
        how: int,
        proof: int,
        *,
        by: NodeId,
        method: str = "",
        agent: str = "",
        duration_ns: Nanoseconds = 0,
        text: str = "",
        wall_seconds: int = 0,
    ) -> VictimDone:
        round_id = self._round.id if self._round is not None else 0
        return VictimDone(round_id, victim, how, proof, method, agent, by, duration_ns, text, wall_seconds)

    def _broadcast(self, message: Message) -> None:
        for node in sorted(self._members):
            if node != self._me:
                self._out.send.append((self._members[node], message))

    # --- what people and services ask ----------------------------------------------------------------------------

    def _acknowledged(self, now: Instant, event: ManualAck) -> None:
        waiting = [
            victim.incarnation
            for victim in self._waiting_victims()
            if victim.node == event.victim.node
            and event.victim.incarnation in (ANY_INCARNATION, victim.incarnation.incarnation)
        ]
        if not waiting:
            self._refuse(event.victim, f"node {event.victim.node} is not waiting to be fenced")
            return
        for victim in waiting:
            text = event.operator[:TEXT_MAX]
            self._learn(
                now,
                self._fact(victim, OVERRIDE, MANUAL, by=self._me, text=text, wall_seconds=event.wall_seconds),
                tell=True,
            )

    def _fenced_outside(self, now: Instant, event: External) -> None:
        if event.victim not in self._victims:
            self._refuse(event.victim, f"node {event.victim.node} is not waiting to be fenced")
            return
        fact = self._fact(
            event.victim,
            EXTERNAL,
            event.proof,
            by=self._me,
            text=event.text[:TEXT_MAX],
            wall_seconds=event.wall_seconds,
        )
        self._learn(now, fact, tell=True)

    def _requested(self, now: Instant, event: FenceRequest) -> None:
        if not self._running:
            self._refuse(event.victim, "no node is fenced without a quorate view: restore quorum, then ask again")
            return
        member = self._members.get(event.victim.node)
        if member is not None and event.victim.incarnation in (ANY_INCARNATION, member.incarnation):
            self._expel(NodeIncarnation(member.node, member.incarnation), event.reason[:TEXT_MAX])
            return
        if not self._hurry(now, event.victim):
            self._refuse(
                event.victim,
                f"node {event.victim.node} is not configured, is fenced already, has joined again clean, "
                f"or {REQUESTS_MAX} fence requests wait already",
            )
            return
        assert self._round is not None
        self._broadcast(FencePlease(self._round.id, event.victim, event.reason[:TEXT_MAX]))

    def _expel(self, member: NodeIncarnation, reason: str) -> None:
        """Whoever coordinates the next view has to know, and every member may become the one that does."""
        if member.node == self._me:
            self._refuse(member, f"node {member.node} does not fence itself: ask another node")
            return
        assert self._round is not None
        self._out.emit.append(ExpelNode(member, reason))
        self._broadcast(FencePlease(self._round.id, member, reason))

    def _pleased(self, now: Instant, message: FencePlease) -> None:
        member = self._members.get(message.victim.node)
        if member is None or member.incarnation != message.victim.incarnation:
            self._hurry(now, message.victim)
        elif member.node != self._me:
            self._out.emit.append(ExpelNode(message.victim, message.reason))

    def _hurry(self, now: Instant, wanted: NodeIncarnation) -> bool:
        """End the delay of this victim, or make it one. Incarnation 0 means every victim of that node there is."""
        known = [
            victim
            for victim in self._waiting_victims()
            if victim.node == wanted.node and wanted.incarnation in (ANY_INCARNATION, victim.incarnation.incarnation)
        ]
        for victim in known:
            if victim.waits_delay:
                victim.not_before = min(victim.not_before, now)
        return bool(known) or self._add_request(wanted, now)

    def _add_request(self, wanted: NodeIncarnation, now: Instant) -> bool:
        member = self._members.get(wanted.node)
        here = member is not None and wanted.incarnation in (ANY_INCARNATION, member.incarnation)
        waiting = sum(not victim.gates for victim in self._waiting_victims())
        if here or self._rejoined_clean(wanted) or waiting >= REQUESTS_MAX or wanted.node not in self._config.nodes:
            return False
        if wanted.incarnation == ANY_INCARNATION and wanted not in self._wanted:
            self._ledger.forget(wanted)  # it was fenced on an earlier request, and may be up again since
        if wanted in self._ledger:
            return False
        self._victims[wanted] = Victim(wanted, now, gates=False)
        return True

    def _refuse(self, victim: NodeIncarnation, text: str) -> None:
        self._out.emit.append(Refused(victim, text))
