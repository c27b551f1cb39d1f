"""Files by path: what an application expects of `os`, over one mounted filesystem (`api.gfs.Filesystem`).

Names, flags and errors are those of `os`; OSError is all that is raised. Paths start at the filesystem's root, with or
without a leading slash; so do absolute symbolic links. Modes are taken as they are given (no umask), and nothing is
refused for lack of permission: who opened the device can read it all anyway.

An answer leaves only while this node may act (its lease runs): until then it waits, and when the guarantee is lost for
good the call raises EIO, also if it was carried out (`gate.py`).
"""

import os
from collections import deque
from collections.abc import AsyncIterator, Coroutine, Generator
from contextlib import asynccontextmanager
from errno import EBADF, EEXIST, EINVAL, EISDIR, ELOOP, ENOENT
from stat import S_ISDIR, S_ISLNK
from types import TracebackType
from typing import Any, Final, NamedTuple, TypeVar, final

from corral.api.gfs import ROOT, Attributes, Caller, Changes, Filesystem, FilesystemUsage, LockRange
from corral.base.world import Buffer
from corral.files.gate import Gate

CHUNK: Final = 1 << 20  # bytes the filesystem is asked for at once, as the kernel does
LINKS_MAX: Final = 40  # symbolic links followed on the way to one file, as in Linux
CREATE_TRIES: Final = 100  # a name may come and go between two looks
LISTING: Final = 64 << 10  # bytes of directory entries asked for at once
WHOLE: Final = (1 << 63) - 1
F_RDLCK: Final = 0
F_WRLCK: Final = 1
F_UNLCK: Final = 2

T = TypeVar("T")

Path = str | bytes | os.PathLike[str] | os.PathLike[bytes]


class Listed(NamedTuple):
    """A name in a directory and its type, as in `stat.S_IFMT(mode)`."""

    name: str
    type: int


@final
class Files:
    """One filesystem."""

    def __init__(self, filesystem: Filesystem, caller: Caller, gate: Gate) -> None:
        self._filesystem = filesystem
        self._caller = caller
        self._gate = gate

    # -- files

    def open(self, path: Path, flags: int = os.O_RDONLY, mode: int = 0o644) -> "OpeningFile":
        """`async with` it, or `await` it and `close()` the result. Flags: O_CREAT, O_EXCL, O_TRUNC, O_NOFOLLOW and the
        access modes; others change nothing."""
        return OpeningFile(self._open(path, flags, mode))

    async def read(self, path: Path) -> bytes:
        """The whole content."""
        async with self.open(path) as file:
            return await file.pread((await file.stat()).size, 0)

    async def _open(self, path: Path, flags: int, mode: int) -> "File":
        async with self._gate.request():
            return await self._open_or_create(path, flags, mode)

    async def _open_or_create(self, path: Path, flags: int, mode: int) -> "File":
        for _ in range(CREATE_TRIES):
            if flags & os.O_CREAT:
                try:
                    return await self._create(path, flags, mode)
                except FileExistsError:
                    if flags & os.O_EXCL:
                        raise
            try:
                return await self._open_there(path, flags)
            except FileNotFoundError:
                if not flags & os.O_CREAT:
                    raise
        raise OSError(ENOENT, "the name comes and goes, or is a link to nothing", os.fsdecode(path))

    async def _create(self, path: Path, flags: int, mode: int) -> "File":
        async with self._parent(path) as (parent, name):
            entry, opened = await self._filesystem.create(parent, name, mode, flags, self._caller)
            return File(self, self._filesystem, entry.ino, opened.handle, flags)

    async def _open_there(self, path: Path, flags: int) -> "File":
        walked: list[int] = []
        try:
            ino, mode = await self._walk(path, walked, follow=not flags & os.O_NOFOLLOW)
            if S_ISLNK(mode):
                raise OSError(ELOOP, "is a symbolic link", os.fsdecode(path))
            if S_ISDIR(mode):
                raise OSError(EISDIR, "is a directory", os.fsdecode(path))
            opened = await self._filesystem.open(ino, flags, self._caller)
            walked.remove(ino)  # forgotten when the file is closed
            return File(self, self._filesystem, ino, opened.handle, flags)
        finally:
            self._forget(walked)

    # -- names

    async def mkdir(self, path: Path, mode: int = 0o755) -> None:
        async with self._parent(path) as (parent, name):
            self._forget([(await self._filesystem.mkdir(parent, name, mode, self._caller)).ino])

    async def symlink(self, target: Path, path: Path) -> None:
        async with self._parent(path) as (parent, name):
            entry = await self._filesystem.symlink(parent, name, os.fsencode(target), self._caller)
            self._forget([entry.ino])

    async def link(self, existing: Path, path: Path) -> None:
        async with self._at(existing, follow=False) as ino, self._parent(path) as (parent, name):
            self._forget([(await self._filesystem.link(ino, parent, name, self._caller)).ino])

    async def unlink(self, path: Path) -> None:
        async with self._parent(path) as (parent, name):
            await self._filesystem.unlink(parent, name, self._caller)

    async def rmdir(self, path: Path) -> None:
        async with self._parent(path) as (parent, name):
            await self._filesystem.rmdir(parent, name, self._caller)

    async def rename(self, path: Path, new: Path, flags: int = 0) -> None:
        """What has the new name is replaced. `flags`: those of renameat2."""
        async with self._parent(path) as (parent, name), self._parent(new) as (new_parent, new_name):
            await self._filesystem.rename(parent, name, new_parent, new_name, flags, self._caller)

    async def readlink(self, path: Path) -> str:
        async with self._at(path, follow=False) as ino:
            return os.fsdecode(await self._filesystem.readlink(ino))

    async def scandir(self, path: Path = "/") -> list[Listed]:
        """Every name but "." and "..", in no particular order."""
        async with self._at(path) as ino:
            filesystem = self._filesystem
            handle = (await filesystem.opendir(ino, os.O_RDONLY, self._caller)).handle
            try:
                found: list[Listed] = []
                cookie = 0
                while entries := await filesystem.readdir(ino, handle, cookie, LISTING, plus=False):
                    cookie = entries[-1].cookie
                    found += [Listed(os.fsdecode(entry.name), entry.type << 12) for entry in entries]
                return [one for one in found if one.name not in (".", "..")]
            finally:
                await filesystem.releasedir(ino, handle)

    async def listdir(self, path: Path = "/") -> list[str]:
        return [one.name for one in await self.scandir(path)]

    # -- attributes

    async def stat(self, path: Path, *, follow: bool = True) -> Attributes:
        async with self._at(path, follow=follow) as ino:
            return (await self._filesystem.getattr(ino, None))[0]

    async def chmod(self, path: Path, mode: int) -> None:
        await self._change(path, Changes(mode=mode))

    async def chown(self, path: Path, uid: int, gid: int) -> None:
        """-1 leaves as it is, as in `os`."""
        await self._change(path, Changes(uid=None if uid < 0 else uid, gid=None if gid < 0 else gid))

    async def utime(self, path: Path, atime_ns: int, mtime_ns: int, *, follow: bool = True) -> None:
        await self._change(path, Changes(atime_ns=atime_ns, mtime_ns=mtime_ns), follow=follow)

    async def truncate(self, path: Path, size: int) -> None:
        await self._change(path, Changes(size=size))

    async def statfs(self) -> FilesystemUsage:
        return await self.told(self._filesystem.statfs())

    async def _change(self, path: Path, changes: Changes, *, follow: bool = True) -> None:
        async with self._at(path, follow=follow) as ino:
            await self._filesystem.setattr(ino, changes, None, self._caller)

    # -- from a path to a file

    async def told(self, work: Coroutine[Any, Any, T]) -> T:
        """The result, when it may be told."""
        try:
            async with self._gate.request():
                return await work
        finally:
            work.close()  # refused before it began

    @asynccontextmanager
    async def _at(self, path: Path, *, follow: bool = True) -> AsyncIterator[int]:
        """The file at the end of the path, which stays known meanwhile."""
        walked: list[int] = []
        async with self._gate.request():
            try:
                yield (await self._walk(path, walked, follow=follow))[0]
            finally:
                self._forget(walked)

    @asynccontextmanager
    async def _parent(self, path: Path) -> AsyncIterator[tuple[int, bytes]]:
        """The directory of the last name, and that name."""
        names = _names(os.fsencode(path))
        if not names or names[-1] == b"..":
            raise OSError(EEXIST if not names else EINVAL, "not a name in a directory", os.fsdecode(path))
        async with self._at(b"/".join(names[:-1])) as parent:
            yield parent, names[-1]

    async def _walk(self, path: Path, walked: list[int], *, follow: bool) -> tuple[int, int]:
        """(node id, type and mode) of the last name; `walked` gets every node a lookup was counted for."""
        filesystem = self._filesystem
        names = deque(_names(os.fsencode(path)))
        above = [(ROOT, 0o040000)]  # from the root down to where we are
        links = 0
        while names:
            name = names.popleft()
            if name == b"..":
                above = above[:-1] or above  # above the root is the root
                continue
            entry = await filesystem.lookup(above[-1][0], name, self._caller)
            walked.append(entry.ino)
            mode = entry.attributes.mode
            if not S_ISLNK(mode) or not (names or follow):
                above.append((entry.ino, mode))
                continue
            links += 1
            if links > LINKS_MAX:
                raise OSError(ELOOP, "too many symbolic links", os.fsdecode(path))
            target = await filesystem.readlink(entry.ino)
            if target.startswith(b"/"):
                del above[1:]
            names.extendleft(reversed(_names(target)))
        return above[-1]

    def _forget(self, nodes: list[int]) -> None:
        for ino in nodes:
            self._filesystem.forget(ino, 1)


@final
class OpeningFile:
    """What `Files.open` returns."""

    def __init__(self, opening: "Coroutine[Any, Any, File]") -> None:
        self._opening = opening
        self._file: File

    def __await__(self) -> "Generator[Any, Any, File]":
        return self._opening.__await__()

    async def __aenter__(self) -> "File":
        self._file = await self._opening
        return self._file

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._file.close()


@final
class File:
    """An open file. Closing it gives back its flock."""

    def __init__(self, files: Files, filesystem: Filesystem, ino: int, handle: int, flags: int) -> None:
        self._files = files
        self._filesystem = filesystem
        self._ino = ino
        self._handle = handle
        self._access = flags & os.O_ACCMODE
        self._closed = False

    async def pread(self, size: int, offset: int) -> bytes:
        """Up to `size` bytes; fewer at the end of the file."""
        self._check(os.O_RDONLY)
        return await self._files.told(self._read(size, offset))

    async def _read(self, size: int, offset: int) -> bytes:
        found = bytearray()
        while len(found) < size:
            wanted = min(CHUNK, size - len(found))
            before = len(found)
            # Views of the cache, right only until somebody else's turn.
            for part in await self._filesystem.read(self._ino, self._handle, offset + before, wanted):
                found += part
            if len(found) - before < wanted:
                break
        return bytes(found)

    async def pwrite(self, data: Buffer, offset: int) -> int:
        """All of it, seen by every node on return; durable after `fsync`. More than 1 MiB is several steps."""
        return await self._write(data, offset, append=False)

    async def append(self, data: Buffer) -> int:
        """At the end, wherever that is; up to 1 MiB in one step."""
        return await self._write(data, 0, append=True)

    async def _write(self, data: Buffer, offset: int, *, append: bool) -> int:
        self._check(os.O_WRONLY)
        return await self._files.told(self._write_chunks(memoryview(data), offset, append))

    async def _write_chunks(self, data: memoryview, offset: int, append: bool) -> int:
        done = 0
        while done < len(data):
            done += await self._filesystem.write(
                self._ino, self._handle, offset + done, data[done : done + CHUNK],
                append=append, from_cache=False, kill_suidgid=True,
            )  # fmt: skip
        return done

    async def truncate(self, size: int) -> None:
        self._check(os.O_WRONLY)
        changes = Changes(size=size, kill_suidgid=True)
        await self._files.told(self._filesystem.setattr(self._ino, changes, self._handle, self._files._caller))

    async def stat(self) -> Attributes:
        self._check(None)
        return (await self._files.told(self._filesystem.getattr(self._ino, self._handle)))[0]

    async def fsync(self) -> None:
        """Content and attributes are durable on return."""
        self._check(None)
        await self._files.told(self._filesystem.fsync(self._ino, self._handle, data_only=False))

    async def flock(self, *, exclusive: bool = True, wait: bool = True) -> None:
        """Through the lock manager, between all nodes. Raises EAGAIN when it is held and `wait` is false."""
        await self._flock(F_WRLCK if exclusive else F_RDLCK, wait=wait)

    async def unlock(self) -> None:
        await self._flock(F_UNLCK, wait=True)

    async def _flock(self, kind: int, *, wait: bool) -> None:
        self._check(None)
        lock = LockRange(0, WHOLE, kind, os.getpid())
        await self._files.told(
            self._filesystem.setlk(self._ino, self._handle, self._handle, lock, wait=wait, flock=True)
        )

    async def close(self) -> None:
        """Closing twice does nothing."""
        if self._closed:
            return
        self._closed = True
        await self._filesystem.release(self._ino, self._handle, self._handle)
        self._filesystem.forget(self._ino, 1)

    def _check(self, access: int | None) -> None:
        """Open, and for reading or writing as asked."""
        if self._closed or (access is not None and self._access not in (access, os.O_RDWR)):
            raise OSError(EBADF, "closed, or not open for that")


def _names(path: bytes) -> list[bytes]:
    return [name for name in path.split(b"/") if name not in (b"", b".")]
