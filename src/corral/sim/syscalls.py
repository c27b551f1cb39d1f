"""System calls of a simulated application on a simulated mount: what a file checker sees, and where it judges.

    calls = Syscalls(kernel, process)               # a process on the mount's machine
    file = await calls.open("/log", os.O_CREAT | os.O_RDWR)
    await calls.write(file, b"...")

Every call runs in the kernel: it ends even when its caller is killed, and the caller is not gone before.
"""

import errno
import os
import stat
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, Final, TypeVar

from corral.api.gfs import ROOT, Attributes, Caller, Changes, Dirent, LockRange
from corral.sim.kernel import PAGE, REQUEST_MAX, CachedPage, KernelInode, SimKernel, fail

if TYPE_CHECKING:
    from corral.sim.process import Process

T = TypeVar("T")

SYMLINKS_MAX: Final = 40
READDIR_SIZE: Final = 4096
CREATING: Final = os.O_CREAT | os.O_EXCL | os.O_TRUNC  # done by other requests than OPEN


class OpenFile:
    """A file description. `position` is where read and write go on."""

    __slots__ = ("append", "direct", "flocked", "handle", "inode", "position", "readable", "writable")

    def __init__(self, inode: KernelInode, handle: int, flags: int, direct: bool) -> None:
        self.inode = inode
        self.handle = handle
        self.direct = direct
        self.append = bool(flags & os.O_APPEND)
        self.readable = flags & os.O_ACCMODE != os.O_WRONLY
        self.writable = flags & os.O_ACCMODE != os.O_RDONLY
        self.flocked = False
        self.position = 0


class SystemCall:
    """Keeps its process from being gone."""

    def power_cut(self) -> None:
        """Nobody is left to be told."""


class Syscalls:
    """Paths are absolute within the mount, bytes or str."""

    def __init__(self, kernel: SimKernel, process: "Process", *, umask: int = 0o022) -> None:
        self._kernel = kernel
        self._process = process
        self._caller = Caller(process.uid, process.gid, process.pid, umask)

    async def _call(self, work: Coroutine[Any, Any, T]) -> T:
        process, call = self._process, SystemCall()

        async def counted() -> T:
            try:
                return await work
            finally:
                process.operation_done(call)

        process.operations[call] = None
        return await self._kernel.in_kernel(counted())

    # --- names -------------------------------------------------------------------------------------------------------

    async def open(self, path: bytes | str, flags: int = os.O_RDONLY, mode: int = 0o666) -> OpenFile:
        return await self._call(self._again_if_stale(lambda: self._open(path, flags, mode)))

    async def stat(self, path: bytes | str, *, follow: bool = True) -> Attributes:
        return await self._call(self._again_if_stale(lambda: self._stat(path, follow)))

    async def mkdir(self, path: bytes | str, mode: int = 0o777) -> None:
        mode &= ~self._caller.umask
        await self._call(self._make(path, lambda fs, parent, name: fs.mkdir(parent, name, mode, self._caller)))

    async def symlink(self, target: bytes, path: bytes | str) -> None:
        await self._call(self._make(path, lambda fs, parent, name: fs.symlink(parent, name, target, self._caller)))

    async def link(self, old: bytes | str, new: bytes | str) -> None:
        await self._call(self._link(old, new))

    async def readlink(self, path: bytes | str) -> bytes:
        return await self._call(self._readlink(path))

    async def unlink(self, path: bytes | str) -> None:
        await self._call(self._remove(path, directory=False))

    async def rmdir(self, path: bytes | str) -> None:
        await self._call(self._remove(path, directory=True))

    async def rename(self, old: bytes | str, new: bytes | str, flags: int = 0) -> None:
        await self._call(self._rename(old, new, flags))

    async def listdir(self, path: bytes | str) -> list[bytes]:
        return await self._call(self._again_if_stale(lambda: self._listdir(path)))

    async def _again_if_stale(self, attempt: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """As the VFS: ESTALE from a cached name makes it look up every name of the path again, once."""
        try:
            return await attempt()
        except OSError as error:
            if error.errno != errno.ESTALE:
                raise
            for inode in self._kernel.inodes.values():
                inode.children.clear()
            return await attempt()

    async def _walk(self, path: bytes | str, *, follow: bool, links: int = 0) -> KernelInode:
        parent, name = await self._parent(path, links)
        if not name:
            return parent
        inode = await self._kernel.lookup(parent, name, self._caller)
        if inode is None:
            raise fail(errno.ENOENT)
        if follow and stat.S_ISLNK(inode.attributes.mode):
            return await self._walk(await self._target(inode, path, links), follow=True, links=links + 1)
        return inode

    async def _parent(self, path: bytes | str, links: int = 0) -> tuple[KernelInode, bytes]:
        """The directory a path ends in and the last name; an empty name for the root."""
        if links > SYMLINKS_MAX:
            raise fail(errno.ELOOP)
        names = [name for name in os.fsencode(path).split(b"/") if name]
        directory = self._kernel.inode(ROOT)
        done = b""
        for name in names[:-1]:
            inode = await self._kernel.lookup(directory, name, self._caller)
            if inode is None:
                raise fail(errno.ENOENT)
            done += b"/" + name
            if stat.S_ISLNK(inode.attributes.mode):
                inode = await self._walk(await self._target(inode, done, links), follow=True, links=links + 1)
            if not stat.S_ISDIR(inode.attributes.mode):
                raise fail(errno.ENOTDIR)
            directory = inode
        return directory, names[-1] if names else b""

    async def _target(self, inode: KernelInode, path: bytes | str, links: int) -> bytes:
        if links >= SYMLINKS_MAX:
            raise fail(errno.ELOOP)
        target = await self._kernel.request("readlink", lambda fs: fs.readlink(inode.ino))
        return target if target.startswith(b"/") else os.fsencode(path).rstrip(b"/").rpartition(b"/")[0] + b"/" + target

    async def _open(self, path: bytes | str, flags: int, mode: int) -> OpenFile:
        kernel = self._kernel
        parent, name = await self._parent(path)
        inode: KernelInode | None = parent
        if name and flags & os.O_CREAT:
            async with parent.names.held(exclusive=True):
                inode = await kernel.lookup(parent, name, self._caller, locked=True)
                if inode is None:
                    return await self._create(parent, name, flags, mode)
            if flags & os.O_EXCL:
                raise fail(errno.EEXIST)
        elif name:
            inode = await kernel.lookup(parent, name, self._caller)
        if inode is None:
            raise fail(errno.ENOENT)
        if stat.S_ISLNK(inode.attributes.mode):
            if flags & os.O_NOFOLLOW:
                raise fail(errno.ELOOP)
            inode = await self._walk(path, follow=True)
        if inode.bad:
            raise fail(errno.ESTALE)
        if stat.S_ISDIR(inode.attributes.mode):
            raise fail(errno.EISDIR)
        ino = inode.ino
        opened = await kernel.request("open", lambda fs: fs.open(ino, flags & ~CREATING, self._caller))
        file = self._opened(inode, opened.handle, flags, opened.direct)
        if not opened.keep and not opened.direct:
            await self._drop_clean_pages(inode)
        if flags & os.O_TRUNC:
            await self._setattr(inode, Changes(size=0), file.handle)
        return file

    async def _create(self, parent: KernelInode, name: bytes, flags: int, mode: int) -> OpenFile:
        """Under the directory's lock."""
        kernel = self._kernel
        epoch, version = kernel.epoch, kernel.version
        entry, opened = await kernel.request(
            "create",
            lambda fs: fs.create(
                parent.ino, name, stat.S_IFREG | mode & ~self._caller.umask, flags & ~os.O_EXCL, self._caller
            ),
        )
        inode = kernel.learn(parent, name, entry, epoch, version)
        assert inode is not None
        kernel.outdate(parent)
        return self._opened(inode, opened.handle, flags, opened.direct)

    def _opened(self, inode: KernelInode, handle: int, flags: int, direct: bool) -> OpenFile:
        file = OpenFile(inode, handle, flags, direct)
        inode.handles[handle] = file.writable
        return file

    async def _drop_clean_pages(self, inode: KernelInode) -> None:
        for index in sorted(inode.pages):
            page = inode.pages.get(index)
            if page is None:
                continue
            await page.wait_unlocked()
            if page.dirty:
                await self._kernel.write_back(inode, index)
            if inode.pages.get(index) is page and not page.locked and not page.dirty:
                del inode.pages[index]

    async def _stat(self, path: bytes | str, follow: bool) -> Attributes:
        return await self._kernel.getattr(await self._walk(path, follow=follow))

    async def _make(self, path: bytes | str, start: Callable[[Any, int, bytes], Coroutine[Any, Any, Any]]) -> None:
        kernel = self._kernel
        parent, name = await self._parent(path)
        if not name:
            raise fail(errno.EEXIST)
        async with parent.names.held(exclusive=True):
            if await kernel.lookup(parent, name, self._caller, locked=True) is not None:
                raise fail(errno.EEXIST)
            epoch, version = kernel.epoch, kernel.version
            entry = await kernel.request("make", lambda fs: start(fs, parent.ino, name))
            kernel.learn(parent, name, entry, epoch, version)
            kernel.outdate(parent)

    async def _link(self, old: bytes | str, new: bytes | str) -> None:
        inode = await self._walk(old, follow=False)
        await self._make(new, lambda fs, parent, name: fs.link(inode.ino, parent, name, self._caller))
        self._kernel.outdate(inode)

    async def _readlink(self, path: bytes | str) -> bytes:
        inode = await self._walk(path, follow=False)
        if not stat.S_ISLNK(inode.attributes.mode):
            raise fail(errno.EINVAL)
        return await self._kernel.request("readlink", lambda fs: fs.readlink(inode.ino))

    async def _remove(self, path: bytes | str, *, directory: bool) -> None:
        kernel = self._kernel
        parent, name = await self._parent(path)
        if not name:
            raise fail(errno.EBUSY)
        async with parent.names.held(exclusive=True):
            inode = await kernel.lookup(parent, name, self._caller, locked=True)
            if inode is None:
                raise fail(errno.ENOENT)
            if directory:
                await kernel.request("rmdir", lambda fs: fs.rmdir(parent.ino, name, self._caller))
            else:
                await kernel.request("unlink", lambda fs: fs.unlink(parent.ino, name, self._caller))
            kernel.forget_name(parent, name)
            kernel.outdate(parent)
            kernel.outdate(inode)

    async def _rename(self, old: bytes | str, new: bytes | str, flags: int) -> None:
        kernel = self._kernel
        (one, name), (other, new_name) = await self._parent(old), await self._parent(new)
        first, second = sorted((one, other), key=lambda inode: inode.ino)
        async with first.names.held(exclusive=True):
            if second is first:
                await self._rename_locked(one, name, other, new_name, flags)
            else:
                async with second.names.held(exclusive=True):
                    await self._rename_locked(one, name, other, new_name, flags)
        kernel.outdate(one)
        kernel.outdate(other)

    async def _rename_locked(
        self, one: KernelInode, name: bytes, other: KernelInode, new_name: bytes, flags: int
    ) -> None:
        kernel = self._kernel
        moved = await kernel.lookup(one, name, self._caller, locked=True)
        if moved is None:
            raise fail(errno.ENOENT)
        await kernel.request("rename", lambda fs: fs.rename(one.ino, name, other.ino, new_name, flags, self._caller))
        kernel.forget_name(one, name)
        kernel.forget_name(other, new_name)
        kernel.outdate(moved)

    async def _listdir(self, path: bytes | str) -> list[bytes]:
        kernel = self._kernel
        inode = await self._walk(path, follow=True)
        opened = await kernel.request("opendir", lambda fs: fs.opendir(inode.ino, os.O_RDONLY, self._caller))
        names: list[bytes] = []
        cookie = 0
        try:
            async with inode.names.held(exclusive=False):
                while batch := await self._readdir(inode, opened.handle, cookie):
                    names.extend(dirent.name for dirent in batch)
                    cookie = batch[-1].cookie
        finally:
            await kernel.request("releasedir", lambda fs: fs.releasedir(inode.ino, opened.handle))
        return [name for name in names if name not in (b".", b"..")]

    async def _readdir(self, inode: KernelInode, handle: int, cookie: int) -> list[Dirent]:
        """READDIRPLUS: every entry but "." and ".." counts as a lookup."""
        kernel = self._kernel
        version = kernel.version
        batch = await kernel.request(
            "readdir", lambda fs: fs.readdir(inode.ino, handle, cookie, READDIR_SIZE, plus=True)
        )
        for dirent in batch:
            if dirent.entry is not None and dirent.entry.ino and dirent.name not in (b".", b".."):
                # Linux takes the epoch when it reads the answer (fuse_direntplus_link), unlike LOOKUP and CREATE.
                kernel.learn(inode, dirent.name, dirent.entry, kernel.epoch, version)
        return list(batch)

    # --- files -------------------------------------------------------------------------------------------------------

    async def read(self, file: OpenFile, size: int) -> bytes:
        data = await self.pread(file, size, file.position)
        file.position += len(data)
        return data

    async def pread(self, file: OpenFile, size: int, offset: int) -> bytes:
        return await self._call(self._read(file, size, offset))

    async def write(self, file: OpenFile, data: bytes) -> int:
        written = await self.pwrite(file, data, file.position)
        file.position = file.inode.size if file.append else file.position + written
        return written

    async def pwrite(self, file: OpenFile, data: bytes, offset: int) -> int:
        """O_APPEND files ignore the offset."""
        return await self._call(self._write(file, data, offset))

    async def fstat(self, file: OpenFile) -> Attributes:
        return await self._call(self._kernel.getattr(file.inode, file.handle))

    async def truncate(self, path: bytes | str, size: int) -> None:
        await self._call(self._truncate(path, size))

    async def ftruncate(self, file: OpenFile, size: int) -> None:
        await self._call(self._setattr(file.inode, Changes(size=size), file.handle))

    async def chmod(self, path: bytes | str, mode: int) -> None:
        await self._call(self._chmod(path, mode))

    async def fsync(self, file: OpenFile, *, data_only: bool = False) -> None:
        await self._call(self._fsync(file, data_only))

    async def fsync_directory(self, path: bytes | str) -> None:
        await self._call(self._fsync_directory(path))

    async def close(self, file: OpenFile) -> None:
        await self._call(self._close(file))

    async def lock(self, file: OpenFile, kind: int, start: int = 0, end: int = (1 << 63) - 1, *, wait: bool) -> None:
        """fcntl record lock of this process: F_RDLCK 0, F_WRLCK 1, F_UNLCK 2; `end` inclusive."""
        asked = LockRange(start, end, kind, self._process.pid)
        await self._call(
            self._kernel.request(
                "setlk",
                lambda fs: fs.setlk(file.inode.ino, file.handle, self._process.pid, asked, wait=wait, flock=False),
            )
        )

    async def flock(self, file: OpenFile, kind: int, *, wait: bool) -> None:
        """A lock of the file description: F_RDLCK 0 shared, F_WRLCK 1 exclusive, F_UNLCK 2; given back by `close`."""
        asked = LockRange(0, (1 << 63) - 1, kind, self._process.pid)
        await self._call(
            self._kernel.request(
                "setlk",
                lambda fs: fs.setlk(file.inode.ino, file.handle, file.handle, asked, wait=wait, flock=True),
            )
        )
        file.flocked = True

    async def map_read(self, file: OpenFile, size: int, offset: int) -> bytes:
        """What a shared mapping shows."""
        return await self._call(self._read_cached(file, size, offset))

    async def map_write(self, file: OpenFile, data: bytes, offset: int) -> None:
        """Stores through a shared mapping of one page: read if need be, then dirtied without any request."""
        assert offset // PAGE == (offset + len(data) - 1) // PAGE
        await self._call(self._map_write(file, data, offset))

    async def msync(self, file: OpenFile) -> None:
        await self._call(self._write_back_all(file.inode))

    async def _read(self, file: OpenFile, size: int, offset: int) -> bytes:
        if not file.readable:
            raise fail(errno.EBADF)
        if not file.direct:
            return await self._read_cached(file, size, offset)
        parts: list[bytes] = []
        while size:
            piece = min(size, REQUEST_MAX)
            got = b"".join(await self._read_request(file, offset, piece))
            parts.append(got)
            offset += len(got)
            size -= len(got)
            if len(got) < piece:
                break
        return b"".join(parts)

    async def _read_request(self, file: OpenFile, offset: int, size: int) -> Any:
        return await self._kernel.request("read", lambda fs: fs.read(file.inode.ino, file.handle, offset, size))

    async def _read_cached(self, file: OpenFile, size: int, offset: int) -> bytes:
        inode = file.inode
        if inode.bad:
            raise fail(errno.ESTALE)
        if offset + size > inode.size:
            await self._kernel.getattr(inode, file.handle)
        parts: list[bytes] = []
        while size and offset < inode.size:
            page = await self._kernel.page(inode, file.handle, offset // PAGE)
            within = offset % PAGE
            length = min(size, PAGE - within, inode.size - offset)
            if length <= 0:
                break
            parts.append(bytes(page.data[within : within + length]))
            offset += length
            size -= length
        return b"".join(parts)

    async def _write(self, file: OpenFile, data: bytes, offset: int) -> int:
        if not file.writable:
            raise fail(errno.EBADF)
        inode = file.inode
        if inode.bad:
            raise fail(errno.ESTALE)
        async with inode.writing.held(exclusive=True):
            if file.append:
                offset = inode.size  # perhaps not the end any more, and nobody asks: the filesystem knows better
            written = 0
            while written < len(data):
                piece = data[written : written + REQUEST_MAX]
                count = await self._write_request(file, piece, offset + written)
                written += count
                if count < len(piece):
                    break
            return written

    async def _write_request(self, file: OpenFile, data: bytes, offset: int) -> int:
        """One WRITE: its pages are locked until it is answered, and hold the new data then."""
        inode, kernel = file.inode, self._kernel
        pages: dict[int, CachedPage] = {}
        if not file.direct:
            for index in range(offset // PAGE, (offset + len(data) - 1) // PAGE + 1):
                while (page := inode.pages.get(index)) is not None and page.locked:
                    await page.wait_unlocked()
                if page is None:
                    page = CachedPage()
                    covered = offset <= index * PAGE and (index + 1) * PAGE <= offset + len(data)
                    page.dropped = not covered  # only a whole page is worth keeping
                    inode.pages[index] = page
                page.locked = True
                pages[index] = page
        written = 0
        try:
            written = await kernel.request(
                "write",
                lambda fs: fs.write(
                    inode.ino, file.handle, offset, data, append=file.append, from_cache=False, kill_suidgid=False
                ),
            )
            kernel.outdate(inode)
            inode.size = max(inode.size, offset + written)
        finally:
            for index, page in pages.items():
                self._keep_written(inode, index, page, data[:written], offset)
        return written

    def _keep_written(self, inode: KernelInode, index: int, page: CachedPage, data: bytes, offset: int) -> None:
        start, end = max(offset, index * PAGE), min(offset + len(data), (index + 1) * PAGE)
        if start < end:
            page.data[start - index * PAGE : end - index * PAGE] = data[start - offset : end - offset]
        else:
            page.dropped = True  # nothing of it was written: what the page holds is not known
        page.unlock()
        if page.dropped and inode.pages.get(index) is page:
            del inode.pages[index]

    async def _truncate(self, path: bytes | str, size: int) -> None:
        await self._setattr(await self._walk(path, follow=True), Changes(size=size), None)

    async def _chmod(self, path: bytes | str, mode: int) -> None:
        await self._setattr(await self._walk(path, follow=True), Changes(mode=mode), None)

    async def _setattr(self, inode: KernelInode, changes: Changes, handle: int | None) -> None:
        kernel = self._kernel
        async with inode.writing.held(exclusive=True):
            attributes, valid_ns = await kernel.request(
                "setattr", lambda fs: fs.setattr(inode.ino, changes, handle, self._caller)
            )
            kernel.outdate(inode)
            kernel.keep_attributes(inode, attributes, valid_ns, kernel.version)

    async def _map_write(self, file: OpenFile, data: bytes, offset: int) -> None:
        if not (file.readable and file.writable):
            raise fail(errno.EACCES)
        page = await self._kernel.page(file.inode, file.handle, offset // PAGE)
        page.data[offset % PAGE : offset % PAGE + len(data)] = data
        page.dirty = True

    async def _write_back_all(self, inode: KernelInode) -> None:
        for index in sorted(inode.pages):
            page = inode.pages.get(index)
            if page is not None:
                await page.wait_unlocked()
                if page.dirty:
                    await self._kernel.write_back(inode, index)

    async def _fsync(self, file: OpenFile, data_only: bool) -> None:
        await self._write_back_all(file.inode)
        await self._kernel.request("fsync", lambda fs: fs.fsync(file.inode.ino, file.handle, data_only=data_only))

    async def _fsync_directory(self, path: bytes | str) -> None:
        kernel = self._kernel
        inode = await self._walk(path, follow=True)
        opened = await kernel.request("opendir", lambda fs: fs.opendir(inode.ino, os.O_RDONLY, self._caller))
        try:
            await kernel.request("fsyncdir", lambda fs: fs.fsyncdir(inode.ino, opened.handle, data_only=False))
        finally:
            await kernel.request("releasedir", lambda fs: fs.releasedir(inode.ino, opened.handle))

    async def _close(self, file: OpenFile) -> None:
        inode = file.inode
        await self._write_back_all(inode)
        try:
            await self._kernel.request("flush", lambda fs: fs.flush(inode.ino, file.handle, self._process.pid))
        finally:
            inode.handles.pop(file.handle, None)
            owner = file.handle if file.flocked else None
            await self._kernel.request("release", lambda fs: fs.release(inode.ino, file.handle, owner))
