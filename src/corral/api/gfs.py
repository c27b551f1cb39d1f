"""The filesystem's contract towards whoever serves it to applications (FUSE, fsspec, the simulator's kernel model).

One method for each request of the FUSE protocol that corral supports; semantics are POSIX's. A method raises only
OSError with the errno the application shall see. Every method is a coroutine that may finish without suspending (all
locks cached): a door drives it by `send(None)` and replies inline when it does.

A node id is what FUSE calls one: the block address of the inode; `generation` is its formal number, so that a reused
block is a different file (ESTALE). Names are bytes. Times are nanoseconds since 1970.
"""

from collections.abc import Sequence
from typing import Final, Protocol

import msgspec

from corral.base.world import Buffer

ROOT: Final = 1  # FUSE's name for the root; the filesystem maps it to its own


class Caller(msgspec.Struct, frozen=True, gc=False):
    """On whose behalf: the identity the kernel put into the request."""

    uid: int
    gid: int
    pid: int
    umask: int = 0


class Attributes(msgspec.Struct, gc=False):
    ino: int
    mode: int  # type and permission bits
    nlink: int
    uid: int
    gid: int
    rdev: int
    size: int  # bytes
    blocks: int  # 512-byte units
    atime_ns: int
    mtime_ns: int
    ctime_ns: int
    blksize: int = 4096


class Entry(msgspec.Struct, gc=False):
    """A name found or made. `entry_valid_ns` and `attr_valid_ns`: how long the kernel may believe it unasked."""

    ino: int
    generation: int
    attributes: Attributes
    entry_valid_ns: int = 0
    attr_valid_ns: int = 0


class Changes(msgspec.Struct, gc=False):
    """What SETATTR changes; None leaves as it is. `now` in a time means the filesystem's present."""

    mode: int | None = None
    uid: int | None = None
    gid: int | None = None
    size: int | None = None
    atime_ns: int | None = None
    mtime_ns: int | None = None
    ctime_ns: int | None = None
    atime_now: bool = False
    mtime_now: bool = False
    kill_suidgid: bool = False  # the kernel asks to clear setuid/setgid (chown, truncate, write by a stranger)


class Opened(msgspec.Struct, gc=False):
    """`handle` goes into later requests. `direct`: bypass the page cache; `keep`: its old pages are still right;
    `flush`: close(2) of a descriptor must be told, because it ends record locks of its process."""

    handle: int
    direct: bool = False
    keep: bool = False
    flush: bool = True


class Dirent(msgspec.Struct, gc=False):
    """One name of a directory. `cookie`: pass it as `offset` to go on after this one. `entry`: readdirplus only."""

    name: bytes
    ino: int
    type: int  # mode >> 12
    cookie: int
    entry: Entry | None = None


class FilesystemUsage(msgspec.Struct, gc=False):
    block_size: int
    blocks: int
    blocks_free: int
    blocks_available: int
    inodes: int
    inodes_free: int
    name_max: int = 255


class LockRange(msgspec.Struct, gc=False):
    """A POSIX record lock: inclusive byte range, type F_RDLCK, F_WRLCK or F_UNLCK, pid of the owner."""

    start: int
    end: int
    type: int
    pid: int = 0


class Notifier(Protocol):
    """What the filesystem tells the kernel's caches. Never awaited inside a request whose reply the kernel's inode
    locks could wait for (measured: INVAL_INODE deadlocks with READ/WRITE of that inode, INVAL_ENTRY with LOOKUP of the
    parent): notifications run on a thread of their own and their completion is a future."""

    async def invalidate_inode(self, ino: int, offset: int = 0, length: int = 0) -> None:
        """Attributes (offset < 0: only those) and pages; dirty mapped pages are written back first, as WRITE requests
        that must be served before this returns."""

    async def invalidate_entry(self, parent: int, name: bytes) -> None: ...

    async def invalidate_all_entries(self) -> bool:
        """INC_EPOCH where the kernel has it (True); False means entry timeouts must stay zero."""


class Filesystem(Protocol):
    async def lookup(self, parent: int, name: bytes, caller: Caller) -> Entry: ...
    def forget(self, ino: int, lookups: int) -> None: ...
    async def getattr(self, ino: int, handle: int | None) -> tuple[Attributes, int]:
        """Attributes and for how many ns the kernel may keep them."""

    async def setattr(
        self, ino: int, changes: Changes, handle: int | None, caller: Caller
    ) -> tuple[Attributes, int]: ...
    async def readlink(self, ino: int) -> bytes: ...
    async def mknod(self, parent: int, name: bytes, mode: int, rdev: int, caller: Caller) -> Entry: ...
    async def mkdir(self, parent: int, name: bytes, mode: int, caller: Caller) -> Entry: ...
    async def symlink(self, parent: int, name: bytes, target: bytes, caller: Caller) -> Entry: ...
    async def link(self, ino: int, parent: int, name: bytes, caller: Caller) -> Entry: ...
    async def unlink(self, parent: int, name: bytes, caller: Caller) -> None: ...
    async def rmdir(self, parent: int, name: bytes, caller: Caller) -> None: ...
    async def rename(
        self, parent: int, name: bytes, new_parent: int, new_name: bytes, flags: int, caller: Caller
    ) -> None:
        """`flags`: RENAME_NOREPLACE 1, RENAME_EXCHANGE 2; RENAME_WHITEOUT is EINVAL."""

    async def open(self, ino: int, flags: int, caller: Caller) -> Opened: ...
    async def create(self, parent: int, name: bytes, mode: int, flags: int, caller: Caller) -> tuple[Entry, Opened]: ...
    async def read(self, ino: int, handle: int, offset: int, size: int) -> Sequence[Buffer]: ...
    async def write(
        self, ino: int, handle: int, offset: int, data: Buffer, *, append: bool, from_cache: bool, kill_suidgid: bool
    ) -> int:
        """`append`: the caller's file was opened O_APPEND, so `offset` is ignored: position, data and size change as
        one. `from_cache`: written back from the page cache (a mapping), EX is already held. Returns bytes written."""

    async def flush(self, ino: int, handle: int, lock_owner: int) -> None:
        """A descriptor was closed: drops the POSIX locks of `lock_owner` on this file."""

    async def release(self, ino: int, handle: int, flock_owner: int | None) -> None: ...
    async def fsync(self, ino: int, handle: int, *, data_only: bool) -> None: ...
    async def opendir(self, ino: int, flags: int, caller: Caller) -> Opened: ...
    async def readdir(self, ino: int, handle: int, offset: int, size: int, *, plus: bool) -> Sequence[Dirent]:
        """As many entries after cookie `offset` as fit `size` bytes of reply, "." and ".." included. With `plus` each
        entry other than those two counts as a lookup, if the door sends it."""

    async def releasedir(self, ino: int, handle: int) -> None: ...
    async def fsyncdir(self, ino: int, handle: int, *, data_only: bool) -> None: ...
    async def statfs(self) -> FilesystemUsage: ...
    async def fallocate(self, ino: int, handle: int, offset: int, length: int, mode: int) -> None: ...
    async def seek(self, ino: int, handle: int, offset: int, whence: int) -> int: ...
    async def getlk(self, ino: int, handle: int, owner: int, lock: LockRange) -> LockRange: ...
    async def setlk(self, ino: int, handle: int, owner: int, lock: LockRange, *, wait: bool, flock: bool) -> None: ...
    async def destroy(self) -> None:
        """The mount is gone: everything committed and flushed, locks given back."""
