"""Names again for inodes that lost theirs: fsck's last repair, done through a mount, so that it is journaled."""

from errno import ENOENT
from typing import Final, NamedTuple

from corral.api.gfs import ROOT, Caller
from corral.base.world import Disk, World
from corral.gfs.filesystem import GfsFilesystem
from corral.gfs.format import name_hash
from corral.gfs.glock import EX
from corral.gfs.mount import mount

NAME: Final = b"lost+found"
NOBODY: Final = Caller(0, 0, 0)


class Orphan(NamedTuple):
    """An inode without a name in the tree. `links`: names it has in other orphans."""

    number: int
    links: int
    subdirectories: int


async def reattach(world: World, disk: Disk, orphans: list[Orphan]) -> None:
    """Each becomes `/lost+found/#NUMBER`. The bitmaps are right and the journals clean."""
    filesystem = await mount(world, disk, None, slot=0)
    await filesystem.start(None)
    # The gate stays shut: nothing else is to happen here; on a mount without a lock manager it stops nobody.
    filesystem.recovery.give_up_work()
    await filesystem.go_live()
    number = await _directory(filesystem)
    for orphan in orphans:
        await _attach(filesystem, number, orphan)
    await filesystem.destroy()


async def _directory(filesystem: GfsFilesystem) -> int:
    try:
        return (await filesystem.lookup(ROOT, NAME, NOBODY)).ino
    except OSError as error:
        if error.errno != ENOENT:
            raise
        return (await filesystem.mkdir(ROOT, NAME, 0o700, NOBODY)).ino


async def _attach(filesystem: GfsFilesystem, into: int, orphan: Orphan) -> None:
    name = b"#%d" % orphan.number
    hashed = name_hash(name)
    parent, directory = await filesystem.hold_directory(into, EX)
    try:
        await filesystem.prepare(directory, hashed)
        inode = await filesystem.hold_named(orphan.number, 0, EX)
        space = await filesystem.space(directory.growth(name, hashed), parent.number, parent)
        directory.add(space, name, hashed, inode.formal, inode.number, inode.mode >> 12)
        if inode.is_directory:
            inode.parent, inode.parent_formal = parent.number, parent.formal
            inode.nlink = 2 + orphan.subdirectories
            parent.nlink += 1
        else:
            inode.nlink = 1 + orphan.links
        filesystem.touch(inode)
        filesystem.directory_changed(parent, directory)
        space.done()
        filesystem.drop(inode, EX)
    finally:
        filesystem.drop(parent, EX)
