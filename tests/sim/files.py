"""Whole nodes with a filesystem in the simulator: one disk, a mount on every machine, faults from the seed.

    python -m corral.sim tests.sim.files:shared SEED [--nasty] [--trace FILE]

Every mount works on shared files through `api.gfs.Filesystem`, as the kernel would; what was acknowledged is judged in
true time:

  SIM-5  a counter read under its flock is never below what was acknowledged before: no write is lost, none is stale
  SIM-6  the shared log has every acknowledged record once, whole, each writer's in order
  SIM-7  a private file that was fsynced is there with its content, also after its node died
  SIM-8  when everything is unmounted, fsck finds nothing
  SIM-10 a register in a file, written and read without a lock on every node, is linearizable
  SIM-11 a name is there, or gone, on every node as soon as the call that made it so returns; what is open stays whole
  (and SIM-2, SIM-4 of nodes.py; SIM-3: no write lands of a mount that a round counts as failed)
"""

import re
import struct
from errno import ENOENT, ESTALE
from typing import Any

from corral.api.gfs import ROOT, Caller, Changes, LockRange
from corral.base.errors import ClusterError
from corral.base.ids import MemberId, NodeId
from corral.base.time import FOREVER, MILLISECOND, SECOND
from corral.base.view import Round
from corral.base.world import ProcessId, World
from corral.cli.demo.checks import Failed, check_records
from corral.gfs import fsck, mkfs
from corral.gfs.filesystem import GfsFilesystem
from corral.gfs.glock import STATE_NAMES
from corral.gfs.mount import mount
from corral.gfs.volume import Options
from corral.providers.endpoint import native_endpoint
from corral.providers.native_gfs import NativeMount
from corral.providers.participant import Participant
from corral.sim.disk import Flushed, Landed
from corral.sim.faults import Pause, Scope, Timed, draw_plan, inject
from corral.sim.simulation import Simulation
from tests.sim.nodes import DETECT, PATHS, RECOVER, Cluster, Violation, survivable
from tests.sim.registers import Operation, complaint

DEVICE = "/dev/shared"
SIZE = 64 << 20
COUNTERS = 2
REGISTERS = 3
SWAPPED = 2  # names over which files of one content each are renamed
WORKERS = 2  # at once on each mount
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
        self.begun: dict[tuple[NodeId, bytes], int] = {}  # operations on it: it may come back and go again
        self.operations = 0
        self.registers: list[list[Operation]] = [[] for _ in range(REGISTERS)]
        self.values = 0  # written to registers so far: each is another

    def begin(self, *keys: tuple[NodeId, bytes]) -> None:
        for key in keys:
            self.doubtful.add(key)
            self.begun[key] = self.begun.get(key, 0) + 1

    def untouched(self, key: tuple[NodeId, bytes], since: int) -> bool:
        """Nothing was done to it since so many operations had begun."""
        return key not in self.doubtful and self.begun.get(key, 0) == since


class FileCluster(Cluster):
    def __init__(self, sim: Simulation, count: int) -> None:
        self.acknowledged = Acknowledged()
        self.mounted = 0
        self.mounts: dict[NodeId, GfsFilesystem] = {}  # the newest of each node
        self.identities: dict[MemberId, ProcessId] = {}
        self.failed: dict[ProcessId, int] = {}  # mounts that were counted as failed -> by which round
        self.late_write = ""
        sim.disks[DEVICE].watch(self.landed)
        super().__init__(sim, count, None)

    def landed(self, event: Landed | Flushed) -> None:
        if isinstance(event, Landed) and event.identity in self.failed:
            self.late_write = self.late_write or (
                f"SIM-3 a write of {event.machine}'s mount landed at {event.landed} ns, which failed before round "
                f"{self.failed[event.identity]}"
            )

    def judge(self) -> None:
        if self.late_write:
            raise Violation(self.late_write)

    async def keep_running(self, until: int) -> None:
        await super().keep_running(until)
        self.judge()

    def stuck(self) -> str:
        """What every mount waits for: its glocks that somebody wants or that are on their way."""
        lines = []
        for number, fs in sorted(self.mounts.items()):
            table = fs.locks.table
            lines.append(
                f"n{number} slot {fs.slot} gate {'shut' if table.gate_closed else 'open'} withdrawn {fs.withdrawn} "
                f"journal jobs {len(fs.journal._jobs)} serving {fs.journal._serving}"
            )
            for _, glock in sorted(table.glocks.items()):
                if glock.queue or glock.blocked or glock.phase or glock.holders:
                    queue = [(STATE_NAMES[holder.state], holder.flags) for holder in glock.queue]
                    lines.append(f"    {glock} demote={STATE_NAMES[glock.demote]} blocked={glock.blocked} {queue}")
        return "\n".join(lines)

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
            self.identities[participant.me] = world.process.me
            start = member.start

            async def watched_start(round: Round) -> None:
                for entry in round.failed:
                    self.failed.setdefault(self.identities[entry.member], round.id)
                await start(round)

            member.start = watched_start  # type: ignore[method-assign]

            async def work() -> None:
                try:
                    filesystem = await member.open(None)
                except ClusterError as error:  # all slots are taken while the failed are recovered: init tries again
                    if not withdrawn.done():
                        withdrawn.set_result(str(error))
                    return
                self.mounted += 1
                self.mounts[number] = filesystem
                machine.note(f"mounted in slot {filesystem.slot}, replayed {filesystem.recovery.replayed}")
                for index in range(WORKERS):
                    worker = Worker(self, world, participant, filesystem, number, index)
                    world.spawn(worker.run(), f"work on files {index}")

            world.spawn(work(), "mount")
            participant.lost.add_done_callback(lambda lost: withdrawn.done() or withdrawn.set_result(lost.result()))
            reason = await withdrawn
            machine.note(f"mount ends: {reason}")
            participant.close()
            return 1

        return main


class Worker:
    """The applications of one node."""

    def __init__(
        self,
        cluster: FileCluster,
        world: World,
        participant: Participant,
        fs: GfsFilesystem,
        number: NodeId,
        index: int,
    ) -> None:
        self.cluster = cluster
        self.acknowledged = cluster.acknowledged
        self.world = world
        self.participant = participant
        self.fs = fs
        self.number = number
        self.index = index
        self.name = f"n{number}.{participant.me.incarnation}.{participant.me.serial}.{index}"
        self.record = 0
        self.serial = 0  # of names and contents nobody had before

    async def run(self) -> None:
        work = [
            self.count,
            self.append,
            self.private,
            self.look,
            self.register,
            self.register,
            self.swap,
            self.hold_on,
            self.names,
            self.list,
        ]
        while True:
            try:
                await self.world.rng.choice(work)()
            except OSError as error:
                if self.participant.lost.done() or self.fs.withdrawn is not None:
                    return
                raise Violation(f"SIM-11 {self.name}: an operation failed: {error}") from error
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
        name = b"private%d.%d.%d" % (self.number, self.index, rng.randrange(4))
        key = (self.number, name)
        acknowledged = self.acknowledged
        known = acknowledged.private.get(key)
        if key in acknowledged.doubtful:
            known = await self._settle(key)
        directory = (await self.fs.lookup(ROOT, b"shared", SOMEBODY)).ino
        acknowledged.begin(key)
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
        before, begun = self.acknowledged.private[key], self.acknowledged.begun.get(key, 0)
        content = await self.content(key[1])
        if not await self.reply():
            return
        if self.acknowledged.untouched(key, begun) and content != before:
            told = {True: "nothing", False: f"{len(content or b'')} bytes"}[content is None]
            wanted = "nothing" if before is None else f"{len(before)} bytes"
            raise Violation(f"SIM-7 {self.name} finds {told} in {key[1]!r}, acknowledged were {wanted}")
        self.done()

    # -- without any lock of ours

    async def register(self) -> None:
        """Writes a value nobody wrote before, or reads; either is durable before it counts as answered."""
        rng, acknowledged = self.world.rng, self.acknowledged
        number = rng.randrange(REGISTERS)
        history = acknowledged.registers[number]
        sim = self.cluster.sim
        entry = await self.fs.lookup(ROOT, b"registers", SOMEBODY)
        ino = entry.ino
        handle = (await self.fs.open(ino, O_RDWR, SOMEBODY)).handle
        began = sim.now
        if rng.random() < 0.5:
            acknowledged.values += 1
            value = acknowledged.values
            at = len(history)
            history.append(Operation(began, FOREVER, value, True, self.name))
            data = struct.pack("<Q", value)
            await self.fs.write(ino, handle, number * 3000, data, append=False, from_cache=False, kill_suidgid=False)
            await self.fs.fsync(ino, handle, data_only=False)
            if await self.reply():
                history[at] = Operation(began, sim.now, value, True, self.name)
                self.done()
        else:
            parts = await self.fs.read(ino, handle, number * 3000, 8)
            (value,) = struct.unpack("<Q", b"".join(bytes(part) for part in parts))
            await self.fs.fsync(ino, handle, data_only=False)  # what this node alone had seen dies with it
            if await self.reply():
                history.append(Operation(began, sim.now, value, False, self.name))
                self.done()
        await self.fs.release(ino, handle, None)
        self.fs.forget(ino, 1)

    async def swap(self) -> None:
        """Renames a file of one repeated word over a name that others have open."""
        rng = self.world.rng
        self.serial += 1
        word = f"{self.name}:{self.serial};".encode()
        fresh = b"fresh-" + self.name.encode()
        shared = (await self.fs.lookup(ROOT, b"shared", SOMEBODY)).ino
        entry, opened = await self.fs.create(shared, fresh, 0o100644, O_RDWR, SOMEBODY)
        content = word * rng.choice((1, 50, 900))
        await self.fs.write(entry.ino, opened.handle, 0, content, append=False, from_cache=False, kill_suidgid=False)
        await self.fs.release(entry.ino, opened.handle, None)
        self.fs.forget(entry.ino, 1)
        await self.fs.rename(shared, fresh, ROOT, b"swap%d" % rng.randrange(SWAPPED), 0, SOMEBODY)
        self.fs.forget(shared, 1)
        if await self.reply():
            self.done()

    async def hold_on(self) -> None:
        """A file stays whole for whoever has it open, whoever takes its name away."""
        try:
            entry = await self.fs.lookup(ROOT, b"swap%d" % self.world.rng.randrange(SWAPPED), SOMEBODY)
            opened = await self.fs.open(entry.ino, 0, SOMEBODY)
        except OSError as error:
            if error.errno in (ENOENT, ESTALE):
                return
            raise
        first = await self.whole(entry.ino, opened.handle)
        await self.world.sleep_until(self.world.now() + self.world.rng.randrange(100 * MILLISECOND))
        again = await self.whole(entry.ino, opened.handle)
        await self.fs.release(entry.ino, opened.handle, None)
        self.fs.forget(entry.ino, 1)
        if not await self.reply():
            return
        word, _, _ = first.partition(b";")
        if first != again or first.replace(word + b";", b""):
            raise Violation(f"SIM-11 {self.name} reads {first[:40]!r} and {again[:40]!r} in one open file")
        self.done()

    async def whole(self, ino: int, handle: int) -> bytes:
        return b"".join(bytes(part) for part in await self.fs.read(ino, handle, 0, 1 << 20))

    async def names(self) -> None:
        """A directory of our own made, filled, moved between directories, linked, emptied and removed."""
        fs = self.fs
        self.serial += 1
        mine = f"dir-{self.name}-{self.serial}".encode()
        shared = (await fs.lookup(ROOT, b"shared", SOMEBODY)).ino
        made = (await fs.mkdir(shared, mine, 0o40755, SOMEBODY)).ino
        entry, opened = await fs.create(made, b"a", 0o100644, O_RDWR, SOMEBODY)
        await fs.release(entry.ino, opened.handle, None)
        linked = await fs.link(entry.ino, ROOT, mine + b"-link", SOMEBODY)
        if linked.attributes.nlink != 2:
            raise Violation(f"SIM-11 a file with two names has {linked.attributes.nlink} links")
        await fs.rename(made, b"a", ROOT, mine + b"-moved", 0, SOMEBODY)
        await fs.rename(shared, mine, ROOT, mine, 0, SOMEBODY)
        if await self.listed(made):
            raise Violation(f"SIM-11 {self.name} finds {await self.listed(made)} in an empty directory")
        await fs.rmdir(ROOT, mine, SOMEBODY)
        for parent, name in ((shared, mine), (ROOT, mine)):
            try:
                found = await fs.lookup(parent, name, SOMEBODY)
            except OSError as error:
                if error.errno not in (ENOENT, ESTALE):
                    raise
            else:
                raise Violation(f"SIM-11 {self.name} still finds {name!r} as {found.ino}")
        await fs.unlink(ROOT, mine + b"-moved", SOMEBODY)
        await fs.unlink(ROOT, mine + b"-link", SOMEBODY)
        for ino, lookups in ((made, 1), (entry.ino, 2), (shared, 1)):
            fs.forget(ino, lookups)
        if await self.reply():
            self.done()

    async def listed(self, directory: int) -> set[bytes]:
        opened = await self.fs.opendir(directory, 0, SOMEBODY)
        names: set[bytes] = set()
        cookie = 0
        while entries := await self.fs.readdir(directory, opened.handle, cookie, 4096, plus=False):
            names |= {entry.name for entry in entries}
            cookie = entries[-1].cookie
        await self.fs.releasedir(directory, opened.handle)
        return names - {b".", b".."}

    async def list(self) -> None:
        """Every name acknowledged and untouched since is listed once it is there, and not once it is gone."""
        acknowledged = self.acknowledged
        before = {key: value for key, value in acknowledged.private.items() if key not in acknowledged.doubtful}
        begun = dict(acknowledged.begun)
        directory = (await self.fs.lookup(ROOT, b"shared", SOMEBODY)).ino
        names = await self.listed(directory)
        self.fs.forget(directory, 1)
        usage = await self.fs.statfs()
        if not await self.reply():
            return
        if not 0 < usage.blocks_free <= usage.blocks:
            raise Violation(f"SIM-11 statfs says {usage.blocks_free} of {usage.blocks} blocks are free")
        for key, value in sorted(before.items(), key=lambda item: item[0]):
            untouched = acknowledged.untouched(key, begun.get(key, 0))
            if untouched and (key[1] in names) != (value is not None):
                raise Violation(f"SIM-11 {self.name} lists {key[1]!r}: {key[1] in names}, which is wrong")
        self.done()


# --- bodies ----------------------------------------------------------------------------------------------------------


async def prepare(sim: Simulation, world: World) -> None:
    """Makes the filesystem and the shared files, through a mount of its own."""
    disk = await world.disk(DEVICE)
    await mkfs.format(world, disk, cluster="corral", name="home", journals=6, journal_blocks=256)
    fs = await mount(world, disk, None, slot=0)
    await fs.start(None)
    fs.finish(None)
    await fs.go_live()
    lengths = {b"log": 0, b"registers": REGISTERS * 3000} | {b"counter%d" % n: 8 for n in range(COUNTERS)}
    for name, length in sorted(lengths.items()):
        entry, opened = await fs.create(ROOT, name, 0o100644, O_RDWR, SOMEBODY)
        if length:
            zeros = bytes(length)
            await fs.write(entry.ino, opened.handle, 0, zeros, append=False, from_cache=False, kill_suidgid=False)
        await fs.release(entry.ino, opened.handle, None)
    await fs.mkdir(ROOT, b"shared", 0o40755, SOMEBODY)
    await fs.destroy()
    disk.close()


RECORD = re.compile(rb"(n[\d.]+a?) (\d+) x*\n")
PART = re.compile(rb"(n[\d.]*a?)(?: \d*(?: x*)?)?(?=n|\Z)")


def check_log(content: bytes, acknowledged: dict[str, int]) -> None:
    try:
        check_records(content, RECORD, PART, acknowledged)
    except Failed as error:
        raise Violation(f"SIM-6 {error}") from None


async def final_check(sim: Simulation, world: World, acknowledged: Acknowledged) -> None:
    """With every mount dead: replay, read everything, unmount, fsck."""
    disk = await world.disk(DEVICE)
    fs = await mount(world, disk, None, slot=0)
    await fs.start(None)
    fs.finish(None)
    await fs.go_live()

    async def content(parent: int, name: bytes) -> bytes | None:
        try:
            entry = await fs.lookup(parent, name, SOMEBODY)
        except FileNotFoundError:
            return None
        opened = await fs.open(entry.ino, 0, SOMEBODY)
        parts = await fs.read(entry.ino, opened.handle, 0, entry.attributes.size)
        await fs.release(entry.ino, opened.handle, None)
        return b"".join(bytes(part) for part in parts)

    for number, history in enumerate(acknowledged.registers):
        if wrong := complaint(history):
            raise Violation(f"SIM-10 register {number}: {wrong}")
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
        if sim.rng.random() < 0.4:
            # A mount alone that stands still for longer than `recover`: its corrald evicts it.
            pause = Pause(sim.rng.choice(machines), "worker")
            begin = sim.rng.randrange(40) * SECOND
            plan.append(Timed(begin, begin + 2 * RECOVER, pause))
        hurting = sim.loop.create_task(inject(sim, plan))
        await cluster.keep_running(sim.now + FAULT_SECONDS * SECOND)
        await hurting
        await cluster.keep_running(sim.now + QUIET_SECONDS * SECOND)
        if not cluster.settled():
            views = {n: str(node.view) for n, node in sorted(cluster.oracle.nodes.items())}
            raise Violation(f"SIM-4 {QUIET_SECONDS} s after the last fault the views are {views}")
    late = [n for n in cluster.numbers if sim.now - cluster.oracle.last_act.get(n, 0) > 15 * SECOND]
    if late:
        raise Violation(f"SIM-4 nodes {late} have not worked for 15 s although all faults are over\n{cluster.stuck()}")
    for number in cluster.numbers:
        sim.machines[f"n{number}"].power_cut()
    await sim.wait_until(sim.now + SECOND)
    after = sim.machine(98, hosts=("afterwards",)).attach("administrator").world
    await final_check(sim, after, cluster.acknowledged)
    return {"operations": cluster.acknowledged.operations, "faults": len(plan), "mounts": cluster.mounted}


async def calm(sim: Simulation) -> dict[str, int]:
    return await shared(sim, faults=False)
