"""Space held for one step of an operation: resource groups in EX, from which blocks are taken and given back.

What is taken or freed here is journaled and counted in the same step; a freed block is given out again only after the
commit that freed it is durable (GFS-5).
"""

from errno import ENOSPC
from typing import TYPE_CHECKING, final

from corral.gfs.extent import Node
from corral.gfs.glock import EX, Glock
from corral.gfs.inode import Inode
from corral.gfs.meta import Meta
from corral.gfs.rgrp import Rgrp

if TYPE_CHECKING:
    from corral.gfs.volume import Volume


@final
class Space:
    """Held resource groups: one step of an operation takes blocks from the first and gives back to all. Ends with
    `done`."""

    __slots__ = ("inode", "rgrp", "rgrps", "volume")

    def __init__(self, volume: "Volume", rgrps: list[Rgrp], inode: Inode | None) -> None:
        self.volume = volume
        self.rgrps = rgrps
        self.rgrp = rgrps[0]
        self.inode = inode  # whose `blocks` count what is taken

    def add(self, meta: Meta) -> None:
        self.volume.journal.add(meta)

    def allocate(self, want: int, goal: int) -> tuple[int, int]:
        """A run of data blocks, as long as it may be. ENOSPC when the group is empty."""
        number, count = self.rgrp.allocate(want, goal)
        if not count:
            raise OSError(ENOSPC, "no space left")
        self.volume.journal.add(self.rgrp)
        self.volume.count_blocks(-count, 0)
        if self.inode is not None:
            self.inode.blocks += count
        return number, count

    def allocate_block(self, glock: Glock) -> int:
        return self.allocate(1, 0)[0]

    def allocate_node(self) -> int:
        return self.allocate(1, 0)[0]

    def free_block(self, meta: Meta) -> None:
        """A metadata block in one of the groups."""
        self.volume.journal.free(meta.number, meta)
        self.free_run(meta.number, 1)

    def free_node(self, node: Node) -> None:
        self.free_block(node)

    def free_run(self, number: int, count: int) -> None:
        rgrp = next(rgrp for rgrp in self.rgrps if rgrp.contains(number))
        journal = self.volume.journal
        rgrp.release(number, count)
        journal.add(rgrp)
        journal.when_durable(lambda: rgrp.reopen(number, count))
        self.volume.count_blocks(count, 0)
        if self.inode is not None:
            self.inode.blocks -= count

    def done(self) -> None:
        for rgrp in self.rgrps:
            self.volume.locks.drop(rgrp.glock, EX)
