"""Plays a story of several lockspace engines and tells what happened, in the words of the story file.

A story is commands, a line of dashes, and the expected lines; `CORRAL_REWRITE=1 pytest tests/scenario/dlm` writes what
happened instead (read the diff). Messages wait in the network until the story delivers them: any order can be told.

    nodes 1 2 3                 members; their first round runs to its end, silently
    lock C@N NAME RES MODE [FLAG...] [value=V] [timeout=MS]     client C on node N; NAME names the lock from here on
    convert NAME MODE [FLAG...] [value=V] [timeout=MS]
    unlock NAME [FLAG...] [value=V]      cancel NAME
    deliver [A>B [COUNT]]       messages from A to B, or all until nothing moves
    drop A>B                    what is on its way from A to B is lost (only sensible before a new round)
    settle                      deliver all, and say nothing of it
    kill N                      dies: its locks count until the next round
    gone C@N                    the client dies
    purge C@N WHOSE NODE        client C on node N purges the orphans that client WHOSE (0: all) left on NODE
    stop        round [N...]    start a round with these members (default: all alive)       finish [N...]
    recover                     stop, round, deliver all, finish
    lapse N     lease N         the lease runs out; is renewed
    wait MS                     time passes
    show RES                    the queues on the master
"""

from collections.abc import Iterator

import corral.api.dlm as api
from corral.api.dlm import MODE_NAMES, Request
from corral.base.engine import TICK, Received
from corral.base.ids import MemberId
from corral.base.time import FOREVER, MILLISECOND, SECOND
from corral.base.view import Round, Slotted
from corral.dlm.engine import LockspaceEngine
from corral.dlm.events import Blocked, ClientGone, Done, Finish, Lease, RoundDone, SpaceLost, Start, Stop, Submit
from corral.dlm.resource import Lock
from corral.dlm.wire import CODEC

STATUS = {
    0: "granted",
    api.ECANCEL: "cancelled",
    api.EUNLOCK: "unlocked",
    -2: "refused: no such lock",
    -11: "not granted: would block",
    -16: "refused: busy",
    -22: "refused: illegal",
    -35: "not granted: deadlock",
    -110: "not granted: timed out",
}
MODES = {name: mode for mode, name in enumerate(MODE_NAMES)}


class Story:
    def __init__(self) -> None:
        self.now = SECOND
        self.engines: dict[int, LockspaceEngine] = {}
        self.dead: set[int] = set()
        self.round_id = 0
        self.rounds: dict[int, int] = {}  # the round each node is in
        self.network: dict[tuple[int, int], list[tuple[int, bytes]]] = {}
        self.names: dict[str, tuple[int, int, int]] = {}  # lock name -> node, client, handle
        self.cookies: dict[int, str] = {}
        self.lines: list[str] = []
        self.quiet = False

    def play(self, text: str) -> list[str]:
        for line in text.splitlines():
            words = line.split("#")[0].split()
            if words:
                getattr(self, "do_" + words[0])(*words[1:])
        return self.lines

    # --- the network --------------------------------------------------------------------------------------------------

    def step(self, node: int, *events: object) -> None:
        engine = self.engines[node]
        for event in events:
            engine.step(self.now, event)
        ready = engine.ready()
        for peer, message in ready.send:
            self.network.setdefault((node, peer.node), []).append((self.rounds[node], CODEC.encode(message)))
        for event in ready.emit:
            self.emitted(node, event)

    def deliver_one(self, source: int, target: int) -> bool:
        queue = self.network.get((source, target), [])
        if not queue or target in self.dead or queue[0][0] > self.rounds[target]:
            return False
        round_id, payload = queue.pop(0)
        if round_id == self.rounds[target]:
            message = CODEC.decode(payload)
            if not self.quiet:
                self.lines.append(f"  {source}>{target} {type(message).__name__}")
            self.step(target, Received(member(source), message))
        return True

    def deliver_all(self) -> None:
        moved = True
        while moved:
            moved = False
            for pair in sorted(self.network):
                moved = self.deliver_one(*pair) or moved

    # --- commands -----------------------------------------------------------------------------------------------------

    def do_nodes(self, *nodes: str) -> None:
        for node in map(int, nodes):
            self.engines[node] = LockspaceEngine(member(node), "story", 8, lease_until=FOREVER, toss_ns=SECOND)
            self.rounds[node] = 0
        lines, self.lines = self.lines, []
        self.do_recover()
        self.lines = lines

    def do_join(self, node: str) -> None:
        self.engines[int(node)] = LockspaceEngine(member(int(node)), "story", 8, lease_until=FOREVER, toss_ns=SECOND)
        self.rounds[int(node)] = 0

    def do_lock(self, where: str, name: str, resource: str, mode: str, *rest: str) -> None:
        client, node = map(int, where.split("@"))
        self.names[name] = (node, client, len(self.names) + 1)
        self.submit(name, options("lock", rest, resource=resource.encode(), mode=MODES[mode]))

    def do_convert(self, name: str, mode: str, *rest: str) -> None:
        self.submit(name, options("convert", rest, mode=MODES[mode]))

    def do_unlock(self, name: str, *rest: str) -> None:
        self.submit(name, options("unlock", rest))

    def do_cancel(self, name: str) -> None:
        self.submit(name, options("cancel", ()))

    def submit(self, name: str, request: Request) -> None:
        node, client, handle = self.names[name]
        cookie = len(self.cookies) + 1
        self.cookies[cookie] = f"{name} cancel" if request.op == "cancel" else name
        self.step(node, Submit(client, [(handle, cookie, request)]))

    def do_deliver(self, pair: str = "", count: str = "1000000") -> None:
        if not pair:
            self.deliver_all()
            return
        source, target = map(int, pair.split(">"))
        for _ in range(int(count)):
            if not self.deliver_one(source, target):
                break

    def do_drop(self, pair: str) -> None:
        source, target = map(int, pair.split(">"))
        self.network.pop((source, target), None)

    def do_settle(self) -> None:
        self.quiet = True
        self.deliver_all()
        self.quiet = False

    def do_kill(self, node: str) -> None:
        self.dead.add(int(node))

    def do_gone(self, where: str) -> None:
        client, node = map(int, where.split("@"))
        self.step(node, ClientGone(client))

    def do_purge(self, where: str, whose: str, left_on: str) -> None:
        client, node = map(int, where.split("@"))
        cookie = len(self.cookies) + 1
        self.cookies[cookie] = "purge"
        self.step(node, Submit(client, [(0, cookie, Request("purge", lock=int(left_on), owner=int(whose)))]))

    def alive(self) -> Iterator[int]:
        return (node for node in sorted(self.engines) if node not in self.dead)

    def do_stop(self) -> None:
        for node in self.alive():
            self.step(node, Stop())

    def do_round(self, *nodes: str) -> None:
        self.round_id += 1
        members = tuple(Slotted(member(node), node) for node in (map(int, nodes) if nodes else self.alive()))
        round = Round(self.round_id, "dlm:story", members, (), (), ())
        for entry in members:
            self.rounds[entry.member.node] = self.round_id
            self.step(entry.member.node, Start(round))

    def do_finish(self, *nodes: str) -> None:
        for node in map(int, nodes) if nodes else self.alive():
            self.step(node, Finish(self.round_id))

    def do_recover(self) -> None:
        self.do_stop()
        self.do_round()
        self.do_settle()
        self.do_finish()
        self.do_settle()

    def do_lapse(self, node: str) -> None:
        self.step(int(node), Lease(self.now))

    def do_lease(self, node: str) -> None:
        self.step(int(node), Lease(FOREVER))

    def do_wait(self, milliseconds: str) -> None:
        self.now += int(milliseconds) * MILLISECOND
        for node in self.alive():
            if self.engines[node].deadline <= self.now:
                self.step(node, TICK)

    def do_show(self, name: str) -> None:
        for node in self.alive():
            resource = self.engines[node].space.resources.get(name.encode())
            if resource is not None and resource.complete:
                value = (resource.value or b"").rstrip(b"\0").decode()
                validity = "" if resource.value_valid else " (not valid)"
                self.lines.append(f"{name} mastered by {node} value={value!r}{validity}")
                for title, queue in (
                    ("granted", resource.granted),
                    ("converting", resource.converting),
                    ("waiting", resource.waiting),
                ):
                    if queue:
                        self.lines.append(f"  {title}: {', '.join(self.describe(node, lock) for lock in queue)}")

    # --- words --------------------------------------------------------------------------------------------------------

    def describe(self, node: int, lock: Lock) -> str:
        holder = node if lock.holder is None else lock.holder.node
        name = self.named(holder, lock.id >> 32, lock.id & 0xFFFFFFFF)
        modes = [MODE_NAMES[mode] for mode in (lock.granted, lock.requested) if mode >= 0]
        return f"{name} {'->'.join(modes)}"

    def named(self, node: int, client: int, handle: int) -> str:
        return next(name for name, where in self.names.items() if where == (node, client, handle))

    def emitted(self, node: int, event: object) -> None:
        if isinstance(event, Done):
            self.lines.append(f"{self.cookies[event.cookie]} {self.outcome(event)}")
        elif isinstance(event, Blocked):
            self.lines.append(f"{self.named(node, event.client, event.handle)} blocks {MODE_NAMES[event.mode]}")
        elif isinstance(event, RoundDone):
            self.lines.append(f"{node} done with round {event.round_id}")
        elif isinstance(event, SpaceLost):
            self.lines.append(f"{node} lost")

    def outcome(self, event: Done) -> str:
        completion = event.completion
        words = [STATUS[completion.status]]
        if self.cookies[event.cookie].endswith(" cancel") and completion.status == 0:
            words = ["under way"]
        elif completion.mode >= 0:
            words.append(MODE_NAMES[completion.mode])
            if completion.status == 0:
                words.append(f"token={completion.token >> 32}.{completion.token & 0xFFFFFFFF}")
        if text := completion.value.rstrip(b"\0").decode():
            words.append(f"value={text}")
        for flag in ("DEMOTED", "VALNOTVALID", "ALTMODE"):
            if completion.flags & getattr(api, flag):
                words.append(flag)
        return " ".join(words)


def member(node: int) -> MemberId:
    return MemberId(node, 1, 1)


def options(op: str, words: tuple[str, ...], resource: bytes = b"", mode: int = 0) -> Request:
    request = Request(op, resource, mode)
    for word in words:
        if word.startswith("value="):
            request.value = word[6:].encode()
            request.flags |= api.VALBLK
        elif word.startswith("timeout="):
            request.timeout_ns = int(word[8:]) * MILLISECOND
        else:
            request.flags |= getattr(api, word)
    return request
