"""A cluster of lockspace engines under faults, all from one seed; engines only, no worlds.

Members exchange encoded messages, FIFO per pair with random delays, stamped and filtered by round as comm does. A
controller plays cman: Stop to all, Start when the dead are fenced, Finish when every member is done; it abandons rounds
when more happens. Faults: members die and join, clients die, leases lapse and come back.

Workload: *counters* convert a kept NL lock to EX, add one in the value block and convert back, or spoil the block
instead; *mixers* do anything legal in any mode, also locks that outlive them, adopt and purge such, and ask who holds
what. Checkers, by invariant:
DLM-1  what holders may believe they hold is pairwise compatible
DLM-2  tokens of EX grants of a resource rise, over removals of the resource and losses of its master too
DLM-3  resources' queues hold what holders hold (at the end)
DLM-4  a valid value block never misses an acknowledged increment
DLM-8  what outlives its client can be adopted, once, until it is purged
DLM-7  every request completes once; after the faults every request completes, and nothing is left anywhere
"""

import sys
from collections.abc import Iterator
from heapq import heappop, heappush
from random import Random

from corral.api.dlm import (
    ALTCW,
    ALTPR,
    CONVDEADLK,
    CR,
    EX,
    FORCEUNLOCK,
    IVVALBLK,
    MODE_NAMES,
    NL,
    NOQUEUE,
    NOQUEUEBAST,
    ORPHAN,
    PERSISTENT,
    QUECVT,
    QUERY_ALL,
    QUERY_QUEUES,
    QUEUE_GRANT,
    VALBLK,
    Request,
)
from corral.base.engine import TICK, Received
from corral.base.ids import MemberId
from corral.base.time import FOREVER, MILLISECOND, SECOND
from corral.base.view import Round, Slotted
from corral.dlm.engine import LockspaceEngine
from corral.dlm.events import (
    Blocked,
    ClientGone,
    Done,
    Finish,
    Lease,
    RoundDone,
    Start,
    Stop,
    Submit,
)
from corral.dlm.modes import COMPATIBLE, ETIMEDOUT, QUECVT_LEGAL, is_down, is_middle
from corral.dlm.operations import RUNNING
from corral.dlm.wire import CODEC

LEASE = 300 * MILLISECOND
TOSS = 200 * MILLISECOND
COUNTERS = (b"counter-a", b"counter-b")
MIXED = (b"mixed-a", b"mixed-b", b"mixed-c")
VALUE_SIZE = 8


class Violation(AssertionError):
    """An invariant does not hold; the message begins with its number."""


def require(condition: bool, invariant: str, what: object) -> None:
    if not condition:
        raise Violation(f"{invariant}: {what}")


class Held:
    """One lock as its client knows it."""

    def __init__(self, resource: bytes) -> None:
        self.resource = resource
        self.mode = -1  # granted, as last told
        self.belief = -1  # what the client may count on now
        self.pending: str | None = "lock"
        self.asked = -1
        self.cookie = 0
        self.flags = 0  # of the last request or conversion
        self.certain = True  # as an orphan: nothing was under way when its client died, and no purge since
        self.whose = 0
        self.purged = 0  # cookie of the last purge that must take it


class Client:
    def __init__(self, node: "Node", number: int, kind: str) -> None:
        self.node = node
        self.number = number
        self.kind = kind
        self.alive = True
        self.locks: dict[int, Held] = {}
        self.handles = 0
        self.unanswered: dict[int, int] = {}  # cookie -> handle
        self.adding: int | None = None  # a counter's value on its way
        self.token = 0  # of its last EX
        self.asking: dict[int, tuple[str, int, int]] = {}  # cookie -> purge (and of whom, where) or query


class Node:
    def __init__(self, cluster: "Cluster", me: MemberId) -> None:
        self.me = me
        self.engine = cluster.engine_class(me, "sim", VALUE_SIZE, toss_ns=TOSS)
        self.alive = True
        self.round_id = 0
        self.early: list[tuple[MemberId, int, bytes]] = []
        self.lapsed_until = 0
        self.clients: dict[int, Client] = {}
        self.orphans: list[Held] = []
        self.ticking = FOREVER


class Cluster:
    engine_class: type[LockspaceEngine] = LockspaceEngine

    def __init__(self, seed: int) -> None:
        self.rng = Random(seed)
        self.now = SECOND
        self.events: list[tuple[int, int, object, tuple[object, ...]]] = []
        self.sequence = 0
        self.nodes: dict[MemberId, Node] = {}
        self.arrival: dict[tuple[MemberId, MemberId], int] = {}
        self.round_id = 0
        self.group: tuple[MemberId, ...] = ()
        self.done: set[MemberId] = set()
        self.finished: tuple[MemberId, ...] = ()
        self.cookies = 0
        self.client_numbers = 0
        self.calm = False
        self.purges_of_the_dead: list[tuple[int, int]] = []  # (whose orphans, on which node): they may still arrive
        self.tokens: dict[bytes, int] = {}
        self.acknowledged: dict[bytes, int] = dict.fromkeys(COUNTERS, 0)
        self.spoiled: dict[bytes, bool] = dict.fromkeys(COUNTERS, False)
        self.written: dict[bytes, int] = dict.fromkeys(COUNTERS, 0)  # token of the last EX whose holder began to write
        self.summary = {"completed": 0, "rounds": 0, "abandoned": 0, "increments": 0, "invalid": 0, "granted": 0}
        self.summary |= {"adopted": 0, "purges": 0, "queries": 0, "spoiled": 0}
        self.story: list[str] = []
        self.max_delay = self.rng.choice((MILLISECOND, 5 * MILLISECOND, 30 * MILLISECOND))

    # --- time and network --------------------------------------------------------------------------------------------

    def at(self, delay: int, call: object, *arguments: object) -> None:
        self.sequence += 1
        heappush(self.events, (self.now + delay, self.sequence, call, arguments))

    def run_until(self, when: int) -> None:
        while self.events and self.events[0][0] <= when:
            self.now, _, call, arguments = heappop(self.events)
            call(*arguments)  # type: ignore[operator]
        self.now = when

    def note(self, what: str) -> None:
        self.story.append(f"{(self.now - SECOND) / MILLISECOND:9.3f} {what}")

    def step(self, node: Node, *events: object) -> None:
        if not node.alive:
            return
        for event in events:
            node.engine.step(self.now, event)
        ready = node.engine.ready()
        for peer, message in ready.send:
            key = (node.me, peer)
            when = max(self.arrival.get(key, 0), self.now + self.rng.randrange(self.max_delay))
            self.arrival[key] = when
            self.at(when - self.now, self.deliver, node.me, peer, node.round_id, CODEC.encode(message))
        for event in ready.emit:
            self.emitted(node, event)
        if node.engine.deadline < node.ticking:
            node.ticking = node.engine.deadline
            self.at(max(0, node.ticking - self.now), self.tick, node)

    def tick(self, node: Node) -> None:
        node.ticking = FOREVER
        self.step(node, TICK)

    def deliver(self, sender: MemberId, receiver: MemberId, round_id: int, payload: bytes) -> None:
        node = self.nodes.get(receiver)
        if node is None or not node.alive or round_id < node.round_id:
            return
        if round_id > node.round_id:
            node.early.append((sender, round_id, payload))
        else:
            self.step(node, Received(sender, CODEC.decode(payload)))

    # --- rounds ------------------------------------------------------------------------------------------------------

    def live(self) -> list[Node]:
        return [node for _, node in sorted(self.nodes.items()) if node.alive]

    def change(self) -> None:
        """The group changed, or a session broke: a new round over those that live."""
        if self.round_id and self.finished != self.group:
            self.summary["abandoned"] += 1
        self.round_id += 1
        self.summary["rounds"] += 1
        self.group = tuple(node.me for node in self.live())
        self.done = set()
        self.note(f"round {self.round_id} {[str(me) for me in self.group]}")
        for me in self.group:
            stop = self.rng.randrange(5 * MILLISECOND)
            self.at(stop, self.control, me, self.round_id, Stop())
        fence = self.rng.randrange(5, 60) * MILLISECOND
        joined = tuple(me for me in self.group if me not in self.finished)
        failed = tuple(Slotted(me, 0) for me in self.finished if me not in self.group)
        members = tuple(Slotted(me, slot) for slot, me in enumerate(self.group))
        round = Round(self.round_id, "sim", members, failed, joined, ())
        for me in self.group:
            self.at(fence + self.rng.randrange(10 * MILLISECOND), self.control, me, self.round_id, Start(round))

    def control(self, me: MemberId, round_id: int, event: object) -> None:
        node = self.nodes[me]
        if not node.alive or round_id != self.round_id:
            return
        if isinstance(event, Start):
            node.round_id = round_id
            self.step(node, event)
            early, node.early = node.early, []
            for sender, stamped, payload in early:
                self.deliver(sender, me, stamped, payload)
        else:
            self.step(node, event)

    def round_done(self, node: Node, round_id: int) -> None:
        if round_id != self.round_id:
            return
        self.done.add(node.me)
        if self.done == set(self.group):
            self.finished = self.group
            for me in self.group:
                self.at(self.rng.randrange(10 * MILLISECOND), self.control, me, round_id, Finish(round_id))

    # --- faults ------------------------------------------------------------------------------------------------------

    def join(self) -> None:
        numbers = [me.node for me in self.nodes]
        me = MemberId(max(numbers, default=0) + 1, 1, 1)
        node = self.nodes[me] = Node(self, me)
        self.note(f"join {me}")
        self.renew(node)
        for _ in range(self.rng.randrange(1, 3)):
            self.add_client(node, "counter")
        for _ in range(self.rng.randrange(1, 3)):
            self.add_client(node, "mixer")

    def add_client(self, node: Node, kind: str) -> None:
        self.client_numbers += 1
        client = node.clients[self.client_numbers] = Client(node, self.client_numbers, kind)
        self.at(self.rng.randrange(20 * MILLISECOND), self.act, client)

    def kill(self, node: Node) -> None:
        self.note(f"kill {node.me}")
        node.alive = False
        node.orphans.clear()
        for client in node.clients.values():
            self.bury(client)

    def bury(self, client: Client) -> None:
        client.alive = False
        for held in client.locks.values():
            if held.pending == "lock" and held.flags & ORPHAN:
                self.maybe_adopted(client.node, held.resource)
            elif client.node.alive and held.flags & PERSISTENT and held.pending != "unlock":
                self.leave_behind(client, held)
            else:
                held.belief = held.mode = -1
        self.purges_of_the_dead += [(whose, where) for what, whose, where in client.asking.values() if what == "purge"]
        client.asking.clear()
        client.locks.clear()
        client.unanswered.clear()
        self.forget_values()

    def maybe_adopted(self, node: Node, resource: bytes) -> None:
        """The answer will not tell, and what was adopted goes with who adopted it."""
        for orphan in node.orphans:
            if orphan.resource == resource:
                orphan.certain, orphan.belief = False, -1

    def leave_behind(self, client: Client, held: Held) -> None:
        held.certain = held.pending is None
        held.whose = client.number
        client.node.orphans.append(held)
        purges = self.purges_of_the_dead + [
            (whose, where)
            for node in self.live()
            for other in node.clients.values()
            for what, whose, where in other.asking.values()
            if what == "purge"
        ]
        if any(where == client.node.me.node and whose in (0, client.number) for whose, where in purges):
            held.certain, held.belief = False, -1

    def renew(self, node: Node) -> None:
        if not node.alive:
            return
        if self.now >= node.lapsed_until:
            self.step(node, Lease(self.now + LEASE))
        self.at(LEASE // 3, self.renew, node)

    def fault(self) -> None:
        if self.calm:
            return
        live = self.live()
        victim = self.rng.choice(live)
        kind = self.rng.choice(("kill", "kill", "join", "join", "client", "client", "lapse", "session"))
        if kind == "kill" and len(live) > 2:
            self.kill(victim)
            self.change()
        elif kind == "join" and len(live) < 5:
            self.join()
            self.change()
        elif kind == "client" and victim.clients:
            client = self.rng.choice(sorted(victim.clients.items()))[1]
            if client.alive:
                self.note(f"client {client.number} dies")
                self.bury(client)
                self.step(victim, ClientGone(client.number))
                self.add_client(victim, client.kind)
        elif kind == "lapse":
            self.note(f"lease of {victim.me} lapses")
            victim.lapsed_until = self.now + 2 * LEASE
        elif kind == "session":
            self.change()
        self.at(self.rng.choice((5, 20, 40, 150, 400)) * MILLISECOND, self.fault)

    # --- clients -----------------------------------------------------------------------------------------------------

    def submit(self, client: Client, handle: int, request: Request) -> None:
        self.cookies += 1
        client.unanswered[self.cookies] = handle
        held = client.locks[handle]
        if request.op in ("lock", "convert"):
            held.pending = request.op
            held.cookie = self.cookies
            held.asked = request.mode
            held.flags = request.flags
        if request.op == "convert":
            held.belief = while_converting(held.mode, request.mode, request.flags)
        elif request.op == "unlock":
            if held.pending == "lock" and held.flags & ORPHAN:
                self.maybe_adopted(client.node, held.resource)
            held.belief = -1
            held.pending = "unlock"
            self.forget_values()
        self.step(client.node, Submit(client.number, [(handle, self.cookies, request)]))

    def new_lock(self, client: Client, resource: bytes, mode: int, flags: int, timeout_ns: int = 0) -> None:
        client.handles += 1
        client.locks[client.handles] = Held(resource)
        self.submit(client, client.handles, Request("lock", resource, mode, flags, timeout_ns=timeout_ns))

    def purge(self, client: Client, where: Node, whose: int) -> None:
        self.cookies += 1
        client.unanswered[self.cookies] = 0
        client.asking[self.cookies] = ("purge", whose, where.me.node)
        for held in where.orphans:
            if whose in (0, held.whose):
                held.certain, held.belief, held.purged = False, -1, self.cookies
        asked = Request("purge", lock=where.me.node, owner=whose)
        self.step(client.node, Submit(client.number, [(0, self.cookies, asked)]))

    def query(self, client: Client, resource: bytes) -> None:
        self.cookies += 1
        client.unanswered[self.cookies] = 0
        client.asking[self.cookies] = ("query", 0, 0)
        asked = Request("query", resource, flags=QUERY_QUEUES | QUERY_ALL)
        self.step(client.node, Submit(client.number, [(0, self.cookies, asked)]))

    def act(self, client: Client) -> None:
        if not client.alive or not client.node.alive:
            return
        if client.kind == "counter":
            self.act_counter(client)
        else:
            self.act_mixer(client)
        self.at(self.rng.randrange(1, 40) * MILLISECOND, self.act, client)

    def act_counter(self, client: Client) -> None:
        if not client.locks:
            if not self.calm:
                self.new_lock(client, self.rng.choice(COUNTERS), NL, VALBLK)
            return
        handle, held = next(iter(client.locks.items()))
        if held.pending is not None:
            return
        if held.mode == NL:
            if self.calm or self.rng.random() < 0.02:
                self.submit(client, handle, Request("unlock"))
            else:
                self.submit(client, handle, Request("convert", mode=EX, flags=VALBLK))
        elif held.mode == EX and client.adding is not None:
            value = client.adding.to_bytes(VALUE_SIZE, "big")
            spoil = self.rng.random() < 0.1
            if not spoil:
                self.written[held.resource] = max(self.written[held.resource], client.token)
                self.spoiled[held.resource] = False
            self.submit(client, handle, Request("convert", mode=NL, flags=IVVALBLK if spoil else VALBLK, value=value))

    def act_mixer(self, client: Client) -> None:
        rng = self.rng
        node = client.node
        if self.calm and node.orphans and not client.asking:
            self.purge(client, node, 0)
        elif not self.calm and rng.random() < (0.3 if node.orphans else 0.06):
            self.ask_something(client)
        if len(client.locks) < 3 and not self.calm and rng.random() < 0.6:
            flags = 0
            for flag in (NOQUEUE, NOQUEUEBAST, ALTPR, ALTCW, VALBLK, PERSISTENT, PERSISTENT):
                flags |= flag if rng.random() < 0.2 else 0
            timeout_ns = rng.randrange(1, 300) * MILLISECOND if rng.random() < 0.3 else 0
            self.new_lock(client, rng.choice(MIXED), rng.randrange(6), flags, timeout_ns)
            return
        if not client.locks:
            return
        handle, held = rng.choice(sorted(client.locks.items()))
        if held.pending == "unlock":
            return
        if held.pending is not None:
            choice = rng.random()
            if choice < 0.2:
                self.submit(client, handle, Request("cancel"))
            elif choice < 0.3:
                self.submit(client, handle, Request("unlock", flags=FORCEUNLOCK))
            return
        if self.calm or rng.random() < 0.4:
            self.submit(client, handle, Request("unlock", flags=VALBLK if rng.random() < 0.3 else 0))
            return
        mode = rng.randrange(6)
        flags = VALBLK if rng.random() < 0.3 else 0
        flags |= PERSISTENT if rng.random() < 0.3 else 0
        flags |= NOQUEUE if rng.random() < 0.2 else 0
        flags |= rng.choice((0, 0, ALTPR, ALTCW))
        if rng.random() < 0.2 and QUECVT_LEGAL[held.mode][mode]:
            flags |= QUECVT
        if rng.random() < 0.3 and not flags & NOQUEUE:
            flags |= CONVDEADLK
        timeout_ns = rng.randrange(1, 300) * MILLISECOND if rng.random() < 0.3 else 0
        self.submit(client, handle, Request("convert", mode=mode, flags=flags, timeout_ns=timeout_ns))

    def ask_something(self, client: Client) -> None:
        rng = self.rng
        orphans = client.node.orphans
        if orphans and rng.random() < 0.5:
            mode = max(0, rng.choice(orphans).mode) if rng.random() < 0.8 else rng.randrange(6)
            self.new_lock(client, rng.choice(orphans).resource, mode, ORPHAN | rng.choice((0, PERSISTENT)))
        elif rng.random() < 0.2:
            self.purge(client, rng.choice(self.live()), rng.choice((0, rng.randrange(1, self.client_numbers + 1))))
        else:
            self.query(client, rng.choice(MIXED + COUNTERS))

    # --- what engines say --------------------------------------------------------------------------------------------

    def emitted(self, node: Node, event: object) -> None:
        if isinstance(event, RoundDone):
            self.round_done(node, event.round_id)
            return
        if not (isinstance(event, Done) and event.completion.status == ETIMEDOUT):
            require(self.now < node.engine.lease_until, "DLM-6", f"{event} at {node.me} without a lease")
        if isinstance(event, Done):
            client = node.clients[event.client]
            if client.alive:
                self.completed(client, event)
        elif isinstance(event, Blocked):
            client = node.clients[event.client]
            require(not client.alive or event.handle in client.locks, "DLM-7", f"callback for no lock: {event}")

    def completed(self, client: Client, event: Done) -> None:
        self.summary["completed"] += 1
        handle, completion = event.handle, event.completion
        require(client.unanswered.pop(event.cookie, None) == handle, "DLM-7", f"answered twice: {event}")
        if event.cookie in client.asking:
            self.answered(client, event)
            return
        held = client.locks.get(handle)
        if held is None:  # asked of a lock that had ended while its end was held back
            require(completion.status == -2, "DLM-7", f"answer for no lock: {event}")
            return
        if held.pending == "unlock" and completion.status == -2:
            del client.locks[handle]  # its request had failed, which was held back
            return
        if held.pending == "lock" and held.flags & ORPHAN and event.cookie == held.cookie:
            held = self.adoption(client, held, event)
            if held is None:
                return
        if event.cookie == held.cookie:
            require(completion.status not in (-22, -2, -16), "DLM-7", f"refused: {event} {held.__dict__}")
        if completion.status == -0x10002:
            del client.locks[handle]
            self.forget_values()
            return
        if event.cookie != held.cookie or held.pending is None:
            return  # a cancel was taken note of
        if held.pending == "unlock":
            return  # overtaken by a force unlock
        was, held.pending = held.pending, None
        if was == "lock" and completion.status:
            del client.locks[handle]
            return
        held.mode = held.belief = completion.mode
        if completion.status == 0:
            self.granted(client, held, event)

    def answered(self, client: Client, event: Done) -> None:
        """To a purge, or to a query."""
        what, _, where = client.asking.pop(event.cookie)
        if what == "purge":
            self.summary["purges"] += 1
            require(event.completion.status == 0, "DLM-7", f"purge failed: {event}")
            for node in self.live():
                if node.me.node == where:
                    node.orphans = [held for held in node.orphans if held.purged != event.cookie]
            return
        self.summary["queries"] += 1
        report = event.completion.report
        require(event.completion.status in (0, -2), "DLM-7", f"query failed: {event}")
        if report is not None:
            modes = [info.granted for info in report.locks if info.state == QUEUE_GRANT]
            for at, mode in enumerate(modes):
                require(all(COMPATIBLE[mode][other] for other in modes[:at]), "DLM-1", f"a query tells {report}")

    def adoption(self, client: Client, held: Held, event: Done) -> Held | None:
        """None: there was nothing to adopt; else the orphan, which is this client's lock from now on."""
        node, mode = client.node, event.completion.mode
        status = event.completion.status
        mine = [orphan for orphan in node.orphans if orphan.resource == held.resource]
        if status:
            require(status in (-2, -11), "DLM-8", f"adoption failed: {event}")
            del client.locks[event.handle]
            certain = [orphan for orphan in mine if orphan.certain and (status == -2 or orphan.mode == held.asked)]
            require(not certain, "DLM-8", f"client {client.number} may not adopt {held.resource!r}: {event}")
            return None
        fitting = [orphan for orphan in mine if orphan.mode == mode and orphan.certain]
        fitting += [orphan for orphan in mine if not orphan.certain]
        require(bool(fitting), "DLM-8", f"client {client.number} adopted what nobody left: {event}")
        self.summary["adopted"] += 1
        orphan = fitting[0]
        for other in fitting[1:]:
            if not other.certain:
                other.belief = -1  # it may have been that one
        node.orphans.remove(orphan)
        orphan.pending, orphan.mode, orphan.belief = None, mode, mode
        orphan.cookie, orphan.flags, orphan.certain = held.cookie, held.flags, True
        client.locks[event.handle] = orphan
        return None

    def granted(self, client: Client, held: Held, event: Done) -> None:
        self.summary["granted"] += 1
        completion = event.completion
        for whose, theirs in self.believed():
            if theirs is held or theirs.resource != held.resource or theirs.belief < 0:
                continue
            require(
                COMPATIBLE[held.mode][theirs.belief],
                "DLM-1",
                f"{held.resource!r} {MODE_NAMES[held.mode]} granted to client {client.number} while {whose} counts on "
                f"{MODE_NAMES[theirs.belief]} ({theirs.__dict__})",
            )
        if held.mode == EX:
            last = self.tokens.get(held.resource, 0)
            require(completion.token > last, "DLM-2", f"{held.resource!r} token {completion.token} after {last}")
            self.tokens[held.resource] = completion.token
        if client.kind == "counter":
            self.counted(client, held, event)

    def believed(self) -> Iterator[tuple[str, Held]]:
        for node in self.live():
            for client in node.clients.values():
                for held in client.locks.values():
                    yield f"client {client.number}", held
            for held in node.orphans:
                yield f"an orphan on {node.me}", held

    def counted(self, client: Client, held: Held, event: Done) -> None:
        completion = event.completion
        if held.mode == EX:
            value = int.from_bytes(completion.value, "big")
            if completion.value_valid:
                require(not self.spoiled[held.resource], "DLM-4", f"{held.resource!r} is spoiled, but told to be valid")
                known = self.acknowledged[held.resource]
                require(value >= known, "DLM-4", f"{held.resource!r} is {value}, {known} was acknowledged")
            else:
                self.summary["invalid"] += 1
                self.acknowledged[held.resource] = 0
            client.adding = value + 1
            client.token = completion.token
        elif held.mode == NL and client.adding is not None:
            adding, client.adding = client.adding, None
            if held.flags & IVVALBLK:
                self.summary["spoiled"] += 1
                if self.acknowledged[held.resource]:  # else there may be no value yet, which is not told as spoiled
                    self.spoiled[held.resource] |= client.token > self.written[held.resource]
                return
            self.summary["increments"] += 1
            if completion.value_valid:
                self.acknowledged[held.resource] = max(self.acknowledged[held.resource], adding)

    def forget_values(self) -> None:
        """A value lives as long as somebody has a lock on its resource."""
        for name in COUNTERS:
            if not any(
                held.resource == name and held.mode >= 0 and held.pending != "unlock"
                for node in self.live()
                for client in node.clients.values()
                for held in client.locks.values()
            ):
                self.acknowledged[name] = 0
                self.spoiled[name] = False

    # --- the run -----------------------------------------------------------------------------------------------------

    def play(self) -> dict[str, int]:
        for _ in range(self.rng.randrange(3, 6)):
            self.join()
        self.change()
        self.at(self.rng.randrange(100, 300) * MILLISECOND, self.fault)
        self.run_until(self.now + 2 * SECOND)
        self.calm = True
        self.run_until(self.now + 6 * SECOND)
        self.check_end()
        return self.summary

    def check_end(self) -> None:
        for node in self.live():
            engine = node.engine
            require(engine.phase == RUNNING, "DLM-7", f"{node.me} is {engine.state}")
            for client in node.clients.values():
                require(not client.unanswered, "DLM-7", f"client {client.number} waits: {self.waiting(client)}")
                require(not client.locks, "DLM-7", f"client {client.number} still has locks")
            space = engine.space
            require(space.counters.conflicts == 0, "DLM-5", "recovered locks exclude each other")
            require(space.counters.hostile == 0, "DLM-7", f"{node.me} took a member for hostile")
            require(not node.orphans and not engine._orphans, "DLM-8", f"{node.me} has {engine._orphans}")
            left = list(space.resources)
            require(not left and not space.copies and not space.lock_count, "DLM-3", f"{node.me} still has {left}")
            require(not space.directory, "DLM-3", f"{node.me} still lists {space.directory}")

    def waiting(self, client: Client) -> list[str]:
        return [f"{held.resource!r} {held.pending} {held.mode}->{held.asked}" for held in client.locks.values()]


def while_converting(granted: int, asked: int, flags: int) -> int:
    """What a holder may count on while a conversion is under way."""
    if flags & CONVDEADLK:
        return NL
    if flags & (ALTPR | ALTCW) or is_middle(granted, asked):
        return min(granted, asked, CR)
    return asked if is_down(granted, asked) else granted


def run(seed: int, cluster_class: type[Cluster] = Cluster) -> dict[str, int]:
    cluster = cluster_class(seed)
    try:
        return cluster.play()
    except AssertionError as error:
        error.add_note(f"seed {seed}, at {(cluster.now - SECOND) / MILLISECOND} ms; the story:")
        error.add_note("\n".join(cluster.story))
        raise


def main(argument: str) -> None:
    """`python -m tests.sim.dlm_cluster 17` runs one seed, `0..2000` many; stops at the first violation."""
    first, _, last = argument.partition("..")
    for seed in range(int(first), int(last or int(first) + 1)):
        print(seed, run(seed))


if __name__ == "__main__":
    main(sys.argv[1])
