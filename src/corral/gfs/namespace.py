"""Operations on names: lookup, create and its kin, link, unlink, rename, readdir; freeing what lost its last name."""

from contextlib import suppress
from errno import (
    EAGAIN,
    EEXIST,
    EINVAL,
    EIO,
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

from corral.api.gfs import Caller, Dirent, Entry
from corral.base.time import MILLISECOND
from corral.gfs import format as fmt
from corral.gfs.directory import Directory, Found, Listed
from corral.gfs.format import BlockDamaged, name_hash
from corral.gfs.glock import EX, INODE, IOPEN, NOEXP, NONDISK, NONDISK_RENAME, SH, TRY, TRY_CALLBACK, Glock
from corral.gfs.inode import S_IFDIR, S_IFLNK, S_IFMT, S_IFREG, Inode
from corral.gfs.rgrp import Rgrp
from corral.gfs.volume import FOREVER_VALID, Volume

RENAME_NOREPLACE: Final = 1
RENAME_EXCHANGE: Final = 2
LINK_MAX: Final = (1 << 32) - 2
S_ISGID: Final = 0o2000
READ_CLUSTER: Final = 256  # blocks: neighbouring dinodes read at once
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


class Namespace(Volume):
    """The part of the filesystem that reads and changes directories."""

    # --- replies -----------------------------------------------------------------------------------------------------

    def entry(self, inode: Inode) -> Entry:
        """What LOOKUP and its kin answer; counts as one lookup. The inode's glock is held."""
        inode.lookups += 1
        ino = self.ino_of(inode.number)
        valid = self.attributes_valid(inode)
        return Entry(ino, inode.formal, inode.attributes(ino), FOREVER_VALID if self.options.entry_cache else 0, valid)

    def attributes_valid(self, inode: Inode) -> int:
        """How long the kernel may keep attributes: until we tell it otherwise, if we can tell it."""
        if self.locks.table.local or self.notifier is not None:
            return FOREVER_VALID
        return 0

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
        """A new inode with a name. With `opened` its iopen glock is held in SH before anybody can see it."""
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
        fresh: Inode | None = None
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
            fresh = self.adopt(number, formal)
            if opened:
                await self.hold_iopen(fresh)
            # From here on nothing waits: one step, one transaction.
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
            if fresh is not None and fresh.opens and not made:
                await self.drop_iopen(fresh)

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
            locks.fetch(locks.table.get(IOPEN, one), SH)
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
                _check_kind(child, directory_wanted)
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

    # --- renaming ----------------------------------------------------------------------------------------------------

    async def rename(
        self, parent: int, name: bytes, new_parent: int, new_name: bytes, flags: int, caller: Caller
    ) -> None:
        check_name(name)
        check_name(new_name)
        if flags & ~(RENAME_NOREPLACE | RENAME_EXCHANGE) or flags == RENAME_NOREPLACE | RENAME_EXCHANGE:
            raise OSError(EINVAL, "rename flags not supported")
        await self.throttle()
        source, target = self.known(parent), self.known(new_parent)
        if source is target:
            await self._rename_locked(name, new_name, flags, [source], source, target, set(), set())
            return
        glock = self.locks.table.get(NONDISK, NONDISK_RENAME)
        await self.locks.hold(glock, EX)
        try:
            # Under the rename glock no directory gets another parent, so what is found here stays true.
            above_source = {inode.number for inode in await self.ancestors(source)}
            above_target = {inode.number for inode in await self.ancestors(target)}
            order = [source, target] if source.number < target.number else [target, source]
            if target.number in above_source:
                order = [target, source]
            elif source.number in above_target:
                order = [source, target]
            await self._rename_locked(name, new_name, flags, order, source, target, above_source, above_target)
        finally:
            self.locks.drop(glock, EX)

    async def ancestors(self, inode: Inode) -> list[Inode]:
        """From the parent up to the root."""
        out: list[Inode] = []
        number = inode.number
        current = inode
        while number != self.root:
            await self.hold(current, SH)
            up, formal, is_directory = current.parent, current.parent_formal, current.is_directory
            self.drop(current, SH)
            if not is_directory:
                raise OSError(ENOTDIR, "not a directory")
            if len(out) > 10_000 or not up:
                raise self.damage(BlockDamaged(inode.number, "has no path to the root"), "directory")
            current, number = self.inode(up, formal), up
            out.append(current)
        return out

    async def _rename_locked(
        self,
        name: bytes,
        new_name: bytes,
        flags: int,
        order: list[Inode],
        source: Inode,
        target: Inode,
        above_source: set[int],
        above_target: set[int],
    ) -> None:
        """`order`: the parents in the order they are to be locked (one when they are the same)."""
        held: list[Inode] = []
        victim: Inode | None = None
        try:
            for directory in order:
                await self.hold(directory, EX)
                held.append(directory)
            moved, replaced = await self._rename_find(source, name, target, new_name)
            if flags & RENAME_NOREPLACE and replaced is not None:
                raise OSError(EEXIST, "file exists")
            if flags & RENAME_EXCHANGE and replaced is None:
                raise OSError(ENOENT, "nothing to exchange with")
            formals = {child.number: child.formal for child in (moved, replaced) if child}
            children: dict[int, Inode] = {}
            # A directory below itself, or one put in the place of its own ancestor.
            if moved.number == target.number or moved.number in above_target:
                raise OSError(EINVAL, "a directory cannot move below itself")
            if replaced is not None and (replaced.number == source.number or replaced.number in above_source):
                raise OSError(EINVAL if flags & RENAME_EXCHANGE else ENOTEMPTY, "the target contains the source")
            for number in sorted(formals):
                children[number] = await self.hold_named(number, formals[number], EX)
                held.append(children[number])
            child = children[moved.number]
            if replaced is None:
                await self._rename_to_free(source, name, target, new_name, child)
            elif replaced.number == moved.number:
                return  # two names of one file: nothing to do
            elif flags & RENAME_EXCHANGE:
                await self._rename_exchange(source, name, target, new_name, child, children[replaced.number])
            else:
                victim = children[replaced.number]
                await self._rename_over(source, name, target, new_name, child, victim)
        finally:
            for inode in reversed(held):
                self.drop(inode, EX)
        if victim is not None and not victim.nlink:
            await self.reclaim(victim)

    async def _rename_find(
        self, source: Inode, name: bytes, target: Inode, new_name: bytes
    ) -> tuple[Found, Found | None]:
        if source.directory is None or target.directory is None:
            raise OSError(ENOTDIR, "not a directory")
        if not source.nlink or not target.nlink:
            raise OSError(ENOENT, "the directory was removed")
        await self.prepare(source.directory, name_hash(name))
        await self.prepare(target.directory, name_hash(new_name))
        moved = source.directory.find(name, name_hash(name))
        if moved is None:
            raise OSError(ENOENT, "no such file or directory")
        return moved, target.directory.find(new_name, name_hash(new_name))

    async def _rename_to_free(self, source: Inode, name: bytes, target: Inode, new_name: bytes, child: Inode) -> None:
        assert source.directory is not None
        assert target.directory is not None
        hashed = name_hash(new_name)
        space = await self.space(target.directory.growth(new_name, hashed), target.number, target)
        try:
            target.directory.add(space, new_name, hashed, child.formal, child.number, child.mode >> 12)
            source.directory.remove(space, name, name_hash(name))
            self._moved(child, source, target)
            self.directory_changed(target, target.directory)
            self.directory_changed(source, source.directory)
        finally:
            space.done()

    async def _rename_over(
        self, source: Inode, name: bytes, target: Inode, new_name: bytes, child: Inode, victim: Inode
    ) -> None:
        assert source.directory is not None
        assert target.directory is not None
        if child.is_directory:
            _check_kind(victim, directory_wanted=True)
        elif victim.is_directory:
            raise OSError(EISDIR, "is a directory")
        space = await self.space_of([victim.number], None)
        try:
            target.directory.replace(space, new_name, name_hash(new_name), child.formal, child.number, child.mode >> 12)
            source.directory.remove(space, name, name_hash(name))
            if victim.is_directory:
                target.nlink -= 1
            self._moved(child, source, target)
            self.directory_changed(target, target.directory)
            self.directory_changed(source, source.directory)
            self._lost_name(victim, space)
        finally:
            space.done()

    async def _rename_exchange(
        self, source: Inode, name: bytes, target: Inode, new_name: bytes, child: Inode, other: Inode
    ) -> None:
        assert source.directory is not None
        assert target.directory is not None
        space = await self.space(0, target.number, None)
        try:
            target.directory.replace(space, new_name, name_hash(new_name), child.formal, child.number, child.mode >> 12)
            source.directory.replace(space, name, name_hash(name), other.formal, other.number, other.mode >> 12)
            self._moved(child, source, target)
            self._moved(other, target, source)
            self.directory_changed(target, target.directory)
            self.directory_changed(source, source.directory)
        finally:
            space.done()

    def _moved(self, child: Inode, source: Inode, target: Inode) -> None:
        if child.is_directory and source is not target:
            child.parent, child.parent_formal = target.number, target.formal
            source.nlink -= 1
            target.nlink += 1
        child.ctime_ns = self.world.wall_ns()
        self.touch(child)

    # --- listing -----------------------------------------------------------------------------------------------------

    async def readdir(self, ino: int, handle: int, offset: int, size: int, *, plus: bool) -> list[Dirent]:
        inode, directory = await self.hold_directory(ino, SH)
        try:
            out, room = _dots(self.ino_of(inode.number), self.ino_of(inode.parent), offset, size, plus)
            listed = await self._list(directory, max(offset, 2), room, plus)
        except BlockDamaged as error:
            raise self.damage(error, f"directory {inode.number}") from None
        finally:
            self.drop(inode, SH)
        if plus:
            return out + await self._with_entries(listed)
        out.extend(Dirent(one.name, self.ino_of(one.number), one.type, one.cookie) for one in listed)
        return out

    async def _list(self, directory: Directory, after: int, room: int, plus: bool) -> list[Listed]:
        out: list[Listed] = []
        at = after
        while True:
            listing, at = await directory.listing_at(max(at, after + 1), self.read_block)
            for one in listing:
                if one.cookie <= after:
                    continue
                room -= dirent_size(one.name, plus)
                if room < 0:
                    return out
                out.append(one)
            if not at:
                return out

    async def _with_entries(self, listed: list[Listed]) -> list[Dirent]:
        """All glocks asked for at once, neighbouring dinodes read at once; then one by one what is left."""
        absent = []
        for one in listed:
            known = self.inodes.get(one.number)
            if known is None or not known.loaded:
                with suppress(OSError):
                    absent.append(self.inode(one.number, one.formal))
        await self.prefetch_inodes(absent)
        out: list[Dirent] = []
        for one in listed:
            entry = None
            try:
                inode = await self.hold_named(one.number, one.formal, SH)
                if inode.nlink:
                    entry = self.entry(inode)
                self.drop(inode, SH)
            except OSError as error:
                if error.errno not in (ESTALE, EIO) or self.refusal is not None:
                    raise
            out.append(Dirent(one.name, self.ino_of(one.number), one.type, one.cookie, entry))
        return out

    async def prefetch_inodes(self, inodes: list[Inode]) -> None:
        table, locks = self.locks.table, self.locks
        asked = [locks.fetch(inode.glock, SH) for inode in inodes]
        locks.pump()
        for granted in asked:
            if granted is not None:
                await granted
        held = [inode for inode in sorted(inodes, key=_number) if table.try_hold(inode.glock, SH)]
        try:
            await self._read_clusters([inode for inode in held if not inode.loaded])
        finally:
            for inode in held:
                self.drop(inode, SH)

    async def _read_clusters(self, inodes: list[Inode]) -> None:
        """`inodes` sorted by number, held."""
        at = 0
        while at < len(inodes):
            first = inodes[at].number
            upto = at + 1
            while (
                upto < len(inodes)
                and inodes[upto].number < first + READ_CLUSTER
                and inodes[upto].number - inodes[upto - 1].number <= fmt.CLUSTER
            ):
                upto += 1
            count = inodes[upto - 1].number - first + 1
            content = await self.device.read(first, count) if count > 1 else bytearray()
            for inode in inodes[at:upto]:
                if count > 1 and not inode.loaded and self.journal.newest_image(inode.number) is None:
                    begin = (inode.number - first) * fmt.BLOCK
                    await self._load_from(inode, content[begin : begin + fmt.BLOCK])
            at = upto

    async def _load_from(self, inode: Inode, block: bytearray) -> None:
        """As `load`, but whatever is wrong is left for `load` to say."""
        try:
            if fmt.DINODE_HEAD.unpack_from(block, fmt.HEADER_SIZE)[0] == inode.formal:
                await self.take_content(inode, block)
        except (BlockDamaged, OSError):
            pass

    # --- last references ---------------------------------------------------------------------------------------------

    async def hold_iopen(self, inode: Inode) -> None:
        """One more open here: each holds the iopen glock in SH (taken under the inode's glock)."""
        glock = inode.iopen
        if glock is None or glock.forgotten:
            glock = self.locks.table.get(IOPEN, inode.number)
        if not self.locks.table.try_hold(glock, SH):
            await self.locks.hold(glock, SH)
        inode.iopen = glock
        inode.opens += 1

    async def drop_iopen(self, inode: Inode) -> None:
        """One open less. The last one of a file without names frees it."""
        inode.opens -= 1
        self.locks.drop(inode.iopen, SH)
        if not inode.opens:
            inode.iopen = None
            if inode.loaded and not inode.nlink:
                await self.reclaim(inode)

    async def reclaim_quietly(self, number: int, formal: int) -> None:
        try:
            await self.reclaim(self.inode(number, formal))
        except OSError as error:
            if error.errno not in (ESTALE, EAGAIN):
                self.counts["reclaim_failed"] = self.counts.get("reclaim_failed", 0) + 1

    async def reclaim(self, inode: Inode, flags: int = 0) -> None:
        """Frees an inode without names, if nobody in the cluster has it open. Harmless when called too often."""
        if inode.opens or self.refusal is not None:
            return
        await self.throttle()
        await self.hold(inode, EX, flags)
        try:
            if inode.nlink or inode.opens:
                return
            glock = self.locks.table.get(IOPEN, inode.number)
            if not await self.locks.hold(glock, EX, TRY | TRY_CALLBACK | flags):
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
            await self.hold_rgrp(rgrp, SH, NOEXP)
            try:
                numbers = rgrp.unlinked_numbers()
            finally:
                self.locks.drop(rgrp.glock, SH)
            found += len(numbers)
            for number in numbers:
                inode = self.inodes.get(number)
                await self.reclaim_quietly(number, inode.formal if inode is not None else 0)
        return found


def _check_kind(child: Inode, directory_wanted: bool) -> None:
    if directory_wanted:
        if child.directory is None:
            raise OSError(ENOTDIR, "not a directory")
        if child.directory.entries:
            raise OSError(ENOTEMPTY, "directory not empty")
    elif child.is_directory:
        raise OSError(EISDIR, "is a directory")


def dirent_size(name: bytes, plus: bool) -> int:
    """Bytes of one entry in a FUSE reply."""
    return (24 + len(name) + 7 & ~7) + (128 if plus else 0)


def _dots(ino: int, parent: int, offset: int, size: int, plus: bool) -> tuple[list[Dirent], int]:
    out: list[Dirent] = []
    for cookie, name, number in ((1, b".", ino), (2, b"..", parent)):
        if offset < cookie and size >= dirent_size(name, plus):
            out.append(Dirent(name, number, S_IFDIR >> 12, cookie))
            size -= dirent_size(name, plus)
    return out, size


def _number(inode: Inode) -> int:
    return inode.number
