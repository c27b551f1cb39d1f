"""Simulation of comm's engines: random traffic, broken connections, delays, cuts, crashes; one seed is one run.

    python -m tests.sim.comm_sessions 17            run one seed and print what happened
    python -m tests.sim.comm_sessions 0..2000       run many; prints the first violation

Workload: every host sends numbered messages to every peer it is told is up. Faults: connections that break at both ends
or at one, links cut and healed, processes killed and started again as a newer incarnation (sometimes while the peers
still have its old frames before them, or the call of a dead process arrives after that of its successor), sessions
ended by hand, delays from nothing to longer than a session timeout.

Checked, at every event: COMM-1 (once, in order, a prefix), COMM-2 (alternation, rising numbers), COMM-3 (nothing
outside its session), COMM-4 (queue bound), COMM-5 (incarnations never go back), COMM-9 (honest peers never look hostile
to each other), COMM-10 (a deadline moves when it was kept). After the faults stop: everybody hears everybody, and what
is sent arrives, within a bound.
"""

import hashlib
import sys
from random import Random
from typing import Any

import msgspec

from corral.api.comm import PeerDown, PeerUp
from corral.base.ids import MemberId
from corral.base.time import MILLISECOND, SECOND
from corral.comm.actions import Deliver, Limits, Rejected
from tests.unit.comm.rig import Host, Rig, hello

FAULTS_LAST = 8 * SECOND
SETTLE = 8 * SECOND  # within this, after the faults stop, everything works again
QUEUE_BYTES = 3000
FAULTS = ("reset", "half", "cut", "crash", "end", "slow", "burst", "late")
FAULT_WEIGHTS = (6, 4, 3, 3, 2, 4, 2, 2)
HONEST = {
    "hello unanswered",
    "no hello in time",
    "hello refused: stale connection attempt",
    "hello refused: stale incarnation",
}
STALE = {
    "hello with stale connection attempt",
    "hello with stale incarnation",
    "hello with another process was called",
    "answer of a stale incarnation",
}


class Violation(AssertionError):
    """The checker's verdict; the message begins with the invariant."""


class Checker:
    """Watches what one host is told. `received` counts per session what arrived from each peer."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self.up: dict[MemberId, int] = {}
        self.last: dict[MemberId, int] = {}
        self.incarnation: dict[tuple[int, int], int] = {}
        self.received: dict[MemberId, int] = {}

    def check(self, condition: bool, what: str) -> None:
        if not condition:
            raise Violation(f"{what} at {self.host.member}")

    def event(self, event: Any) -> None:
        if isinstance(event, PeerUp):
            self.check(event.peer not in self.up, f"COMM-2: {event.peer} up twice")
            self.check(event.session > self.last.get(event.peer, 0), f"COMM-2: session {event.session} is not newer")
            place = event.peer.node, event.peer.serial
            self.check(event.peer.incarnation >= self.incarnation.get(place, 0), f"COMM-5: {event.peer} is older")
            self.check(all((p.node, p.serial) != place for p in self.up), f"COMM-2: two of {event.peer} up")
            self.incarnation[place] = event.peer.incarnation
            self.up[event.peer] = self.last[event.peer] = event.session
            self.received[event.peer] = 0
        elif isinstance(event, PeerDown):
            self.check(self.up.get(event.peer) == event.session, f"COMM-2: {event.peer} down without up")
            self.check("protocol error" not in event.reason, f"COMM-1: {event.reason}")
            del self.up[event.peer]
        elif isinstance(event, Deliver):
            self.check(event.peer in self.up, f"COMM-3: {event.peer} is not up")
            for payload in event.payloads:
                sender, session, number, port = msgspec.msgpack.decode(payload)
                self.check(tuple(sender) == event.peer, "COMM-5: somebody else's message")
                self.check(session == self.up[event.peer], f"COMM-3: message of session {session}")
                self.check(
                    number == self.received[event.peer] + 1, f"COMM-1: {number} after {self.received[event.peer]}"
                )
                self.check(port == event.port, "COMM-1: another port")
                self.received[event.peer] = number
        elif isinstance(event, Rejected):
            self.check(event.kind in HONEST | STALE, f"COMM-9: honest peers look hostile: {event}")


class Run:
    def __init__(self, seed: int) -> None:
        self.random = random = Random(seed)
        self.rig = Rig()
        self.slow = 0
        self.rig.delay = self.delay
        self.limits = Limits(
            session_timeout_ns=random.choice((150, 300, 600)) * MILLISECOND,
            handshake_ns=random.choice((200, 500)) * MILLISECOND,
            stall_ns=random.choice((500, 2000)) * MILLISECOND,
            queue_bytes=QUEUE_BYTES,
            ack_delay_ns=random.choice((1, 20)) * MILLISECOND,
            ack_frames=random.choice((1, 4, 64)),
        )
        self.count = random.randint(2, 4)
        self.incarnations = dict.fromkeys(range(1, self.count + 1), 1)
        self.hosts: dict[int, Host] = {}
        self.sent: dict[tuple[MemberId, MemberId, int], int] = {}
        self.trace = hashlib.blake2b()
        self.deliveries = self.faults = self.sessions = 0
        for node in self.incarnations:
            self.start(node)

    def delay(self) -> int:
        random = self.random
        if self.slow and random.random() < 0.2:
            return random.randrange(self.slow)
        return random.randrange(3 * MILLISECOND)

    def start(self, node: int) -> None:
        host = self.rig.host(node, incarnation=self.incarnations[node], limits=self.limits)
        checker = Checker(host)

        def heard(event: Any) -> None:
            self.trace.update(repr((self.rig.now, host.member, event_key(event))).encode())
            self.deliveries += isinstance(event, Deliver)
            self.sessions += isinstance(event, PeerUp)
            checker.event(event)

        host.on_event = heard
        self.hosts[node] = host
        for peer in self.incarnations:
            if peer != node:
                host.engine.add_node(self.rig.now, peer, f"n{peer}.0")
        self.rig.act(host)

    def chatter(self) -> None:
        """One host tells all its peers something, several times."""
        random = self.random
        host = random.choice([*self.hosts.values()])
        for peer in sorted(host.up):
            for _ in range(random.randint(1, 4)):
                self.say(host, peer)

    def say(self, host: Host, peer: MemberId) -> None:
        session = host.up.get(peer, 0)
        key = (host.member, peer, session)
        number = self.sent.get(key, 0) + 1
        port = self.random.choice((64, 65))
        if host.send(peer, port, 1, msgspec.msgpack.encode((host.member, session, number, port))):
            self.sent[key] = number

    def fault(self) -> None:
        random = self.random
        self.faults += 1
        kind = random.choices(FAULTS, FAULT_WEIGHTS)[0]
        node = random.choice([*self.hosts])
        host = self.hosts[node]
        if kind == "reset":
            self.rig.break_all()
        elif kind == "half" and host.ends:
            self.rig.breaks(random.choice([*host.ends.values()]), "reset")
        elif kind == "cut":
            pair = frozenset(random.sample(sorted(self.incarnations), 2))
            self.rig.cut.add(pair)
            self.rig.later(random.randrange(SECOND), lambda: self.heal(pair))
        elif kind == "crash":
            self.crash(node)
        elif kind == "end" and host.up:
            host.engine.end_session(self.rig.now, random.choice(sorted(host.up)), "by the workload")
            self.rig.act(host)
        elif kind == "slow":
            self.slow = random.choice((0, 0, 50, 500, 1500)) * MILLISECOND
        elif kind == "late":
            self.late(host)
        elif kind == "burst" and host.up:
            peer = random.choice(sorted(host.up))
            while peer in host.up and random.random() < 0.98:
                self.say(host, peer)

    def late(self, host: Host) -> None:
        """A call that its caller gave up arrives when a newer one has long been answered."""
        for peer, session in sorted(host.up.items()):
            there = self.hosts.get(peer.node)
            if there is not None and peer.node > host.member.node:
                end = self.rig.stranger(there, host.member.node)
                given_up = self.random.randint(1, session)
                self.rig.transmit(end, [hello(host.member, MemberId(peer.node, 0, 0), attempt=given_up)])
                self.rig._close(end)

    def heal(self, pair: frozenset[int]) -> None:
        """What passed the cut meanwhile is lost, so those connections are too."""
        if pair in self.rig.cut:
            for node in sorted(pair):
                for end in [*self.hosts[node].ends.values()] if node in self.hosts else []:
                    if end.peer.host is not None and end.peer.host.member.node in pair:
                        self.rig.breaks(end, "timed out")
            self.rig.cut.discard(pair)

    def crash(self, node: int) -> None:
        old = self.hosts.pop(node)
        self.rig.kill(old)
        if self.random.random() < 0.5:
            self.rig.later(self.random.randrange(SECOND), lambda: self.haunt(old.member))
        self.incarnations[node] += 1
        if not self.hosts or self.random.random() < 0.5:
            self.start(node)
        else:
            self.rig.later(self.random.randrange(SECOND), lambda: self.start(node))

    def haunt(self, dead: MemberId) -> None:
        """A call that a killed process had under way arrives only now, perhaps behind those of its successor."""
        for node, host in sorted(self.hosts.items()):
            if node > dead.node:
                end = self.rig.stranger(host, dead.node)
                target = MemberId(node, 0, 0)
                self.rig.transmit(end, [hello(dead, target, attempt=1_000_000)])
                self.rig._close(end)

    def go(self) -> "Run":
        rig = self.rig
        stop = rig.now + FAULTS_LAST
        while rig.now < stop:
            rig.run(self.random.randrange(1, 20 * MILLISECOND))
            if self.hosts:
                self.chatter()
                if self.random.random() < 0.08:
                    self.fault()
            for host in self.hosts.values():
                for peer in host.engine.statistics().peers:
                    if peer.queued_bytes > QUEUE_BYTES:
                        raise Violation(f"COMM-4: {peer.queued_bytes} bytes queued to {peer.peer}")
        self.settle()
        return self

    def settle(self) -> None:
        """No more faults: whatever was cut heals, and then everything has to work."""
        rig = self.rig
        self.slow = 0
        rig.run(2 * SECOND)
        for pair in sorted(rig.cut, key=sorted):
            self.heal(pair)
        rig.run(SETTLE)
        members = {node: host.member for node, host in self.hosts.items()}
        sent: list[tuple[Host, MemberId, int]] = []
        for node, host in self.hosts.items():
            for peer, member in members.items():
                if peer != node:
                    if member not in host.up or host.up[member] != self.hosts[peer].up.get(host.member):
                        raise Violation(f"liveness: {host.member} and {member} do not hear each other")
                    self.say(host, member)
                    sent.append((host, member, host.up[member]))
        rig.run(SECOND)
        for host, member, session in sent:
            engine = host.engine.session_of(member)
            if engine is None or engine.session != session or engine.queued_frames:
                raise Violation(f"liveness: {host.member} waits for {member}'s acknowledgement")
        self.all_arrived()

    def all_arrived(self) -> None:
        """Sessions alive at the end have lost nothing."""
        for host in self.hosts.values():
            for peer, session in host.up.items():
                there = self.hosts[peer.node]
                got = sum(
                    1
                    for event in there.log
                    if isinstance(event, Deliver) and event.peer == host.member
                    for payload in event.payloads
                    if msgspec.msgpack.decode(payload)[1] == session
                )
                if got != self.sent.get((host.member, peer, session), 0):
                    raise Violation(f"COMM-1: {host.member} sent {self.sent} and {peer} got {got}")


def event_key(event: Any) -> tuple[Any, ...]:
    if isinstance(event, Deliver):
        return (event.peer, event.port, event.round_id, event.payloads)
    return tuple(event)


def run(seed: int) -> str:
    """Runs a seed; returns the digest of everything every host was told. Raises Violation, or an engine's assert."""
    return Run(seed).go().trace.hexdigest()


def main(argv: list[str]) -> int:
    for argument in argv or ["0..200"]:
        first, _, last = argument.partition("..")
        for seed in range(int(first), int(last or first) + 1):
            try:
                finished = Run(seed).go()
            except AssertionError as error:
                print(f"seed {seed}: {error}")
                return 1
            if not last:
                print(
                    f"seed {seed}: {finished.faults} faults, {finished.sessions} ends of sessions begun, "
                    f"{finished.deliveries} deliveries, trace {finished.trace.hexdigest()[:16]}"
                )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
