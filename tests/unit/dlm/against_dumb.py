"""The engine against the dumb lockspace of `dumb.py`, over random stories of operations; what differs is made small.

    python -m tests.unit.dlm.against_dumb [--seconds 60] [--operations N] [--seed S [--members N]]

Stories are played on one member and on three that share the clients. A seed is one story; each run begins where the
last one that is recorded in `campaign/dlm-model.json` ended. A difference is shrunk to the operations it needs.
"""

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

from tests.unit.dlm.dumb import ORDER, DumbSpace
from tests.unit.dlm.members import Members

import corral.api.dlm as api
from corral.api.dlm import Request
from corral.base.engine import TICK
from corral.base.time import MILLISECOND
from corral.dlm.events import Blocked, Done, Waiting

RECORD = Path("campaign/dlm-model.json")
LENGTH = 70  # operations in a story
SIZE = 8
WIDTH = 6  # bytes of a resource that ranges are drawn from
SLOW = 40 * MILLISECOND
FAR = 1 << 60  # nothing is tossed: a resource's validity would go with it
RESOURCES = (b"a", b"b")
STATUS = {0: "OK", -2: "ENOENT", -11: "EAGAIN", -16: "EBUSY", -17: "EEXIST", -22: "EINVAL", -35: "EDEADLK"}
STATUS |= {-110: "ETIMEDOUT", api.ECANCEL: "ECANCEL", api.EUNLOCK: "EUNLOCK"}
USUAL = [
    "NOQUEUE", "VALBLK", "IVVALBLK", "PERSISTENT", "NODLCKWT", "NOQUEUEBAST", "HEADQUE", "NOORDER", "ALTPR", "ALTCW",
]  # fmt: skip
FLAGS = [
    *USUAL, "CANCEL", "CONVERT", "QUECVT", "CONVDEADLK", "NODLCKBLK", "EXPEDITE", "ORPHAN", "FORCEUNLOCK", "TIMEOUT",
]  # fmt: skip

Operation = tuple[Any, ...]


def story(seed: int) -> list[Operation]:
    """Operations as plain data: shrinking drops some of them."""
    rng = Random(seed)
    weights = {flag: rng.choice((0.02, 0.1, 0.3)) for flag in FLAGS}
    cancels = rng.random() < 0.3
    ranged = rng.choice((0.0, 0.0, 0.4, 0.8))

    def some(flags: Sequence[str]) -> frozenset[str]:
        chosen = {flag for flag in flags if rng.random() < weights[flag]}
        if rng.random() < 0.02:
            chosen.add(rng.choice(FLAGS))
        return frozenset(chosen)

    def value() -> bytes | None:
        return bytes([rng.randrange(1, 255)]) * rng.randrange(1, SIZE + 1) if rng.random() < 0.6 else None

    def timeout() -> int:
        return rng.randrange(1, 100 * MILLISECOND) if rng.random() < 0.2 else 0

    def span() -> tuple[int, int] | None:
        if rng.random() >= ranged:
            return None
        first = rng.randrange(WIDTH)
        return first, rng.randrange(first, WIDTH)

    operations: list[Operation] = []
    for _ in range(LENGTH):
        client, handle, mode = rng.randrange(1, 5), rng.randrange(1, 5), rng.choice(ORDER)
        choice = rng.random()
        if choice < 0.34:
            name = RESOURCES[rng.random() < 0.15]
            flags = some([*USUAL, *(["ORPHAN"] if rng.random() < 0.5 else ())])
            if mode == "NL" and rng.random() < 0.2:
                flags |= {"EXPEDITE"}
            operations.append(("lock", client, handle, name, mode, flags, value(), timeout(), span()))
        elif choice < 0.68:
            flags = some([*USUAL, "QUECVT", "CONVDEADLK"])
            operations.append(("convert", client, handle, mode, flags, value(), timeout(), span()))
        elif choice < 0.82:
            flags = some(["VALBLK", "IVVALBLK", "FORCEUNLOCK"])
            operations.append(("unlock", client, handle, flags, value()))
        elif choice < (0.9 if cancels else 0.86):
            operations.append(("cancel", client, handle))
        elif choice < 0.95:
            operations.append(("wait", rng.randrange(1, 30 * MILLISECOND)))
        elif choice < 0.985:
            operations.append(("gone", client))
        else:
            operations.append(("purge", client, rng.randrange(1, 4), rng.choice((0, 0, rng.randrange(1, 9)))))
    return operations


class Both:
    """The engine (one member, or several that share the clients) and the dumb lockspace, told the same.

    Ended by way of another member a conversion is cancelled first and the lock unlocked then: two grant passes instead
    of one, so others may hear more of it. Conversions are force-unlocked, and clients with requests die, on one member.
    """

    def __init__(self, members: int) -> None:
        self.count = members
        self.members = Members(*range(1, members + 1), value_size=SIZE, toss_ns=FAR, warn_ns=SLOW)
        self.start = self.members.now
        self.dumb = DumbSpace(self.node_of, SIZE, SLOW)
        self.dumb.now = self.start
        self.number: dict[int, int] = {}  # a client that died comes back under another number
        self.numbers = 0
        self.cookie = 0

    def node_of(self, client: int) -> int:
        return client % self.count + 1

    def client(self, slot: int) -> int:
        if slot not in self.number:
            self.numbers += 1
            self.number[slot] = self.numbers
        return self.number[slot]

    def play(self, operation: Operation) -> None:
        self.cookie += 1
        what, *rest = operation
        self.members.heard.clear()
        self.dumb.heard.clear()
        getattr(self, what)(*rest)
        got = Counter(map(self.said, (event for _, event in self.members.heard)))
        expected = Counter(self.dumb.heard)
        assert got == expected, f"{operation}: expected {list(expected - got)}, got {list(got - expected)}"
        self.compare_queues()

    def submit(self, client: int, handle: int, request: Request) -> None:
        self.members.cookie = self.cookie - 1
        self.members.submit(self.node_of(client), client, handle, request)

    def lock(
        self,
        slot: int,
        handle: int,
        name: bytes,
        mode: str,
        flags: frozenset[str],
        value: Any,
        ns: int,
        span: tuple[int, int] | None = None,
    ) -> None:
        client = self.client(slot)
        ns = self.unlike_any(ns)
        asked = Request("lock", name, ORDER.index(mode), bits(flags), value=value, timeout_ns=ns, range=span)
        self.submit(client, handle, asked)
        self.dumb.lock(client, handle, self.cookie, name, mode, flags, value, ns, span)

    def convert(
        self,
        slot: int,
        handle: int,
        mode: str,
        flags: frozenset[str],
        value: Any,
        ns: int,
        span: tuple[int, int] | None = None,
    ) -> None:
        client = self.client(slot)
        ns = self.unlike_any(ns)
        asked = Request("convert", mode=ORDER.index(mode), flags=bits(flags), value=value, timeout_ns=ns, range=span)
        self.submit(client, handle, asked)
        self.dumb.convert(client, handle, self.cookie, mode, flags, value, ns, span)

    def unlock(self, slot: int, handle: int, flags: frozenset[str], value: Any) -> None:
        client = self.client(slot)
        entry = self.dumb.find(client, handle)
        if self.count > 1 and "FORCEUNLOCK" in flags and entry and entry["pending"] == "convert":
            return
        self.submit(client, handle, Request("unlock", flags=bits(flags), value=value))
        self.dumb.unlock(client, handle, self.cookie, flags, value)

    def cancel(self, slot: int, handle: int) -> None:
        client = self.client(slot)
        self.submit(client, handle, Request("cancel"))
        self.dumb.cancel(client, handle, self.cookie)

    def gone(self, slot: int) -> None:
        client = self.client(slot)
        if self.count > 1 and any(entry["pending"] for entry in self.dumb.of(client)):
            return
        del self.number[slot]
        self.members.gone(self.node_of(client), client)
        self.dumb.gone(client)

    def purge(self, slot: int, node: int, whose: int) -> None:
        client, node = self.client(slot), (node - 1) % self.count + 1
        self.submit(client, 0, Request("purge", lock=node, owner=whose))
        self.dumb.purge(client, self.cookie, node, whose)

    def wait(self, duration: int) -> None:
        members = self.members
        until = members.now + duration
        while (due := min(engine.deadline for engine in members.engines.values())) <= until:
            members.now = max(members.now, due)
            for node, engine in sorted(members.engines.items()):
                if engine.deadline <= members.now:
                    members.step(node, TICK)
        members.now = until
        self.dumb.wait(until)

    def unlike_any(self, timeout_ns: int) -> int:
        """No two requests time out at the same instant: whose turn it is would be nobody's business."""
        return timeout_ns and timeout_ns // 1000 * 1000 + self.cookie

    def said(self, event: object) -> tuple[Any, ...]:
        if isinstance(event, Blocked):
            return ("bast", event.client, event.handle, ORDER[event.mode])
        if isinstance(event, Waiting):
            return ("slow", event.client, event.waits.lock, event.cookie)
        assert isinstance(event, Done)
        done = event.completion
        head = ("done", event.client, event.handle, event.cookie, STATUS[done.status])
        if (*head, None, (), None) in self.dumb.heard:
            return (*head, None, (), None)  # what it says of a lock that has ended, or that is not its own, is nothing
        flags = tuple(f for f in ("ALTMODE", "DEMOTED", "VALNOTVALID") if done.flags & getattr(api, f))
        return (*head, ORDER[done.mode], flags, (done.value or None) if done.status == 0 else None)

    def compare_queues(self) -> None:
        for name in RESOURCES:
            dumb = self.dumb.resource(name)
            expected = [
                [self.address(lock["id"]) for lock in queue] for queue in (dumb.granted, dumb.converting, dumb.waiting)
            ]
            modes = {self.address(number): lock["mode"] for number, lock in dumb.locks.items()}
            for engine in self.members.engines.values():
                resource = engine.space.resources.get(name)
                if resource is None or not resource.complete:
                    continue
                queues = (resource.granted, resource.converting, resource.waiting)
                got = [[self.of(lock) for lock in queue] for queue in queues]
                assert sorted(got[0]) == sorted(expected[0]), f"granted of {name!r}: {got[0]} for {expected[0]}"
                assert got[1:] == expected[1:], f"queues of {name!r}: {got} for {expected}"
                held = {self.of(lock): None if lock.granted < 0 else ORDER[lock.granted] for q in queues for lock in q}
                assert held == modes, f"modes of {name!r}: {held} for {modes}"
                extents = {self.of(lock): lock.extent for q in queues for lock in q}
                spans = {self.address(number): lock["range"] for number, lock in dumb.locks.items()}
                assert extents == spans, f"ranges of {name!r}: {extents} for {spans}"
                assert (resource.value, resource.value_valid) == (dumb.value, dumb.valid), f"value of {name!r}"

    def address(self, number: int) -> tuple[int, int]:
        entry = self.dumb.entries[number]
        return entry["client"], entry["handle"]

    def of(self, lock: Any) -> tuple[int, int]:
        """Who has this lock: asked of its holder, because a master does not hear of adoptions."""
        if lock.holder is not None:
            lock = self.members.engines[lock.holder.node].space.find(lock.id)
        return lock.address >> 32, lock.address & 0xFFFFFFFF


def bits(flags: frozenset[str]) -> int:
    return sum(getattr(api, flag) for flag in flags)


def difference(operations: Sequence[Operation], members: int) -> str:
    """Where the engine and the dumb lockspace part; empty if they do not."""
    both = Both(members)
    for at, operation in enumerate(operations):
        try:
            both.play(operation)
        except Exception as error:  # an engine that raises differs as well
            return f"operation {at}: {type(error).__name__} {error}"
    return ""


def shrunk(operations: Sequence[Operation], members: int) -> list[Operation]:
    """Leaves out whatever the difference does not need: halves first, single operations last."""
    needed = list(operations)
    step = len(needed) // 2
    while step:
        at = 0
        while at < len(needed):
            fewer = needed[:at] + needed[at + step :]
            if difference(fewer, members):
                needed = fewer
            else:
                at += step
        step //= 2
    return needed


def check(seed: int, members: int) -> None:
    """Raises AssertionError with the shortest story found."""
    operations = story(seed)
    if difference(operations, members):
        needed = shrunk(operations, members)
        lines = "\n".join(f"  {operation}" for operation in needed)
        raise AssertionError(f"seed {seed}, {members} members: {difference(needed, members)}\n{lines}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--operations", type=int, default=0, help="stop when so many have been played in all")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--members", type=int, default=1)
    arguments = parser.parse_args()
    if arguments.seed is not None:
        check(arguments.seed, arguments.members)
        return 0
    record = json.loads(RECORD.read_text()) if RECORD.exists() else {"seed": 0, "operations": 0, "cpu_seconds": 0.0}
    begun, cpu = time.monotonic(), time.process_time()
    failed = ""
    while time.monotonic() - begun < arguments.seconds and not failed:
        if arguments.operations and record["operations"] >= arguments.operations:
            break
        try:
            check(record["seed"], (1, 3)[record["seed"] % 2])
        except AssertionError as error:
            failed = str(error)
        record["seed"] += 1
        record["operations"] += LENGTH
    record["cpu_seconds"] = round(record["cpu_seconds"] + time.process_time() - cpu, 1)
    if not failed:
        RECORD.parent.mkdir(exist_ok=True)
        RECORD.write_text(json.dumps(record) + "\n")
    done = f"{record['operations']} operations, {record['seed']} stories, {record['cpu_seconds']} CPU s: no difference"
    print(failed or done)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
