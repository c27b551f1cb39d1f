"""System files read straight from the device, without caches or locks: by mount, recovery and fsck.

What they hold never changes while mounted (a grow changes rindex under its glock), so reading them so is safe.
"""

from corral.gfs import format as fmt
from corral.gfs.device import Device
from corral.gfs.format import BLOCK, BlockDamaged
from corral.gfs.glock import INODE, Glock
from corral.gfs.inode import Inode
from corral.gfs.journal import Ring
from corral.gfs.replay import JournalDamaged
from corral.gfs.superblock import Superblock


async def read_system_inode(device: Device, superblock: Superblock, number: int) -> Inode:
    """Raises BlockDamaged."""
    if not fmt.SUPERBLOCK_AT < number < superblock.blocks:
        raise BlockDamaged(number, "lies outside the filesystem")
    inode = Inode(number, Glock(INODE, number))
    await inode.load(await device.read(number), device.read, superblock.blocks)
    if not inode.flags & fmt.SYSTEM:
        raise BlockDamaged(number, "is not a system file")
    return inode


async def read_master(device: Device, superblock: Superblock) -> dict[bytes, tuple[int, int]]:
    """Names of the master directory: name -> (formal, number). Raises BlockDamaged."""
    master = await read_system_inode(device, superblock, superblock.master)
    directory = master.directory
    if directory is None:
        raise BlockDamaged(superblock.master, "the master directory is not a directory")
    names: dict[bytes, tuple[int, int]] = {}
    cookie = 3
    while True:
        listing, cookie = await directory.listing_at(cookie, device.read)
        names.update({entry.name: (entry.formal, entry.number) for entry in listing})
        if not cookie:
            break
    for name in (b"rindex", b"statfs", b"inum"):
        if name not in names:
            raise BlockDamaged(superblock.master, f"the master directory has no {name.decode()}")
    return names


async def ring_of(device: Device, superblock: Superblock, system: dict[bytes, tuple[int, int]], slot: int) -> Ring:
    """Where a journal lies. Raises JournalDamaged."""
    name = b"journal%d" % slot
    if name not in system:
        raise JournalDamaged(f"the master directory has no {name.decode()}: run fsck")
    try:
        inode = await read_system_inode(device, superblock, system[name][1])
    except BlockDamaged as error:
        raise JournalDamaged(f"{name.decode()}: {error}; run fsck") from None
    extents = inode.extents.extents() if inode.extents is not None else []
    ring = Ring((logical, physical, count) for logical, physical, count, _ in extents)
    at = 0
    for position, _, count in ring.extents:
        if position != at:
            raise JournalDamaged(f"{name.decode()} has a hole at block {at}: run fsck")
        at += count
    if at < 64 or at * BLOCK != inode.size:
        raise JournalDamaged(f"{name.decode()} has {at} blocks, which is not its size: run fsck")
    return ring


async def read_rindex_entries(
    device: Device, superblock: Superblock, system: dict[bytes, tuple[int, int]]
) -> list[tuple[int, int, int]]:
    """(address, data0, blocks) of each resource group, checked and in order. Raises BlockDamaged."""
    inode = await read_system_inode(device, superblock, system[b"rindex"][1])
    out: list[tuple[int, int, int]] = []
    end = fmt.SUPERBLOCK_AT + 1
    index = 0
    for _, first, count, _ in inode.extents.extents() if inode.extents is not None else []:
        for number in range(first, first + count):
            block = await device.read(number)
            fmt.check(block, fmt.RINDEX, number)
            entries, position = fmt.RINDEX_HEAD.unpack_from(block, fmt.HEADER_SIZE)
            if position != index or entries > fmt.RINDEX_MAX:
                raise BlockDamaged(number, "is not this part of the rindex")
            for item in range(entries):
                address, data0, blocks, _ = fmt.RINDEX_ENTRY.unpack_from(
                    block, fmt.RINDEX_AT + item * fmt.RINDEX_ENTRY.size
                )
                if address < end or data0 != address + 1 or not 0 < blocks <= fmt.RGRP_BLOCKS_MAX:
                    raise BlockDamaged(number, f"rindex entry {item} is impossible")
                end = data0 + blocks
                if end > superblock.blocks:
                    raise BlockDamaged(number, f"rindex entry {item} lies outside the filesystem")
                out.append((address, data0, blocks))
            index += 1
    if not out:
        raise BlockDamaged(inode.number, "the rindex is empty")
    return out
