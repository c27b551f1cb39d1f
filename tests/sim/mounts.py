"""Whole nodes with mounted filesystems in the simulator, judged at the system call: the kernel's caches are in between.

    python -m corral.sim tests.sim.mounts:shared SEED [--nasty] [--trace FILE]

As `files`, but applications are processes of their own that make system calls on a model of the kernel's FUSE client
(dentry, attribute and page caches, read-ahead, its locks), which the mounts notify. Every promise of `files` (SIM-5 to
SIM-8) is judged through those caches, and

  SIM-9  what a process reads of a file it has mapped or read before is what another node wrote before it asked
"""

import errno
import os
import struct
from collections.abc import Callable, Coroutine
from typing import Any

from corral.base.errors import ClusterError
from corral.base.ids import NodeId
from corral.base.time import MILLISECOND, SECOND
from corral.base.world import World
from corral.gfs.volume import Options
from corral.providers.endpoint import native_endpoint
from corral.providers.native_gfs import NativeMount
from corral.providers.participant import Participant
from corral.sim.faults import Scope, draw_plan, inject
from corral.sim.kernel import SimKernel
from corral.sim.process import Process
from corral.sim.simulation import Simulation
from corral.sim.syscalls import OpenFile, Syscalls
from tests.sim.files import COUNTERS, DEVICE, SIZE, Acknowledged, FileCluster, final_check, prepare
from tests.sim.nodes import DETECT, PATHS, Violation, survivable

FORMING_SECONDS = 8
FAULT_SECONDS = 60
QUIET_SECONDS = 40
GONE = (errno.ENOTCONN, errno.EIO)  # the mount has ended: so does the application
RDWR = os.O_RDWR | os.O_CREAT


class MountCluster(FileCluster):
    def attached(self, number: NodeId) -> Any:
        async def main(world: World) -> int:
            machine = self.sim.machines[f"n{number}"]
            process = machine.processes[world.process.me.pid]
            while True:
                participant = Participant(world, PATHS.socket, PATHS.participants, native_endpoint, purpose="mount")
                try:
                    await participant.open()
                    break
                except ClusterError:
                    participant.close()
                    await world.sleep_until(world.now() + DETECT // 2)
            withdrawn = world.future()
            member = NativeMount(world, participant, await world.disk(DEVICE), Options(withdrawn=withdrawn.set_result))
            kernel = SimKernel(process, may_reply=participant.may_act)

            async def serve() -> None:
                kernel.attach(await member.open(kernel))
                self.mounted += 1
                for application in (Application, Appender):
                    machine.start("application", application(self, kernel, participant, number).main)

            world.spawn(serve(), "serve the mount")
            participant.lost.add_done_callback(lambda lost: withdrawn.done() or withdrawn.set_result(lost.result()))
            reason = await withdrawn
            machine.note(f"mount ends: {reason}")
            kernel.withdraw()
            participant.close()
            return 1

        return main


class Application:
    """A process that works on the mount until that is gone."""

    calls: Syscalls
    world: World
    suffix = ""
    think_ns = 40 * MILLISECOND  # at most, between two pieces of work

    def __init__(self, cluster: MountCluster, kernel: SimKernel, participant: Participant, number: NodeId) -> None:
        self.cluster = cluster
        self.acknowledged: Acknowledged = cluster.acknowledged
        self.kernel = kernel
        self.number = number
        self.name = f"n{number}.{participant.me.incarnation}.{participant.me.serial}{self.suffix}"
        self.record = 0
        self.kept: dict[int, OpenFile] = {}  # counters held open all the time

    async def main(self, world: World) -> int:
        process: Process = self.kernel.process.machine.processes[world.process.me.pid]
        self.calls, self.world = Syscalls(self.kernel, process), world
        work = self.work()
        while True:
            try:
                await world.rng.choice(work)()
            except OSError as error:
                if error.errno in GONE and (self.kernel.withdrawn or not self.kernel.process.alive):
                    return 0
                raise Violation(f"node {self.number}: a system call failed: {error}") from error
            if world.rng.random() < 0.05:
                self.kernel.drop_caches()
            await world.sleep_until(world.now() + world.rng.randrange(self.think_ns))

    def work(self) -> list[Callable[[], Coroutine[Any, Any, None]]]:
        return [self.count, self.count, self.append, self.private, self.move, self.look, self.list]

    def done(self) -> None:
        self.acknowledged.operations += 1
        oracle = self.cluster.oracle
        oracle.last_act[self.number] = self.cluster.sim.now
        oracle.operations += 1
        oracle.look()

    async def count(self) -> None:
        """Under a flock; sometimes through a descriptor that has been open since long, whose pages are cached."""
        number = self.world.rng.randrange(COUNTERS)
        file = self.kept.get(number)
        if file is None:
            file = await self.calls.open(f"/counter{number}", os.O_RDWR)
        await self.calls.flock(file, 1, wait=True)
        floor = self.acknowledged.counters[number]  # acknowledged before we held the lock
        (value,) = struct.unpack("<Q", await self.calls.pread(file, 8, 0))
        if value < floor:
            raise Violation(f"SIM-5 {self.name} reads {value} in counter {number}; {floor} was acknowledged")
        await self.calls.pwrite(file, struct.pack("<Q", value + 1), 0)
        await self.calls.fsync(file)
        if self.acknowledged.counters[number] > value:
            raise Violation(f"SIM-5 {self.name} counts to {value + 1} in counter {number} beside another holder")
        self.acknowledged.counters[number] = value + 1
        self.done()
        await self.calls.flock(file, 2, wait=False)
        if self.world.rng.random() < 0.5:
            self.kept[number] = file
        else:
            self.kept.pop(number, None)
            await self.calls.close(file)

    async def append(self) -> None:
        file = await self.calls.open("/log", os.O_WRONLY | os.O_APPEND)
        self.record += 1
        line = f"{self.name} {self.record} {'x' * self.world.rng.randrange(200)}\n".encode()
        await self.calls.write(file, line)
        await self.calls.fsync(file)
        self.acknowledged.records[self.name] = self.record
        self.done()
        await self.calls.close(file)

    async def private(self) -> None:
        """Creates, fills, cuts, renames over or unlinks a file of this node's own, in a directory everybody uses."""
        rng = self.world.rng
        name = b"private%d.%d" % (self.number, rng.randrange(6))
        key = (self.number, name)
        acknowledged = self.acknowledged
        if key in acknowledged.doubtful:  # after a crash in the middle: what is there is the truth
            acknowledged.private[key] = await self.content(name)
            acknowledged.doubtful.discard(key)
        known = acknowledged.private.get(key)
        acknowledged.begin(key)
        new: bytes | None = None
        if known is None or rng.random() < 0.2:
            new = rng.randbytes(rng.choice((10, 3000, 9000, 70_000)))
            fresh = b"/shared/fresh%d" % self.number
            file = await self.calls.open(fresh, RDWR | os.O_TRUNC)
            await self.calls.write(file, new)
            await self.calls.fsync(file)
            await self.calls.close(file)
            await self.calls.rename(fresh, b"/shared/" + name)
        elif rng.random() < 0.5:
            new = known[: len(known) // 2]
            file = await self.calls.open(b"/shared/" + name, os.O_RDWR)
            await self.calls.ftruncate(file, len(new))
            await self.calls.fsync(file)
            await self.calls.close(file)
        else:
            await self.calls.unlink(b"/shared/" + name)
        await self.calls.fsync_directory("/shared")
        acknowledged.private[key] = new
        acknowledged.doubtful.discard(key)
        self.done()

    async def move(self) -> None:
        """Renames a file of this node's own over another name: the old name is gone everywhere, the file is not."""
        rng, acknowledged = self.world.rng, self.acknowledged
        keys = sorted(
            {(self.number, b"private%d.%d" % (self.number, each)) for each in range(6)} - acknowledged.doubtful
        )
        here = [key for key in keys if acknowledged.private.get(key) is not None]
        if not here or len(keys) < 2:
            return
        old = rng.choice(here)
        new = rng.choice([key for key in keys if key != old])
        acknowledged.begin(old, new)
        await self.calls.rename(b"/shared/" + old[1], b"/shared/" + new[1])
        await self.calls.fsync_directory("/shared")
        acknowledged.private[new], acknowledged.private[old] = acknowledged.private[old], None
        acknowledged.doubtful -= {old, new}
        self.done()

    async def content(self, name: bytes) -> bytes | None:
        try:
            file = await self.calls.open(b"/shared/" + name)
        except FileNotFoundError:
            return None
        content = await self.calls.pread(file, 1 << 20, 0)
        await self.calls.close(file)
        return content

    async def look(self) -> None:
        """Reads somebody's private file: what was acknowledged and untouched since must be there, on every node."""
        await self._compare(self.content, "content")

    async def list(self) -> None:
        """By the directory: a name acknowledged and untouched since is listed, one unlinked is not."""

        async def listed(name: bytes) -> bytes | None:
            return b"" if name in await self.calls.listdir("/shared") else None

        await self._compare(listed, "list")

    async def _compare(self, look: Callable[[bytes], Coroutine[Any, Any, bytes | None]], how: str) -> None:
        keys = sorted(set(self.acknowledged.private) - self.acknowledged.doubtful)
        if not keys:
            return
        key = self.world.rng.choice(keys)
        before, begun = self.acknowledged.private[key], self.acknowledged.begun.get(key, 0)
        found = await look(key[1])
        if not self.acknowledged.untouched(key, begun):
            return
        same = found == before if how == "content" else (found is None) == (before is None)
        if not same:
            sizes = [None if each is None else len(each) for each in (found, before)]
            raise Violation(f"SIM-9 {self.name} by {how} finds {sizes[0]} bytes in {key[1]!r}, not {sizes[1]}")
        self.done()


class Appender(Application):
    """A second process beside it, which does nothing but append to the shared log through one open file: there is
    always a write on its way when something happens to a lock."""

    suffix = "a"
    think_ns = 60 * MILLISECOND
    log: OpenFile | None = None

    def work(self) -> list[Callable[[], Coroutine[Any, Any, None]]]:
        return [self.append_on]

    async def append_on(self) -> None:
        if self.log is None:
            self.log = await self.calls.open("/log", os.O_WRONLY | os.O_APPEND)
        self.record += 1
        await self.calls.write(self.log, f"{self.name} {self.record} \n".encode())
        await self.calls.fsync(self.log)
        self.acknowledged.records[self.name] = self.record
        self.done()


async def shared(sim: Simulation, *, faults: bool = True, quiet_seconds: int = QUIET_SECONDS) -> dict[str, int]:
    sim.disk(DEVICE, SIZE)
    await prepare(sim, sim.machine(99, hosts=("outside",)).attach("administrator").world)
    cluster = MountCluster(sim, 3)
    await cluster.keep_running(FORMING_SECONDS * SECOND)
    if not cluster.settled():
        raise Violation("SIM-4 the cluster did not form in time")
    plan = []
    if faults:
        scope = Scope(tuple(f"n{n}" for n in cluster.numbers), ("corrald", "worker"))
        plan = survivable(draw_plan(sim.rng, scope, duration_ns=FAULT_SECONDS * SECOND, count=sim.rng.randrange(5, 9)))
        hurting = sim.loop.create_task(inject(sim, plan))
        await cluster.keep_running(sim.now + FAULT_SECONDS * SECOND)
        await hurting
    await cluster.keep_running(sim.now + quiet_seconds * SECOND)
    late = [n for n in cluster.numbers if sim.now - cluster.oracle.last_act.get(n, 0) > 15 * SECOND]
    if late or not cluster.settled():
        views = {n: str(node.view) for n, node in sorted(cluster.oracle.nodes.items())}
        raise Violation(f"SIM-4 all faults are over; nodes {late} have not worked for 15 s; the views are {views}")
    for number in cluster.numbers:
        sim.machines[f"n{number}"].power_cut()
    await sim.wait_until(sim.now + SECOND)
    after = sim.machine(98, hosts=("afterwards",)).attach("administrator").world
    await final_check(sim, after, cluster.acknowledged)
    return {"operations": cluster.acknowledged.operations, "faults": len(plan), "mounts": cluster.mounted}


async def calm(sim: Simulation) -> dict[str, int]:
    return await shared(sim, faults=False, quiet_seconds=8)
