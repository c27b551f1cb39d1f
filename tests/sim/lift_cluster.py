"""Simulation of recovery control: the lifts of 2-5 nodes over a model of their surroundings; one seed is one run.

    python -m tests.sim.lift_cluster 17            run one seed and print its story
    python -m tests.sim.lift_cluster 0..2000       run many; prints the first violation of each kind

What is modelled. *Channels*: FIFO, each with its own random delay, those to oneself too; a session that breaks loses
what is under way in both directions, and what is sent later arrives. *Disks*: one log for membership, one for the lift;
what an engine wants durable takes a random time, and what depends on it waits (`corral.driver`). *Membership*: promise,
acceptance and installation by one coordinator, each message with its own delay, over the real `State` and the real sum
of promises; attempts are abandoned by newer ones; views are made of all or of some; nodes crash between any two steps
and return with a new incarnation, with or without participants that outlived them; clean leaves; power cuts of
everything. *Fencing*: fails for a while, then takes effect, or a clean rejoin averts it; members hear of it at various
times and wait for their lease guard. *Participants*: join groups of stacks of up to three levels and groups without a
stack, leave cleanly, die in the middle of a round, lose each other, and need a random time for each start.

The checks are in `lift_checks.py`. Which faults and delays a run has is drawn from its seed.
"""

import hashlib
import heapq
import sys
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

from corral.api.cman import FENCE_GROUP
from corral.base.engine import TICK, Ready, Received
from corral.base.ids import NO_VIEW, MemberId, NodeId, NodeIncarnation, ViewId
from corral.base.time import FOREVER, MILLISECOND, SECOND
from corral.base.view import Round, View
from corral.base.world import ProcessId
from corral.cman import agreement
from corral.cman.lift import LiftEngine
from corral.cman.lift_events import (
    EvictLocal,
    Fenced,
    FinishGroup,
    Installed,
    Left,
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
from corral.cman.lift_wire import ATTACHMENT_CODEC, CODEC, STATE_CODEC, Attachment, Begin, Done, LiftState
from corral.cman.quorum import first_record
from corral.cman.state import first_state, recover
from corral.cman.wire import RECORDS, STATEFUL, AcceptedView, ActiveView, InstalledView, Promise, Propose, Started
from corral.cman.wire import Promised as PromisedRecord
from tests.sim.lift_checks import Checks, Membership, Violation

RECOVER = 300 * MILLISECOND
SETTLE = 30 * SECOND  # after the last fault everything is settled by then
STEPS_MAX = 100_000
GROUPS = {"dlm:home": 1, "gfs:home": 2, "app:home": 3, "dlm:data": 1, "gfs:data": 2, "votes": 1}
FAULTS = ("crash", "power", "break", "subset", "again", "leave", "die", "reach")


class Disk:
    """The log of one engine in one life: batches become durable in order, each after a random time."""

    def __init__(self, life: "Life", delay: int, write: Callable[[list[Any]], None]) -> None:
        self.life = life
        self.delay = delay
        self.write = write
        self.waiting: list[tuple[list[Any], Callable[[], None]]] = []
        self.writing: list[tuple[list[Any], Callable[[], None]]] = []

    def put(self, records: list[Any], then: Callable[[], None]) -> None:
        """`then` runs when they, and all put before, are durable."""
        if not (records or self.waiting or self.writing):
            then()
            return
        self.waiting.append((records, then))
        if not self.writing:
            self.begin()

    def begin(self) -> None:
        self.writing, self.waiting = self.waiting, []
        self.life.later(self.delay, self.written)

    def written(self) -> None:
        batch = self.writing
        self.write([record for records, _ in batch for record in records])
        for _, then in batch:
            if not self.life.runs:
                return
            then()
        self.writing = []
        if self.waiting and self.life.runs:
            self.begin()

    def crash(self, rng: Random) -> None:
        """Of what was being written a first part may have reached the disk."""
        records = [record for batch, _ in self.writing for record in batch]
        if records:
            self.write(records[: rng.randint(0, len(records))])


class Machine:
    """One node: what its disks hold, over all lives."""

    def __init__(self, checks: Checks, node: NodeId, records: list[Any]) -> None:
        self.checks = checks
        self.node = node
        self.cman = [RECORDS.encode(record) for record in records]
        self.lift: list[bytes] = []
        self.life: Life | None = None  # the newest
        self.started_high = 0

    def lift_state(self) -> LiftState:
        return STATE_CODEC.decode(self.lift[-1]) if self.lift else LiftState()

    def write_cman(self, records: list[Any]) -> None:
        self.cman.extend(RECORDS.encode(record) for record in records)

    def write_lift(self, states: list[LiftState]) -> None:
        for state in states:
            self.checks.written(self.lift_state(), state, self.node)
            self.lift.append(STATE_CODEC.encode(state))


class Participant:
    """A process with services in some groups. What it wants of each: `in`, `out`, or nothing any more."""

    def __init__(self, life: "Life", member: MemberId) -> None:
        self.life = life
        self.member = member
        self.alive = True  # its process runs; `dying`: it was killed and is not gone yet
        self.dying = False
        self.groups: dict[str, str] = {}  # -> asking, in, leaving
        self.joins: dict[str, int] = {}  # how often it asked to join
        self.left: dict[str, int] = {}  # with which of its joins it left
        self.asked_to_leave: dict[str, int] = {}  # with which of its joins it asked to leave last
        self.starting: dict[str, int] = {}
        self.serving: set[str] = set()  # was told to start, and not to stop
        self.down: set[tuple[str, MemberId]] = set()


class Attempt:
    """One proposal of a coordinator, as it goes."""

    def __init__(self, view_id: ViewId, lives: "list[Life]", leaving: frozenset[NodeIncarnation]) -> None:
        self.lives = lives
        self.leaving = leaving
        self.engine = agreement.Attempt(view_id, tuple(life.me for life in lives))
        self.known: dict[NodeIncarnation, tuple[set[Membership], dict[Membership, int], set[Membership]]] = {}
        self.installed: Installed | None = None

    @property
    def id(self) -> ViewId:
        return self.engine.id


class Life:
    """One incarnation of one node: a lift, its driver, and membership in miniature."""

    def __init__(self, cluster: "Cluster", machine: Machine, *, clean: bool) -> None:
        self.cluster = cluster
        self.machine = machine
        self.clean = clean
        state = recover(map(RECORDS.decode, machine.cman))
        incarnation = state.next_incarnation(100)
        machine.write_cman([Started(incarnation)])
        self.state = recover(map(RECORDS.decode, machine.cman))
        self.me = NodeIncarnation(machine.node, incarnation)
        self.runs = True
        self.acts = False  # participants of it serve, or live on after it
        process = ProcessId(machine.node * 1000 + incarnation, 1, "boot")
        self.lift = LiftEngine(self.me, process, cluster.nodes, RECOVER, machine.lift_state())
        rng = cluster.rng
        self.cman_disk = Disk(self, rng.choice((0, 1, 20)) * MILLISECOND, machine.write_cman)
        self.lift_disk = Disk(self, rng.choice((0, 1, 20)) * MILLISECOND, machine.write_lift)
        self.ticking = FOREVER
        self.installed: View | None = None
        self.stopped = True
        self.promised: ViewId = NO_VIEW
        self.attempts: dict[ViewId, Attempt] = {}  # that it promised
        self.attached_round = 0
        self.serial = 0
        self.fence_round: Round | None = None
        self.fence_waits: set[NodeIncarnation] = set()
        self.guard = 0
        # What the checks keep of it.
        self.known: set[Membership] = set()
        self.known_out: dict[Membership, int] = {}
        self.known_left: set[Membership] = set()
        self.newest: dict[str, int] = {}
        self.finished: dict[str, int] = {}

    def later(self, most: int, fn: Callable[..., None], *arguments: Any) -> None:
        """In at most that many ns, if this life still runs then."""
        self.cluster.at(self.cluster.now + self.cluster.rng.randint(0, most), self.if_running, fn, arguments)

    def if_running(self, fn: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        if self.runs:
            fn(*arguments)

    # --- the driver, in miniature --------------------------------------------------------------------------------

    def feed(self, event: Any) -> None:
        if not self.runs:
            return
        self.lift.step(self.cluster.now, event)
        ready = self.lift.ready()
        for peer, message in ready.send:
            self.cluster.transmit(self, peer, message)
        self.lift_disk.put(ready.persist, lambda: self.follow(ready))
        if self.lift.deadline < self.ticking:
            self.ticking = self.lift.deadline
            self.cluster.at(self.ticking, self.if_running, self.tick, ())

    def tick(self) -> None:
        self.ticking = FOREVER
        self.feed(TICK)

    def follow(self, ready: Ready) -> None:
        for peer, message in ready.then_send:
            self.cluster.transmit(self, peer, message)
        for event in ready.emit:
            if self.runs:
                self.emitted(event)

    # --- membership, in miniature --------------------------------------------------------------------------------

    def prepare(self, attempt: Attempt) -> None:
        if attempt.id.epoch <= self.state.promised.epoch:
            return
        self.state.apply(PromisedRecord(attempt.id))
        self.attempts[attempt.id] = attempt
        self.cman_disk.put([PromisedRecord(attempt.id)], lambda: self.feed(Promised(attempt.id)))

    def promise(self, event: Stopped) -> None:
        self.fence_round = None
        if event.id != self.state.promised:
            return
        self.promised = event.id
        self.attached_round = event.attachment.state.round
        attempt = self.attempts[event.id]
        attempt.known[self.me] = set(self.known), dict(self.known_out), set(self.known_left)
        state = self.state
        promise = Promise(
            event.id.epoch,
            tuple(state.accepted),
            state.left,
            state.installed,
            state.active,
            state.record,
            0 if self.clean else STATEFUL,
            ATTACHMENT_CODEC.encode(event.attachment),
        )
        coordinator = self.cluster.coordinator(attempt)
        coordinator.later(self.cluster.delay, coordinator.hear_promise, attempt, self.me, promise)

    def hear_promise(self, attempt: Attempt, member: NodeIncarnation, promise: Promise) -> None:
        promises = attempt.engine.promises
        promises[member.node] = promise
        if attempt.engine.missing() or attempt.engine.proposal is not None:
            return
        newest = agreement.newest_quorate(view for each in promises.values() for view in each.accepted)
        outsiders = agreement.outsiders(attempt.engine, newest)
        for outsider in outsiders:
            life = self.cluster.lives[outsider]
            life.later(self.cluster.delay, self.cluster.exclude, life)
        if outsiders:
            return
        proposal = agreement.proposal_of(attempt.engine, self.cluster.record, attempt.leaving)
        attempt.engine.proposal = proposal
        for life in attempt.lives:
            life.later(self.cluster.delay, life.accept, attempt, proposal)

    def accept(self, attempt: Attempt, proposal: Propose) -> None:
        if self.state.promised != attempt.id:
            return
        record = AcceptedView(proposal.view, proposal.left, proposal.active)
        self.state.apply(record)
        coordinator = self.cluster.coordinator(attempt)
        self.cman_disk.put(
            [record], lambda: coordinator.later(self.cluster.delay, coordinator.hear_accept, attempt, self.me)
        )

    def hear_accept(self, attempt: Attempt, member: NodeIncarnation) -> None:
        attempt.engine.accepts.add(member.node)
        proposal = attempt.engine.proposal
        assert proposal is not None
        if attempt.engine.missing():
            return
        self.cluster.installs(proposal)
        for life in attempt.lives:
            life.later(self.cluster.delay, life.install, attempt, proposal)

    def install(self, attempt: Attempt, proposal: Propose) -> None:
        if self.state.promised != attempt.id:
            return
        record = InstalledView(attempt.id)
        self.state.apply(record)
        attachments: dict[NodeIncarnation, Attachment] = {
            carried.member: ATTACHMENT_CODEC.decode(carried.attachment) for carried in proposal.carried
        }
        event = Installed(
            proposal.view,
            attachments,
            proposal.accepted,
            first=proposal.active.epoch == 0,
            left=proposal.left,
            unclean=agreement.unclean(proposal),
        )
        self.cman_disk.put([record], lambda: self.told_installed(attempt, event))

    def told_installed(self, attempt: Attempt, event: Installed) -> None:
        self.installed = event.view
        for known, known_out, known_left in attempt.known.values():
            self.known |= known
            self.known_left |= known_left
            for membership, round_id in known_out.items():
                self.known_out[membership] = min(round_id, self.known_out.get(membership, round_id))
        self.feed(event)

    # --- what the lift decides -----------------------------------------------------------------------------------

    def emitted(self, event: Any) -> None:
        cluster = self.cluster
        cluster.note(self, event)
        if isinstance(event, Stopped):
            self.promise(event)
        elif isinstance(event, StopAll):
            self.stopped = True
            self.stop(None)
        elif isinstance(event, StartFence):
            cluster.checks.fence_started(self, event)
            self.stopped = False
            self.start_fence(event)
        elif isinstance(event, StartGroup):
            cluster.checks.group_started(self, event)
            self.start_group(event)
        elif isinstance(event, FinishGroup):
            cluster.checks.finished(self, event)
        elif isinstance(event, ViewActive):
            cluster.checks.active(self, event.view)
            if event.view.id > self.state.active:
                record = ActiveView(event.view.id)
                self.state.apply(record)
                self.cman_disk.put([record], lambda: None)
        elif isinstance(event, Left):
            self.left_group(event.member, event.group)
        elif isinstance(event, Refused):
            cluster.count("refused")
            if "slot" not in event.reason and "it left" not in event.reason:
                raise Violation(f"LIFT-10: the join of {event.member} to {event.group} is refused: {event.reason}")
            groups = cluster.participants[event.member].groups
            if groups.get(event.group) == "asking":  # else it has given up, and Left answers that
                del groups[event.group]
        elif isinstance(event, EvictLocal):
            cluster.count("evicted")
            participant = cluster.participants.get(event.member)
            if participant is not None:
                cluster.kill(participant)

    def local(self) -> list[Participant]:
        return [p for _, p in sorted(self.cluster.participants.items()) if p.life is self and p.alive]

    def running(self) -> set[str]:
        return {group for participant in self.local() for group in participant.serving}

    def stop(self, groups: Sequence[str] | None) -> None:
        for participant in self.local():
            for group in sorted(participant.serving) if groups is None else groups:
                participant.serving.discard(group)
                participant.starting.pop(group, None)

    def start_group(self, decision: StartGroup) -> None:
        round, name = decision.round, decision.group.name
        self.stop(decision.stops)
        for participant in self.local():
            member = participant.member
            if member not in decision.local or participant.dying:
                continue
            self.acts = True
            if participant.groups.get(name) == "asking":
                participant.groups[name] = "in"
            participant.serving.add(name)
            participant.starting[name] = round.id
            self.later(self.cluster.service_delay, self.service_done, participant, round)
            for group, peer in sorted(participant.down):
                if group == name and peer in round.member_ids:
                    self.feed(LocalReach(member, name, peer, True))

    def service_done(self, participant: Participant, round: Round) -> None:
        if participant.dying or not participant.alive or participant.starting.get(round.group) != round.id:
            return
        del participant.starting[round.group]
        checks = self.cluster.checks
        checks.done[checks.view_of(self, round).id, round.id].add(participant.member)
        self.feed(LocalDone(participant.member, round.group, round.id))

    def left_group(self, member: MemberId, group: str) -> None:
        participant = self.cluster.participants[member]
        self.cluster.count("left")
        if participant.groups.get(group) == "leaving":
            participant.left[group] = participant.joins[group]
            del participant.groups[group]
            participant.serving.discard(group)
            participant.starting.pop(group, None)

    # --- fencing -------------------------------------------------------------------------------------------------

    def start_fence(self, decision: StartFence) -> None:
        self.fence_round = decision.round
        self.guard = self.cluster.now + self.cluster.rng.choice((0, 50)) * MILLISECOND
        victims = [NodeIncarnation(entry.member.node, entry.member.incarnation) for entry in decision.round.failed]
        self.fence_waits = set(victims)
        back = {member.node for member in decision.clean}
        for victim in victims:
            settled = victim not in self.cluster.checks.owed and not self.cluster.lives[victim].acts
            if victim.node in back or settled:
                self.cluster.settle(victim)
                self.later(self.cluster.delay, self.told_fenced, victim)
            else:
                self.cluster.fence(victim)
        self.pass_fence(decision.round)

    def told_fenced(self, victim: NodeIncarnation) -> None:
        if self.fence_round is not None and victim in self.fence_waits:
            self.fence_waits.discard(victim)
            self.feed(Fenced(victim))
            self.pass_fence(self.fence_round)

    def pass_fence(self, round: Round) -> None:
        if self.fence_waits or self.fence_round is not round:
            return
        if self.cluster.now < self.guard:
            self.cluster.at(self.guard, self.if_running, self.pass_fence, (round,))
            return
        self.fence_round = None
        self.cluster.checks.fence_passed.add((self.cluster.checks.view_of(self, round).id, self.me))
        self.feed(LocalDone(self.me.corrald(), FENCE_GROUP, round.id))


class Cluster:
    """`go` hurts it for a while, heals it and waits for it."""

    def __init__(self, seed: int, kinds: Sequence[str] = ()) -> None:
        self.rng = rng = Random(seed)
        self.nodes = tuple(range(1, rng.choice((2, 3, 3, 3, 4, 5)) + 1))
        self.kinds = list(kinds) or rng.sample(FAULTS, rng.randint(1, len(FAULTS)))
        self.delay = rng.choice((1, 5, 20)) * MILLISECOND
        self.service_delay = rng.choice((1, 10, 100)) * MILLISECOND
        self.fence_delay = rng.choice((1, 50, 400)) * MILLISECOND
        self.pace = rng.choice((10, 40, 150)) * MILLISECOND  # between two faults or wishes
        self.slots = rng.choice((2, 4, 16))
        self.names = sorted(rng.sample(sorted(GROUPS), rng.choice((1, 2, 3, 6))))
        self.record = first_record(dict.fromkeys(self.nodes, 1), SECOND)
        self.checks = Checks(self)
        self.machines = {node: Machine(self.checks, node, first_state(self.record)) for node in self.nodes}
        self.lives: dict[NodeIncarnation, Life] = {}
        self.participants: dict[MemberId, Participant] = {}
        self.arrival: dict[tuple[NodeIncarnation, NodeIncarnation], int] = {}
        self.sessions: dict[frozenset[NodeIncarnation], int] = {}
        self.slowness: dict[tuple[NodeId, NodeId], int] = {}
        self.fencing: set[NodeIncarnation] = set()
        self.leaving: set[NodeIncarnation] = set()
        self.attempt: Attempt | None = None
        self.epoch = 0
        self.calm = False
        self.now = SECOND
        self.heap: list[tuple[int, int, Callable[..., None], tuple[Any, ...]]] = []
        self.sequence = 0
        self.faults = 0
        self.counts: dict[str, int] = {}
        self.digest = hashlib.sha256()
        self.story: list[str] | None = None

    # --- machinery -----------------------------------------------------------------------------------------------

    def at(self, when: int, fn: Callable[..., None], *arguments: Any) -> None:
        self.sequence += 1
        heapq.heappush(self.heap, (max(when, self.now), self.sequence, fn, arguments))

    def after(self, most: int, fn: Callable[..., None], *arguments: Any) -> None:
        self.at(self.now + self.rng.randint(0, most), fn, *arguments)

    def run_until(self, end: int, done: Callable[[], bool] | None = None) -> None:
        steps = 0
        while self.heap and self.heap[0][0] <= end:
            self.now, _, fn, arguments = heapq.heappop(self.heap)
            fn(*arguments)
            steps += 1
            if steps > STEPS_MAX:
                raise Violation("LIFT-10: the engines keep busy without end")
            if done is not None and done():
                return
        self.now = end

    def count(self, what: str) -> None:
        self.counts[what] = self.counts.get(what, 0) + 1

    def tell(self, what: str) -> None:
        line = f"{(self.now - SECOND) / MILLISECOND:10.3f} {what}"
        self.digest.update(line.encode())
        if self.story is not None:
            self.story.append(line)

    def note(self, life: Life, event: Any) -> None:
        if not isinstance(event, Stopped):
            fields = {name: getattr(event, name) for name in sorted(event.__slots__)}
            self.tell(f"{life.me.node}.{life.me.incarnation} {type(event).__name__} {fields}")

    # --- channels ------------------------------------------------------------------------------------------------

    def transmit(self, life: Life, peer: MemberId, message: Any) -> None:
        if isinstance(message, Begin):
            self.checks.begun(life, message)
        elif isinstance(message, Done):
            durable = life.machine.lift_state().round
            if durable < message.round:
                raise Violation(f"LIFT-3: node {life.me.node} did round {message.round} with {durable} on its disk")
        target = self.lives.get(NodeIncarnation(peer.node, peer.incarnation))
        if target is None:
            return
        pair = (life.me, target.me)
        slowest = self.slowness.setdefault((pair[0].node, pair[1].node), self.delay * self.rng.choice((1, 1, 1, 5)))
        self.arrival[pair] = max(self.now + self.rng.randint(0, slowest), self.arrival.get(pair, 0))
        session = self.sessions.get(frozenset(pair), 0)
        self.at(self.arrival[pair], self.deliver, life, target, session, CODEC.encode(message))

    def deliver(self, life: Life, target: Life, session: int, payload: bytes) -> None:
        if target.runs and self.sessions.get(frozenset((life.me, target.me)), 0) == session:
            self.feed_message(life, target, payload)

    def feed_message(self, life: Life, target: Life, payload: bytes) -> None:
        message = CODEC.decode(payload)
        self.tell(f"{life.me.node} -> {target.me.node} {message}")
        target.feed(Received(life.me.corrald(), message))

    def break_sessions(self, life: Life, others: list[Life]) -> None:
        for other in others:
            if other is not life:
                pair = frozenset((life.me, other.me))
                self.sessions[pair] = self.sessions.get(pair, 0) + 1

    # --- lives ---------------------------------------------------------------------------------------------------

    def running(self) -> list[Life]:
        lives = [machine.life for _, machine in sorted(self.machines.items())]
        return [life for life in lives if life is not None and life.runs]

    def start(self, node: NodeId) -> None:
        machine = self.machines[node]
        if machine.life is not None and machine.life.runs:
            return
        clean = self.calm or self.rng.random() < 0.8
        for life in self.lives.values():
            if life.me.node == node and clean:
                life.acts = False  # whoever outlived it was killed before this life joins
        clean = clean or not any(life.acts for life in self.lives.values() if life.me.node == node)
        life = machine.life = Life(self, machine, clean=clean)
        self.lives[life.me] = life
        self.tell(f"{life.me} starts {'clean' if clean else 'stateful'}")

    def crash(self, life: Life, *, survivors: bool) -> None:
        if not life.runs:
            return
        self.tell(f"{life.me} crashes{' and leaves participants' if survivors else ''}")
        life.cman_disk.crash(self.rng)
        life.lift_disk.crash(self.rng)
        life.runs = False
        self.leaving.discard(life.me)
        for participant in life.local():
            participant.alive = False
        if not survivors:
            life.acts = False
        if self.rng.random() < 0.5:  # else what it sent still arrives
            self.break_sessions(life, self.running())

    def exclude(self, life: Life) -> None:
        """It learnt that a quorate view goes on without it: its participants end before it does."""
        self.count("excluded")
        self.crash(life, survivors=False)
        self.after(self.pace, self.start, life.me.node)

    def fence(self, victim: NodeIncarnation) -> None:
        if victim not in self.fencing:
            self.fencing.add(victim)
            tries = 1 if self.calm else self.rng.choice((1, 1, 3))
            self.after(self.fence_delay * tries, self.cut_off, victim)

    def cut_off(self, victim: NodeIncarnation) -> None:
        self.fencing.discard(victim)
        if not any(victim in life.fence_waits for life in self.running() if life.fence_round is not None):
            return  # nobody wants it any more; who wants it again begins again
        life = self.lives[victim]
        self.tell(f"{victim} is cut off")
        self.crash(life, survivors=False)
        life.acts = False
        self.settle(victim)
        for other in self.running():
            other.later(self.delay, other.told_fenced, victim)
        self.after(self.pace * 4, self.start, victim.node)

    def settle(self, victim: NodeIncarnation) -> None:
        life = self.lives[victim]
        if life.acts:
            raise Violation(f"LIFT-2: the fence of {victim}, whose participants act, is averted")
        self.checks.settled(victim)

    # --- views ---------------------------------------------------------------------------------------------------

    def coordinator(self, attempt: Attempt) -> Life:
        return next(life for life in attempt.lives if life.me.node == attempt.id.coordinator)

    def propose(self, lives: list[Life]) -> None:
        lives = [life for life in lives if life.me not in self.leaving]
        if not lives:
            return
        self.epoch += 1
        coordinator = lives[0] if self.rng.random() < 0.7 else self.rng.choice(lives)
        leaving = frozenset(self.leaving)
        attempt = self.attempt = Attempt(ViewId(self.epoch, coordinator.me.node), lives, leaving)
        self.tell(f"{coordinator.me} proposes {[str(life.me) for life in lives]}")
        for life in lives:
            life.later(self.delay, life.prepare, attempt)

    def installs(self, proposal: Propose) -> None:
        view = proposal.view
        self.count("installed")
        self.tell(f"{view} is installed")
        self.checks.views[view.id] = view
        for leaver in proposal.left:
            if view.quorate:
                self.checks.left.add(leaver)  # else those who come back later may not hear of it, and fence it
            self.checks.settled(leaver)
            life = self.lives[leaver]
            if leaver in self.leaving:
                life.later(self.delay, self.crash_of_leaver, life)

    def crash_of_leaver(self, life: Life) -> None:
        self.crash(life, survivors=False)
        self.after(self.pace * 4, self.start, life.me.node)

    def whole(self) -> bool:
        lives = self.running()
        views = {life.installed for life in lives}
        if len(lives) < len(self.nodes) or len(views) != 1 or None in views or self.leaving:
            return False
        view = lives[0].installed
        assert view is not None
        return view.members == tuple(life.me for life in lives) and all(
            life.state.promised == view.id for life in lives
        )

    def look(self) -> None:
        """What membership does by itself: a view of all who run, when there is none."""
        lives = self.running()
        views = {life.installed for life in lives}
        view = next(iter(views)) if len(views) == 1 else None
        fits = (
            view is not None
            and view.members == tuple(life.me for life in lives if life.me not in self.leaving)
            and all(life.state.promised == view.id for life in lives)
        )
        if not fits:
            some = "subset" in self.kinds and not self.calm and self.rng.random() < 0.3
            self.propose([life for life in lives if self.rng.random() < 0.6] if some else lives)
        self.at(self.now + 8 * self.delay + 120 * MILLISECOND + self.rng.randint(0, 2 * self.pace), self.look)

    # --- participants --------------------------------------------------------------------------------------------

    def arrive(self, life: Life) -> None:
        life.serial += 1
        member = MemberId(life.me.node, life.me.incarnation, life.serial)
        participant = self.participants[member] = Participant(life, member)
        wanted = [name for name in self.names if self.rng.random() < 0.6] or [self.rng.choice(self.names)]
        for name in wanted:
            life.later(self.rng.choice((0, self.pace)), self.ask, participant, name)

    def ask(self, participant: Participant, name: str) -> None:
        if participant.dying or not participant.alive or name in participant.groups:
            return
        if participant.life.me in self.leaving:
            return
        participant.groups[name] = "asking"
        participant.joins[name] = participant.joins.get(name, 0) + 1
        member = participant.member
        self.tell(f"{member} asks to join {name}")
        process = ProcessId(member.node * 1000 + member.serial, 2, "boot")
        participant.life.feed(
            LocalJoin(member, name, GROUPS[name], self.slots, f"host{member.node}:{member.serial}", b"ticket", process)
        )

    def leave_group(self, participant: Participant, name: str) -> None:
        self.tell(f"{participant.member} leaves {name}")
        participant.groups[name] = "leaving"
        participant.asked_to_leave[name] = participant.joins[name]
        participant.life.feed(LocalLeave(participant.member, name))

    def kill(self, participant: Participant) -> None:
        if not participant.dying and participant.alive:
            self.tell(f"{participant.member} is killed")
            participant.dying = True
            participant.life.later(self.rng.choice((0, self.pace)), self.gone, participant)

    def gone(self, participant: Participant) -> None:
        participant.alive = False
        self.tell(f"{participant.member} is gone")
        participant.life.feed(LocalGone(participant.member))

    def wish(self) -> None:
        """What participants want of their own will."""
        if self.calm:
            return
        lives = [life for life in self.running() if life.me not in self.leaving]
        here = [p for life in lives for p in life.local() if not p.dying]
        if lives and (len(here) < 2 or self.rng.random() < 0.4) and len(here) < 8:
            self.arrive(self.rng.choice(lives))
        elif here:
            participant = self.rng.choice(here)
            groups = sorted(name for name, what in participant.groups.items() if what != "leaving")
            if groups and self.rng.random() < 0.6:
                self.leave_group(participant, self.rng.choice(groups))
            else:
                self.ask(participant, self.rng.choice(self.names))
        self.at(self.now + self.rng.randint(0, 2 * self.pace), self.wish)

    # --- faults --------------------------------------------------------------------------------------------------

    def fault(self) -> None:
        if self.calm:
            return
        lives = self.running()
        kind = self.rng.choice(self.kinds)
        self.faults += 1
        if kind == "crash" and lives:
            life = self.rng.choice(lives)
            self.crash(life, survivors=self.rng.random() < 0.5)
            self.after(self.pace * 8, self.start, life.me.node)
        elif kind == "power" and self.rng.random() < 0.3:
            for node in self.nodes:
                self.power_off(node)
        elif kind == "break" and len(lives) > 1:
            one, other = self.rng.sample(lives, 2)
            self.break_sessions(one, [other])
            self.after(self.pace, self.reform)
        elif kind == "again":
            self.propose_again()
        elif kind == "leave" and len(stay := [life for life in lives if life.me not in self.leaving]) > 1:
            self.leave(self.rng.choice(stay))
        else:
            self.hurt_participants(kind)
        self.at(self.now + self.rng.choice((0, 1, 2, 5)) * self.rng.randint(0, self.pace), self.fault)

    def power_off(self, node: NodeId) -> None:
        for life in list(self.lives.values()):
            if life.me.node == node:
                self.crash(life, survivors=False)
                life.acts = False
        self.after(self.pace * 4, self.start, node)

    def propose_again(self) -> None:
        """A view like the last one: a session broke."""
        if not self.calm:
            self.reform()

    def reform(self) -> None:
        self.propose(self.running())

    def leave(self, life: Life) -> None:
        self.tell(f"{life.me} leaves the cluster")
        for participant in life.local():
            participant.alive = False
        life.acts = False
        self.leaving.add(life.me)

    def hurt_participants(self, kind: str) -> None:
        here = [p for life in self.running() for p in life.local() if not p.dying]
        if not here:
            return
        participant = self.rng.choice(here)
        if kind == "die":
            self.kill(participant)
        elif kind == "reach" and participant.groups:
            name = self.rng.choice(sorted(participant.groups))
            peers = [p for p in here if name in p.groups and p is not participant]
            if peers:
                peer = self.rng.choice(peers)
                both = self.rng.random() < 0.3
                for one, other in ((participant, peer), (peer, participant))[: 2 if both else 1]:
                    self.lose(one, name, other.member)
                    if not both:
                        self.after(self.pace * 4, self.reach, one, name, other.member)

    def lose(self, participant: Participant, name: str, peer: MemberId) -> None:
        participant.down.add((name, peer))
        participant.life.feed(LocalReach(participant.member, name, peer, True))

    def reach(self, participant: Participant, name: str, peer: MemberId) -> None:
        participant.down.discard((name, peer))
        participant.life.feed(LocalReach(participant.member, name, peer, False))

    # --- the run -------------------------------------------------------------------------------------------------

    def unsettled(self) -> str:
        """What is not as it should be after the faults; empty when all is."""
        if not self.whole():
            return "no whole view"
        lives = self.running()
        inactive = [life.me.node for life in lives if not life.lift.active]
        waits = {life.me.node: life.lift.waiting_for() for life in lives if life.lift.waiting_for()}
        if inactive:
            return f"the view is not active on {inactive}, waiting for {waits}"
        if any(life.lift.deadline < FOREVER for life in lives):
            return f"a judgement is due, waiting for {waits}"
        wanted: dict[str, set[MemberId]] = {}
        for member, participant in sorted(self.participants.items()):
            for name, what in sorted(participant.groups.items()):
                if participant.alive and participant.life.runs:
                    if what != "in" or participant.dying:
                        return f"{member} is {'dying' if participant.dying else what} in {name}, waiting for {waits}"
                    wanted.setdefault(name, set()).add(member)
        for life in lives:
            table = {name: {entry.member for entry in group.members} for name, group in life.lift.groups.items()}
            if table != wanted:
                return f"node {life.me.node} has members {table}, not {wanted}, waiting for {waits}"
            for name in sorted(wanted):
                if life.finished.get(name) != life.newest.get(name) or name not in life.finished:
                    return f"{name} has not finished on node {life.me.node}, waiting for {waits}"
        return str(waits) if waits else ""

    def go(self) -> "Cluster":
        for node in self.nodes:
            self.after(self.pace, self.start, node)
        self.after(self.pace, self.look)
        self.after(self.pace, self.wish)
        self.at(self.now + 3 * self.pace, self.fault)
        self.run_until(self.now + self.pace * self.rng.choice((20, 60, 100)))
        self.calm = True
        self.tell("the faults end")
        for node in self.nodes:
            self.start(node)
        self.run_until(self.now + SETTLE, lambda: not self.unsettled())
        self.checks.check_settled()
        self.run_until(self.now + SECOND)  # what is still under way changes nothing
        self.checks.check_settled()
        return self


def run(seed: int, kinds: Sequence[str] = ()) -> str:
    """Runs a seed; returns the digest of what happened. Raises Violation, or an engine's assert."""
    return Cluster(seed, kinds).go().digest.hexdigest()


def main(argv: list[str]) -> int:
    seen: dict[str, int] = {}
    for argument in argv or ["0..200"]:
        first, _, last = argument.partition("..")
        for seed in range(int(first), int(last or first) + 1):
            cluster = Cluster(seed)
            if not last:
                cluster.story = []
            try:
                cluster.go()
            except AssertionError as error:
                kind = str(error).partition(":")[0]
                seen[kind] = seen.get(kind, 0) + 1
                if seen[kind] == 1 or not last:
                    print("\n".join(cluster.story or ()), f"seed {seed}: {error}", sep="\n")
            else:
                if not last:
                    print("\n".join(cluster.story or ()), f"seed {seed}: {cluster.counts}", sep="\n")
    if seen:
        print(f"violations: {seen}")
    return 1 if seen else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
