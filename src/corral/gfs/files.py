"""Operations on files and their handles: open, close, attributes, fsync."""

from errno import (
    EIO,
    EISDIR,
    ESTALE,
)
from typing import Final

from corral.api.gfs import Attributes, Caller, Changes, Entry, Opened
from corral.gfs.content import Content, Handle, clear_suidgid
from corral.gfs.glock import EX, SH
from corral.gfs.inode import Inode

O_ACCMODE: Final = 3
O_RDONLY: Final = 0
O_TRUNC: Final = 0o1000
O_DIRECT: Final = 0o40000


class Files(Content):
    """Handles, attributes and durability."""

    @property
    def has_record_locks(self) -> bool:
        return self.locks.table.local

    def _opened(self, inode: Inode, flags: int) -> Opened:
        writable = flags & O_ACCMODE != O_RDONLY
        if writable:
            inode.write_opens += 1
        number = self._next_handle
        self._next_handle += 1
        self.handles[number] = Handle(inode, flags, writable)
        direct = self.options.strict or bool(flags & O_DIRECT)
        return Opened(number, direct=direct, keep=not direct, flush=self.has_record_locks)

    async def open(self, ino: int, flags: int, caller: Caller) -> Opened:
        inode = self.known(ino)
        writable = flags & O_ACCMODE != O_RDONLY
        state = EX if writable else SH
        await self.hold(inode, state)
        try:
            if inode.is_directory and writable:
                raise OSError(EISDIR, "is a directory")
            if not inode.nlink and not inode.opens:
                raise OSError(ESTALE, "the file was removed")
            inode.opens += 1
        finally:
            self.drop(inode, state)
        opened = self._opened(inode, flags)
        if flags & O_TRUNC and writable:
            await self._set_size(inode, 0)
        return opened

    async def create(self, parent: int, name: bytes, mode: int, flags: int, caller: Caller) -> tuple[Entry, Opened]:
        inode = await self.make(parent, name, 0o100000 | mode & 0o7777, caller, opened=True)
        return self.entry(inode), self._opened(inode, flags)

    async def release(self, ino: int, handle: int, flock_owner: int | None) -> None:
        found = self.handles.pop(handle, None)
        if found is None:
            return
        inode = found.inode
        if found.writable:
            inode.write_opens -= 1
        await self.close_one(inode)

    async def opendir(self, ino: int, flags: int, caller: Caller) -> Opened:
        inode = self.known(ino)
        await self.hold(inode, SH)
        is_directory = inode.is_directory
        self.drop(inode, SH)
        if not is_directory:
            raise OSError(20, "not a directory")
        number = self._next_handle
        self._next_handle += 1
        self.handles[number] = Handle(inode, flags, False)
        return Opened(number)

    async def releasedir(self, ino: int, handle: int) -> None:
        self.handles.pop(handle, None)

    # --- attributes --------------------------------------------------------------------------------------------------

    async def getattr(self, ino: int, handle: int | None) -> tuple[Attributes, int]:
        inode = self._by_handle(ino, handle)
        await self.hold(inode, SH)
        try:
            if not inode.nlink and not inode.opens and not inode.is_directory:
                raise OSError(ESTALE, "the file was removed")
            return inode.attributes(self.ino_of(inode.number)), self.cache_valid
        finally:
            self.drop(inode, SH)

    async def setattr(self, ino: int, changes: Changes, handle: int | None, caller: Caller) -> tuple[Attributes, int]:
        inode = self._by_handle(ino, handle)
        if changes.size is not None:
            await self._set_size(inode, changes.size)
        await self.throttle()
        await self.hold(inode, EX)
        try:
            self._apply(inode, changes)
            self.touch(inode)
            return inode.attributes(self.ino_of(inode.number)), self.cache_valid
        finally:
            self.drop(inode, EX)

    def _apply(self, inode: Inode, changes: Changes) -> None:
        now = self.world.wall_ns()
        if changes.mode is not None:
            inode.mode = inode.mode & ~0o7777 | changes.mode & 0o7777
        if changes.uid is not None:
            inode.uid = changes.uid
        if changes.gid is not None:
            inode.gid = changes.gid
        if changes.kill_suidgid:
            clear_suidgid(inode)
        if changes.atime_now:
            inode.atime_ns = now
        elif changes.atime_ns is not None:
            inode.atime_ns = changes.atime_ns
        if changes.mtime_now:
            inode.mtime_ns = now
        elif changes.mtime_ns is not None:
            inode.mtime_ns = changes.mtime_ns
        inode.ctime_ns = changes.ctime_ns if changes.ctime_ns is not None else now

    # --- durability --------------------------------------------------------------------------------------------------

    async def flush(self, ino: int, handle: int, lock_owner: int) -> None:
        return

    async def fsync(self, ino: int, handle: int, *, data_only: bool) -> None:
        """Durable on return. The device is always flushed: blocks handed over by other nodes may be in its cache."""
        inode = self._by_handle(ino, handle)
        await self._sync(inode, inode.metadata_transaction if data_only else inode.transaction)

    async def fsyncdir(self, ino: int, handle: int, *, data_only: bool) -> None:
        inode = self._by_handle(ino, handle)
        await self._sync(inode, inode.transaction)

    async def _sync(self, inode: Inode, transaction: int) -> None:
        if self.refusal is not None:
            self.refuse()
        if transaction > self.journal.durable:
            await self.journal.commit()
        elif inode.data is not None:
            await self.data.write_clean(inode.data)
        if inode.error:
            code, inode.error = inode.error, 0
            raise OSError(code, "data written earlier could not be put on the device")
        try:
            await self.device.flush()
        except OSError as error:
            raise OSError(EIO, f"the device cannot be flushed: {error.strerror or error}") from None
