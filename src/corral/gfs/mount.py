"""Mounting: superblock, system files, own journal replayed, everything wired. The gate is shut on return.

filesystem = await mount(world, disk, lockspace, slot=0)
await filesystem.start(round)       # None for the only mount there is
filesystem.finish(round)
await filesystem.go_live()          # once
"""

from corral.api.dlm import Lockspace
from corral.api.gfs import Notifier
from corral.base.world import Disk, World
from corral.gfs.device import Device, Guard
from corral.gfs.filesystem import GfsFilesystem
from corral.gfs.format import BlockDamaged
from corral.gfs.glock import EX, JOURNAL, NOEXP, RGRP
from corral.gfs.journal import Journal, Ring
from corral.gfs.recovery import replay_slot
from corral.gfs.replay import JournalState
from corral.gfs.rgrp import Rgrp
from corral.gfs.superblock import Refused
from corral.gfs.superblock import read as read_superblock
from corral.gfs.system import read_master, read_rindex_entries, ring_of
from corral.gfs.volume import Options


async def mount(
    world: World,
    disk: Disk,
    lockspace: Lockspace | None,
    *,
    slot: int,
    notifier: Notifier | None = None,
    options: Options | None = None,
    cluster: str | None = None,
    guard: Guard | None = None,
) -> GfsFilesystem:
    """`attach` and `begin` in one."""
    filesystem = await attach(
        world, disk, lockspace, slot=slot, notifier=notifier, options=options, cluster=cluster, guard=guard
    )
    await begin(filesystem)
    return filesystem


async def attach(
    world: World,
    disk: Disk,
    lockspace: Lockspace | None,
    *,
    slot: int,
    notifier: Notifier | None = None,
    options: Options | None = None,
    cluster: str | None = None,
    guard: Guard | None = None,
) -> GfsFilesystem:
    """The filesystem, of which nothing but the superblock has been read. `lockspace` None: no other node can mount this
    device while we do (lock_nolock). Raises Refused or OSError, each with a sentence for the operator."""
    device = Device(world, disk, guard)
    superblock, _ = await read_superblock(device)
    if cluster is not None and superblock.cluster != cluster:
        raise Refused(
            f"this filesystem belongs to cluster {superblock.cluster!r}, not {cluster!r}: "
            "mount it there, or change its lock table with fsck"
        )
    if not 0 <= slot < superblock.journals:
        raise Refused(f"slot {slot} has no journal, there are {superblock.journals}: add journals with jadd")
    filesystem = GfsFilesystem(world, device, superblock, lockspace, notifier, options or Options(), slot)
    filesystem.locks.table.close_gate()
    return filesystem


async def begin(filesystem: GfsFilesystem) -> None:
    """This slot's journal replayed, the gate still shut; a round follows, and after it `go_live`. Raises Refused,
    JournalDamaged or OSError, each with a sentence for the operator."""
    try:
        await _begin(filesystem)
    except BaseException as error:
        filesystem.locks.stop()
        if isinstance(error, BlockDamaged):
            raise Refused(f"system files are damaged ({error}): run fsck") from None
        raise


async def _begin(filesystem: GfsFilesystem) -> None:
    device, superblock, slot = filesystem.device, filesystem.superblock, filesystem.slot
    # The journal's glock says to everybody that its owner lives: held to the end.
    glock = filesystem.locks.table.get(JOURNAL, slot)
    await filesystem.locks.hold(glock, EX, NOEXP)
    # Our own journal first: what it holds may be the master directory itself.
    filesystem.system = await read_master(device, superblock)
    ring = await ring_of(device, superblock, filesystem.system, slot)
    state = await replay_slot(device, ring, slot, superblock.uuid, filesystem.world.wall_ns())
    if state.images:
        filesystem.recovery.replayed.append(slot)
        filesystem.system = await read_master(device, superblock)
    filesystem.journal = make_journal(filesystem, ring, state)
    filesystem.rgrps = await read_rindex(filesystem)
    filesystem.rgrp_starts = [rgrp.number for rgrp in filesystem.rgrps]
    root = filesystem.inode(superblock.root, 0)
    root.lookups = 1  # the kernel never forgets it


def make_journal(filesystem: GfsFilesystem, ring: Ring, state: JournalState) -> Journal:
    return Journal(
        filesystem.world,
        filesystem.device,
        ring,
        slot=filesystem.slot,
        uuid=filesystem.superblock.uuid,
        sequence=state.next_sequence,
        position=state.next_position,
        write_data=filesystem.data.write_all,
        failed=filesystem.withdraw,
    )


async def read_rindex(filesystem: GfsFilesystem) -> list[Rgrp]:
    """Raises BlockDamaged."""
    entries = await read_rindex_entries(filesystem.device, filesystem.superblock, filesystem.system)
    table = filesystem.locks.table
    rgrps: list[Rgrp] = []
    for index, (address, data0, blocks) in enumerate(entries):
        rgrp = Rgrp(address, data0, blocks, index, table.get(RGRP, address))
        rgrp.glock.cached = rgrp
        rgrps.append(rgrp)
    return rgrps
