"""Whole nodes with a filesystem in the simulator: one disk, a mount on every machine, faults from the seed.

    python -m corral.sim tests.sim.files:shared SEED [--nasty] [--trace FILE]

Every mount works on shared files through `api.gfs.Filesystem`, as the kernel would; what was acknowledged is judged in
true time:

  SIM-5  a counter read under its flock is never below what was acknowledged before: no write is lost, none is stale
  SIM-6  the shared log has every acknowledged record once, whole, each writer's in order
  SIM-7  a private file that was fsynced is there with its content, also after its node died
  SIM-8  when everything is unmounted, fsck finds nothing
  (and SIM-2, SIM-4 of nodes.py)
"""

import struct
from errno import ENOENT, ESTALE
from typing import Any

from corral.api.gfs import ROOT, Caller, Changes, LockRange
from corral.base.errors import ClusterError
from corral.base.ids import NodeId
from corral.base.time import MILLISECOND, SECOND
from corral.base.world import World
from corral.gfs import fsck, mkfs
from corral.gfs.filesystem import GfsFilesystem
from corral.gfs.mount import mount
from corral.gfs.volume import Options
from corral.providers.endpoint import native_endpoint
from corral.providers.native_gfs import NativeMount
from corral.providers.participant import Participant
from corral.sim.faults import Scope, draw_plan, inject
from corral.sim.simulation import Simulation
from tests.sim.nodes import DETECT, PATHS, Cluster, Violation, survivable

DEVICE = "/dev/shared"
SIZE = 64 << 20
COUNTERS = 2
SOMEBODY = Caller(0, 0, 1)
F_WRLCK = 1
F_UNLCK = 2
O_RDWR = 2
O_APPEND = 0o2000


class Acknowledged:
    """What the mounts were told is durable."""

    def __init__(self) -> None:
        self.counters = [0] * COUNTERS
        self.records: dict[str, int] = {}
        self.private: dict[tuple[NodeId, bytes], bytes | None] = {}  # None: unlinked, and the directory fsynced
        self.doubtful: set[tuple[NodeId, bytes]] = set()  # an operation on it was under way
        self.operations = 0


class FileCluster(Cluster):
    def __init__(self, sim: Simulation, count: int) -> None:
        self.acknowledged = Acknowledged()
        self.mounted = 0
        super().__init__(sim, count, None)

    def attached(self, number: NodeId) -> Any:
        async def main(world: World) -> int:
            while True:
                participant = Participant(world, PATHS.socket, PATHS.participants, native_endpoint, purpose="mount")
                try:
                    await participant.open()
                    break
                except ClusterError:
                    participant.close()
                    await world.sleep_until(world.now() + DETECT // 2)
            withdrawn = world.future()
            disk = await world.disk(DEVICE)
            member = NativeMount(world, participant, disk, Options(withdrawn=withdrawn.set_result))
            machine = self.sim.machines[f"n{number}"]

            async def work() -> None:
                filesystem = await member.open(None)
                self.mounted += 1
                machine.note(f"mounted in slot {filesystem.slot}, replayed {filesystem.recovery.replayed}")
                await Worker(self, world, participant, filesystem, number).run()

            world.spawn(work(), "work on files")
            participant.lost.add_done_callback(lambda lost: withdrawn.done() or withdrawn.set_result(lost.result()))
            reason = await withdrawn
            machine.note(f"mount ends: {reason}")
            participant.close()
            return 1

        return main


class Worker:
    """The applications of one node."""

    def __init__(
        self, cluster: FileCluster, world: World, participant: Participant, fs: GfsFilesystem, number: NodeId
    ) -> None:
        self.cluster = cluster
        self.acknowledged = cluster.acknowledged
        self.world = world
        self.participant = participant
        self.fs = fs
        self.number = number
        self.name = f"n{number}.{participant.me.incarnation}.{participant.me.serial}"
        self.record = 0

    async def run(self) -> None:
        work = [self.count, self.append, self.private, self.look]
        while True:
            try:
                await self.world.rng.choice(work)()
            except OSError as error:
                if self.participant.lost.done() or self.fs.withdrawn is not None:
                    return
                raise Violation(f"node {self.number}: an operation failed: {error}") from error
            await self.world.sleep_until(self.world.now() + self.world.rng.randrange(40 * MILLISECOND))

    def done(self) -> None:
        """An acknowledged operation; the door would have checked the page before the reply."""
        self.acknowledged.operations += 1
        oracle = self.cluster.oracle
        oracle.acts[self.number] = oracle.acts.get(self.number, 0) + 1
        oracle.last_act[self.number] = self.cluster.sim.now
        oracle.operations += 1
        oracle.look()

    async def reply(self) -> bool:
        """A door holds replies back while the lease has lapsed; False: this mount will never answer again."""
        while not self.participant.may_act():
            if self.participant.lost.done():
                return False
            await self.world.sleep_until(self.world.now() + DETECT // 20)
        return True

    async def count(self) -> None:
        number = self.world.rng.randrange(COUNTERS)
        entry = await self.fs.lookup(ROOT, b"counter%d" % number, SOMEBODY)
        opened = await self.fs.open(entry.ino, O_RDWR, SOMEBODY)
        ino, handle = entry.ino, opened.handle
        whole = LockRange(0, (1 << 63) - 1, F_WRLCK, 1)
        await self.fs.setlk(ino, handle, handle, whole, wait=True, flock=True)
        try:
            if not await self.reply():
                return
            floor = self.acknowledged.counters[number]  # acknowledged before we held the lock
            (value,) = struct.unpack("<Q", b"".join(bytes(b) for b in await self.fs.read(ino, handle, 0, 8)))
            if not await self.reply():
                return
            if value < floor:
                raise Violation(f"SIM-5 {self.name} reads {value} in counter {number}; {floor} was acknowledged")
            data = struct.pack("<Q", value + 1)
            await self.fs.write(ino, handle, 0, data, append=False, from_cache=False, kill_suidgid=False)
            await self.fs.fsync(ino, handle, data_only=False)
            if not await self.reply():
                return
            if self.acknowledged.counters[number] > value:
                raise Violation(f"SIM-5 {self.name} counts to {value + 1} in counter {number} beside another holder")
            self.acknowledged.counters[number] = value + 1
            self.done()
        finally:
            if not self.participant.lost.done():
                await self.fs.release(ino, handle, handle)
                self.fs.forget(ino, 1)

    async def append(self) -> None:
        entry = await self.fs.lookup(ROOT, b"log", SOMEBODY)
        opened = await self.fs.open(entry.ino, O_RDWR | O_APPEND, SOMEBODY)
        self.record += 1
        line = f"{self.name} {self.record} {'x' * self.world.rng.randrange(200)}\n".encode()
        await self.fs.write(entry.ino, opened.handle, 0, line, append=True, from_cache=False, kill_suidgid=False)
        await self.fs.fsync(entry.ino, opened.handle, data_only=False)
        if await self.reply():
            self.acknowledged.records[self.name] = self.record
            self.done()
        await self.fs.release(entry.ino, opened.handle, None)
        self.fs.forget(entry.ino, 1)

    async def private(self) -> None:
        """Creates, fills, renames or unlinks a file of this node's own, in a directory everybody uses."""
        rng = self.world.rng
        name = b"private%d.%d" % (self.number, rng.randrange(6))
        key = (self.number, name)
        acknowledged = self.acknowledged
        known = acknowledged.private.get(key)
        if key in acknowledged.doubtful:
            known = await self._settle(key)
        directory = (await self.fs.lookup(ROOT, b"shared", SOMEBODY)).ino
        acknowledged.doubtful.add(key)
        if known is None:
            entry, opened = await self.fs.create(directory, name, 0o100644, O_RDWR, SOMEBODY)
            content = rng.randbytes(rng.choice((10, 3000, 9000, 70000)))
            await self.fs.write(
                entry.ino, opened.handle, 0, content, append=False, from_cache=False, kill_suidgid=False
            )
            await self.fs.fsync(entry.ino, opened.handle, data_only=False)
            await self.fs.fsyncdir(directory, 0, data_only=False)
            await self.fs.release(entry.ino, opened.handle, None)
            self.fs.forget(entry.ino, 1)
            new: bytes | None = content
        elif rng.random() < 0.3:
            entry = await self.fs.lookup(directory, name, SOMEBODY)
            await self.fs.setattr(entry.ino, Changes(size=len(known) // 2), None, SOMEBODY)
            opened = await self.fs.open(entry.ino, O_RDWR, SOMEBODY)
            await self.fs.fsync(entry.ino, opened.handle, data_only=False)
            await self.fs.release(entry.ino, opened.handle, None)
            self.fs.forget(entry.ino, 1)
            new = known[: len(known) // 2]
        else:
            await self.fs.unlink(directory, name, SOMEBODY)
            await self.fs.fsyncdir(directory, 0, data_only=False)
            new = None
        self.fs.forget(directory, 1)
        if await self.reply():
            acknowledged.private[key] = new
            acknowledged.doubtful.discard(key)
            self.done()

    async def _settle(self, key: tuple[NodeId, bytes]) -> bytes | None:
        """After a crash in the middle of an operation: takes what is there as the truth."""
        content = await self.content(key[1])
        self.acknowledged.private[key] = content
        self.acknowledged.doubtful.discard(key)
        return content

    async def content(self, name: bytes) -> bytes | None:
        directory = (await self.fs.lookup(ROOT, b"shared", SOMEBODY)).ino
        try:
            entry = await self.fs.lookup(directory, name, SOMEBODY)
            opened = await self.fs.open(entry.ino, 0, SOMEBODY)
        except OSError as error:
            if error.errno in (ENOENT, ESTALE):  # also when it went between the two calls
                return None
            raise
        finally:
            self.fs.forget(directory, 1)
        parts = await self.fs.read(entry.ino, opened.handle, 0, 1 << 20)
        content = b"".join(bytes(part) for part in parts)
        await self.fs.release(entry.ino, opened.handle, None)
        self.fs.forget(entry.ino, 1)
        return content

    async def look(self) -> None:
        """Reads somebody's private file: what was acknowledged and untouched since must be there, on every node."""
        keys = sorted(set(self.acknowledged.private) - self.acknowledged.doubtful)
        if not keys:
            return
        key = self.world.rng.choice(keys)
        before = self.acknowledged.private[key]
        content = await self.content(key[1])
        if not await self.reply():
            return
        if key not in self.acknowledged.doubtful and self.acknowledged.private[key] is before and content != before:
            told = {True: "nothing", False: f"{len(content or b'')} bytes"}[content is None]
            wanted = "nothing" if before is None else f"{len(before)} bytes"
            raise Violation(f"SIM-7 {self.name} finds {told} in {key[1]!r}, acknowledged were {wanted}")
        self.done()


# --- bodies ----------------------------------------------------------------------------------------------------------


async def prepare(sim: Simulation, world: World) -> None:
    """Makes the filesystem and the shared files, through a mount of its own."""
    disk = await world.disk(DEVICE)
    await mkfs.format(world, disk, cluster="corral", name="home", journals=6, journal_blocks=256)
    fs = await mount(world, disk, None, slot=0)
    await fs.start(None)
    fs.finish(None)
    for name in [*(b"counter%d" % n for n in range(COUNTERS)), b"log"]:
        entry, opened = await fs.create(ROOT, name, 0o100644, O_RDWR, SOMEBODY)
        if name != b"log":
            await fs.write(entry.ino, opened.handle, 0, bytes(8), append=False, from_cache=False, kill_suidgid=False)
        await fs.release(entry.ino, opened.handle, None)
    await fs.mkdir(ROOT, b"shared", 0o40755, SOMEBODY)
    await fs.destroy()
    disk.close()


def check_log(content: bytes, acknowledged: dict[str, int]) -> None:
    seen: dict[str, int] = {}
    for line in content.split(b"\n")[:-1]:
        words = line.decode("ascii", "replace").split(" ")
        if len(words) != 3 or not words[1].isdigit() or set(words[2]) - {"x"}:
            raise Violation(f"SIM-6 damaged record {line[:80]!r}")
        name, number = words[0], int(words[1])
        if number != seen.get(name, 0) + 1:
            raise Violation(f"SIM-6 record {number} of {name} comes after {seen.get(name, 0)}")
        seen[name] = number
    for name, number in sorted(acknowledged.items()):
        if seen.get(name, 0) < number:
            raise Violation(f"SIM-6 {number} records of {name} were acknowledged, {seen.get(name, 0)} are there")


async def final_check(sim: Simulation, world: World, acknowledged: Acknowledged) -> None:
    """With every mount dead: replay, read everything, unmount, fsck."""
    disk = await world.disk(DEVICE)
    fs = await mount(world, disk, None, slot=0)
    await fs.start(None)
    fs.finish(None)

    async def content(parent: int, name: bytes) -> bytes | None:
        try:
            entry = await fs.lookup(parent, name, SOMEBODY)
        except FileNotFoundError:
            return None
        opened = await fs.open(entry.ino, 0, SOMEBODY)
        parts = await fs.read(entry.ino, opened.handle, 0, entry.attributes.size)
        await fs.release(entry.ino, opened.handle, None)
        return b"".join(bytes(part) for part in parts)

    for number, value in enumerate(acknowledged.counters):
        found = await content(ROOT, b"counter%d" % number)
        assert found is not None
        if struct.unpack("<Q", found)[0] < value:
            raise Violation(f"SIM-5 counter {number} ends at {struct.unpack('<Q', found)[0]}, acknowledged {value}")
    check_log(await content(ROOT, b"log") or b"", acknowledged.records)
    directory = (await fs.lookup(ROOT, b"shared", SOMEBODY)).ino
    for key, wanted in sorted(acknowledged.private.items(), key=lambda item: item[0]):
        if key not in acknowledged.doubtful and await content(directory, key[1]) != wanted:
            raise Violation(f"SIM-7 {key[1]!r} does not have its acknowledged content at the end")
    await fs.destroy()
    report = await fsck.check(world, disk)
    if report.findings:
        raise Violation(f"SIM-8 fsck: {'; '.join(str(finding) for finding in report.findings[:5])}")


FAULT_SECONDS = 60
QUIET_SECONDS = 40


async def shared(sim: Simulation, *, faults: bool = True) -> dict[str, int]:
    count = sim.rng.choice((3, 3, 3, 4))
    sim.disk(DEVICE, SIZE)
    world = sim.machine(99, hosts=("outside",)).attach("administrator").world
    await prepare(sim, world)
    cluster = FileCluster(sim, count)
    await cluster.keep_running(20 * SECOND)
    if not cluster.settled():
        raise Violation("SIM-4 the cluster did not form in 20 s")
    plan = []
    if faults:
        machines = tuple(f"n{n}" for n in cluster.numbers)
        scope = Scope(machines, ("corrald", "worker"))
        plan = survivable(draw_plan(sim.rng, scope, duration_ns=FAULT_SECONDS * SECOND, count=sim.rng.randrange(5, 9)))
        hurting = sim.loop.create_task(inject(sim, plan))
        await cluster.keep_running(sim.now + FAULT_SECONDS * SECOND)
        await hurting
        await cluster.keep_running(sim.now + QUIET_SECONDS * SECOND)
        if not cluster.settled():
            views = {n: str(node.view) for n, node in sorted(cluster.oracle.nodes.items())}
            raise Violation(f"SIM-4 {QUIET_SECONDS} s after the last fault the views are {views}")
    late = [n for n in cluster.numbers if sim.now - cluster.oracle.last_act.get(n, 0) > 15 * SECOND]
    if late:
        raise Violation(f"SIM-4 nodes {late} have not worked for 15 s although all faults are over")
    for number in cluster.numbers:
        sim.machines[f"n{number}"].power_cut()
    await sim.wait_until(sim.now + SECOND)
    after = sim.machine(98, hosts=("afterwards",)).attach("administrator").world
    await final_check(sim, after, cluster.acknowledged)
    return {"operations": cluster.acknowledged.operations, "faults": len(plan), "mounts": cluster.mounted}


async def calm(sim: Simulation) -> dict[str, int]:
    return await shared(sim, faults=False)
