"""The kernel's FUSE protocol, server → kernel half: the bytes of every answer and notification.

Pure functions from the records of `corral.api.gfs` to bytes. Times are split with floor, so that a file from before
1970 keeps a nanosecond part between 0 and 10^9. Widths are the kernel's; what does not fit is our own bug.
"""

import struct
from collections.abc import Sequence
from typing import Final

from corral.api.gfs import Attributes, Dirent, Entry, FilesystemUsage, LockRange
from corral.base.time import SECOND
from corral.fuse import protocol as p

HEADER: Final = struct.Struct("=IiQ")  # len, error (0 or -errno), unique
HEADER_SIZE: Final = 16

_ATTR: Final = struct.Struct("=QQQqqqIIIIIIIIII")  # fuse_attr
_ATTR_OUT: Final = struct.Struct("=QIIQQQqqqIIIIIIIIII")  # attr_valid, attr_valid_nsec, dummy, fuse_attr
_ENTRY_OUT: Final = struct.Struct("=QQQQIIQQQqqqIIIIIIIIII")  # nodeid, generation, two timeouts, fuse_attr
_DIRENT: Final = struct.Struct("=QQII")  # ino, off, namelen, type
_OPEN_OUT: Final = struct.Struct("=QII")  # fh, open_flags, padding
_WRITE_OUT: Final = struct.Struct("=II")  # size, padding
_STATFS_OUT: Final = struct.Struct("=QQQQQIII28x")  # fuse_kstatfs
_U64: Final = struct.Struct("=Q")
_LK_OUT: Final = struct.Struct("=QQII")  # start, end, type, pid
# major, minor, max_readahead, flags, max_background, congestion_threshold, max_write, time_gran, max_pages,
# map_alignment, flags2, then room
_INIT_OUT: Final = struct.Struct("=IIIIHHIIHHI28x")
_INVAL_INODE: Final = struct.Struct("=Qqq")  # ino, off, len
_INVAL_ENTRY: Final = struct.Struct("=QII")  # parent, namelen, flags

ENTRY_SIZE: Final = _ENTRY_OUT.size
DIRENT_SIZE: Final = _DIRENT.size
assert (_ATTR.size, ENTRY_SIZE, _ATTR_OUT.size, _STATFS_OUT.size, _INIT_OUT.size) == (88, 128, 104, 80, 64)

_NO_ENTRY: Final = bytes(ENTRY_SIZE)


def reply(unique: int, payload: bytes) -> bytes:
    return HEADER.pack(HEADER_SIZE + len(payload), 0, unique) + payload


def error(unique: int, errno: int) -> bytes:
    return HEADER.pack(HEADER_SIZE, -errno, unique)


def attributes_out(a: Attributes, valid_ns: int) -> bytes:
    atime, atime_ns = divmod(a.atime_ns, SECOND)
    mtime, mtime_ns = divmod(a.mtime_ns, SECOND)
    ctime, ctime_ns = divmod(a.ctime_ns, SECOND)
    valid, valid_ns = divmod(valid_ns, SECOND)
    return _ATTR_OUT.pack(
        valid, valid_ns, 0,
        a.ino, a.size, a.blocks, atime, mtime, ctime, atime_ns, mtime_ns, ctime_ns,
        a.mode, a.nlink, a.uid, a.gid, a.rdev, a.blksize, 0,
    )  # fmt: skip


def entry_out(entry: Entry, *, entry_timeouts: bool) -> bytes:
    """`entry_timeouts` False: the kernel asks again for each name (FUSE-6). Node id 0 is a cacheable "no such name"."""
    a = entry.attributes
    atime, atime_ns = divmod(a.atime_ns, SECOND)
    mtime, mtime_ns = divmod(a.mtime_ns, SECOND)
    ctime, ctime_ns = divmod(a.ctime_ns, SECOND)
    entry_valid, entry_valid_ns = divmod(entry.entry_valid_ns if entry_timeouts else 0, SECOND)
    attr_valid, attr_valid_ns = divmod(entry.attr_valid_ns, SECOND)
    return _ENTRY_OUT.pack(
        entry.ino, entry.generation, entry_valid, attr_valid, entry_valid_ns, attr_valid_ns,
        a.ino, a.size, a.blocks, atime, mtime, ctime, atime_ns, mtime_ns, ctime_ns,
        a.mode, a.nlink, a.uid, a.gid, a.rdev, a.blksize, 0,
    )  # fmt: skip


def entry_node(payload: bytes) -> int:
    """The node id of an `entry_out`: what the kernel would have counted."""
    node: int = _U64.unpack_from(payload)[0]
    return node


def open_out(handle: int, flags: int) -> bytes:
    return _OPEN_OUT.pack(handle, flags, 0)


def open_handle(payload: bytes) -> int:
    handle: int = _OPEN_OUT.unpack_from(payload, len(payload) - _OPEN_OUT.size)[0]
    return handle


def write_out(size: int) -> bytes:
    return _WRITE_OUT.pack(size, 0)


def statfs_out(u: FilesystemUsage) -> bytes:
    return _STATFS_OUT.pack(
        u.blocks, u.blocks_free, u.blocks_available, u.inodes, u.inodes_free, u.block_size, u.name_max, u.block_size
    )


def lock_out(lock: LockRange) -> bytes:
    return _LK_OUT.pack(lock.start, lock.end, lock.type, lock.pid)


def seek_out(offset: int) -> bytes:
    return _U64.pack(offset)


def init_out(
    minor: int, *, flags: int, max_readahead: int, max_background: int, max_write: int, page_size: int = 4096
) -> bytes:
    return _INIT_OUT.pack(
        p.MAJOR, minor, max_readahead, flags & 0xFFFFFFFF, max_background, max_background * 3 // 4, max_write, 1,
        max_write // page_size, 0, flags >> 32,
    )  # fmt: skip


def directory(entries: Sequence[Dirent], size: int, *, plus: bool, entry_timeouts: bool) -> tuple[bytes, int]:
    """As many of `entries` as fit `size` bytes, and how many those are. Records are padded to 8 bytes."""
    parts: list[bytes] = []
    room = size
    for count, dirent in enumerate(entries):
        name = dirent.name
        record = DIRENT_SIZE + len(name)
        padding = -record % 8
        room -= record + padding + (ENTRY_SIZE if plus else 0)
        if room < 0:
            return b"".join(parts), count
        if plus:
            entry = dirent.entry
            parts.append(_NO_ENTRY if entry is None else entry_out(entry, entry_timeouts=entry_timeouts))
        parts.append(_DIRENT.pack(dirent.ino, dirent.cookie, len(name), dirent.type))
        parts.append(name + b"\0\0\0\0\0\0\0"[:padding])
    return b"".join(parts), len(entries)


def directory_nodes(payload: bytes) -> list[int]:
    """The node ids a READDIRPLUS answer would have made the kernel count."""
    nodes, at = [], 0
    while at < len(payload):
        nodes.append(entry_node(payload[at : at + 8]))
        record = DIRENT_SIZE + _DIRENT.unpack_from(payload, at + ENTRY_SIZE)[2]
        at += ENTRY_SIZE + record + -record % 8
    return [node for node in nodes if node]


def _notification(code: int, body: bytes) -> bytes:
    return HEADER.pack(HEADER_SIZE + len(body), code, 0) + body


def inval_inode(ino: int, offset: int, length: int) -> bytes:
    return _notification(p.NOTIFY_INVAL_INODE, _INVAL_INODE.pack(ino, offset, length))


def inval_entry(parent: int, name: bytes) -> bytes:
    return _notification(p.NOTIFY_INVAL_ENTRY, _INVAL_ENTRY.pack(parent, len(name), 0) + name + b"\0")


def inc_epoch() -> bytes:
    return _notification(p.NOTIFY_INC_EPOCH, b"")
