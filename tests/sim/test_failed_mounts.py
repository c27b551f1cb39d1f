"""A mount that cannot take part in its group says so in a sentence and ends; the others go on or say what they need."""

from collections.abc import Awaitable, Callable
from typing import Any

from corral.api.gfs import ROOT
from corral.base.errors import ClusterError
from corral.base.ids import NodeId
from corral.base.time import SECOND
from corral.base.world import World
from corral.gfs import mkfs
from corral.gfs.device import Device
from corral.gfs.filesystem import GfsFilesystem
from corral.gfs.format import BLOCK
from corral.gfs.superblock import read as read_superblock
from corral.gfs.system import read_master, ring_of
from corral.gfs.volume import Options
from corral.providers.endpoint import native_endpoint
from corral.providers.native_gfs import NativeMount
from corral.providers.participant import Participant
from corral.sim import harness
from corral.sim.disk import Device as SharedDisk
from corral.sim.simulation import Simulation
from tests.sim.files import DEVICE, SIZE, SOMEBODY
from tests.sim.nodes import PATHS, RECOVER, Cluster

JOURNALS = 3
Body = Callable[["MountsByHand"], Awaitable[None]]


class MountsByHand(Cluster):
    """Three nodes; mounts are made when told. `mounted[n]`: the filesystem; `ended[n]`: why that mount is over."""

    def __init__(self, sim: Simulation) -> None:
        self.mounted: dict[NodeId, GfsFilesystem] = {}
        self.ended: dict[NodeId, str] = {}
        self.rings: dict[int, list[tuple[int, int]]] = {}
        self.wanted: set[NodeId] = set()
        super().__init__(sim, 3, None)

    @property
    def disk(self) -> SharedDisk:
        return self.sim.disks[DEVICE]

    def attached(self, number: NodeId) -> Any:
        async def main(world: World) -> int:
            if number not in self.wanted:
                return 0
            participant = Participant(world, PATHS.socket, PATHS.participants, native_endpoint, purpose="mount")
            await participant.open()
            withdrawn = world.future()
            disk = await world.disk(DEVICE)
            member = NativeMount(world, participant, disk, Options(withdrawn=withdrawn.set_result))
            participant.lost.add_done_callback(lambda lost: withdrawn.done() or withdrawn.set_result(lost.result()))
            try:
                self.mounted[number] = await member.open(None)
                self.ended[number] = await withdrawn
            except ClusterError as error:
                self.ended[number] = str(error)
            self.mounted.pop(number, None)
            participant.close()
            return 1

        return main

    async def format(self) -> None:
        world = self.sim.machine(99, hosts=("outside",)).attach("administrator").world
        disk = await world.disk(DEVICE)
        await mkfs.format(world, disk, cluster="corral", name="home", journals=JOURNALS, journal_blocks=256)
        device = Device(world, disk)
        superblock, _ = await read_superblock(device)
        system = await read_master(device, superblock)
        for slot in range(JOURNALS):
            ring = await ring_of(device, superblock, system, slot)
            self.rings[slot] = [(number * BLOCK, count * BLOCK) for _, number, count in ring.extents]

    async def mount(self, *numbers: NodeId) -> None:
        for number in numbers:
            self.wanted.add(number)
            self.ended.pop(number, None)
            self.mounted.pop(number, None)
            self.sim.machines[f"n{number}"].launch("worker")
            await self.until(lambda n=number: n in self.mounted or n in self.ended, f"the mount of node {number}")

    def kill(self, number: NodeId) -> None:
        process = self.sim.machines[f"n{number}"].running("worker")
        assert process is not None
        process.kill()
        del self.mounted[number]

    async def until(self, done: Callable[[], bool], what: str, seconds: int = 60, step: int = SECOND // 20) -> None:
        end = self.sim.now + seconds * SECOND
        while not done():
            assert self.sim.now < end, f"waited {seconds} s for {what}"
            await self.sim.wait_until(self.sim.now + step)

    async def sleep(self, nanoseconds: int) -> None:
        await self.sim.wait_until(self.sim.now + nanoseconds)

    async def work(self, number: NodeId, name: bytes) -> None:
        """A new file, durable: needs locks, the journal and an open gate. Returns when that is done."""
        process = self.sim.machines[f"n{number}"].running("worker")
        assert process is not None
        filesystem = self.mounted[number]

        async def create() -> None:
            await filesystem.mknod(ROOT, name, 0o100644, 0, SOMEBODY)
            await filesystem.fsyncdir(ROOT, 0, data_only=False)

        done = process.spawn(create(), "work")
        await self.until(done.done, f"node {number} to make a file", 30)

    def wipe(self, slot: int) -> list[bytes]:
        """Nothing of that journal can be read any more; returns what it held."""
        held = [self.disk.image[offset : offset + length] for offset, length in self.rings[slot]]
        for offset, length in self.rings[slot]:
            self.disk.image[offset : offset + length] = bytes(length)
        return held

    def restore(self, slot: int, held: list[bytes]) -> None:
        for (offset, length), content in zip(self.rings[slot], held, strict=True):
            self.disk.image[offset : offset + length] = content

    def replayed(self) -> list[int]:
        return [slot for filesystem in self.mounted.values() for slot in filesystem.recovery.replayed]

    def replaying(self) -> bool:
        return any(filesystem.recovery.replaying is not None for filesystem in self.mounted.values())

    def told(self, number: NodeId) -> str:
        """All that this node has logged."""
        return "\n".join(text for _, _, text in self.oracle.nodes[number].chronicle.since(0))

    def waits(self, number: NodeId) -> str:
        return "; ".join(local.waits_for() for local in self.oracle.nodes[number].warden.locals.values())


def run(body: Body) -> None:
    async def whole(sim: Simulation) -> dict[str, int]:
        sim.disk(DEVICE, SIZE)
        cluster = MountsByHand(sim)
        await cluster.format()
        await cluster.until(cluster.settled, "the cluster to form")
        await body(cluster)
        return {}

    harness.run(5, whole)


def test_a_mount_whose_own_journal_is_damaged_is_refused_and_the_others_go_on() -> None:
    async def body(cluster: MountsByHand) -> None:
        await cluster.mount(1, 2)
        cluster.wipe(2)
        await cluster.mount(3)
        assert "journal 2: no whole commit at its head; run fsck" in cluster.ended[3]
        await cluster.work(1, b"one")
        await cluster.work(2, b"two")
        # It wrote nothing: it left in order, so nobody tried to recover the slot.
        assert [cluster.mounted[n].recovery.failed for n in (1, 2)] == [{}, {}]
        await cluster.mount(3)
        assert "run fsck" in cluster.ended[3]
        await cluster.work(1, b"three")

    run(body)


def test_a_mount_that_cannot_write_is_refused_and_its_slot_is_recovered() -> None:
    async def body(cluster: MountsByHand) -> None:
        await cluster.mount(1, 2, 3)
        await cluster.work(3, b"something to replay")
        cluster.disk.refuse("n3")
        cluster.kill(3)
        await cluster.until(lambda: 2 in cluster.replayed(), "a survivor to replay slot 2")
        await cluster.mount(3)
        assert "disk cannot be read or written here" in cluster.ended[3]
        await cluster.work(1, b"one")
        await cluster.work(2, b"two")
        cluster.disk.admit("n3")
        await cluster.mount(3)
        await cluster.work(3, b"three")

    run(body)


def test_a_failed_journal_that_nobody_can_replay_keeps_the_gate_shut_and_says_so() -> None:
    async def body(cluster: MountsByHand) -> None:
        await cluster.mount(1, 2, 3)
        await cluster.work(3, b"something to replay")
        cluster.kill(3)
        held = cluster.wipe(2)
        await cluster.sleep(4 * RECOVER)
        assert sorted(cluster.mounted) == [1, 2]  # neither evicted nor withdrawn
        for number in (1, 2):
            assert "corral gfs fsck" in cluster.waits(number)
            assert 2 in cluster.mounted[number].recovery.failed
            assert cluster.mounted[number].locks.table.gate_closed
            assert "waits to recover gfs:home" in cluster.told(number)
        await cluster.mount(3)  # waits for the slot, in vain
        assert "what has failed is still not recovered" in cluster.ended[3]
        assert cluster.mounted[1].locks.table.gate_closed
        cluster.restore(2, held)
        await cluster.work(1, b"one")
        await cluster.work(2, b"two")
        assert cluster.waits(1) == cluster.waits(2) == ""

    run(body)


def test_a_survivor_that_cannot_read_withdraws_and_another_recovers() -> None:
    async def body(cluster: MountsByHand) -> None:
        await cluster.mount(1, 2, 3)
        await cluster.work(3, b"something to replay")
        await cluster.work(1, b"one")
        cluster.disk.refuse("n1")
        cluster.kill(3)
        await cluster.until(lambda: 1 in cluster.ended, "node 1 to withdraw")
        assert cluster.ended[1].startswith("what failed cannot be recovered here")
        await cluster.work(2, b"two")

    run(body)


def test_a_replay_that_takes_longer_than_recover_but_advances_is_not_evicted() -> None:
    async def body(cluster: MountsByHand) -> None:
        await cluster.mount(1, 2, 3)
        for number in range(60):
            await cluster.work(3, b"file%d" % number)
        cluster.kill(3)
        begun = cluster.sim.now
        await cluster.until(cluster.replaying, "the replay to begin", step=SECOND // 1000)
        cluster.disk.slowness = 500
        told: set[str] = set()

        def replayed() -> bool:
            told.update(cluster.waits(n) for n in (1, 2))
            return not cluster.replaying()

        await cluster.until(replayed, "the replay to end")
        assert cluster.sim.now - begun > 2 * RECOVER
        assert "gfs:home: the replay of journal 2" in told
        cluster.disk.slowness = 1
        await cluster.work(1, b"one")
        await cluster.work(2, b"two")
        assert set(cluster.ended) == set()

    run(body)


def test_a_killed_mount_that_does_not_end_never_counts_as_gone_and_costs_its_node() -> None:
    async def body(cluster: MountsByHand) -> None:
        await cluster.mount(1, 2, 3)
        await cluster.work(3, b"something to replay")
        process = cluster.sim.machines["n3"].running("worker")
        assert process is not None
        cluster.disk.slowness = 1_000_000  # of what is submitted now: it stays in the kernel
        process.spawn(cluster.mounted[3].mknod(ROOT, b"late", 0o100644, 0, SOMEBODY), "work")
        process.spawn(cluster.mounted[3].fsyncdir(ROOT, 0, data_only=False), "work")
        await cluster.until(lambda: bool(process.operations), "its disk to be busy", step=SECOND // 1000)
        cluster.disk.slowness = 1
        node = cluster.oracle.nodes[3]
        cluster.kill(3)
        (local,) = (one for one in node.warden.locals.values() if one.process == process.identity)
        await cluster.until(lambda: f"killed process {process.pid} to end" in cluster.told(3), "it to say so")
        assert "stuck in the kernel" in local.waits_for()
        assert not process.gone
        assert not any(slot == 2 for slot in cluster.replayed())
        await cluster.until(node.ended.done, "node 3 to give up")
        assert "is not gone, so it may still write" in node.ended.result().reason
        assert not node.ended.result().clean
        assert not process.gone
        assert not any(slot == 2 for slot in cluster.replayed())
        await cluster.until(lambda: 2 in cluster.replayed(), "a survivor to replay")
        assert process.gone  # the power switch saw to that
        await cluster.work(1, b"one")

    run(body)


def test_a_node_whose_participant_does_not_end_does_not_leave_cleanly() -> None:
    async def body(cluster: MountsByHand) -> None:
        await cluster.mount(1, 2, 3)
        await cluster.work(3, b"something to replay")
        process = cluster.sim.machines["n3"].running("worker")
        assert process is not None
        cluster.disk.slowness = 1_000_000
        process.spawn(cluster.mounted[3].mknod(ROOT, b"late", 0o100644, 0, SOMEBODY), "work")
        process.spawn(cluster.mounted[3].fsyncdir(ROOT, 0, data_only=False), "work")
        await cluster.until(lambda: bool(process.operations), "its disk to be busy", step=SECOND // 1000)
        cluster.disk.slowness = 1
        node = cluster.oracle.nodes[3]
        node.world.spawn(node.leave(), "leave")
        await cluster.until(node.ended.done, "node 3 to end")
        assert not node.ended.result().clean
        assert "counts as failed until it is fenced" in node.ended.result().reason
        assert not process.gone
        await cluster.until(lambda: 2 in cluster.replayed(), "a survivor to replay")
        assert process.gone

    run(body)
