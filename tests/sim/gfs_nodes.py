"""Several mounts of one disk: every acknowledged operation is visible on every node at once, also while nodes die.

`run(seed)` mounts three filesystems over one simulated disk and one small lock manager. `sequential`: one operation at
a time on a random node, checked against a dictionary through another random node. `concurrent`: all nodes at once
append records to shared logs and count under flock; a node is killed in the middle, a survivor replays its journal, it
comes back in its old slot. In the end every acknowledged record is there once and whole, and fsck is clean.
"""

import struct
from collections.abc import Coroutine
from random import Random
from typing import Any

from corral.api.gfs import ROOT, Caller, LockRange
from corral.base.ids import MemberId
from corral.base.view import Round, Slotted
from corral.gfs import fsck, mkfs
from corral.gfs import journal as journal_module
from corral.gfs.filesystem import GfsFilesystem
from corral.gfs.mount import mount
from corral.gfs.volume import Options
from tests.sim.gfs_crash import ViolationError, Workload, read_tree, shape
from tests.unit.gfs.fakelocks import Client, Manager
from tests.unit.gfs.world import BLOCK, Future, MemoryDisk, Timer, World

ME = Caller(0, 0, 1)
BLOCKS = 8192
NODES = 3
SMALL = 16  # files
RECORD = struct.Struct("<II56x")
F_WRLCK = 1
F_UNLCK = 2


class NodeWorld:
    """One node's view of the world: what it has running can be killed."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.alive = True

    def now(self) -> int:
        return self.world.now()

    def wall_ns(self) -> int:
        return self.world.wall_ns()

    def wall_seconds(self) -> int:
        return self.world.wall_seconds()

    def random_bytes(self, count: int) -> bytes:
        return self.world.random_bytes(count)

    def future(self) -> Future:
        return Future()

    def call_at(self, when: int, call: Any) -> Timer:
        return self.world.call_at(when, lambda: call() if self.alive else None)

    def soon(self, call: Any) -> None:
        self.world.soon(call)

    async def sleep_until(self, when: int) -> None:
        await self.world.sleep_until(when)

    def spawn(self, coroutine: Coroutine[Any, Any, Any], name: str) -> Future:
        if not self.alive:
            coroutine.close()
            return Future()
        return self.world.spawn(self._mortal(coroutine), name)

    def _mortal(self, coroutine: Coroutine[Any, Any, Any]) -> Coroutine[Any, Any, Any]:
        return _Mortal(self, coroutine)  # type: ignore[return-value]


class _Mortal:
    """A coroutine that goes no further once its node is dead."""

    def __init__(self, node: NodeWorld, coroutine: Coroutine[Any, Any, Any]) -> None:
        self.node = node
        self.coroutine = coroutine

    def send(self, value: Any) -> Any:
        if not self.node.alive:
            raise StopIteration(None)
        return self.coroutine.send(value)

    def close(self) -> None:
        self.coroutine.close()


class Node:
    def __init__(self, cluster: "Cluster", slot: int) -> None:
        self.cluster = cluster
        self.slot = slot
        self.incarnation = 0
        self.world: NodeWorld
        self.client: Client
        self.filesystem: GfsFilesystem
        self.notifier: Any = None

    @property
    def member(self) -> MemberId:
        return MemberId(self.slot + 1, self.incarnation, 1)

    async def mount(self) -> None:
        self.incarnation += 1
        self.world = NodeWorld(self.cluster.world)
        self.client = self.cluster.manager.client()
        disk = MemoryDisk(self.world, BLOCKS, self.cluster.disk.content)  # type: ignore[arg-type]
        self.filesystem = await mount(
            self.world,  # type: ignore[arg-type]
            disk,
            self.client,  # type: ignore[arg-type]
            slot=self.slot,
            notifier=self.notifier,
            options=Options(commit_ns=self.cluster.commit_ns, min_hold_ns=self.cluster.min_hold_ns),
        )


class Cluster:
    """The mounts and the rounds of their group: stop everywhere, start everywhere, then finish everywhere."""

    def __init__(self, world: World, rng: Random) -> None:
        self.world = world
        self.rng = rng
        self.disk = MemoryDisk(world, BLOCKS)
        self.manager = Manager(world)
        self.commit_ns = rng.choice([10, 100, 5000])
        self.min_hold_ns = rng.choice([0, 3, 30])
        self.nodes: list[Node] = []
        self.round = 0

    async def begin(self, count: int = NODES) -> None:
        await mkfs.format(
            self.world,  # type: ignore[arg-type]
            self.disk,
            cluster="c",
            name="n",
            journals=count,
            journal_blocks=self.rng.choice([160, 256, 512]),
            rgrp_blocks=1024,
        )
        self.nodes = [Node(self, slot) for slot in range(count)]
        for node in self.nodes:
            await node.mount()
        await self.recover(failed=[], joined=self.nodes)

    async def recover(self, failed: list[Slotted], joined: list[Node]) -> None:
        self.round += 1
        alive = [node for node in self.nodes if node.world.alive]
        members = tuple(Slotted(node.member, node.slot) for node in alive)
        round_ = Round(self.round, "gfs:n", members, tuple(failed), tuple(node.member for node in joined), ())
        for node in alive:
            node.filesystem.stop()
        for node in alive:
            await node.filesystem.start(round_)
        for node in alive:
            node.filesystem.finish(round_)
        for node in joined:
            await node.filesystem.go_live()

    def kill(self, node: Node) -> list[Slotted]:
        """As fencing leaves it: nothing of it runs, its locks are purged."""
        failed = [Slotted(node.member, node.slot)]
        for other in self.nodes:
            if other.world.alive and other is not node:
                other.filesystem.stop()
        node.world.alive = False
        self.manager.kill(node.client)
        return failed

    async def unmount(self) -> None:
        for node in self.nodes:
            if node.world.alive:
                await node.filesystem.destroy()
                if node.filesystem.damaged or node.filesystem.withdrawn:
                    raise ViolationError(
                        f"NODES-SOUND slot {node.slot}: {node.filesystem.damaged} {node.filesystem.withdrawn}"
                    )

    async def check(self) -> None:
        report = await fsck.check(self.world, self.disk)  # type: ignore[arg-type]
        if not report.clean:
            raise ViolationError(f"NODES-FSCK {[finding.message for finding in report.findings[:5]]}")


# --- one operation at a time ------------------------------------------------------------------------------------------


class SharedWorkload(Workload):
    """The crash test's operations, each on another node."""

    cluster: Cluster

    def __init__(self, cluster: Cluster, rng: Random) -> None:
        self.cluster = cluster
        cluster.disk.log = []
        super().__init__(cluster.world, cluster.nodes[0].filesystem, cluster.disk, rng)

    def choose(self) -> None:
        self.filesystem = self.rng.choice([node for node in self.cluster.nodes if node.world.alive]).filesystem

    async def ino(self, path: bytes) -> int:
        """Each node's kernel walks down by itself."""
        ino = ROOT
        for name in path.split(b"/")[1:]:
            ino = (await self.filesystem.lookup(ino, name, ME)).ino
        return ino

    async def verify(self, node: Node) -> None:
        """What this node shows is what was acknowledged, to the byte."""
        tree, contents = await read_tree(node.filesystem)
        if shape(tree) != shape(self.tree):
            missing = sorted(set(self.tree) ^ set(tree))[:3]
            raise ViolationError(f"NODES-VISIBLE slot {node.slot} shows another tree, first {missing}")
        for path, entry in self.tree.items():
            if entry[0] == "f" and contents[path] != bytes(self.files[entry[1]].data):
                raise ViolationError(f"NODES-VISIBLE slot {node.slot}: content of {path!r}")


async def sequential(cluster: Cluster, rng: Random, operations: int) -> int:
    await cluster.begin()
    workload = SharedWorkload(cluster, rng)
    for _ in range(operations // 20):
        await workload.run(20)
        await workload.verify(rng.choice(cluster.nodes))
    for node in cluster.nodes:
        await workload.verify(node)
    await cluster.unmount()
    await cluster.check()
    return operations


# --- all at once, and one dies ----------------------------------------------------------------------------------------


class Acknowledged:
    def __init__(self) -> None:
        self.records: dict[tuple[int, int], bool] = {}
        self.count = 0
        self.names: dict[bytes, bool] = {}
        self.small: dict[bytes, set[tuple[int, int]]] = {}
        self.operations = 0


async def worker(cluster: Cluster, node: Node, done: Acknowledged, rng: Random, rounds: int, identity: int) -> None:
    """Appends to one log, counts in one file under flock, makes and removes names in one directory."""
    filesystem = node.filesystem
    log = (await filesystem.lookup(ROOT, b"log", ME)).ino
    counter = (await filesystem.lookup(ROOT, b"counter", ME)).ino
    shared = (await filesystem.lookup(ROOT, b"shared", ME)).ino
    appender = await filesystem.open(log, 1, ME)
    counting = await filesystem.open(counter, 2, ME)
    for number in range(rounds):
        kind = rng.choice([0, 0, 1, 1, 2, 2, 3, 4, 4, 4, 4, 4])
        if kind == 4:
            await pass_on(filesystem, done, rng, identity, number)
        elif kind == 0:
            record = RECORD.pack(identity, number)
            await filesystem.write(log, appender.handle, 0, record, append=True, from_cache=False, kill_suidgid=False)
            await filesystem.fsync(log, appender.handle, data_only=True)
            done.records[identity, number] = True
        elif kind == 1:
            await filesystem.setlk(counter, counting.handle, identity, LockRange(0, 0, F_WRLCK), wait=True, flock=True)
            parts = await filesystem.read(counter, counting.handle, 0, 8)
            (value,) = struct.unpack("<Q", b"".join(bytes(part) for part in parts))
            await filesystem.write(
                counter,
                counting.handle,
                0,
                struct.pack("<Q", value + 1),
                append=False,
                from_cache=False,
                kill_suidgid=False,
            )
            await filesystem.fsync(counter, counting.handle, data_only=True)
            done.count += 1
            await filesystem.setlk(counter, counting.handle, identity, LockRange(0, 0, F_UNLCK), wait=True, flock=True)
        elif kind == 2:
            name = b"%d-%d" % (identity, number)
            entry = await filesystem.mkdir(shared, name, 0o755, ME)
            await filesystem.fsyncdir(shared, 0, data_only=False)
            done.names[name] = True
            filesystem.forget(entry.ino, 1)
        else:
            mine = sorted(name for name in done.names if done.names[name] and name.startswith(b"%d-" % identity))
            if mine:
                name = rng.choice(mine)
                done.names[name] = False  # from here on either is right until it is acknowledged
                await filesystem.rmdir(shared, name, ME)
                await filesystem.fsyncdir(shared, 0, data_only=False)
                del done.names[name]
        done.operations += 1
    await filesystem.release(log, appender.handle, None)
    await filesystem.release(counter, counting.handle, identity)


async def pass_on(filesystem: GfsFilesystem, done: Acknowledged, rng: Random, identity: int, number: int) -> None:
    """A record in one of many small files, each touched now here, now there, and then left alone for a while."""
    name = b"small%d" % rng.randrange(SMALL)
    ino = (await filesystem.lookup(ROOT, name, ME)).ino
    opened = await filesystem.open(ino, 1, ME)
    record = RECORD.pack(identity, number)
    await filesystem.write(ino, opened.handle, 0, record, append=True, from_cache=False, kill_suidgid=False)
    await filesystem.fsync(ino, opened.handle, data_only=False)
    done.small.setdefault(name, set()).add((identity, number))
    await filesystem.release(ino, opened.handle, None)


async def concurrent(cluster: Cluster, rng: Random, rounds: int, *, kill: bool) -> int:
    await cluster.begin()
    first = cluster.nodes[0].filesystem
    await first.mknod(ROOT, b"log", 0o100644, 0, ME)
    entry, opened = await first.create(ROOT, b"counter", 0o644, 2, ME)
    await first.write(entry.ino, opened.handle, 0, bytes(8), append=False, from_cache=False, kill_suidgid=False)
    await first.release(entry.ino, opened.handle, None)
    await first.mkdir(ROOT, b"shared", 0o755, ME)
    for index in range(SMALL):
        await first.mknod(ROOT, b"small%d" % index, 0o100644, 0, ME)
    await first.sync()
    done = Acknowledged()
    workers = [
        (node, node.world.spawn(worker(cluster, node, done, Random(rng.random()), rounds, node.slot), "worker"))
        for node in cluster.nodes
    ]
    if kill:
        await _sleep(cluster.world, rng.randrange(200, 1200))
        victim = rng.choice(cluster.nodes)
        failed = cluster.kill(victim)
        await _sleep(cluster.world, rng.randrange(1, 100))
        await cluster.recover(failed, [])
        await _sleep(cluster.world, rng.choice([rng.randrange(1, 200), rng.randrange(1000, 6000)]))
        await victim.mount()
        await cluster.recover([], [victim])
        again = worker(cluster, victim, done, Random(rng.random()), rounds // 2, 10 + victim.slot)
        workers.append((victim, victim.world.spawn(again, "worker")))
        workers = [(node, task) for node, task in workers if node is not victim or task is workers[-1][1]]
    for _, task in workers:
        await task
    for node in cluster.nodes:
        await judge(node, done)
    await cluster.unmount()
    await cluster.check()
    return done.operations


async def judge(node: Node, done: Acknowledged) -> None:
    filesystem = node.filesystem
    log = (await filesystem.lookup(ROOT, b"log", ME)).ino
    opened = await filesystem.open(log, 0, ME)
    content = b"".join(bytes(part) for part in await filesystem.read(log, opened.handle, 0, 1 << 20))
    await filesystem.release(log, opened.handle, None)
    if len(content) % RECORD.size:
        raise ViolationError("NODES-LOG a record is not whole")
    found = [RECORD.unpack_from(content, at) for at in range(0, len(content), RECORD.size)]
    if len(set(found)) != len(found) or not set(done.records) <= set(found):
        raise ViolationError(f"NODES-LOG lost {sorted(set(done.records) - set(found))[:5]} of {len(done.records)}")
    counter = (await filesystem.lookup(ROOT, b"counter", ME)).ino
    opened = await filesystem.open(counter, 0, ME)
    parts = await filesystem.read(counter, opened.handle, 0, 8)
    (value,) = struct.unpack("<Q", b"".join(bytes(part) for part in parts))
    await filesystem.release(counter, opened.handle, None)
    if not done.count <= value <= done.count + 1:
        raise ViolationError(f"NODES-COUNT {value} after {done.count} acknowledged")
    for name, wanted in sorted(done.small.items()):
        ino = (await filesystem.lookup(ROOT, name, ME)).ino
        opened = await filesystem.open(ino, 0, ME)
        content = b"".join(bytes(part) for part in await filesystem.read(ino, opened.handle, 0, 1 << 20))
        await filesystem.release(ino, opened.handle, None)
        there = {RECORD.unpack_from(content, at) for at in range(0, len(content), RECORD.size)}
        if not wanted <= there:
            raise ViolationError(f"NODES-SMALL {name!r} lost {sorted(wanted - there)[:5]}")
    shared = (await filesystem.lookup(ROOT, b"shared", ME)).ino
    names = {entry.name for entry in await filesystem.readdir(shared, 0, 0, 1 << 20, plus=False)}
    lost = {name for name, sure in done.names.items() if sure} - names
    if lost:
        raise ViolationError(f"NODES-NAMES lost {sorted(lost)[:5]}")


async def _sleep(world: World, steps: int) -> None:
    await world.sleep_until(world.now() + steps)


def run(seed: int, operations: int = 160, kind: str = "") -> dict[str, Any]:
    """`kind` is drawn unless given. Raises ViolationError with the seed."""
    rng = Random(seed)
    world = World(Random(seed + 1), delay=True)
    cluster = Cluster(world, rng)
    handover_all, journal_module.HANDOVER_ALL = journal_module.HANDOVER_ALL, rng.choice([0, 0, 8, 512])  # type: ignore[misc]
    kind = kind or rng.choice(["sequential", "concurrent", "kill"])
    try:
        if kind == "sequential":
            count = world.run(sequential(cluster, rng, operations))
        else:
            count = world.run(concurrent(cluster, rng, operations // 4, kill=kind == "kill"))
    except ViolationError as error:
        raise ViolationError(f"{error} (seed {seed}, {kind})") from error
    finally:
        journal_module.HANDOVER_ALL = handover_all
        world.abandon()
    return {"seed": seed, "kind": kind, "operations": count, "blasts": cluster.manager.blasts}


if __name__ == "__main__":
    import sys

    for number in range(int(sys.argv[1]), int(sys.argv[2])):
        print(run(number))


__all__ = ["BLOCK", "run"]
