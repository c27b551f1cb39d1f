"""From a decoded request to the Filesystem and back to the payload of its answer: one coroutine for each opcode.

`table[opcode]` is called with (node id, header, body) and awaits only the filesystem, so it ends without suspending
when the filesystem does. An opcode without an entry is answered ENOSYS, which tells the kernel to stop asking or to do
it itself. Besides translating, this is where the kernel's references are counted: `known` holds for every node id how
many lookups the kernel has (FUSE-4: what an answer promised and the kernel did not take is given back by `undo`).
"""

import errno
import os
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final, TypeAlias, final

from corral.api.gfs import ROOT, Caller, Changes, Entry, Filesystem, LockRange, Opened
from corral.base.world import Buffer
from corral.fuse import protocol as p
from corral.fuse import replies

Payload: TypeAlias = bytes | Sequence[Buffer]
Body: TypeAlias = tuple[Any, ...]
Handler: TypeAlias = Callable[[int, p.Head, Body], Any]

_ATIME: Final = p.FATTR_ATIME | p.FATTR_ATIME_NOW  # with NOW set, the time beside it means nothing
_MTIME: Final = p.FATTR_MTIME | p.FATTR_MTIME_NOW
_ENTRY_OPCODES: Final = frozenset({p.LOOKUP, p.SYMLINK, p.MKNOD, p.MKDIR, p.LINK, p.CREATE})


def _caller(head: p.Head, umask: int = 0) -> Caller:
    return Caller(head[4], head[5], head[6], umask)


@final
class Operations:
    """`entry_timeouts` and `parallel_writes` are set once INIT has told what the kernel can."""

    def __init__(self, filesystem: Filesystem) -> None:
        self.filesystem = filesystem
        self.entry_timeouts = False
        self.parallel_writes = False
        self.known: dict[int, int] = {}
        self.forgets_excessive = 0
        table: list[Handler | None] = [None] * p.OPCODES
        for opcode, name in p.OPCODE_NAMES.items():
            table[opcode] = getattr(self, name.lower(), None)
        for opcode, same in (
            (p.RENAME, self.rename),
            (p.RENAME2, self.rename),
            (p.SETLK, self.setlk),
            (p.SETLKW, self.setlk),
            (p.FORGET, None),
            (p.BATCH_FORGET, None),
        ):
            table[opcode] = same
        self.table: Final = table

    # --- the kernel's references ---------------------------------------------------------------------------------

    def _entry(self, entry: Entry) -> bytes:
        if entry.ino:
            self.known[entry.ino] = self.known.get(entry.ino, 0) + 1
        return replies.entry_out(entry, entry_timeouts=self.entry_timeouts)

    def forget(self, node: int, lookups: int) -> None:
        """What the kernel dropped. It cannot drop more than it has: the surplus is counted and ignored."""
        have = self.known.get(node, 0)
        if lookups > have:
            if node != ROOT:
                self.forgets_excessive += 1
            lookups = have
        if not lookups:
            return
        if lookups == have:
            del self.known[node]
        else:
            self.known[node] = have - lookups
        self.filesystem.forget(node, lookups)

    def undo(self, opcode: int, node: int, payload: bytes) -> list[Awaitable[None]]:
        """The kernel did not take this answer: give back the lookups it promised; what must be awaited is returned."""
        if opcode in _ENTRY_OPCODES:
            entry = replies.entry_node(payload)
            if entry:
                self.forget(entry, 1)
            if opcode == p.CREATE:
                return [self.filesystem.release(entry, replies.open_handle(payload), None)]
        elif opcode == p.READDIRPLUS:
            for entry in replies.directory_nodes(payload):
                self.forget(entry, 1)
        elif opcode == p.OPEN:
            return [self.filesystem.release(node, replies.open_handle(payload), None)]
        elif opcode == p.OPENDIR:
            return [self.filesystem.releasedir(node, replies.open_handle(payload))]
        return []

    # --- names ---------------------------------------------------------------------------------------------------

    async def lookup(self, node: int, head: p.Head, body: Body) -> Payload:
        return self._entry(await self.filesystem.lookup(node, body[0], _caller(head)))

    async def mknod(self, node: int, head: p.Head, body: Body) -> Payload:
        mode, rdev, umask, _, name = body
        return self._entry(await self.filesystem.mknod(node, name, mode, rdev, _caller(head, umask)))

    async def mkdir(self, node: int, head: p.Head, body: Body) -> Payload:
        mode, umask, name = body
        return self._entry(await self.filesystem.mkdir(node, name, mode, _caller(head, umask)))

    async def symlink(self, node: int, head: p.Head, body: Body) -> Payload:
        name, target = body
        return self._entry(await self.filesystem.symlink(node, name, target, _caller(head)))

    async def link(self, node: int, head: p.Head, body: Body) -> Payload:
        old_node, name = body
        return self._entry(await self.filesystem.link(old_node, node, name, _caller(head)))

    async def unlink(self, node: int, head: p.Head, body: Body) -> Payload:
        await self.filesystem.unlink(node, body[0], _caller(head))
        return b""

    async def rmdir(self, node: int, head: p.Head, body: Body) -> Payload:
        await self.filesystem.rmdir(node, body[0], _caller(head))
        return b""

    async def rename(self, node: int, head: p.Head, body: Body) -> Payload:
        """RENAME: (newdir, name, new name); RENAME2 has flags and padding between."""
        flags = body[1] if head[1] == p.RENAME2 else 0
        await self.filesystem.rename(node, body[-2], body[0], body[-1], flags, _caller(head))
        return b""

    async def readlink(self, node: int, head: p.Head, body: Body) -> Payload:
        return await self.filesystem.readlink(node)

    # --- attributes ----------------------------------------------------------------------------------------------

    async def getattr(self, node: int, head: p.Head, body: Body) -> Payload:
        flags, _, handle = body
        attributes, valid_ns = await self.filesystem.getattr(node, handle if flags & p.GETATTR_FH else None)
        return replies.attributes_out(attributes, valid_ns)

    async def setattr(self, node: int, head: p.Head, body: Body) -> Payload:
        handle = body[2] if body[0] & p.FATTR_FH else None
        attributes, valid_ns = await self.filesystem.setattr(node, _changes(body), handle, _caller(head))
        return replies.attributes_out(attributes, valid_ns)

    async def statfs(self, node: int, head: p.Head, body: Body) -> Payload:
        return replies.statfs_out(await self.filesystem.statfs())

    # --- files ---------------------------------------------------------------------------------------------------

    def _open_flags(self, opened: Opened) -> int:
        flags = (p.FOPEN_KEEP_CACHE if opened.keep else 0) | (0 if opened.flush else p.FOPEN_NOFLUSH)
        if opened.direct:
            flags |= p.FOPEN_DIRECT_IO | (p.FOPEN_PARALLEL_DIRECT_WRITES if self.parallel_writes else 0)
        return flags

    async def open(self, node: int, head: p.Head, body: Body) -> Payload:
        flags, open_flags = body
        caller = _caller(head)
        opened = await self.filesystem.open(node, flags, caller)
        if open_flags & p.OPEN_KILL_SUIDGID and flags & os.O_TRUNC:
            await self.filesystem.setattr(node, Changes(kill_suidgid=True), opened.handle, caller)
        return replies.open_out(opened.handle, self._open_flags(opened))

    async def create(self, node: int, head: p.Head, body: Body) -> Payload:
        flags, mode, umask, _, name = body
        entry, opened = await self.filesystem.create(node, name, mode, flags, _caller(head, umask))
        return self._entry(entry) + replies.open_out(opened.handle, self._open_flags(opened))

    async def read(self, node: int, head: p.Head, body: Body) -> Payload:
        parts = await self.filesystem.read(node, body[0], body[1], body[2])
        assert sum(map(len, parts)) <= body[2], "FUSE-1: more data than was asked for"
        return parts

    async def write(self, node: int, head: p.Head, body: Body) -> Payload:
        handle, offset, _, write_flags, _, flags, _, data = body
        from_cache = bool(write_flags & p.WRITE_CACHE)
        written = await self.filesystem.write(
            node,
            handle,
            offset,
            data,
            append=bool(flags & os.O_APPEND) and not from_cache,
            from_cache=from_cache,
            kill_suidgid=bool(write_flags & p.WRITE_KILL_SUIDGID),
        )
        return replies.write_out(written)

    async def flush(self, node: int, head: p.Head, body: Body) -> Payload:
        await self.filesystem.flush(node, body[0], body[3])
        return b""

    async def release(self, node: int, head: p.Head, body: Body) -> Payload:
        handle, _, release_flags, owner = body
        await self.filesystem.release(node, handle, owner if release_flags & p.RELEASE_FLOCK_UNLOCK else None)
        return b""

    async def fsync(self, node: int, head: p.Head, body: Body) -> Payload:
        await self.filesystem.fsync(node, body[0], data_only=bool(body[1] & p.FSYNC_DATA_ONLY))
        return b""

    async def fallocate(self, node: int, head: p.Head, body: Body) -> Payload:
        handle, offset, length, mode, _ = body
        await self.filesystem.fallocate(node, handle, offset, length, mode)
        return b""

    async def lseek(self, node: int, head: p.Head, body: Body) -> Payload:
        handle, offset, whence, _ = body
        return replies.seek_out(await self.filesystem.seek(node, handle, offset, whence))

    # --- directories ---------------------------------------------------------------------------------------------

    async def opendir(self, node: int, head: p.Head, body: Body) -> Payload:
        opened = await self.filesystem.opendir(node, body[0], _caller(head))
        return replies.open_out(opened.handle, p.FOPEN_CACHE_DIR | p.FOPEN_KEEP_CACHE if opened.keep else 0)

    async def readdir(self, node: int, head: p.Head, body: Body) -> Payload:
        entries = await self.filesystem.readdir(node, body[0], body[1], body[2], plus=False)
        return replies.directory(entries, body[2], plus=False, entry_timeouts=False)[0]

    async def readdirplus(self, node: int, head: p.Head, body: Body) -> Payload:
        entries = await self.filesystem.readdir(node, body[0], body[1], body[2], plus=True)
        payload, sent = replies.directory(entries, body[2], plus=True, entry_timeouts=self.entry_timeouts)
        for index, dirent in enumerate(entries):
            if dirent.entry is None or not dirent.entry.ino:
                continue
            ino = dirent.entry.ino
            if index < sent:
                self.known[ino] = self.known.get(ino, 0) + 1
            else:
                self.filesystem.forget(ino, 1)
        return payload

    async def releasedir(self, node: int, head: p.Head, body: Body) -> Payload:
        await self.filesystem.releasedir(node, body[0])
        return b""

    async def fsyncdir(self, node: int, head: p.Head, body: Body) -> Payload:
        await self.filesystem.fsyncdir(node, body[0], data_only=bool(body[1] & p.FSYNC_DATA_ONLY))
        return b""

    # --- locks ---------------------------------------------------------------------------------------------------

    async def getlk(self, node: int, head: p.Head, body: Body) -> Payload:
        handle, owner, start, end, type_, pid, _, _ = body
        return replies.lock_out(await self.filesystem.getlk(node, handle, owner, LockRange(start, end, type_, pid)))

    async def setlk(self, node: int, head: p.Head, body: Body) -> Payload:
        handle, owner, start, end, type_, pid, lk_flags, _ = body
        if start > end:
            raise OSError(errno.EINVAL, "a lock range that ends before it starts")
        await self.filesystem.setlk(
            node,
            handle,
            owner,
            LockRange(start, end, type_, pid),
            wait=head[1] == p.SETLKW,
            flock=bool(lk_flags & p.LK_FLOCK),
        )
        return b""


def _changes(body: Body) -> Changes:
    valid, _, _, size, _, atime, mtime, ctime, atime_ns, mtime_ns, ctime_ns, mode, _, uid, gid, _ = body
    return Changes(
        mode=mode if valid & p.FATTR_MODE else None,
        uid=uid if valid & p.FATTR_UID else None,
        gid=gid if valid & p.FATTR_GID else None,
        size=size if valid & p.FATTR_SIZE else None,
        atime_ns=atime * 1_000_000_000 + atime_ns if valid & _ATIME == p.FATTR_ATIME else None,
        mtime_ns=mtime * 1_000_000_000 + mtime_ns if valid & _MTIME == p.FATTR_MTIME else None,
        ctime_ns=ctime * 1_000_000_000 + ctime_ns if valid & p.FATTR_CTIME else None,
        atime_now=bool(valid & p.FATTR_ATIME_NOW),
        mtime_now=bool(valid & p.FATTR_MTIME_NOW),
        kill_suidgid=bool(valid & p.FATTR_KILL_SUIDGID),
    )
