"""Makes a filesystem: superblock, resource groups, system files, journals, root. Everything is written, then flushed;
the superblock goes last, so an interrupted mkfs leaves no filesystem rather than half of one."""

from errno import EINVAL, ENOSPC
from typing import Final, NamedTuple

from corral.base.world import Disk, World
from corral.gfs import format as fmt
from corral.gfs.device import Device
from corral.gfs.directory import Directory
from corral.gfs.extent import ExtentTree
from corral.gfs.format import BLOCK, SUPERBLOCK_AT
from corral.gfs.glock import INODE, RGRP, Glock
from corral.gfs.inode import S_IFDIR, S_IFREG, Inode
from corral.gfs.journal import Ring
from corral.gfs.meta import Meta
from corral.gfs.replay import clean_header
from corral.gfs.rgrp import Rgrp
from corral.gfs.superblock import Superblock

JOURNAL_MIN: Final = 256  # blocks: 1 MiB
JOURNAL_MAX: Final = 8192  # blocks: 32 MiB unless asked for more
RGRP_MIN: Final = 1024
ROOT_MODE: Final = 0o755


class Made(NamedTuple):
    blocks: int
    rgrps: int
    journals: int
    journal_blocks: int
    uuid: bytes


class _Builder:
    """A bump allocator over the fresh groups, and the blocks to write. Also the `Space` of directory code."""

    def __init__(self, rgrps: list[Rgrp], now_ns: int) -> None:
        self.rgrps = rgrps
        self.now_ns = now_ns
        self.metas: list[Meta] = []
        self.formal = 1
        self.glock = Glock(INODE, 0)

    def add(self, meta: Meta) -> None:
        if not meta.dirty:
            meta.dirty = True
            self.metas.append(meta)

    def allocate_block(self, glock: Glock) -> int:
        return self.allocate(1)[0][1]

    def free_block(self, meta: Meta) -> None:
        raise AssertionError("mkfs frees nothing")

    def allocate(self, count: int) -> list[tuple[int, int, int]]:
        """(position, block number, count) runs that make up `count` blocks."""
        runs: list[tuple[int, int, int]] = []
        done = 0
        for rgrp in self.rgrps:
            while done < count and rgrp.available:
                number, taken = rgrp.allocate(count - done, 0)
                if not taken:
                    break
                runs.append((done, number, taken))
                done += taken
        if done < count:
            raise OSError(ENOSPC, "the device is too small for these journals: ask for fewer or smaller ones")
        return runs

    def inode(self, mode: int, *, system: bool) -> Inode:
        number = next(n for rgrp in self.rgrps if (n := rgrp.allocate_dinode(0)))
        inode = Inode(number, self.glock, self.formal)
        self.formal += 1
        inode.mode = mode
        inode.nlink = 2 if mode & S_IFDIR else 1
        inode.blocks = 1
        inode.flags = fmt.STUFFED | (fmt.SYSTEM if system else 0)
        inode.atime_ns = inode.mtime_ns = inode.ctime_ns = inode.btime_ns = self.now_ns
        if mode & S_IFDIR == S_IFDIR:
            inode.directory = Directory(inode)
            inode.size = fmt.PAYLOAD
        self.add(inode)
        return inode


def _layout(blocks: int, rgrp_blocks: int) -> list[Rgrp]:
    """Groups from behind the superblock to before the last block, which keeps a copy of it."""
    rgrps: list[Rgrp] = []
    at, end = SUPERBLOCK_AT + 1, blocks - 1
    while end - at > fmt.CLUSTER:
        count = min(rgrp_blocks, end - at - 1) & ~3
        rgrp = Rgrp(at, at + 1, count, len(rgrps), Glock(RGRP, at))
        rgrp.make_empty()
        rgrps.append(rgrp)
        at += 1 + count
    return rgrps


async def format(
    world: World,
    disk: Disk,
    *,
    cluster: str,
    name: str,
    journals: int = 4,
    journal_blocks: int | None = None,
    rgrp_blocks: int | None = None,
    blocks: int | None = None,
    owner: tuple[int, int] = (0, 0),
) -> Made:
    """Raises OSError(EINVAL) for impossible wishes, ENOSPC when the device is too small."""
    device = Device(world, disk)
    total = min(blocks or device.blocks, device.blocks)
    table = f"{cluster}:{name}".encode("ascii", "strict")
    if not cluster or not name or ":" in cluster or ":" in name or len(table) > 63:
        raise OSError(EINVAL, "cluster and name must be given, without a colon and together at most 62 letters")
    if total < 4 * RGRP_MIN or not 1 <= journals <= 128:
        raise OSError(EINVAL, f"a filesystem needs at least {4 * RGRP_MIN * BLOCK >> 20} MiB and 1 to 128 journals")
    size = rgrp_blocks or min(fmt.RGRP_BLOCKS_MAX, max(RGRP_MIN, total // 8)) & ~(fmt.CLUSTER - 1)
    if not fmt.CLUSTER * 4 <= size <= fmt.RGRP_BLOCKS_MAX:
        raise OSError(EINVAL, f"a resource group has {fmt.CLUSTER * 4} to {fmt.RGRP_BLOCKS_MAX} blocks")
    log = journal_blocks or max(JOURNAL_MIN, min(JOURNAL_MAX, total // (8 * journals)))
    if log < 64:
        raise OSError(EINVAL, "a journal has at least 64 blocks")
    rgrps = _layout(total, size)
    builder = _Builder(rgrps, world.wall_ns())
    middle = rgrps[len(rgrps) // 2]
    copy_2 = middle.data0
    middle.allocate(1, copy_2)
    uuid = world.random_bytes(16)
    rings = _system_files(builder, journals, log)
    superblock = Superblock(
        version=fmt.VERSION,
        block_size=BLOCK,
        compatible=fmt.FEATURES_COMPATIBLE,
        read_only_compatible=fmt.FEATURES_READ_ONLY,
        incompatible=fmt.FEATURES_INCOMPATIBLE,
        uuid=uuid,
        created_ns=builder.now_ns,
        blocks=total,
        master=rings.master,
        root=_root(builder, owner),
        rgrps=len(rgrps),
        rgrp_blocks=size,
        journals=journals,
        cluster_blocks=fmt.CLUSTER,
        copy_1=total - 1,
        copy_2=copy_2,
        lock_table=table.ljust(64, b"\0"),
    )
    _finish_counts(builder, rings, journals)
    await _write(world, device, builder, superblock, rings, uuid)
    return Made(total, len(rgrps), journals, log, uuid)


class _Rings(NamedTuple):
    master: int
    rings: list[Ring]
    statfs: Inode
    inum: Inode
    rindex: list[tuple[int, bytes]]


def _system_files(builder: _Builder, journals: int, log: int) -> _Rings:
    master = builder.inode(S_IFDIR | 0o700, system=True)
    master.parent, master.parent_formal = master.number, master.formal

    def enter(name: bytes, inode: Inode) -> Inode:
        directory = master.directory
        assert directory is not None
        directory.add(builder, name, fmt.name_hash(name), inode.formal, inode.number, inode.mode >> 12)
        master.blocks = 1 + directory.leaf_count + len(directory.tables)
        if directory.area is None:
            master.flags &= ~fmt.STUFFED
            master.flags |= fmt.EXHASH
            master.size = directory.leaf_count * BLOCK
        return inode

    def stuffed(name: bytes, size: int) -> Inode:
        inode = enter(name, builder.inode(S_IFREG | 0o600, system=True))
        inode.payload, inode.size = bytearray(size), size
        return inode

    def extended(name: bytes, count: int) -> list[tuple[int, int, int]]:
        inode = enter(name, builder.inode(S_IFREG | 0o600, system=True))
        runs = builder.allocate(count)
        inode.flags &= ~fmt.STUFFED
        inode.extents = ExtentTree(inode.number, builder.glock)
        inode.extents.root = [(position, number, taken, 0) for position, number, taken in runs]
        inode.size = count * BLOCK
        inode.blocks = 1 + count
        return runs

    rindex = extended(b"rindex", -(-len(builder.rgrps) // fmt.RINDEX_MAX))
    statfs = stuffed(b"statfs", fmt.STATFS.size)
    inum = stuffed(b"inum", fmt.INUM.size)
    stuffed(b"quota", 0)
    rings: list[Ring] = []
    for slot in range(journals):
        rings.append(Ring(extended(b"journal%d" % slot, log)))
        stuffed(b"statfs_change%d" % slot, fmt.STATFS.size)
        stuffed(b"inum_range%d" % slot, fmt.INUM_RANGE.size)
        stuffed(b"quota_change%d" % slot, 0)
    return _Rings(master.number, rings, statfs, inum, _rindex_blocks(builder, rindex))


def _rindex_blocks(builder: _Builder, runs: list[tuple[int, int, int]]) -> list[tuple[int, bytes]]:
    numbers = [number + index for _, number, count in runs for index in range(count)]
    out: list[tuple[int, bytes]] = []
    for index, number in enumerate(numbers):
        part = builder.rgrps[index * fmt.RINDEX_MAX : (index + 1) * fmt.RINDEX_MAX]
        block = bytearray(BLOCK)
        fmt.RINDEX_HEAD.pack_into(block, fmt.HEADER_SIZE, len(part), index)
        at = fmt.RINDEX_AT
        for rgrp in part:
            fmt.RINDEX_ENTRY.pack_into(block, at, rgrp.number, rgrp.data0, rgrp.blocks, 0)
            at += fmt.RINDEX_ENTRY.size
        out.append((number, fmt.seal(block, fmt.RINDEX, number, 1)))
    return out


def _root(builder: _Builder, owner: tuple[int, int]) -> int:
    root = builder.inode(S_IFDIR | ROOT_MODE, system=False)
    root.uid, root.gid = owner
    root.parent, root.parent_formal = root.number, root.formal
    return root.number


def _finish_counts(builder: _Builder, rings: _Rings, journals: int) -> None:
    total = sum(rgrp.blocks for rgrp in builder.rgrps)
    free = sum(rgrp.free for rgrp in builder.rgrps)
    dinodes = sum(rgrp.dinodes for rgrp in builder.rgrps)
    fmt.STATFS.pack_into(rings.statfs.payload, 0, total, free, dinodes)
    fmt.INUM.pack_into(rings.inum.payload, 0, builder.formal)


async def _write(
    world: World, device: Device, builder: _Builder, superblock: Superblock, rings: _Rings, uuid: bytes
) -> None:
    # A superblock that was here before must not outlive its filesystem.
    await device.write(SUPERBLOCK_AT, [fmt.ZERO_BLOCK])
    await device.write(device.blocks - 1, [fmt.ZERO_BLOCK])
    blocks = {meta.number: meta.seal() for meta in builder.metas}
    blocks.update({rgrp.number: rgrp.seal() for rgrp in builder.rgrps})
    blocks.update(dict(rings.rindex))
    for slot, ring in enumerate(rings.rings):
        blocks[ring.address(0)] = clean_header(ring, slot, uuid, 0, 1, builder.now_ns)
    await device.write_runs(sorted(blocks.items()))
    await device.flush()
    for copy in (superblock.copy_1, superblock.copy_2, SUPERBLOCK_AT):
        await device.write(copy, [superblock.image(copy)])
    await device.flush()
