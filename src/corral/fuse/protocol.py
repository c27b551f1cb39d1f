"""The kernel's FUSE protocol, kernel → server half: numbers, layouts of requests, and the one decoder.

A request is a 40-byte header, then what its opcode says: a fixed structure, NUL-terminated names, or data. `LAYOUTS` is
that knowledge as a table; `decode` is the only code that reads a body. Everything is in host byte order: both ends are
the same machine. Field names are those of <linux/fuse.h>, whose comments give the version each thing came with.

Where a request lies: the session reads into two buffers, 80 bytes and then a page-aligned one. Header plus WRITE's
structure are exactly 80 bytes, so the data of a WRITE begins on a page and can go to an O_DIRECT device uncopied.

Hostile bytes: `decode` checks length, structure size, NULs and name length; it answers None and never raises.
"""

import struct
from collections.abc import Callable
from typing import Any, Final, TypeAlias

MAJOR: Final = 7
MINOR: Final = 45  # the newest minor whose requests we know (Linux 6.18); an older kernel gets its own
MINOR_OLDEST: Final = 31  # Linux 5.4; older kernels lack MAX_PAGES and EXPLICIT_INVAL_DATA

HEADER_SIZE: Final = 40
HEADER_BUFFER: Final = 80  # header + fuse_write_in
NAME_LIMIT: Final = 4096  # with its NUL; the filesystem's own, smaller limit is its business (ENAMETOOLONG)
BATCH_FORGET_LIMIT: Final = 65536

# --- opcodes -------------------------------------------------------------------------------------------------------

LOOKUP: Final = 1
FORGET: Final = 2
GETATTR: Final = 3
SETATTR: Final = 4
READLINK: Final = 5
SYMLINK: Final = 6
MKNOD: Final = 8
MKDIR: Final = 9
UNLINK: Final = 10
RMDIR: Final = 11
RENAME: Final = 12
LINK: Final = 13
OPEN: Final = 14
READ: Final = 15
WRITE: Final = 16
STATFS: Final = 17
RELEASE: Final = 18
FSYNC: Final = 20
SETXATTR: Final = 21
GETXATTR: Final = 22
LISTXATTR: Final = 23
REMOVEXATTR: Final = 24
FLUSH: Final = 25
INIT: Final = 26
OPENDIR: Final = 27
READDIR: Final = 28
RELEASEDIR: Final = 29
FSYNCDIR: Final = 30
GETLK: Final = 31
SETLK: Final = 32
SETLKW: Final = 33
ACCESS: Final = 34
CREATE: Final = 35
INTERRUPT: Final = 36
BMAP: Final = 37
DESTROY: Final = 38
IOCTL: Final = 39
POLL: Final = 40
NOTIFY_REPLY: Final = 41
BATCH_FORGET: Final = 42
FALLOCATE: Final = 43
READDIRPLUS: Final = 44
RENAME2: Final = 45
LSEEK: Final = 46
COPY_FILE_RANGE: Final = 47
SETUPMAPPING: Final = 48
REMOVEMAPPING: Final = 49
SYNCFS: Final = 50
TMPFILE: Final = 51
STATX: Final = 52
COPY_FILE_RANGE_64: Final = 53

OPCODES: Final = 64  # table size; anything above is unknown

OPCODE_NAMES: Final[dict[int, str]] = {
    value: name
    for name, value in list(globals().items())
    if name.isupper() and isinstance(value, int) and name not in
    {"MAJOR", "MINOR", "MINOR_OLDEST", "HEADER_SIZE", "HEADER_BUFFER", "NAME_LIMIT", "BATCH_FORGET_LIMIT", "OPCODES"}
}  # fmt: skip

# --- flags ---------------------------------------------------------------------------------------------------------

# INIT, low word
ASYNC_READ: Final = 1 << 0
POSIX_LOCKS: Final = 1 << 1
ATOMIC_O_TRUNC: Final = 1 << 3
BIG_WRITES: Final = 1 << 5
FLOCK_LOCKS: Final = 1 << 10
AUTO_INVAL_DATA: Final = 1 << 12
DO_READDIRPLUS: Final = 1 << 13
READDIRPLUS_AUTO: Final = 1 << 14
ASYNC_DIO: Final = 1 << 15
WRITEBACK_CACHE: Final = 1 << 16
PARALLEL_DIROPS: Final = 1 << 18
ABORT_ERROR: Final = 1 << 21
MAX_PAGES: Final = 1 << 22
EXPLICIT_INVAL_DATA: Final = 1 << 25
HANDLE_KILLPRIV_V2: Final = 1 << 28
INIT_EXT: Final = 1 << 30

GETATTR_FH: Final = 1 << 0
LK_FLOCK: Final = 1 << 0
RELEASE_FLOCK_UNLOCK: Final = 1 << 1
WRITE_CACHE: Final = 1 << 0
WRITE_KILL_SUIDGID: Final = 1 << 2
OPEN_KILL_SUIDGID: Final = 1 << 0
FSYNC_DATA_ONLY: Final = 1 << 0

FATTR_MODE: Final = 1 << 0
FATTR_UID: Final = 1 << 1
FATTR_GID: Final = 1 << 2
FATTR_SIZE: Final = 1 << 3
FATTR_ATIME: Final = 1 << 4
FATTR_MTIME: Final = 1 << 5
FATTR_FH: Final = 1 << 6
FATTR_ATIME_NOW: Final = 1 << 7
FATTR_MTIME_NOW: Final = 1 << 8
FATTR_CTIME: Final = 1 << 10
FATTR_KILL_SUIDGID: Final = 1 << 11

FOPEN_DIRECT_IO: Final = 1 << 0
FOPEN_KEEP_CACHE: Final = 1 << 1
FOPEN_CACHE_DIR: Final = 1 << 3
FOPEN_NOFLUSH: Final = 1 << 5  # no FLUSH at close(2); unknown, and so ignored, before minor 35
FOPEN_PARALLEL_DIRECT_WRITES: Final = 1 << 6

# minors from which a flag may be sent
SINCE_KILLPRIV_V2: Final = 33
SINCE_INIT_EXT: Final = 36
SINCE_PARALLEL_DIRECT_WRITES: Final = 38
SINCE_INC_EPOCH: Final = 44

NOTIFY_INVAL_INODE: Final = 2
NOTIFY_INVAL_ENTRY: Final = 3
NOTIFY_INC_EPOCH: Final = 8

# --- requests ------------------------------------------------------------------------------------------------------

# len, opcode, unique, nodeid, uid, gid, pid, total_extlen (8-byte units, since 7.38), padding
HEADER: Final = struct.Struct("=IIQQIIIHH")
assert HEADER.size == HEADER_SIZE

Head: TypeAlias = tuple[int, int, int, int, int, int, int, int, int]

NO_TAIL: Final = 0
ONE_NAME: Final = 1
TWO_NAMES: Final = 2
NAME_AND_TARGET: Final = 3  # SYMLINK: the second string may hold slashes
DATA: Final = 4
FORGETS: Final = 5  # BATCH_FORGET: `count` pairs (nodeid, nlookup)
OPEN_ENDED: Final = 6  # INIT grows with versions; ioctl and the like are answered ENOSYS unread

Layout: TypeAlias = tuple[int, Callable[..., tuple[Any, ...]], int]


def _layout(format_: str, tail: int = NO_TAIL) -> Layout:
    fixed = struct.Struct("=" + format_)
    return fixed.size, fixed.unpack_from, tail


LAYOUTS: Final[list[Layout | None]] = [None] * OPCODES
for _opcode, _entry in {
    LOOKUP: _layout("", ONE_NAME),
    FORGET: _layout("Q"),  # nlookup
    GETATTR: _layout("IIQ"),  # getattr_flags, dummy, fh
    # valid, padding, fh, size, lock_owner, atime, mtime, ctime, their nsec, mode, unused4, uid, gid, unused5
    SETATTR: _layout("IIQQQqqqIIIIIIII"),
    READLINK: _layout(""),
    SYMLINK: _layout("", NAME_AND_TARGET),
    MKNOD: _layout("IIII", ONE_NAME),  # mode, rdev, umask, padding
    MKDIR: _layout("II", ONE_NAME),  # mode, umask
    UNLINK: _layout("", ONE_NAME),
    RMDIR: _layout("", ONE_NAME),
    RENAME: _layout("Q", TWO_NAMES),  # newdir
    RENAME2: _layout("QII", TWO_NAMES),  # newdir, flags, padding
    LINK: _layout("Q", ONE_NAME),  # oldnodeid
    OPEN: _layout("II"),  # flags, open_flags
    OPENDIR: _layout("II"),
    CREATE: _layout("IIII", ONE_NAME),  # flags, mode, umask, open_flags
    READ: _layout("QQIIQII"),  # fh, offset, size, read_flags, lock_owner, flags, padding
    READDIR: _layout("QQIIQII"),
    READDIRPLUS: _layout("QQIIQII"),
    WRITE: _layout("QQIIQII", DATA),  # fh, offset, size, write_flags, lock_owner, flags, padding
    STATFS: _layout(""),
    RELEASE: _layout("QIIQ"),  # fh, flags, release_flags, lock_owner
    RELEASEDIR: _layout("QIIQ"),
    FSYNC: _layout("QII"),  # fh, fsync_flags, padding
    FSYNCDIR: _layout("QII"),
    FLUSH: _layout("QIIQ"),  # fh, unused, padding, lock_owner
    INIT: _layout("IIII", OPEN_ENDED),  # major, minor, max_readahead, flags (since 7.36 flags2 and room)
    GETLK: _layout("QQQQIIII"),  # fh, owner, start, end, type, pid, lk_flags, padding
    SETLK: _layout("QQQQIIII"),
    SETLKW: _layout("QQQQIIII"),
    INTERRUPT: _layout("Q"),  # unique of the request that is to give up
    DESTROY: _layout(""),
    BATCH_FORGET: _layout("II", FORGETS),  # count, dummy
    FALLOCATE: _layout("QQQII"),  # fh, offset, length, mode, padding
    LSEEK: _layout("QQII"),  # fh, offset, whence, padding
}.items():
    LAYOUTS[_opcode] = _entry
# Whatever else exists is answered ENOSYS; the kernel then stops asking or does it itself (xattr, ioctl, poll, access,
# copy_file_range, tmpfile, statx).

_SLASH: Final = ord("/")  # as a number: `bytes in bytes` costs an exception inside the interpreter
_FORGET_ONE: Final = struct.Struct("=QQ")


def decode(opcode: int, length: int, header: bytearray, data: memoryview) -> tuple[Any, ...] | None:
    """The fields of a request's body, then its names or data; None when it is not what its opcode promises.

    `length` is the whole request without extensions: its first 80 bytes are in `header`, the rest is in `data`.
    The data of a WRITE is a slice of `data`: whoever keeps it keeps that buffer.
    """
    layout = LAYOUTS[opcode]
    if layout is None:
        return None
    size, unpack_from, tail = layout
    if tail == NO_TAIL and length == HEADER_SIZE + size:
        if length <= HEADER_BUFFER:
            return unpack_from(header, HEADER_SIZE)
        return unpack_from(_body(length, header, data))
    if tail == DATA:
        fields = unpack_from(header, HEADER_SIZE)
        if length < HEADER_BUFFER or fields[2] != length - HEADER_BUFFER or fields[2] > len(data):
            return None
        return (*fields, data[: fields[2]])
    if length < HEADER_SIZE + size or length > HEADER_BUFFER + len(data) or tail == NO_TAIL:
        return None
    body = bytes(header[HEADER_SIZE:length]) if length <= HEADER_BUFFER else _body(length, header, data)
    if tail == ONE_NAME:
        name = body[size:-1]
        if not name or body[-1] or _SLASH in name or 0 in name or len(name) >= NAME_LIMIT:
            return None
        return (*unpack_from(body), name) if size else (name,)
    if tail == OPEN_ENDED:
        return (*unpack_from(body), body[size:])
    if tail == FORGETS:
        return _forgets(unpack_from(body)[0], body, size)
    names = _two_names(body[size:], tail)
    return None if names is None else (*unpack_from(body), *names)


def _body(length: int, header: bytearray, data: memoryview) -> bytes:
    return bytes(header[HEADER_SIZE:]) + bytes(data[: length - HEADER_BUFFER])


def _forgets(count: int, body: bytes, size: int) -> tuple[Any, ...] | None:
    if count > BATCH_FORGET_LIMIT or len(body) != size + count * _FORGET_ONE.size:
        return None
    return tuple(_FORGET_ONE.iter_unpack(body[size:]))


def _two_names(tail: bytes, kind: int) -> list[bytes] | None:
    """The two NUL-terminated strings that make up `tail` exactly."""
    names = tail.split(b"\0")
    if names.pop() != b"" or len(names) != 2:
        return None
    for index, name in enumerate(names):
        if not name or len(name) >= NAME_LIMIT:
            return None
        if _SLASH in name and not (kind == NAME_AND_TARGET and index == 1):
            return None
    return names
