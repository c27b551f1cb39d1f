"""rename(2) with its flags: lock order by ancestry, no directory below itself, one step for all changes."""

from errno import (
    EEXIST,
    EINVAL,
    EISDIR,
    ENOENT,
    ENOTDIR,
    ENOTEMPTY,
)
from typing import Final

from corral.api.gfs import Caller
from corral.gfs.directory import Found
from corral.gfs.format import BlockDamaged, name_hash
from corral.gfs.glock import EX, NONDISK, NONDISK_RENAME, SH
from corral.gfs.inode import Inode
from corral.gfs.namespace import Namespace, check_kind, check_name

RENAME_NOREPLACE: Final = 1
RENAME_EXCHANGE: Final = 2


class Renames(Namespace):
    """Moves names, within a directory and between two."""

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
            check_kind(victim, directory_wanted=True)
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
