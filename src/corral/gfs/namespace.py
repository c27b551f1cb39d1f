"""Operations on names: lookup, create and its kin, link, unlink. The rest: renames, listing, references."""

from errno import (
    EEXIST,
    EINVAL,
    EISDIR,
    EMLINK,
    ENAMETOOLONG,
    ENOENT,
    ENOTDIR,
    ENOTEMPTY,
    EPERM,
    ESTALE,
)
from typing import Final

from corral.api.gfs import Caller, Entry
from corral.base.time import MILLISECOND
from corral.gfs import format as fmt
from corral.gfs.directory import Directory, Found
from corral.gfs.format import BlockDamaged, name_hash
from corral.gfs.glock import EX, INODE, SH, TRY, TRY_CALLBACK, Glock
from corral.gfs.inode import S_IFDIR, S_IFLNK, S_IFMT, S_IFREG, Inode
from corral.gfs.references import References
from corral.gfs.rgrp import Rgrp

LINK_MAX: Final = (1 << 32) - 2
S_ISGID: Final = 0o2000
BUSY_MAX: Final = 16  # free blocks tried for a dinode whose glocks are elsewhere, before the group is let go
BUSY_PAUSE: Final = MILLISECOND
AHEAD_MIN: Final = 8  # glocks of future dinodes under way or at hand, below which more are asked for
AHEAD_MAX: Final = 48


class BusyInodes(Exception):
    """The glocks of the free blocks tried are held elsewhere: let go of the resource group, then try again."""


def check_name(name: bytes) -> None:
    if len(name) > fmt.NAME_MAX:
        raise OSError(ENAMETOOLONG, "file name too long")
    if name in (b"", b".", b"..") or b"/" in name or b"\0" in name:
        raise OSError(EINVAL, "not a file name")


class Namespace(References):
    """The part of the filesystem that reads and changes directories."""

    # --- replies -----------------------------------------------------------------------------------------------------

    def entry(self, inode: Inode) -> Entry:
        """What LOOKUP and its kin answer; counts as one lookup. The inode's glock is held."""
        inode.lookups += 1
        ino = self.ino_of(inode.number)
        valid = self.cache_valid
        return Entry(ino, inode.formal, inode.attributes(ino), valid, valid)

    # --- finding -----------------------------------------------------------------------------------------------------

    async def hold_directory(self, ino: int, state: int) -> tuple[Inode, Directory]:
        """A directory, held and loaded. The caller drops it."""
        inode = self.known(ino)
        await self.hold(inode, state)
        directory = inode.directory
        if directory is None:
            self.drop(inode, state)
            raise OSError(ENOTDIR, "not a directory")
        return inode, directory

    def known(self, ino: int) -> Inode:
        """The inode the kernel means by a node id it was given before."""
        number = self.number_of(ino)
        inode = self.inodes.get(number)
        if inode is not None and not (inode.loaded or inode.lookups or inode.opens or inode.glock.queue):
            inode = None  # nobody referred to that life of the block: take what is there now
            del self.inodes[number]
        if inode is None:
            if not fmt.SUPERBLOCK_AT < number < self.superblock.blocks:
                raise OSError(ESTALE, "stale file handle")
            inode = self.inode(number, 0)
        return inode

    async def prepare(self, directory: Directory, hashed: int) -> None:
        try:
            await directory.prepare(hashed, self.read_block)
        except BlockDamaged as error:
            raise self.damage(error, f"directory {directory.number}") from None

    async def _find(self, parent: int, name: bytes) -> Found:
        inode, directory = await self.hold_directory(parent, SH)
        try:
            hashed = name_hash(name)
            if not directory.ready(hashed):
                await self.prepare(directory, hashed)
            found = directory.find(name, hashed)
        finally:
            self.drop(inode, SH)
        if found is None:
            raise OSError(ENOENT, "no such file or directory")
        return found

    async def lookup(self, parent: int, name: bytes, caller: Caller) -> Entry:
        if len(name) > fmt.NAME_MAX:
            raise OSError(ENAMETOOLONG, "file name too long")
        for _ in range(100):
            found = await self._find(parent, name)
            try:
                inode = await self.hold_named(found.number, found.formal, SH)
            except OSError as error:
                if error.errno == ESTALE:
                    continue  # gone between the two looks: look again
                raise
            try:
                if inode.nlink:
                    return self.entry(inode)
            finally:
                self.drop(inode, SH)
        raise self.damage(BlockDamaged(found.number, f"is not the file that {name!r} names"), "directory entry")

    def forget(self, ino: int, lookups: int) -> None:
        inode = self.inodes.get(self.number_of(ino))
        if inode is not None:
            inode.lookups = max(0, inode.lookups - lookups)

    # --- making ------------------------------------------------------------------------------------------------------

    async def make(
        self,
        parent: int,
        name: bytes,
        mode: int,
        caller: Caller,
        *,
        rdev: int = 0,
        target: bytes = b"",
        opened: bool = False,
    ) -> Inode:
        """A new inode with a name. With `opened` it counts as open before anybody can see it."""
        check_name(name)
        await self.throttle()
        await self.ensure_formal()
        inode, directory = await self.hold_directory(parent, EX)
        try:
            hashed = name_hash(name)
            if not directory.ready(hashed):
                await self.prepare(directory, hashed)
            if directory.find(name, hashed) is not None:
                raise OSError(EEXIST, "file exists")
            if not inode.nlink:
                raise OSError(ENOENT, "the directory was removed")
            if mode & S_IFMT == S_IFDIR and inode.nlink >= LINK_MAX:
                raise OSError(EMLINK, "too many links")
            while True:
                try:
                    return await self._make_in(inode, directory, name, hashed, mode, caller, rdev, target, opened)
                except BusyInodes:
                    # The group is free again meanwhile, so whoever frees one of them can go on.
                    await self.world.sleep_until(self.world.now() + BUSY_PAUSE)
        finally:
            self.drop(inode, EX)

    async def _glock_of_free(self, number: int) -> Glock | None:
        """The glock of a block that is to become a dinode, held in EX. None when another node has it: a reclaimer may
        hold it and wait for the resource group that we hold, against the lock order."""
        locks = self.locks
        glock = locks.table.get(INODE, number)
        if locks.table.try_hold(glock, EX) or await locks.hold(glock, EX, TRY | TRY_CALLBACK):
            return glock
        return None

    async def _make_in(
        self,
        parent: Inode,
        directory: Directory,
        name: bytes,
        hashed: int,
        mode: int,
        caller: Caller,
        rdev: int,
        target: bytes,
        opened: bool,
    ) -> Inode:
        locks = self.locks
        space = await self.space(1 + directory.growth(name, hashed), parent.goal_dinode or parent.number, parent)
        glock: Glock | None = None
        made = False
        number = 0
        aside: list[int] = []
        try:
            while glock is None:
                number = space.rgrp.find_dinode(parent.goal_dinode)
                assert number or aside, "GFS-9"
                if not number or len(aside) >= BUSY_MAX:
                    raise BusyInodes
                aside.append(number)
                glock = await self._glock_of_free(number)
            formal = self.take_formal()
            # From here on nothing waits: one step, one transaction.
            fresh = self.adopt(number, formal)
            directory.add(space, name, hashed, formal, number, mode >> 12)
            space.rgrp.take_dinode(number)
            space.add(space.rgrp)
            self.count_blocks(-1, 1)
            self._fill(fresh, parent, mode, caller, rdev, target)
            parent.goal_dinode = number
            if mode & S_IFMT == S_IFDIR:
                parent.nlink += 1
            self.directory_changed(parent, directory)
            self.touch(fresh)
            fresh.opens = int(opened)
            made = True
            self._fetch_next_glocks(space.rgrp, number)
            return fresh
        finally:
            for unused in aside:
                if not made or unused != number:
                    space.rgrp.put_back(unused)
            space.done()
            if glock is not None:
                locks.drop(glock, EX)

    def _fetch_next_glocks(self, rgrp: Rgrp, number: int) -> None:
        """Asks at once for the glocks of the dinodes that will be made next: one by one each costs a round trip."""
        ahead = self.ahead
        if number in ahead:
            ahead.discard(number)
        else:
            ahead.clear()  # another cluster, or others were faster: what was asked for there is of no more use
        if self.locks.table.local or len(ahead) >= AHEAD_MIN:
            return
        locks = self.locks
        wanted = [n for n in rgrp.free_in_cluster(number, AHEAD_MAX) if n not in ahead]
        ahead.update(wanted)
        for one in wanted:
            locks.fetch(locks.table.get(INODE, one), EX)
        locks.pump()

    def _fill(self, inode: Inode, parent: Inode, mode: int, caller: Caller, rdev: int, target: bytes) -> None:
        now = self.world.wall_ns()
        kind = mode & S_IFMT
        inode.uid, inode.gid = caller.uid, caller.gid
        if parent.mode & S_ISGID:
            inode.gid = parent.gid
            if kind == S_IFDIR:
                mode |= S_ISGID
        inode.mode = mode
        inode.rdev = rdev
        inode.blocks = 1
        inode.flags = fmt.STUFFED
        inode.atime_ns = inode.mtime_ns = inode.ctime_ns = inode.btime_ns = now
        inode.payload = bytearray(target)
        inode.size = len(target)
        inode.nlink = 1
        inode.goal_data = 0
        inode.xattr = inode.xattr_inline = 0
        inode.freed = False
        inode.extents = inode.directory = inode.data = None
        if kind == S_IFDIR:
            inode.nlink = 2
            inode.size = fmt.PAYLOAD
            inode.parent, inode.parent_formal = parent.number, parent.formal
            inode.directory = Directory(inode)
            inode.payload = bytearray()
        inode.loaded = True

    def directory_changed(self, inode: Inode, directory: Directory) -> None:
        if directory.area is None:
            if inode.flags & fmt.STUFFED:
                inode.flags = inode.flags & ~fmt.STUFFED | fmt.EXHASH
            inode.size = directory.leaf_count * fmt.BLOCK
        inode.mtime_ns = inode.ctime_ns = self.world.wall_ns()
        self.touch(inode)

    async def mknod(self, parent: int, name: bytes, mode: int, rdev: int, caller: Caller) -> Entry:
        if mode & S_IFMT == S_IFDIR:
            raise OSError(EPERM, "mknod makes no directories")
        if not mode & S_IFMT:
            mode |= S_IFREG
        return self.entry(await self.make(parent, name, mode, caller, rdev=rdev))

    async def mkdir(self, parent: int, name: bytes, mode: int, caller: Caller) -> Entry:
        return self.entry(await self.make(parent, name, S_IFDIR | mode & 0o7777, caller))

    async def symlink(self, parent: int, name: bytes, target: bytes, caller: Caller) -> Entry:
        if not target:
            raise OSError(ENOENT, "an empty link target")
        if len(target) > fmt.PAYLOAD:
            raise OSError(ENAMETOOLONG, "link target too long")
        return self.entry(await self.make(parent, name, S_IFLNK | 0o777, caller, target=target))

    async def readlink(self, ino: int) -> bytes:
        inode = self.known(ino)
        await self.hold(inode, SH)
        try:
            if inode.mode & S_IFMT != S_IFLNK:
                raise OSError(EINVAL, "not a symbolic link")
            return bytes(inode.payload[: inode.size])
        finally:
            self.drop(inode, SH)

    async def link(self, ino: int, parent: int, name: bytes, caller: Caller) -> Entry:
        check_name(name)
        await self.throttle()
        inode = self.known(ino)
        target, directory = await self.hold_directory(parent, EX)
        try:
            hashed = name_hash(name)
            await self.prepare(directory, hashed)
            if directory.find(name, hashed) is not None:
                raise OSError(EEXIST, "file exists")
            if not target.nlink:
                raise OSError(ENOENT, "the directory was removed")
            if inode is target:
                raise OSError(EPERM, "directories have one name")
            await self.hold(inode, EX)
            try:
                await self._link(inode, target, directory, name, hashed)
                return self.entry(inode)
            finally:
                self.drop(inode, EX)
        finally:
            self.drop(target, EX)

    async def _link(self, inode: Inode, target: Inode, directory: Directory, name: bytes, hashed: int) -> None:
        if inode.is_directory:
            raise OSError(EPERM, "directories have one name")
        if inode.nlink >= LINK_MAX:
            raise OSError(EMLINK, "too many links")
        if not inode.nlink:
            raise OSError(ENOENT, "the file was removed")
        space = await self.space(directory.growth(name, hashed), target.number, target)
        try:
            directory.add(space, name, hashed, inode.formal, inode.number, inode.mode >> 12)
            inode.nlink += 1
            inode.ctime_ns = self.world.wall_ns()
            self.touch(inode)
            self.directory_changed(target, directory)
        finally:
            space.done()

    # --- removing ----------------------------------------------------------------------------------------------------

    async def unlink(self, parent: int, name: bytes, caller: Caller) -> None:
        await self._remove(parent, name, directory_wanted=False)

    async def rmdir(self, parent: int, name: bytes, caller: Caller) -> None:
        await self._remove(parent, name, directory_wanted=True)

    async def _remove(self, parent: int, name: bytes, *, directory_wanted: bool) -> None:
        check_name(name)
        await self.throttle()
        inode, directory = await self.hold_directory(parent, EX)
        try:
            hashed = name_hash(name)
            if not directory.ready(hashed):
                await self.prepare(directory, hashed)
            found = directory.find(name, hashed)
            if found is None:
                raise OSError(ENOENT, "no such file or directory")
            child = await self.hold_named(found.number, found.formal, EX)
            try:
                check_kind(child, directory_wanted)
                await self._remove_name(inode, directory, name, hashed, child)
            finally:
                self.drop(child, EX)
        finally:
            self.drop(inode, EX)
        if not child.nlink:
            await self.reclaim(child)

    async def _remove_name(self, parent: Inode, directory: Directory, name: bytes, hashed: int, child: Inode) -> None:
        space = await self.space_of([child.number], None)
        try:
            directory.remove(space, name, hashed)
            if child.is_directory:
                parent.nlink -= 1
            self.directory_changed(parent, directory)
            self._lost_name(child, space)
        finally:
            space.done()

    def _lost_name(self, child: Inode, space: "object") -> None:
        """One name less; the group of its dinode is held by `space`."""
        child.ctime_ns = self.world.wall_ns()
        child.nlink = 0 if child.is_directory else child.nlink - 1
        if not child.nlink:
            rgrp = self.rgrp_of(child.number)
            assert rgrp.glock.holders == -1
            rgrp.unlink_dinode(child.number)
            self.journal.add(rgrp)
            self.count_blocks(0, -1)
        self.touch(child)


def check_kind(child: Inode, directory_wanted: bool) -> None:
    if directory_wanted:
        if child.directory is None:
            raise OSError(ENOTDIR, "not a directory")
        if child.directory.entries:
            raise OSError(ENOTEMPTY, "directory not empty")
    elif child.is_directory:
        raise OSError(EISDIR, "is a directory")
