"""An honest POSIX filesystem in memory behind `corral.api.gfs.Filesystem`: what the FUSE door is tested with.

One process, no locks to wait for, so every handler ends at once; `gate(name)` makes the handler of that name wait until
`open_gate(name)`, which is how tests make requests suspend. `hits[name]` counts calls. Changing a node behind the
kernel's back (`node.data[:] = ...`) plays the part of another cluster node.
"""

import asyncio
import errno
import os
import stat
import time
from collections import Counter
from collections.abc import Sequence

from corral.api.gfs import (
    ROOT,
    Attributes,
    Caller,
    Changes,
    Dirent,
    Entry,
    FilesystemUsage,
    LockRange,
    Notifier,
    Opened,
)
from corral.base.world import Buffer

F_RDLCK, F_WRLCK, F_UNLCK = 0, 1, 2
NAME_MAX = 255
RENAME_NOREPLACE, RENAME_EXCHANGE = 1, 2
FALLOC_KEEP_SIZE, FALLOC_PUNCH_HOLE = 1, 2


def fail(number: int) -> OSError:
    return OSError(number, os.strerror(number))


class Node:
    def __init__(self, ino: int, mode: int, caller: Caller, rdev: int = 0) -> None:
        now = time.time_ns()
        self.ino = ino
        self.mode = mode
        self.uid, self.gid, self.rdev = caller.uid, caller.gid, rdev
        self.atime = self.mtime = self.ctime = now
        self.nlink = 2 if stat.S_ISDIR(mode) else 1
        self.data = bytearray()
        self.target = b""
        self.children: dict[bytes, Node] = {}
        self.parent = self
        self.lookups = 0
        self.opens = 0
        self.locks: list[tuple[int, LockRange, bool]] = []  # owner, range, flock
        self.waiters: list[asyncio.Future[None]] = []

    def is_dir(self) -> bool:
        return stat.S_ISDIR(self.mode)

    def touch(self) -> None:
        self.mtime = self.ctime = time.time_ns()


class MemoryFilesystem:
    def __init__(self, notifier: Notifier | None = None, *, entry_valid_ns: int = 0, attr_valid_ns: int = 0) -> None:
        self.notifier = notifier
        self.entry_valid_ns = entry_valid_ns
        self.attr_valid_ns = attr_valid_ns
        self.keep = False
        self.direct = False
        self.tell_close = True
        self.destroyed = False
        self.hits: Counter[str] = Counter()
        self.appends = 0
        self.gates: dict[str, asyncio.Event] = {}
        self.arrived: dict[str, asyncio.Event] = {}
        self.root = Node(ROOT, stat.S_IFDIR | 0o755, Caller(os.getuid(), os.getgid(), 0))
        self.nodes = {ROOT: self.root}
        self.handles: dict[int, int] = {}  # handle → ino
        self._next_ino = ROOT
        self._next_handle = 0

    # --- for tests -----------------------------------------------------------------------------------------------

    def gate(self, name: str) -> None:
        self.gates[name] = asyncio.Event()
        self.arrived[name] = asyncio.Event()

    def open_gate(self, name: str) -> None:
        self.gates.pop(name).set()

    async def _pass(self, name: str) -> None:
        self.hits[name] += 1
        if name in self.gates:
            self.arrived[name].set()
            await self.gates[name].wait()

    def at(self, path: str) -> Node:
        node = self.root
        for name in path.encode().strip(b"/").split(b"/"):
            node = node.children[name]
        return node

    # --- nodes ---------------------------------------------------------------------------------------------------

    def _node(self, ino: int) -> Node:
        if ino not in self.nodes:
            raise fail(errno.ESTALE)
        return self.nodes[ino]

    def _dir(self, ino: int) -> Node:
        node = self._node(ino)
        if not node.is_dir():
            raise fail(errno.ENOTDIR)
        return node

    def _child(self, parent: int, name: bytes) -> Node:
        node = self._dir(parent).children.get(name)
        if node is None:
            raise fail(errno.ENOENT)
        return node

    def _attributes(self, node: Node) -> Attributes:
        size = len(node.data) or len(node.target)
        return Attributes(
            ino=node.ino, mode=node.mode, nlink=node.nlink, uid=node.uid, gid=node.gid, rdev=node.rdev, size=size,
            blocks=-(-size // 512), atime_ns=node.atime, mtime_ns=node.mtime, ctime_ns=node.ctime,
        )  # fmt: skip

    def _entry(self, node: Node) -> Entry:
        node.lookups += 1
        return Entry(node.ino, 1, self._attributes(node), self.entry_valid_ns, self.attr_valid_ns)

    def _add(self, parent: int, name: bytes, mode: int, caller: Caller, rdev: int = 0) -> Node:
        directory = self._dir(parent)
        if len(name) > NAME_MAX:
            raise fail(errno.ENAMETOOLONG)
        if name in directory.children:
            raise fail(errno.EEXIST)
        if directory.nlink == 0:
            raise fail(errno.ENOENT)
        self._next_ino += 1
        node = Node(self._next_ino, mode, caller, rdev)
        node.parent = directory
        if directory.mode & stat.S_ISGID:
            node.gid = directory.gid
            node.mode |= stat.S_ISGID if node.is_dir() else 0
        directory.children[name] = node
        directory.nlink += node.is_dir()
        directory.touch()
        self.nodes[node.ino] = node
        return node

    def _drop(self, node: Node) -> None:
        if node.nlink == 0 and not node.lookups and not node.opens:
            self.nodes.pop(node.ino, None)

    def _open(self, node: Node) -> int:
        node.opens += 1
        self._next_handle += 1
        self.handles[self._next_handle] = node.ino
        return self._next_handle

    # --- Filesystem: names ---------------------------------------------------------------------------------------

    async def lookup(self, parent: int, name: bytes, caller: Caller) -> Entry:
        await self._pass("lookup")
        if len(name) > NAME_MAX:
            raise fail(errno.ENAMETOOLONG)
        return self._entry(self._child(parent, name))

    def forget(self, ino: int, lookups: int) -> None:
        node = self.nodes[ino]
        node.lookups -= lookups
        assert node.lookups >= 0
        self._drop(node)

    async def readlink(self, ino: int) -> bytes:
        return self._node(ino).target

    async def mknod(self, parent: int, name: bytes, mode: int, rdev: int, caller: Caller) -> Entry:
        return self._entry(self._add(parent, name, mode, caller, rdev))

    async def mkdir(self, parent: int, name: bytes, mode: int, caller: Caller) -> Entry:
        await self._pass("mkdir")
        return self._entry(self._add(parent, name, stat.S_IFDIR | mode, caller))

    async def symlink(self, parent: int, name: bytes, target: bytes, caller: Caller) -> Entry:
        node = self._add(parent, name, stat.S_IFLNK | 0o777, caller)
        node.target = target
        return self._entry(node)

    async def link(self, ino: int, parent: int, name: bytes, caller: Caller) -> Entry:
        node, directory = self._node(ino), self._dir(parent)
        if name in directory.children:
            raise fail(errno.EEXIST)
        directory.children[name] = node
        directory.touch()
        node.nlink += 1
        node.ctime = time.time_ns()
        return self._entry(node)

    async def unlink(self, parent: int, name: bytes, caller: Caller) -> None:
        await self._pass("unlink")
        node = self._child(parent, name)
        if node.is_dir():
            raise fail(errno.EISDIR)
        self._unlink(self._dir(parent), name, node)

    def _unlink(self, directory: Node, name: bytes, node: Node) -> None:
        del directory.children[name]
        directory.touch()
        node.nlink -= 1
        node.ctime = time.time_ns()
        if node.is_dir():
            node.nlink = 0
            directory.nlink -= 1
        self._drop(node)

    async def rmdir(self, parent: int, name: bytes, caller: Caller) -> None:
        node = self._child(parent, name)
        if not node.is_dir():
            raise fail(errno.ENOTDIR)
        if node.children:
            raise fail(errno.ENOTEMPTY)
        self._unlink(self._dir(parent), name, node)

    async def rename(
        self, parent: int, name: bytes, new_parent: int, new_name: bytes, flags: int, caller: Caller
    ) -> None:
        await self._pass("rename")
        if flags & ~(RENAME_NOREPLACE | RENAME_EXCHANGE):
            raise fail(errno.EINVAL)
        old, new, node = self._dir(parent), self._dir(new_parent), self._child(parent, name)
        other = new.children.get(new_name)
        if flags & RENAME_EXCHANGE:
            if other is None:
                raise fail(errno.ENOENT)
            self._move(old, name, other, new)
        elif other is not None:
            self._replace(node, other, new, new_name, flags)
        if other is node and not flags:
            return
        if not flags & RENAME_EXCHANGE:
            del old.children[name]
        self._move(new, new_name, node, old)
        old.touch()
        new.touch()
        node.ctime = time.time_ns()

    def _replace(self, node: Node, other: Node, new: Node, new_name: bytes, flags: int) -> None:
        if flags & RENAME_NOREPLACE:
            raise fail(errno.EEXIST)
        if other is node:
            return
        if other.is_dir() and not node.is_dir():
            raise fail(errno.EISDIR)
        if node.is_dir() and not other.is_dir():
            raise fail(errno.ENOTDIR)
        if other.children:
            raise fail(errno.ENOTEMPTY)
        self._unlink(new, new_name, other)

    def _move(self, directory: Node, name: bytes, node: Node, source: Node) -> None:
        directory.children[name] = node
        if node.is_dir() and directory is not source:
            source.nlink -= 1
            directory.nlink += 1
            node.parent = directory

    # --- attributes ----------------------------------------------------------------------------------------------

    async def getattr(self, ino: int, handle: int | None) -> tuple[Attributes, int]:
        await self._pass("getattr")
        return self._attributes(self._node(ino)), self.attr_valid_ns

    async def setattr(self, ino: int, changes: Changes, handle: int | None, caller: Caller) -> tuple[Attributes, int]:
        await self._pass("setattr")
        node = self._node(ino)
        now = time.time_ns()
        if changes.size is not None:
            self._truncate(node, changes.size)
        if changes.mode is not None:
            node.mode = stat.S_IFMT(node.mode) | stat.S_IMODE(changes.mode)
        if changes.uid is not None:
            node.uid = changes.uid
        if changes.gid is not None:
            node.gid = changes.gid
        if changes.kill_suidgid or (changes.uid is not None or changes.gid is not None):
            self._kill_suidgid(node)
        node.atime = now if changes.atime_now else node.atime if changes.atime_ns is None else changes.atime_ns
        node.mtime = now if changes.mtime_now else node.mtime if changes.mtime_ns is None else changes.mtime_ns
        node.ctime = now
        return self._attributes(node), self.attr_valid_ns

    def _truncate(self, node: Node, size: int) -> None:
        if size > 1 << 32:
            raise fail(errno.EFBIG)
        if size < len(node.data):
            del node.data[size:]
        else:
            node.data.extend(bytes(size - len(node.data)))
        node.touch()

    def _kill_suidgid(self, node: Node) -> None:
        if stat.S_ISREG(node.mode):
            node.mode &= ~stat.S_ISUID
            if node.mode & stat.S_IXGRP:
                node.mode &= ~stat.S_ISGID

    async def statfs(self) -> FilesystemUsage:
        return FilesystemUsage(4096, 1000, 600, 500, 400, 300)

    # --- files ---------------------------------------------------------------------------------------------------

    async def open(self, ino: int, flags: int, caller: Caller) -> Opened:
        await self._pass("open")
        node = self._node(ino)
        if flags & os.O_TRUNC:
            self._truncate(node, 0)
        return Opened(self._open(node), direct=self.direct, keep=self.keep, flush=self.tell_close)

    async def create(self, parent: int, name: bytes, mode: int, flags: int, caller: Caller) -> tuple[Entry, Opened]:
        await self._pass("create")
        existing = self._dir(parent).children.get(name)
        if existing is not None and flags & os.O_EXCL:
            raise fail(errno.EEXIST)
        node = existing or self._add(parent, name, stat.S_IFREG | mode, caller)
        if flags & os.O_TRUNC:
            self._truncate(node, 0)
        return self._entry(node), Opened(self._open(node), direct=self.direct, keep=self.keep, flush=self.tell_close)

    async def read(self, ino: int, handle: int, offset: int, size: int) -> Sequence[Buffer]:
        await self._pass("read")
        assert self.handles[handle] == ino
        return [bytes(memoryview(self._node(ino).data)[offset : offset + size])]

    async def write(
        self, ino: int, handle: int, offset: int, data: Buffer, *, append: bool, from_cache: bool, kill_suidgid: bool
    ) -> int:
        await self._pass("write_from_cache" if from_cache else "write")
        node = self._node(ino)
        if append:
            self.appends += 1
            offset = len(node.data)
        if offset > len(node.data):
            node.data.extend(bytes(offset - len(node.data)))
        node.data[offset : offset + len(data)] = data
        node.touch()
        if kill_suidgid:
            self._kill_suidgid(node)
        return len(data)

    async def flush(self, ino: int, handle: int, lock_owner: int) -> None:
        await self._pass("flush")
        self._unlock(self._node(ino), lock_owner, flock=False)

    async def release(self, ino: int, handle: int, flock_owner: int | None) -> None:
        self.hits["release"] += 1
        node = self._node(ino)
        assert self.handles.pop(handle) == ino
        node.opens -= 1
        if flock_owner is not None:
            self._unlock(node, flock_owner, flock=True)
        self._drop(node)

    async def fsync(self, ino: int, handle: int, *, data_only: bool) -> None:
        await self._pass("fdatasync" if data_only else "fsync")

    async def fallocate(self, ino: int, handle: int, offset: int, length: int, mode: int) -> None:
        node = self._node(ino)
        end = offset + length
        if mode & FALLOC_PUNCH_HOLE:
            end = min(end, len(node.data))
            node.data[offset:end] = bytes(max(0, end - offset))
        elif mode & ~FALLOC_KEEP_SIZE:
            raise fail(errno.EOPNOTSUPP)
        elif not mode and end > len(node.data):
            self._truncate(node, end)

    async def seek(self, ino: int, handle: int, offset: int, whence: int) -> int:
        size = len(self._node(ino).data)
        if offset >= size:
            raise fail(errno.ENXIO)
        return offset if whence == os.SEEK_DATA else size

    # --- directories ---------------------------------------------------------------------------------------------

    async def opendir(self, ino: int, flags: int, caller: Caller) -> Opened:
        await self._pass("opendir")
        return Opened(self._open(self._dir(ino)), keep=self.keep)

    async def readdir(self, ino: int, handle: int, offset: int, size: int, *, plus: bool) -> Sequence[Dirent]:
        await self._pass("readdirplus" if plus else "readdir")
        node = self._dir(ino)
        children = list(node.children.items())
        answer: list[Dirent] = []
        for cookie in range(offset, len(children) + 2):
            name, child = ((b".", node), (b"..", node.parent))[cookie] if cookie < 2 else children[cookie - 2]
            size -= -(-(24 + len(name)) // 8) * 8 + (128 if plus else 0)
            if size < 0:
                break
            entry = self._entry(child) if plus and cookie >= 2 else None
            answer.append(Dirent(name, child.ino, child.mode >> 12, cookie + 1, entry))
        return answer

    async def releasedir(self, ino: int, handle: int) -> None:
        node = self._node(ino)
        assert self.handles.pop(handle) == ino
        node.opens -= 1
        self._drop(node)

    async def fsyncdir(self, ino: int, handle: int, *, data_only: bool) -> None:
        self.hits["fsyncdir"] += 1

    # --- locks ---------------------------------------------------------------------------------------------------

    def _conflict(self, node: Node, owner: int, lock: LockRange, flock: bool) -> LockRange | None:
        for other, held, held_flock in node.locks:
            overlap = held.start <= lock.end and lock.start <= held.end
            if other != owner and held_flock == flock and overlap and F_WRLCK in (held.type, lock.type):
                return held
        return None

    def _unlock(self, node: Node, owner: int, *, flock: bool) -> None:
        self._cut(node, owner, LockRange(0, (1 << 63) - 1, F_UNLCK), flock)

    def _cut(self, node: Node, owner: int, lock: LockRange, flock: bool) -> None:
        kept = []
        for other, held, held_flock in node.locks:
            if other != owner or held_flock != flock or held.end < lock.start or lock.end < held.start:
                kept.append((other, held, held_flock))
                continue
            if held.start < lock.start:
                kept.append((other, LockRange(held.start, lock.start - 1, held.type, held.pid), held_flock))
            if lock.end < held.end:
                kept.append((other, LockRange(lock.end + 1, held.end, held.type, held.pid), held_flock))
        node.locks = kept
        waiters, node.waiters = node.waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)

    async def getlk(self, ino: int, handle: int, owner: int, lock: LockRange) -> LockRange:
        held = self._conflict(self._node(ino), owner, lock, flock=False)
        return held or LockRange(lock.start, lock.end, F_UNLCK, 0)

    async def setlk(self, ino: int, handle: int, owner: int, lock: LockRange, *, wait: bool, flock: bool) -> None:
        self.hits["flock" if flock else "setlk"] += 1
        node = self._node(ino)
        while lock.type != F_UNLCK and self._conflict(node, owner, lock, flock):
            if not wait:
                raise fail(errno.EAGAIN)
            waiter = asyncio.get_running_loop().create_future()
            node.waiters.append(waiter)
            self.hits["lock waits"] += 1
            await waiter
        self._cut(node, owner, lock, flock)
        if lock.type != F_UNLCK:
            node.locks.append((owner, lock, flock))

    async def destroy(self) -> None:
        self.destroyed = True
