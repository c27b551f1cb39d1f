"""What every operation of a mount stands on: inodes, resource groups, locks, journal, caches of one filesystem.

Shape of an operation: `await` the glocks it needs (inodes parents first, then resource groups), read what is missing,
hold space, and then change everything in one step without awaiting; so each operation is wholly in one transaction.

Lock order: rename glock, inode glocks (parents first, else by number), iopen, resource groups.
"""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from contextlib import suppress
from errno import EAGAIN, EIO, ENOSPC, ESTALE
from typing import Any, Final

from corral.api.dlm import Lockspace
from corral.api.gfs import ROOT, Notifier
from corral.base.time import MILLISECOND, SECOND, Instant
from corral.base.world import Timer, World
from corral.gfs import format as fmt
from corral.gfs.data import DIRTY_MAX, DataCache, FileData
from corral.gfs.device import Device
from corral.gfs.format import BlockDamaged
from corral.gfs.glock import EX, INODE, INVALIDATING, IOPEN, RGRP, SYNCING, UN, Glock
from corral.gfs.inode import Inode
from corral.gfs.journal import Journal
from corral.gfs.locks import Locks
from corral.gfs.rgrp import Rgrp
from corral.gfs.space import Space
from corral.gfs.superblock import Superblock

INODES_MAX: Final = 20_000  # in memory, beyond those in use
DRAIN_TURNS: Final = 5000
DRAIN_PAUSE: Final = MILLISECOND
STATFS_QUANTUM: Final = 30 * SECOND  # how far another node's statfs may lag
FOREVER_VALID: Final = 3600 * SECOND  # how long the kernel may believe what a cached glock protects


class Options:
    """`commit_ns`: the longest time an acknowledged namespace operation stays undurable without fsync.
    `strict`: every open is DIRECT_IO. `withdrawn(reason)` is called once."""

    def __init__(
        self,
        *,
        commit_ns: int = 5 * SECOND,
        strict: bool = False,
        min_hold_ns: int | None = None,
        withdrawn: Callable[[str], None] | None = None,
    ) -> None:
        self.commit_ns = commit_ns
        self.strict = strict
        self.min_hold_ns = min_hold_ns
        self.withdrawn = withdrawn


class Volume:
    """One mounted filesystem. Built by `corral.gfs.mount`."""

    def __init__(
        self,
        world: World,
        device: Device,
        superblock: Superblock,
        lockspace: Lockspace | None,
        notifier: Notifier | None,
        options: Options,
        slot: int,
    ) -> None:
        self.world = world
        self.device = device
        self.superblock = superblock
        self.notifier = notifier
        self.options = options
        self.slot = slot
        settings = {} if options.min_hold_ns is None else {"min_hold_ns": options.min_hold_ns}
        self.locks = Locks(world, lockspace, self._demote, **settings)
        self.data = DataCache(world, device)
        self.journal: Journal
        self.inodes: dict[int, Inode] = {}
        self.rgrps: list[Rgrp] = []
        self.rgrp_starts: list[int] = []
        self.system: dict[bytes, tuple[int, int]] = {}  # name in the master directory -> (formal, number)
        self.statfs_change: Inode
        self.inum_range: Inode
        self.free_change = 0
        self.dinode_change = 0
        self.next_formal = 0
        self.end_formal = 0
        self.ahead: set[int] = set()  # blocks whose glocks were asked for because dinodes will be made there
        self.withdrawn: str | None = None
        self.refusal: str | None = None  # withdrawn or unmounted: why nothing is done any more
        self.kept: list[Inode] = []  # system files held in EX as long as the mount lives
        self.damaged: dict[int, str] = {}  # bad blocks met, by number
        self.counts = {"damaged": 0, "commits_forced": 0, "reclaimed": 0}
        self.root = superblock.root
        self._timer: Timer | None = None
        self._next_commit: Instant = 0
        self._statfs_due: Instant = world.now() + STATFS_QUANTUM

    # --- failing -----------------------------------------------------------------------------------------------------

    def withdraw(self, reason: str) -> None:
        """This node can no longer trust its own writes: nothing is read, written or granted from here on. The kernel's
        pages are dropped before `options.withdrawn` is told, for they would outlive this process."""
        if self.withdrawn is None:
            self.withdrawn = reason
            self.refusal = f"withdrawn: {reason}"
            self.locks.stop()
            self._stop_timer()
            if self.notifier is not None:
                self.world.spawn(self._leave(self.notifier, reason), "gfs: withdraw")
            elif self.options.withdrawn is not None:
                self.options.withdrawn(reason)

    async def _leave(self, notifier: Notifier, reason: str) -> None:
        for number, inode in sorted(self.inodes.items()):
            if inode.lookups or inode.opens:
                with suppress(OSError):
                    await notifier.invalidate_inode(self.ino_of(number))
        with suppress(OSError):
            await notifier.invalidate_all_entries()
        if self.options.withdrawn is not None:
            self.options.withdrawn(reason)

    def refuse(self) -> None:
        if self.refusal is not None:
            raise OSError(EIO, self.refusal)

    async def drain(self) -> None:
        """At unmount: until what still runs has let go of its locks; whatever begins now is refused."""
        self.refusal = "unmounted"
        self._stop_timer()
        for _ in range(DRAIN_TURNS):
            busy = [
                glock
                for _, glock in sorted(self.locks.table.glocks.items())
                if glock.phase in (INVALIDATING, SYNCING)
                or (glock.holders and glock.kind in (INODE, RGRP) and glock.cached not in self.kept)
            ]
            if not busy:
                return
            await self.world.sleep_until(self.world.now() + DRAIN_PAUSE)

    def damage(self, error: BlockDamaged, what: str) -> OSError:
        """One bad object: EIO for it alone, named once and counted."""
        self.counts["damaged"] += 1
        if len(self.damaged) < 1000:
            self.damaged.setdefault(error.number, f"{what}: {error}")
        return OSError(EIO, f"{what}: {error}")

    # --- names of inodes ---------------------------------------------------------------------------------------------

    def number_of(self, ino: int) -> int:
        return self.root if ino == ROOT else ino

    def ino_of(self, number: int) -> int:
        return ROOT if number == self.root else number

    @property
    def cache_valid(self) -> int:
        """How long the kernel may keep names and attributes: until we tell it otherwise, if we can tell it."""
        return FOREVER_VALID if self.locks.table.local or self.notifier is not None else 0

    # --- blocks ------------------------------------------------------------------------------------------------------

    async def read_block(self, number: int) -> bytearray:
        """The newest committed content, wherever it is."""
        image = self.journal.newest_image(number)
        if image is not None:
            return bytearray(image)
        return await self.device.read(number)

    # --- inodes ------------------------------------------------------------------------------------------------------

    def inode(self, number: int, formal: int) -> Inode:
        """The object for a file known by both numbers; nothing is read. Raises ESTALE for another life of the block."""
        inode = self.inodes.get(number)
        if inode is None:
            inode = Inode(number, self.locks.table.get(INODE, number), formal)
            self._register(inode)
        elif formal and inode.formal != formal:
            if not inode.formal:
                inode.formal = formal
            elif inode.loaded:
                raise OSError(ESTALE, "stale file handle")
            else:
                # One of the two is stale; whose life the block is in is seen when it is read.
                inode = Inode(number, inode.glock, formal)
        return inode

    def adopt(self, number: int, formal: int) -> Inode:
        """The object for a file made here just now, whatever the block was before."""
        inode = Inode(number, self.locks.table.get(INODE, number), formal)
        self._register(inode)
        return inode

    def _register(self, inode: Inode) -> None:
        before = self.inodes.pop(inode.number, None)
        if before is not None and before is not inode:
            # Old handles keep the old object, which is stale for ever.
            inode.lookups, before.lookups = inode.lookups + before.lookups, 0
            before.loaded = False
            before.freed = True
        self.inodes[inode.number] = inode
        inode.glock.cached = inode
        if len(self.inodes) > INODES_MAX + 1000:
            self._shed_inodes()

    async def hold(self, inode: Inode, state: int, flags: int = 0) -> None:
        """Holds the inode's glock with its content loaded. The caller drops it. EAGAIN only with TRY."""
        glock = inode.glock
        if self.refusal is not None:
            self.refuse()
        if glock.forgotten:
            glock = inode.glock = self.locks.table.get(INODE, inode.number)
        if not self.locks.table.try_hold(glock, state) and not await self.locks.hold(glock, state, flags):
            raise OSError(EAGAIN, "another node holds it")
        if not inode.loaded:
            try:
                await self.load(inode)
            except BaseException:
                self.locks.drop(glock, state)
                raise

    async def hold_named(self, number: int, formal: int, state: int, flags: int = 0) -> Inode:
        """The file a dirent names, held and loaded. ESTALE only if the block is really another file's or none's."""
        while True:
            inode = self.inode(number, formal)
            try:
                await self.hold(inode, state, flags)
            except OSError as error:
                current = self.inodes.get(number)
                if error.errno == ESTALE and current is not None and current is not inode and current.formal == formal:
                    continue  # somebody else read the same file meanwhile: there is a registered object now
                raise
            return inode

    def drop(self, inode: Inode, state: int) -> None:
        self.locks.drop(inode.glock, state)

    async def load(self, inode: Inode) -> None:
        """Reads the dinode (its glock is held). ESTALE when the block is another file's or none's, EIO when bad."""
        try:
            block = await self.read_block(inode.number)
            formal = fmt.DINODE_HEAD.unpack_from(block, fmt.HEADER_SIZE)[0]
            kind = fmt.HEADER.unpack_from(block)[1]
            if inode.freed or block == fmt.ZERO_BLOCK:
                raise OSError(ESTALE, "stale file handle")
            if inode.formal and (kind != fmt.DINODE or formal != inode.formal) and fmt.verified(bytes(block)):
                raise OSError(ESTALE, "stale file handle")
            await self.take_content(inode, block)
        except BlockDamaged as error:
            if inode.formal and not await self._is_dinode(inode.number):
                raise OSError(ESTALE, "stale file handle") from None
            raise self.damage(error, f"inode {inode.number}") from None

    async def take_content(self, inode: Inode, block: bytearray) -> None:
        """Loads a dinode that is this very file's; its object is the registered one then. BlockDamaged, ESTALE."""
        formal = fmt.DINODE_HEAD.unpack_from(block, fmt.HEADER_SIZE)[0]
        current = self.inodes.get(inode.number)
        if current is not None and current is not inode and current.formal == (inode.formal or formal):
            raise OSError(ESTALE, "stale file handle")  # a newer object for the same file: look it up again
        if not inode.loaded:
            await inode.load(block, self.read_block, self.superblock.blocks)
        if self.inodes.get(inode.number) is not inode:
            self._register(inode)

    async def _is_dinode(self, number: int) -> bool:
        """By the bitmap on disk, without its glock: only to tell a stale reference from damage."""
        try:
            rgrp = self.rgrp_of(number)
            if rgrp.loaded:
                return rgrp.state(number) in (fmt.DINODE_STATE, fmt.UNLINKED)
            probe = Rgrp(rgrp.number, rgrp.data0, rgrp.blocks, rgrp.index, Glock(RGRP, rgrp.number))
            probe.load(await self.read_block(rgrp.number))
            return probe.state(number) in (fmt.DINODE_STATE, fmt.UNLINKED)
        except (BlockDamaged, OSError):
            return True

    def touch(self, inode: Inode, *, times_only: bool = False) -> None:
        """The inode was changed in this step."""
        journal = self.journal
        journal.add(inode)
        inode.transaction = journal.running.number
        if not times_only:
            inode.metadata_transaction = inode.transaction

    def data_of(self, inode: Inode) -> FileData:
        if inode.data is None:
            inode.data = FileData(self.data, inode)
        return inode.data

    def _shed_inodes(self) -> None:
        """Drops the oldest inodes nobody refers to, with their glocks."""
        excess = len(self.inodes) - INODES_MAX
        for number, inode in list(self.inodes.items()):
            if excess <= 0:
                return
            glock = inode.glock
            if inode.is_idle and not glock.holders and not glock.queue and glock.phase == 0 and not glock.blocked:
                excess -= 1
                if glock.state != EX or not (glock.dirty or glock.logged):
                    self.forget_inode(number)
                self.locks.give_up(glock)
                self._give_up_idle(IOPEN, number)

    def _give_up_idle(self, kind: int, number: int) -> None:
        glock = self.locks.table.glocks.get((kind, number))
        if glock is not None and not glock.holders and not glock.queue and glock.phase == 0 and not glock.blocked:
            self.locks.give_up(glock)

    def forget_inode(self, number: int) -> None:
        inode = self.inodes.pop(number, None)
        if inode is not None:
            if inode.data is not None:
                inode.data.drop_all()
            inode.forget_content()
            if inode.glock.cached is inode:
                inode.glock.cached = None

    async def hold_system(self, name: bytes, state: int, flags: int = 0) -> Inode:
        """A file of the master directory, held and loaded. Raises BlockDamaged when it is missing."""
        formal, number = self.system_place(name)
        return await self.hold_named(number, formal, state, flags)

    def system_place(self, name: bytes) -> tuple[int, int]:
        """(formal, number). Raises BlockDamaged."""
        if name not in self.system:
            raise BlockDamaged(self.superblock.master, f"the master directory has no {name.decode()}")
        return self.system[name]

    def record(self, inode: Inode, layout: fmt.Layout) -> tuple[Any, ...]:
        try:
            return inode.record(layout)
        except BlockDamaged as error:
            raise self.damage(error, "system file") from None

    # --- space -------------------------------------------------------------------------------------------------------

    def rgrp_of(self, number: int) -> Rgrp:
        index = bisect_right(self.rgrp_starts, number) - 1
        if index < 0 or not self.rgrps[index].contains(number):
            raise BlockDamaged(number, "lies in no resource group")
        return self.rgrps[index]

    async def hold_rgrp(self, rgrp: Rgrp, state: int = EX, flags: int = 0) -> None:
        """Holds and loads one group. A bad bitmap makes this node withdraw: it could allocate what is in use."""
        if not self.locks.table.try_hold(rgrp.glock, state):
            await self.locks.hold(rgrp.glock, state, flags)
        if not rgrp.loaded:
            try:
                block = await self.read_block(rgrp.number)
                if not rgrp.loaded:
                    rgrp.load(block)
            except BlockDamaged as error:
                self.locks.drop(rgrp.glock, state)
                self.damage(error, f"resource group {rgrp.index}")
                self.withdraw(f"resource group {rgrp.index}: {error}; unmount everywhere and run fsck")
                raise OSError(EIO, self.withdrawn) from None
            except BaseException:
                self.locks.drop(rgrp.glock, state)
                raise

    async def space(self, need: int, goal: int, inode: Inode | None) -> Space:
        """Holds a group with `need` blocks to give, near block `goal` if it has them. ENOSPC when there is none."""
        for attempt in range(2):
            for rgrp in self._candidates(goal):
                if rgrp.loaded and rgrp.glock.state == EX and rgrp.available < need:
                    continue
                await self.hold_rgrp(rgrp)
                if rgrp.available >= need:
                    return Space(self, [rgrp], inode)
                self.locks.drop(rgrp.glock, EX)
            if attempt == 0:
                if not self.journal.running.frees and self.journal.durable == self.journal.running.number - 1:
                    break
                self.counts["commits_forced"] += 1
                await self.journal.commit()  # what was freed a moment ago
        raise OSError(ENOSPC, "no space left in the filesystem")

    async def space_of(self, numbers: Sequence[int], inode: Inode | None) -> Space:
        """Holds the groups of these blocks, to free or relabel them."""
        rgrps: list[Rgrp] = []
        try:
            for index in sorted({self.rgrp_of(number).index for number in numbers}):
                await self.hold_rgrp(self.rgrps[index])
                rgrps.append(self.rgrps[index])
        except BlockDamaged as error:
            self._drop_rgrps(rgrps)
            raise self.damage(error, "reference") from None
        except BaseException:
            self._drop_rgrps(rgrps)
            raise
        return Space(self, rgrps, inode)

    def _drop_rgrps(self, rgrps: list[Rgrp]) -> None:
        for rgrp in rgrps:
            self.locks.drop(rgrp.glock, EX)

    def _candidates(self, goal: int) -> Sequence[Rgrp]:
        """Round from this slot's own share, so that nodes stay out of each other's way. Before that the goal's group,
        if it is of that share or this node has its lock anyway: to take it from another node for each block would cost
        more than blocks that lie apart."""
        count = len(self.rgrps)
        journals = max(1, self.superblock.journals)
        first, end = self.slot * count // journals, (self.slot + 1) * count // journals
        index = bisect_right(self.rgrp_starts, goal) - 1
        if index >= 0 and self.rgrps[index].contains(goal):
            near = self.rgrps[index]
            if first <= index < end or near.glock.state == EX:
                return [near, *self.rgrps[first:], *self.rgrps[:first]]
        return self.rgrps[first:] + self.rgrps[:first]

    def count_blocks(self, free: int, dinodes: int) -> None:
        """This slot's part of statfs, journaled with what it counts."""
        self.free_change += free
        self.dinode_change += dinodes
        change = self.statfs_change
        fmt.STATFS.pack_into(change.payload, 0, 0, self.free_change, self.dinode_change)
        self.journal.add(change)

    async def ensure_formal(self) -> None:
        """At least one formal number is at hand."""
        if self.next_formal < self.end_formal:
            return
        inum = await self.hold_system(b"inum", EX)
        try:
            if self.next_formal < self.end_formal:
                return
            (start,) = self.record(inum, fmt.INUM)
            fmt.INUM.pack_into(inum.payload, 0, start + fmt.INUM_RANGE_LENGTH)
            self.touch(inum)
            self.next_formal, self.end_formal = start, start + fmt.INUM_RANGE_LENGTH
            self._save_range()
        finally:
            self.drop(inum, EX)

    def take_formal(self) -> int:
        formal = self.next_formal
        assert formal < self.end_formal
        self.next_formal = formal + 1
        self._save_range()
        return formal

    def _save_range(self) -> None:
        fmt.INUM_RANGE.pack_into(self.inum_range.payload, 0, self.next_formal, self.end_formal)
        self.journal.add(self.inum_range)

    # --- pace --------------------------------------------------------------------------------------------------------

    async def throttle(self) -> None:
        """Before an operation changes anything: room in the running transaction and in the dirty cache."""
        if self.refusal is not None:
            self.refuse()
        if self.journal.full:
            await self.journal.commit()
        if self.data.dirty_bytes > DIRTY_MAX:
            await self.data.write_all()
        if self._timer is None:
            self._arm_commit()

    def _arm_commit(self) -> None:
        self._next_commit = self.world.now() + self.options.commit_ns
        self._timer = self.world.call_at(self._next_commit, self._commit_due)

    def _commit_due(self) -> None:
        self._timer = None
        if self.refusal is None and (self.journal.running or self.data.dirty):
            self.world.spawn(self._commit_quietly(), "gfs: periodic commit")

    async def _commit_quietly(self) -> None:
        try:
            if self.world.now() >= self._statfs_due:
                self._statfs_due = self.world.now() + STATFS_QUANTUM
                await self.sync_statfs()
            if self.journal.running:
                await self.journal.commit()
            else:
                await self.data.write_all()
        except OSError as error:
            if self.refusal is None:
                self.withdraw(str(error.strerror or error))

    async def sync_statfs(self) -> None:
        raise NotImplementedError

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    # --- demotion ----------------------------------------------------------------------------------------------------

    async def _demote(self, glock: Glock, target: int) -> None:
        """Another node wants the lock, or the cache is to shrink: leave nothing behind, then lower the mode."""
        cached = glock.cached
        try:
            if glock.kind == INODE and cached is not None:
                if cached.write_opens:
                    target = UN  # pages of a file open for writing are cached under EX only
                if target == UN:
                    await self.publish_opens(cached)
                    await self._invalidate_kernel(cached)
            if glock.kind != IOPEN:
                await self.locks.wait_drained(glock)  # on the way to SH too reads are served until here
            self.locks.table.begin_sync(glock)
            if glock.state == EX:
                if glock.kind == INODE and cached is not None:
                    while cached.data is not None and not cached.data.is_clean:
                        await self.data.write_clean(cached.data)
                await self.journal.handover(glock)
        except OSError as error:
            # The lock is kept: what it protects cannot be made good. The node leaves and its journal is replayed.
            self.withdraw(f"cannot hand over {glock.name.decode().strip()}: {error.strerror or error}")
            return
        if target == UN:
            self._forget_cached(glock)
        self.locks.synced(glock, target)
        if glock.kind == IOPEN and target == UN:
            self._iopen_released(glock.number)

    async def _invalidate_kernel(self, inode: Inode) -> None:
        """Until a pass was served no read or write meanwhile: only then can no old page have come back."""
        notifier, glock = self.notifier, inode.glock
        if notifier is None or not (inode.lookups or inode.opens):
            await self.locks.wait_drained(glock)
            return
        ino = self.ino_of(inode.number)
        is_directory = inode.is_directory
        if inode.write_opens and glock.state != EX:
            # No page can be cached (they are under EX only), and a write that waits for EX has its pages locked.
            await notifier.invalidate_inode(ino, -1)
            await self.locks.wait_drained(glock)
            return
        while True:
            served = glock.io_served
            await notifier.invalidate_inode(ino)
            if is_directory:
                await notifier.invalidate_all_entries()
            await self.locks.wait_drained(glock)
            if glock.io_served == served and not glock.holders:
                return

    def _forget_cached(self, glock: Glock) -> None:
        cached = glock.cached
        if cached is None:
            return
        if glock.kind == INODE:
            if cached.data is not None:
                cached.data.drop_all()
            cached.forget_content()
            if not cached.lookups and not cached.opens:
                self.inodes.pop(cached.number, None)
                glock.cached = None
        elif glock.kind == RGRP:
            cached.unload()

    def _iopen_released(self, number: int) -> None:
        """Somebody wants the last reference to an unlinked inode: the last releaser tries to free it."""
        self.world.spawn(self.reclaim_quietly(number, 0), "gfs: reclaim")

    async def reclaim_quietly(self, number: int, formal: int) -> None:
        raise NotImplementedError

    async def publish_opens(self, inode: Inode) -> None:
        raise NotImplementedError

    # --- figures -----------------------------------------------------------------------------------------------------

    def statistics(self) -> dict[str, Any]:
        table = self.locks.table
        return {
            "slot": self.slot,
            "withdrawn": self.withdrawn,
            "damaged_blocks": dict(sorted(self.damaged.items())),
            "inodes": len(self.inodes),
            "glocks": len(table.glocks),
            "glock": dict(table.counts),
            "journal": dict(self.journal.counts),
            "journal_used": self.journal.used,
            "dirty_bytes": self.data.dirty_bytes,
            "cached_bytes": self.data.bytes,
            "device": {
                "reads": self.device.reads,
                "writes": self.device.writes,
                "write_bytes": self.device.write_bytes,
                "flushes": self.device.flushes,
            },
            **self.counts,
        }
