"""Last references: open files that others can see, and the end of an inode that has lost its last name.

Whoever frees an inode holds its glock in EX and then asks for its iopen glock in EX. So an open file needs no lock of
its own while this node holds the inode's glock; before that is given up, the iopen glock is taken in SH
(`publish_opens`) and kept until the last close.
"""

from errno import (
    EAGAIN,
    ESTALE,
)

from corral.gfs import format as fmt
from corral.gfs.format import BlockDamaged
from corral.gfs.glock import EX, IOPEN, SH, TRY, TRY_CALLBACK
from corral.gfs.inode import Inode
from corral.gfs.volume import Volume


class References(Volume):
    """Open counts and freeing; `free_content` comes with files."""

    async def publish_opens(self, inode: Inode) -> None:
        """The inode's glock is about to go: from here on the iopen glock says that the file is open here."""
        if not inode.opens or inode.iopen is not None:
            return
        glock = self.locks.table.get(IOPEN, inode.number)
        await self.locks.hold(glock, SH)
        if inode.opens:
            inode.iopen = glock
        else:  # closed meanwhile
            self.locks.drop(glock, SH)

    async def close_one(self, inode: Inode) -> None:
        """One open less. The last one of a file without names frees it."""
        inode.opens -= 1
        if inode.opens:
            return
        glock, inode.iopen = inode.iopen, None
        if glock is not None:
            self.locks.drop(glock, SH)
        if inode.loaded and not inode.nlink:
            await self.reclaim(inode)

    async def reclaim_quietly(self, number: int, formal: int) -> None:
        try:
            await self.reclaim(self.inode(number, formal))
        except OSError as error:
            if error.errno not in (ESTALE, EAGAIN):
                self.counts["reclaim_failed"] = self.counts.get("reclaim_failed", 0) + 1

    async def reclaim(self, inode: Inode) -> None:
        """Frees an inode without names, if nobody in the cluster has it open. Harmless when called too often."""
        if inode.opens or self.refusal is not None:
            return
        await self.throttle()
        try:
            await self.hold(inode, EX)
        except OSError as error:
            if error.errno == ESTALE:
                return  # another node has freed it
            raise
        try:
            if inode.nlink or inode.opens:
                return
            glock = self.locks.table.get(IOPEN, inode.number)
            if not await self.locks.hold(glock, EX, TRY | TRY_CALLBACK):
                return  # open somewhere; the last one to close it tries again
            try:
                await self._free_inode(inode)
            finally:
                self.locks.drop(glock, EX)
        finally:
            self.drop(inode, EX)

    async def _free_inode(self, inode: Inode) -> None:
        """Content first, step by step; then the dinode. The glock is held in EX."""
        if inode.data is not None:
            inode.data.cut(0)
        inode.layout_version += 1
        await self.free_content(inode)
        space = await self.space_of([inode.number], None)
        try:
            rgrp = space.rgrp
            if rgrp.state(inode.number) != fmt.UNLINKED:
                raise self.damage(BlockDamaged(inode.number, "is not UNLINKED in its bitmap"), "inode")
            number = inode.number
            rgrp.free_dinode(number)
            self.journal.free(number, inode)
            self.journal.bury(number, everywhere=not self.locks.table.local)
            self.journal.add(rgrp)
            self.journal.when_durable(lambda: rgrp.reopen(number, 1))
            self.count_blocks(1, 0)
            self.counts["reclaimed"] += 1
            inode.loaded = False
        finally:
            space.done()

    async def free_content(self, inode: Inode) -> None:
        raise NotImplementedError

    async def scan_unlinked(self) -> int:
        """After a recovery: frees what dead nodes had open (trap 16). Returns how many were found."""
        found = 0
        for rgrp in self.rgrps:
            await self.hold_rgrp(rgrp, SH)
            try:
                numbers = rgrp.unlinked_numbers()
            finally:
                self.locks.drop(rgrp.glock, SH)
            found += len(numbers)
            for number in numbers:
                inode = self.inodes.get(number)
                await self.reclaim_quietly(number, inode.formal if inode is not None else 0)
        return found
