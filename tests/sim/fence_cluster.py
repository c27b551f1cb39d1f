"""Simulation of fencing: engines of 3-5 nodes, a lift that abandons rounds, agents that fail; one seed is one run.

    python -m tests.sim.fence_cluster 17            run one seed and print what happened
    python -m tests.sim.fence_cluster 0..2000       run many; prints the first violation

What is modelled. A *life* is one incarnation of a node; it *acts* from its first view until it is really gone. Faults:
lives that die, lives that are cut off and go on acting (and fencing), returns as a new life (clean: the old one is
gone; stateful: it may still act), clean leaves and leaves that end in a crash, views that follow one another faster
than rounds end, lost messages at every change of view. Agents: succeed, fail (some at once), hang, take effect and then
fail, never answer. The lift is a dumb one: failed = every member since the last active view that is not here, did not
leave and is not known (to it) to be fenced. A joiner on which an agent works gets WAIT twice: before a view with it is
proposed (or its knocking would stop the agent for ever) and, because one may have begun meanwhile, when the view is
promised.

Checked at every step: FENCE-1 (a node is told fenced, and a round is done, only when the life does not act), FENCE-2
(no attempt against a member), FENCE-4 (a round is done without own agents at work on a member; where joins are answered
WAIT, no agent of a member hits a member that joined clean), FENCE-7 (one fencer a victim and round). After the faults
stop FENCE-3: the last round ends within a bound.
"""

import hashlib
import heapq
import sys
from collections.abc import Callable
from random import Random
from typing import Any

from corral.api.fence import Device, FenceConfig, Method, NodeFenced, NodeFencing
from corral.base.engine import TICK, Received
from corral.base.ids import MemberId, NodeId, NodeIncarnation
from corral.base.time import FOREVER, MILLISECOND, SECOND
from corral.base.view import Round, Slotted
from corral.fence.engine import FenceEngine
from corral.fence.events import AttemptDone, CancelAttempt, ManualAck, RoundDone, RunAttempt, Start, Stop
from corral.fence.wire import CODEC

FAULTS_LAST = 60 * SECOND
SETTLE = 180 * SECOND
STEPS_MAX = 200_000


class Violation(AssertionError):
    """The checker's verdict; the message begins with the invariant."""


class Attempt:
    def __init__(self, by: "Life", event: RunAttempt, round_id: int) -> None:
        self.by = by
        self.event = event
        self.round_id = round_id
        self.cancelled = False
        self.running = True
        self.effect = True  # what is planned still happens


class Life:
    """One incarnation of one node."""

    def __init__(self, id: NodeIncarnation, config: FenceConfig, *, clean: bool) -> None:
        self.id = id
        self.clean = clean
        self.acts = False  # from its first quorate view until it is really gone
        self.runs = True  # its corrald steps its engine
        self.connected = True
        self.engine = FenceEngine(id.node, config)
        self.round = 0
        self.control_at = 0
        self.fenced: set[NodeIncarnation] = set()
        self.done: set[int] = set()
        self.attempts: dict[int, Attempt] = {}
        self.tick_at = FOREVER


class Cluster:
    def __init__(self, seed: int) -> None:
        self.random = random = Random(seed)
        self.nodes = list(range(1, random.choice((3, 3, 4, 5)) + 1))
        self.config = FenceConfig(
            devices=[
                Device("pdu", "fence_apc", timeout=2.0, limit=random.choice((0, 1))),
                Device("kill", "process", timeout=1.0, limit=0),
            ],
            nodes={
                node: NodeFencing(
                    [Method("power", ["pdu"], random.choice(("off", "reboot"))), Method("kill", ["kill"])],
                    delay=random.choice((0, 0, 1.5)),
                )
                for node in self.nodes
            },
            post_join_delay=random.choice((0.0, 2.0, 6.0)),
            post_fail_delay=random.choice((0.0, 0.0, 1.0)),
            retry_delay=random.choice((0.5, 3.0)),
            concurrent=random.choice((1, 2, 8)),
        )
        self.joins_wait = random.random() < 0.7
        self.able = {node for node in self.nodes if random.random() < 0.6}  # whose agents work once faults have stopped
        self.now = SECOND
        self.heap: list[tuple[int, int, Callable[[], None]]] = []
        self.sequence = 0
        self.lives: dict[NodeId, Life] = {}  # the newest of each node
        self.all: dict[NodeIncarnation, Life] = {}
        self.view: list[Life] = []
        self.proposal = 0
        self.round_id = 0
        self.victims: dict[int, tuple[list[NodeIncarnation], bool]] = {}  # of every round, and whether it was the first
        self.finished = 0
        self.active: set[NodeIncarnation] | None = None
        self.since: set[NodeIncarnation] = set()
        self.left: set[NodeIncarnation] = set()
        self.known_fenced: set[NodeIncarnation] = set()
        self.wanted: list[Life] = []  # that want to be in the view
        self.calm = False
        self.steps = 0
        self.counts: dict[str, int] = {}
        self.trace = hashlib.sha256()

    # --- machinery -----------------------------------------------------------------------------------------------

    def at(self, when: int, fn: Callable[[], None]) -> None:
        self.sequence += 1
        heapq.heappush(self.heap, (max(when, self.now), self.sequence, fn))

    def after(self, low: int, high: int, fn: Callable[[], None]) -> None:
        self.at(self.now + self.random.randint(low, high), fn)

    def note(self, what: str, life: Life | None = None) -> None:
        self.counts[what] = self.counts.get(what, 0) + 1
        self.trace.update(f"{self.now} {what} {life.id if life else ''}\n".encode())

    def run_until(self, end: int) -> None:
        while self.heap and self.heap[0][0] <= end:
            self.now, _, fn = heapq.heappop(self.heap)
            self.steps += 1
            if self.steps > STEPS_MAX:
                raise Violation("FENCE-3: the engines keep busy without end")
            fn()
        self.now = end

    def feed(self, life: Life, event: Any) -> None:
        if not life.runs:
            return
        life.engine.step(self.now, event)
        ready = life.engine.ready()
        for peer, message in ready.send:
            self.transmit(life, peer, CODEC.encode(message))
        for emitted in ready.emit:
            self.emitted(life, emitted)
        if life.engine.deadline < life.tick_at:
            life.tick_at = life.engine.deadline
            self.at(life.tick_at, lambda: self.tick(life))

    def tick(self, life: Life) -> None:
        life.tick_at = FOREVER
        if life.engine.deadline <= self.now:
            self.feed(life, TICK)
        elif life.engine.deadline < FOREVER:
            life.tick_at = life.engine.deadline
            self.at(life.tick_at, lambda: self.tick(life))

    def transmit(self, life: Life, peer: MemberId, payload: bytes) -> None:
        """FIFO per pair, and lost when the pair's session breaks (`epoch` of the pair counts sessions)."""
        receiver = self.all.get(NodeIncarnation(peer.node, peer.incarnation))
        if receiver is None or not (life.connected and receiver.connected and receiver.runs):
            return
        pair = (life.id, receiver.id)
        session = self.sessions.get(frozenset(pair), 0)
        arrival = max(self.now + self.random.randint(0, 40 * MILLISECOND), self.last_arrival.get(pair, 0))
        self.last_arrival[pair] = arrival

        def arrive() -> None:
            if receiver.connected and life.connected and self.sessions.get(frozenset(pair), 0) == session:
                self.feed(receiver, Received(MemberId(life.id.node, life.id.incarnation, 0), CODEC.decode(payload)))

        self.at(arrival, arrive)

    # --- lives ---------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        self.sessions: dict[frozenset[NodeIncarnation], int] = {}
        self.last_arrival: dict[tuple[NodeIncarnation, NodeIncarnation], int] = {}
        for node in self.nodes:
            # At the very first start some nodes may be late, or have an unknown past that still acts.
            past = self.random.random() < 0.3
            if past:
                self.all[NodeIncarnation(node, 1)] = ghost = Life(NodeIncarnation(node, 1), self.config, clean=True)
                ghost.runs = False
                ghost.acts = True
            self.after(0, 8 * SECOND, lambda node=node: self.join(node))  # type: ignore[misc]

    def join(self, node: NodeId) -> None:
        """A new life, once the node's power and corrald allow it."""
        old = self.lives.get(node)
        if old is not None and old.runs and old.connected:
            return
        before = [life for life in self.all.values() if life.id.node == node]
        clean = self.random.random() < 0.75
        for life in before:
            life.runs = False
            life.connected = False
            for attempt in life.attempts.values():
                attempt.running = False
                attempt.effect = False
            if clean:
                life.acts = False
        number = max((life.id.incarnation for life in before), default=1) + 1
        new = Life(NodeIncarnation(node, number), self.config, clean=clean)
        self.all[new.id] = self.lives[node] = new
        self.note("join clean" if clean else "join stateful", new)
        self.knock(new)

    def knock(self, life: Life) -> None:
        """Asks to be let in; WAIT costs the members nothing."""
        if not (life.runs and life.connected):
            return
        if self.joins_wait and any(member.runs and member.engine.fencing(life.id.node) for member in self.view):
            self.note("wait")
            self.after(SECOND // 2, SECOND, lambda: self.knock(life))
            return
        self.wanted.append(life)
        self.propose()

    def die(self, life: Life, *, acts: bool) -> None:
        """Its corrald is gone. `acts`: other processes of that life are not."""
        self.note("die", life)
        life.runs = False
        life.connected = False
        life.acts = life.acts and acts
        for attempt in life.attempts.values():
            attempt.running = False
            attempt.effect = attempt.effect and self.random.random() < 0.3  # already on its way
        self.lose(life)

    def cut_off(self, life: Life) -> None:
        """It goes on, alone, until it notices."""
        self.note("cut off", life)
        life.connected = False
        self.lose(life)
        self.after(0, 3 * SECOND, lambda: self.feed(life, Stop()))

    def leave(self, life: Life) -> None:
        """Clean, unless it crashes before the others have agreed on it."""
        self.note("leave", life)
        if self.random.random() < 0.3:
            self.die(life, acts=True)
            return
        life.runs = life.connected = life.acts = False
        self.left.add(life.id)
        self.lose(life)

    def lose(self, life: Life) -> None:
        if life in self.wanted:
            self.wanted.remove(life)
        self.after(0, 2 * SECOND, self.propose)

    # --- the lift ------------------------------------------------------------------------------------------------

    def propose(self) -> None:
        """Phase one: everybody who is to be in it stops, and says which nodes its agents work on."""
        self.proposal += 1
        proposal = self.proposal
        members = [life for life in self.wanted if life.runs and life.connected]
        waits: set[NodeId] = set()
        slowest = self.now
        for life in members:
            when = max(life.control_at, self.now + self.random.randint(0, 200 * MILLISECOND))
            life.control_at = slowest = max(slowest, when)

            def promise(life: Life = life) -> None:
                self.feed(life, Stop())
                waits.update(node for node in self.nodes if life.runs and life.engine.fencing(node))

            self.at(when, promise)
        self.at(slowest + 1, lambda: self.install(proposal, members, waits))

    def install(self, proposal: int, proposed: list[Life], waits: set[NodeId]) -> None:
        if proposal != self.proposal:
            return
        members = [life for life in proposed if life.runs and life.connected]
        joining = [life for life in members if life not in self.view]
        told_to_wait = [life for life in joining if life.id.node in waits and self.joins_wait]
        if told_to_wait:
            self.note("wait after all")
            members = [life for life in members if life not in told_to_wait]
            for life in told_to_wait:
                self.wanted.remove(life)
                self.after(SECOND // 2, SECOND, lambda life=life: self.knock(life))  # type: ignore[misc]
        self.view = sorted(members, key=lambda life: life.id)
        if not self.view or len(self.view) <= len(self.nodes) // 2:
            return
        self.break_sessions()
        for life in self.view:
            if self.random.random() < 0.7:
                self.known_fenced |= {victim for victim in life.fenced if victim.incarnation}
        self.start_round()

    def break_sessions(self) -> None:
        for life in self.view:
            for other in self.view:
                if life.id < other.id and self.random.random() < 0.3:
                    pair = frozenset((life.id, other.id))
                    self.sessions[pair] = self.sessions.get(pair, 0) + 1

    def start_round(self) -> None:
        here = {life.id for life in self.view}
        self.round_id += 1
        failed = sorted(self.since - self.known_fenced - self.left - here)
        self.since |= here
        for life in self.view:
            life.acts = True
        round = Round(
            self.round_id,
            "fence",
            tuple(Slotted(life.id.corrald(), slot) for slot, life in enumerate(self.view)),
            tuple(Slotted(victim.corrald(), 0) for victim in failed),
            tuple(life.id.corrald() for life in self.view if self.active is None or life.id not in self.active),
            tuple(victim.corrald() for victim in sorted(self.left)),
        )
        first = self.active is None
        nodes = {life.id.node for life in self.view}
        absent = tuple(node for node in self.nodes if node not in nodes)
        clean = frozenset(life.id for life in self.view if life.clean)
        self.victims[round.id] = failed, first
        self.note(f"round {len(failed)}")
        for life in self.view:
            when = max(life.control_at, self.now + self.random.randint(0, 300 * MILLISECOND))
            life.control_at = when
            self.at(when, lambda life=life: self.begin_round(life, Start(round, clean, first, absent)))  # type: ignore[misc]

    def begin_round(self, life: Life, event: Start) -> None:
        if life.connected and event.round.id == self.round_id:
            life.round = event.round.id
            self.feed(life, event)

    def round_done(self, life: Life, round_id: int) -> None:
        failed, first = self.victims[round_id]
        for victim in failed:
            self.check(not self.all[victim].acts, f"FENCE-1: round {round_id} is done but {victim} acts")
        if first:
            for other in self.all.values():
                known = other.id in self.since  # a member, or one of `failed`
                self.check(known or not other.acts, f"FENCE-1: the first round is done but {other.id} acts")
        members = {member.id.node for member in self.view}
        for attempt in life.attempts.values():
            at_work = attempt.running and attempt.event.action == "off" and attempt.event.victim.node in members
            self.check(not (at_work and round_id == self.round_id), f"FENCE-4: {attempt.event} runs on")
        self.check(round_id not in life.done, "FENCE-1: a round is done twice")
        life.done.add(round_id)
        if round_id == self.round_id and all(round_id in member.done for member in self.view):
            self.note("active")
            self.finished = round_id
            self.active = self.since = {member.id for member in self.view}
            self.known_fenced = set()
            self.left = set()

    # --- agents --------------------------------------------------------------------------------------------------

    def emitted(self, life: Life, event: Any) -> None:
        if isinstance(event, RunAttempt):
            self.begin_attempt(life, event)
        elif isinstance(event, CancelAttempt):
            attempt = life.attempts[event.attempt]
            if attempt.running and not attempt.cancelled:
                attempt.cancelled = True
                self.after(0, SECOND, lambda: self.answer(attempt, False, "stopped"))
        elif isinstance(event, RoundDone):
            self.round_done(life, event.round)
        elif isinstance(event, NodeFenced):
            self.note("fenced " + ("", "agent", "member", "manual", "external")[event.how], life)
            self.check(event.victim not in life.fenced, "FENCE-6: told twice")
            life.fenced.add(event.victim)
            for other in self.all.values():
                unknown_past = other.id.node == event.victim.node and other.id not in self.since
                if other.id == event.victim or (event.victim.incarnation == 0 and unknown_past):
                    self.check(not other.acts, f"FENCE-1: {event.victim} is told to be fenced and acts")

    def begin_attempt(self, life: Life, event: RunAttempt) -> None:
        attempt = Attempt(life, event, life.round)
        self.check(event.attempt not in life.attempts, "FENCE-7: an attempt number used twice")
        life.attempts[event.attempt] = attempt
        if event.action == "off":
            members = {member.id for member in self.view}
            self.check(event.victim not in members, f"FENCE-2: {event.victim} is a member")
            for other in self.all.values():
                for rival in other.attempts.values():
                    same = rival.event.victim == event.victim and rival.round_id == attempt.round_id
                    works = rival.running and not rival.cancelled and rival.event.action == "off"
                    self.check(
                        rival is attempt or not (same and works),
                        f"FENCE-7: two fencers of {event.victim} in round {life.round}",
                    )
        self.note(f"attempt {event.action}", life)
        fate = self.random.random()
        if self.calm:
            able = life.id.node in self.able or not any(member.id.node in self.able for member in self.view)
            fate = 0.0 if able and event.method == "kill" else 0.5
        span = event.timeout_ns
        takes_effect = fate < 0.35 or 0.6 <= fate < 0.7
        if takes_effect:
            self.after(0, span // 2, lambda: self.take_effect(attempt))
        if fate < 0.35:
            self.at(self.now + span // 2 + self.random.randint(0, span // 4), lambda: self.answer(attempt, True, ""))
        elif fate < 0.7:
            slow = takes_effect or (self.random.random() < 0.5 and not self.calm)
            self.after(span // 2 if slow else 0, span - 1 if slow else 0, lambda: self.answer(attempt, False, "failed"))
        elif fate < 0.97:
            self.at(self.now + span, lambda: self.answer(attempt, False, "timed out"))

    def take_effect(self, attempt: Attempt) -> None:
        """`kill` reaches one life, `power` whatever runs on that node."""
        if not attempt.effect or attempt.event.action != "off":
            return
        victim = attempt.event.victim
        for life in [life for life in self.all.values() if life.id.node == victim.node]:
            newest = life is self.lives.get(life.id.node) and life.runs
            if attempt.event.method == "kill":
                hit = life.id == victim or (victim.incarnation == 0 and not newest)
            else:
                hit = True
            if not hit:
                continue
            life.acts = False
            if life.runs:
                if life in self.view and life.clean and self.joins_wait and attempt.by in self.view:
                    same = attempt.by.connected and not attempt.cancelled
                    self.check(not same, f"FENCE-4: {attempt.event} hits {life.id}, a member that joined clean")
                self.die(life, acts=False)

    def answer(self, attempt: Attempt, ok: bool, text: str) -> None:
        if not attempt.running:
            return
        attempt.running = False
        if not ok or attempt.cancelled:
            attempt.effect = attempt.effect and ok
        if ok and not attempt.effect:
            ok = False
        self.feed(attempt.by, AttemptDone(attempt.event.attempt, ok, text))

    # --- the run -------------------------------------------------------------------------------------------------

    def check(self, condition: bool, what: str) -> None:
        if not condition:
            raise Violation(what)

    def fault(self) -> None:
        alive = [life for life in self.lives.values() if life.runs and life.connected]
        dead = [node for node in self.nodes if node not in {life.id.node for life in alive}]
        kind = self.random.random()
        if dead and (kind < 0.45 or len(alive) <= 1):
            self.join(self.random.choice(dead))
        elif not alive:
            return
        elif kind < 0.65:
            self.die(self.random.choice(alive), acts=self.random.random() < 0.6)
        elif kind < 0.8:
            self.cut_off(self.random.choice(alive))
        elif kind < 0.88:
            self.leave(self.random.choice(alive))
        elif kind < 0.94:
            self.propose()  # a view like the last one: a session broke
        else:
            self.operator()

    def operator(self) -> None:
        """Switches a victim off by hand and says so."""
        for life in self.view:
            for waiting in life.engine.status(self.now).victims:
                ghost = [other for other in self.all.values() if other.id.node == waiting.victim.node]
                if life.runs and not any(other.runs for other in ghost):
                    for other in ghost:
                        other.acts = False
                    self.note("operator", life)
                    self.feed(life, ManualAck(waiting.victim, "pulled the plug", 1))
                    return

    def go(self) -> "Cluster":
        self.begin()
        while self.now < FAULTS_LAST:
            self.run_until(self.now + self.random.randint(0, 4 * SECOND))
            if self.now > 9 * SECOND:
                self.fault()
        self.calm = True
        for node in self.nodes:
            if not (self.lives[node].runs and self.lives[node].connected) and self.random.random() < 0.3:
                self.after(0, 5 * SECOND, lambda node=node: self.join(node))  # type: ignore[misc]
        self.run_until(self.now + 10 * SECOND)
        alive = sum(life.runs and life.connected for life in self.lives.values())
        if alive <= len(self.nodes) // 2:
            for node in self.nodes:
                self.join(node)
        self.run_until(self.now + SETTLE)
        self.check(len(self.view) > len(self.nodes) // 2, "the model: no quorate view at the end")
        self.check(self.finished == self.round_id, f"FENCE-3: round {self.round_id} never ends: {self.waits()}")
        return self

    def waits(self) -> str:
        return "; ".join(f"{life.id.node}: {life.engine.status(self.now).waits_for or 'done'}" for life in self.view)


def run(seed: int) -> str:
    """Runs a seed; returns the digest of what happened. Raises Violation, or an engine's assert."""
    return Cluster(seed).go().trace.hexdigest()


def main(argv: list[str]) -> int:
    for argument in argv or ["0..200"]:
        first, _, last = argument.partition("..")
        for seed in range(int(first), int(last or first) + 1):
            cluster = Cluster(seed)
            try:
                cluster.go()
            except AssertionError as error:
                print(f"seed {seed}: {error}")
                return 1
            if not last:
                print(f"seed {seed}: {cluster.counts}, trace {cluster.trace.hexdigest()[:16]}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
